"""The tool that runs a kernel's PTX on a CPU (`tools/ptx.py`), on programs written by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from tools.ptx import Kernel
from zamba2_jax.ops import gpu_arithmetic
from zamba2_jax.ops.decode import hopper

HEAD = """
.version 8.7
.target sm_90a
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid 64
{
    .reg .pred %p<4>; .reg .b32 %r<20>; .reg .b64 %rd<8>;
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mad.lo.s32 %r3, %r2, 64, %r1;
    mul.wide.u32 %rd3, %r3, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
"""
TAIL = "st.global.b32 [%rd5], %r9; ret; }"


def run(body, given, dtype, blocks=1):
    kernel = Kernel(HEAD + body + TAIL)
    return kernel.run([given, np.full(given.shape, 7, dtype)], (blocks, 1, 1))[1]


def test_a_loop_of_some_threads():
    """x + 3, but for the last threads of a block, which store it elsewhere."""
    body = """
        ld.global.b32 %r4, [%rd4];
        mov.b32 %r5, 0;
    $L__BB0_1:  // three times
        add.rn.f32 %r4, %r4, 0f3F800000;
        add.s32 %r5, %r5, 1;
        setp.lt.u32 %p1, %r5, 3;
        @%p1 bra $L__BB0_1;
        setp.gt.s32 %p2, %r1, 59;
        @%p2 mov.b64 %rd5, %rd1;
        mov.b32 %r9, %r4;
    """
    x = np.random.default_rng(0).normal(size=128).astype(np.float32)
    result = run(body, x, np.float32, blocks=2)
    written = np.arange(128) % 64 < 60
    np.testing.assert_array_equal(result[written], (x + 1 + 1 + 1)[written])
    assert (result[~written] == 7).all()


def pairs(assembly, words):
    """What the kernels' own assembly makes of words: its two results, two bfloat16 each."""
    results = []
    for number in range(2):
        code = assembly.replace(f"${number}", "%r9").replace(f"${1 - number}", "%r8").replace("$2", "%r4")
        results.append(run(f"ld.global.b32 %r4, [%rd4]; {code}", words, np.uint32).view(jnp.bfloat16).reshape(-1, 2))
    return np.concatenate(results, axis=1).astype(np.float32)


def test_int8_become_bfloat16():
    """Every int8, by what the whole-layer kernel has for it."""
    numbers = np.arange(-128, 128).astype(np.int8).reshape(64, 4)
    np.testing.assert_array_equal(pairs(hopper.WIDEN_FOUR, numbers.view(np.uint32)[:, 0].copy()), numbers)


@pytest.mark.parametrize("high", [False, True])
def test_int4_become_bfloat16(high, monkeypatch):
    """Every byte, by what the products have for it, beside the form for the interpreter."""
    given = []
    monkeypatch.setattr(gpu_arithmetic.plgpu, "elementwise_inline_asm", lambda code, **_: given.append(code) or [None])
    numbers = np.arange(256).astype(np.uint8).reshape(64, 4)
    gpu_arithmetic.nibbles(numbers, high=high, dtype=jnp.bfloat16, interpret=False)
    wanted = gpu_arithmetic.nibbles(jnp.asarray(numbers), high=high, dtype=jnp.float32, interpret=True)
    np.testing.assert_array_equal(wanted, (numbers >> 4 if high else numbers & 15).astype(np.float32) - 8)
    np.testing.assert_array_equal(pairs(given[0], numbers.view(np.uint32)[:, 0].copy()), wanted)


def test_what_it_has_not_is_named():
    with pytest.raises(NotImplementedError, match=r"sin\.approx\.f32 is not among"):
        run("sin.approx.f32 %r9, %r1;", np.zeros(64, np.float32), np.float32)
    with pytest.raises(KeyError, match="%r8 is read before it is written"):
        run("add.s32 %r9, %r8, 1;", np.zeros(64, np.float32), np.float32)
    with pytest.raises(NotImplementedError, match="branch apart"):
        run("setp.lt.u32 %p1, %r1, 3; @%p1 bra $L; $L: mov.b32 %r9, 0;", np.zeros(64, np.float32), np.float32)
