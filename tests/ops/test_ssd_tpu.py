"""The fused recurrence through the real TPU compiler, at the published shapes' sizes; no TPU is needed, libtpu is."""

import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest

PROGRAM = """
    import sys
    import jax, jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec
    from zamba2_jax.ops.ssd import ssd

    topology, heads, state, groups = sys.argv[1], *map(int, sys.argv[2:])
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(devices[:1], ("data",))
    here = NamedSharding(mesh, PartitionSpec())

    def shaped(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    batch, length, headdim = 4, 4096, 64
    x = shaped(jnp.bfloat16, batch, length, heads * headdim)  # as the mixer has it; by heads, it would be laid out anew
    dt = shaped(jnp.float32, batch, length, heads)
    A = D = shaped(jnp.float32, heads)
    B = C = shaped(jnp.bfloat16, batch, length, groups, state)
    first = shaped(jnp.float32, batch, heads, headdim, state)
    ids = shaped(jnp.int32, batch, length)

    def forward(x, dt, A, B, C, D, first, ids, **options):
        x = x.reshape(batch, length, heads, headdim)
        y, last = ssd(x, dt, A, B, C, D, initial_state=first, segment_ids=ids, **options)
        return y.reshape(batch, length, -1), last

    def gradient(*arguments, **options):
        *arguments, ids, dy, dlast = arguments
        y, pull = jax.vjp(lambda *arguments: forward(*arguments, ids, **options), *arguments)
        return y, pull((dy, dlast))

    def recomputed(*arguments):
        return gradient(*arguments, keep_states=True)

    arguments = (x, dt, A, B, C, D, first, ids)
    with jax.set_mesh(mesh):
        for name, function in (("forward", forward), ("gradient", gradient), ("again", recomputed)):
            more = () if function is forward else (x, first)
            compiled = jax.jit(function).lower(*arguments, *more).compile()
            print(name, compiled.as_text().count("tpu_custom_call"), compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the TPU compiler: pip install 'jax[tpu]'")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
    ("heads", "state", "groups"),
    [pytest.param(64, 128, 1, id="1.2B"), pytest.param(80, 64, 1, id="2.7B"), pytest.param(112, 64, 2, id="7B")],
)
def test_kernels_compile(topology, heads, state, groups):
    variables = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), topology, *map(str, (heads, state, groups))],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    [forward, gradient, recomputed] = (line.split() for line in result.stdout.splitlines())
    # One kernel forward; backward the states at the chunks' starts, unless they are kept, and all else.
    assert forward[:2] == ["forward", "1"]
    assert gradient[:2] == ["gradient", "3"]
    assert recomputed[:2] == ["again", "2"]
    # No matrices of length × chunk pass through memory: these would be 0.5 GB and more.
    assert int(gradient[2]) < 250e6
    assert int(recomputed[2]) < 250e6
