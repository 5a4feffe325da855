"""Running a kernel on a mesh: the compiler's partitioner sees through XLA's operations and not into a kernel, so that
every device is handed its own part of the arrays."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from zamba2_jax.sharding import automatic_axes


def on_each_device(
    function: Callable[..., object],
    arguments: tuple,
    in_specs: tuple[PartitionSpec, ...],
    out_specs: PartitionSpec | tuple[PartitionSpec, ...],
) -> object:
    """`function(*arguments)`, in `jax.shard_map` where the mesh has several devices."""
    sizes = automatic_axes()
    if all(size == 1 for size in sizes.values()):
        return function(*arguments)
    return jax.shard_map(
        function,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(sizes),
        # Kernels do not say over which axes their results vary; without the check, what is not split is taken as equal.
        check_vma=False,
    )(*arguments)
