"""A kernel on a mesh gives what one device gives: in a process of its own, which has eight devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]

_START = """
import functools
import jax, jax.numpy as jnp, numpy as np
from zamba2_jax.ops.ssd import chunked, ssd
from zamba2_jax.ops.ssd.partition import partitioned

def mesh_of(**axes):
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)

def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)

def arguments_of(b, l, h, p, n, g):
    vectors = -np.exp(normal(3, h)), normal(4, b, l, g, n), normal(5, b, l, g, n), normal(6, h)
    return (normal(1, b, l, h, p), np.log1p(np.exp(normal(2, b, l, h))), *vectors, normal(7, b, h, p, n))

def with_gradients(function, arguments):
    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=range(len(arguments)), has_aux=True)
    def weighted(*arguments):
        results = function(*arguments)
        # Results are of tens, whose rounding errors would be large ones in the slope of a sine: that of a tenth.
        return sum(jnp.sum(jnp.sin(result / 10)) for result in results), results
    return weighted(*arguments)

def assert_same(actual, wanted):
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        # Sums over rows and heads come in another order.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6 * np.abs(theirs).max())
"""

_SPLITS = """
# The kernel is a stand-in that says which part it was given.
def check(axes, sizes, local, *, skip=True, resets=True):
    b, l, h, p, n, g = sizes
    arguments = arguments_of(*sizes)
    changes = np.random.default_rng(8).uniform(size=(b, l)) < 0.2 if resets else None
    seen = []

    def run(kernel, x, dt, A, B, C, D, state):
        return kernel(x, dt, A, B, C, D if skip else None, state, changes)

    def kernel(x, dt, A, B, C, D, state, resets):
        seen.append((x.shape[0], x.shape[2], B.shape[2]))
        resets = jnp.zeros(x.shape[:2], bool) if resets is None else resets
        return chunked.ssd(x, dt, A, B, C, D, state, resets, chunk_size=8)

    wanted = with_gradients(functools.partial(run, kernel), arguments)
    seen.clear()
    with jax.set_mesh(mesh_of(**axes)):
        actual = with_gradients(functools.partial(run, functools.partial(partitioned, kernel)), arguments)
    assert set(seen) == {local}, (axes, sizes, seen)
    assert_same(actual, wanted)

# Rows over both batch axes; heads, with a group that all share.
check({"data": 2, "fsdp": 2, "tensor": 2}, (4, 13, 6, 2, 3, 1), (1, 3, 1))
# Groups go with their heads.
check({"tensor": 2}, (1, 13, 6, 2, 3, 2), (1, 3, 1), skip=False)
# Two devices to a group: each picks its own.
check({"data": 2, "tensor": 4}, (2, 13, 8, 2, 3, 2), (1, 2, 1), resets=False)
# What does not divide is left out, as is an axis that has no part in this.
check({"data": 3, "fsdp": 2}, (4, 13, 6, 2, 3, 2), (2, 6, 2))
check({"tensor": 3, "sequence": 2}, (2, 13, 6, 2, 3, 2), (2, 6, 2))
# Tokens of a row: states travel, the first one and the last one too.
check({"sequence": 4}, (2, 16, 6, 2, 3, 2), (2, 6, 2))
check({"data": 2, "tensor": 2, "sequence": 2}, (2, 14, 6, 2, 3, 1), (1, 3, 1), resets=False)
# Within somebody else's shard_map: the rows are a device's own, the heads are still to be split.
mesh = mesh_of(data=2, tensor=2)
x, dt, A, B, C, D, state = arguments = arguments_of(2, 13, 4, 2, 3, 1)
P = jax.sharding.PartitionSpec
seen = []
def kernel(x, *others):
    seen.append((x.shape[0], x.shape[2]))
    return chunked.ssd(x, *others, jnp.zeros(x.shape[:2], bool), chunk_size=8)
rows, whole = P("data"), P()
with jax.set_mesh(mesh):
    actual = jax.jit(jax.shard_map(
        lambda *arguments: partitioned(lambda *given: kernel(*given[:-1]), *arguments, None),
        in_specs=(rows, rows, whole, rows, rows, whole, rows), out_specs=rows, axis_names={"data"}, check_vma=False,
    ))(*arguments)
assert seen == [(1, 2)], seen
assert_same(actual, chunked.ssd(*arguments, jnp.zeros((2, 13), bool), chunk_size=8))
"""

_KERNEL = """
arguments = arguments_of(2, 22, 4, 5, 7, 1)
ids = np.sort(np.random.default_rng(8).integers(0, 4, (2, 22)), axis=1)
ids[0] = np.arange(22) // 11  # changes where a device's part ends

def run(x, dt, A, B, C, D, state):
    return ssd(x, dt, A, B, C, D, initial_state=state, segment_ids=ids, implementation=IMPLEMENTATION, interpret=True)

wanted = with_gradients(run, arguments)
with jax.set_mesh(mesh_of(data=2, tensor=2, sequence=2)):
    assert "shard_map" in str(jax.make_jaxpr(run)(*arguments))
    actual = with_gradients(run, arguments)
assert_same(actual, wanted)
"""


def run(program):
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(PROJECT)}
    finished = subprocess.run(
        [sys.executable, "-c", _START + program], env=environment, cwd=PROJECT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


def test_every_way_to_split():
    run(_SPLITS)


@pytest.mark.parametrize("implementation", ["pallas_gpu", "pallas_tpu"])
def test_kernels(implementation):
    run(f"IMPLEMENTATION = {implementation!r}\n{_KERNEL}")
