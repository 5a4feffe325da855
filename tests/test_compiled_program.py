"""What is read from the text of compiled programs: of TPUs written out here, of 8 CPU devices compiled here."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from zamba2_jax.compiled_program import collectives, kernels, program_bytes, refusal

KERNELS = """
  %copy.15 = f32[4,4]{1,0} copy(%custom-call)
  %custom-call.1 = f32[4,64]{1,0} custom-call(%a), custom_call_target="ConcatBitcast", backend_config={}
  %ssd_states.1 = f32[4,32]{1,0:T(8,128)} custom-call(%x.1), custom_call_target="tpu_custom_call", metadata={}
  %ssd_backward.12.3 = (f32[4]{0}, f32[8]{0}) custom-call(%x.1), custom_call_target="tpu_custom_call", metadata={}
  ROOT %ssd_backward = (f32[4]{0}, f32[8]{0}) custom-call(%x.1), custom_call_target="tpu_custom_call", metadata={}
"""

# As libtpu writes it: one all-gather in three pieces with one channel, a reduce-scatter as a fused all-reduce, and a
# loop of 16 turns, two at a time.
TPU = """HloModule jit_step

%gather_start (p.1: bf16[48,64]) -> bf16[192,64] {
  ROOT %all-gather.1 = bf16[192,64]{1,0} all-gather(%p.1), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}
}

%gather_end (p.2: bf16[48,64]) -> bf16[192,64] {
  ROOT %all-gather.2 = bf16[192,64]{1,0} all-gather(%p.2), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}
}

%all-reduce-scatter.3 (p.3: bf16[192,64]) -> bf16[48,64] {
  %all-reduce.4 = bf16[192,64]{1,0} all-reduce(%p.3), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[48,64]{1,0} dynamic-slice(%all-reduce.4, %i), dynamic_slice_sizes={48,64}
}

%cond (c: (u32[], f32[8])) -> pred[] {
  %c = (u32[]{:T(128)}, f32[8]{0}) parameter(0)
  %limit = u32[]{:T(128)} constant(16)
  %turn = u32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%turn, %limit), direction=LT
}

%body (b: (u32[], f32[8])) -> (u32[], f32[8]) {
  %b = (u32[]{:T(128)}, f32[8]{0}) parameter(0)
  %one = u32[]{:T(128)} constant(1)
  %turn.1 = u32[]{:T(128)} get-tuple-element(%b), index=0
  %x = f32[8]{0} get-tuple-element(%b), index=1
  %turn.2 = u32[]{:T(128)} add(%turn.1, %one)
  %turn.3 = u32[]{:T(128)} add(%turn.2, %one)
  %sent = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=21
  %got = f32[8]{0} collective-permute-done(%sent)
  ROOT %carry = (u32[]{:T(128)}, f32[8]{0}) tuple(%turn.3, %got)
}

ENTRY %main (a: bf16[48,64]) -> bf16[48,64] {
  %a = bf16[48,64]{1,0} parameter(0)
  %start = bf16[192,64]{1,0} fusion(%a), kind=kCustom, calls=%gather_start
  %end = bf16[192,64]{1,0} fusion(%a), kind=kCustom, calls=%gather_end
  %loop = (u32[], f32[8]{0}) while(%init), condition=%cond, body=%body
  ROOT %fusion = bf16[48,64]{1,0} fusion(%end), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def by_kind(text):
    found = collectives(text)
    return {kind.kind: (kind.count, kind.runs, kind.bytes) for kind in found.kinds}, found.unread_loops


def test_kernels_are_named_and_counted():
    assert kernels(KERNELS) == {"ssd_backward": 2, "ssd_states": 1}
    assert kernels("") == {}


def test_what_lives_at_once_counts():
    """On a platform that has a compiler here: arguments are in the peak, and what is donated is there once."""

    def compiled(**options):
        array = jax.ShapeDtypeStruct((1 << 20,), jnp.float32)
        return jax.jit(lambda x: jnp.sort(x) + 1, **options).lower(array).compile().memory_analysis()

    plain, donated = (program_bytes(memory) for memory in (compiled(), compiled(donate_argnums=0)))
    assert 2 * 4 << 20 <= plain < 4 * 4 << 20
    assert donated <= plain - (4 << 20)


@pytest.mark.parametrize(
    ("text", "needed", "usable"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU ... Used 17.21G of 15.75G hbm. Exceeded", 17.21, 15.75),
        ("the total memory required for HLO temporaries (2.00T) exceeds\n available HBM (95.74G).", 2048, 95.74),
    ],
)
def test_the_compilers_word_on_memory_is_understood(text, needed, usable):
    found = refusal(text)
    assert (found.needed_bytes, found.usable_bytes) == (round(needed * 2**30), round(usable * 2**30))


def test_other_errors_are_not_about_memory():
    assert refusal("INTERNAL: Mosaic failed to compile") is None


def test_a_tpu_program():
    whole = 192 * 64 * 2
    assert by_kind(TPU) == (
        {
            "all-gather": (1, 1, whole * 3 / 4),
            "reduce-scatter": (1, 1, whole * 3 / 4),
            "collective-permute": (1, 8, 8 * 32),
        },
        0,
    )


def test_a_loop_that_cannot_be_read_is_counted():
    kinds, unread = by_kind(TPU.replace("compare(%turn, %limit), direction=LT", "custom-call(%turn)"))
    assert (kinds["collective-permute"][1], unread) == (1, 1)


_PROGRAMS = """
import json
import jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

mesh = Mesh(jax.devices(), ("x",))

def text(function, *arguments):
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, p)) for s, p in arguments]
    return jax.jit(function, out_shardings=NamedSharding(mesh, P())).lower(*arguments).compile().as_text()

def turns(x, weights):
    return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]

print(json.dumps({
    "gather": text(lambda x: x + 1, ((64, 16), P("x"))),
    "sum": text(lambda x: x.sum(0), ((64, 16), P("x"))),
    "loop": text(turns, ((4, 64), P()), ((5, 64, 64), P(None, None, "x"))),
    "none": text(lambda x: x + 1, ((8,), P())),
}))
"""


@pytest.fixture(scope="module")
def of_eight_devices():
    """Texts of programs compiled for eight CPU devices, in a process of its own."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAMS], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_programs_of_eight_devices(of_eight_devices):
    assert by_kind(of_eight_devices["gather"]) == ({"all-gather": (1, 1, 64 * 16 * 4 * 7 / 8)}, 0)
    assert by_kind(of_eight_devices["sum"]) == ({"all-reduce": (1, 1, 2 * 16 * 4 * 7 / 8)}, 0)
    assert by_kind(of_eight_devices["none"]) == ({}, 0)


def test_a_loop_counts_its_turns(of_eight_devices):
    """One gather in each of five turns, and one after them."""
    assert by_kind(of_eight_devices["loop"]) == ({"all-gather": (2, 6, 6 * 4 * 64 * 4 * 7 / 8)}, 0)
