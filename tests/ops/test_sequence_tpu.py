"""The forms for rows whose tokens are spread over devices, through the TPU compiler, for chips that are not there."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PROGRAM = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from zamba2_jax.ops.attention import attention
from zamba2_jax.ops.ssd import ssd
from zamba2_jax.sharding import make_mesh

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = make_mesh("tensor=2,sequence=2", devices)

def array(shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

by_head, by_token = (None, "sequence", "tensor"), (None, "sequence")
query = array((2, 1024, 4, 128), jnp.bfloat16, *by_head)
ids = array((2, 1024), jnp.int32, *by_token)
x = array((2, 1024, 8, 64), jnp.bfloat16, *by_head)
dt = array((2, 1024, 8), jnp.float32, *by_head)
A = array((8,), jnp.float32, "tensor")
B = array((2, 1024, 1, 128), jnp.bfloat16, *by_token)

def of_attention(query, key, value, ids):
    out = attention(query, key, value, scale=0.1, is_causal=True, segment_ids=(ids, ids))
    return jnp.sum(jnp.square(out.astype(jnp.float32)))

def of_ssd(x, dt, A, B, C, ids):
    return jnp.sum(jnp.square(ssd(x, dt, A, B, C, segment_ids=ids)[0].astype(jnp.float32)))

for loss, arguments in ((of_attention, (query, query, query, ids)), (of_ssd, (x, dt, A, B, B, ids))):
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=tuple(range(len(arguments) - 1)))).lower(*arguments).compile()
    print("kernels:", compiled.as_text().count("tpu_custom_call"))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the TPU compiler: pip install 'jax[tpu]'")
def test_kernels_serve_a_part_of_a_row():
    variables = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }
    project = Path(__file__).parents[2]
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | variables | {"PYTHONPATH": str(project)},
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    # Splash attention forward, of queries, and of keys and values; the recurrence's three.
    assert finished.stdout.count("kernels: 3") == 2, finished.stdout
