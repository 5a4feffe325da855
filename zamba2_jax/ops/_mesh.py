"""Running a kernel on a mesh: the compiler's partitioner sees through XLA's operations and not into a kernel, so that
every device is handed its own part of the arrays."""

from collections.abc import Callable, Iterable

import jax
from jax.sharding import AxisType, PartitionSpec


def automatic_axes() -> dict[str, int]:
    """Sizes of the axes of the mesh in use (`jax.set_mesh`) that the compiler partitions over; {} without a mesh.

    Inside somebody else's shard_map the axes it took are gone, and arrays are a device's own already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    }


def dividing(axes: Iterable[str], sizes: dict[str, int], length: int) -> tuple[str, ...] | None:
    """Those of `axes`, in order, whose product divides `length`. The others' devices repeat each other's work."""
    chosen, product = [], 1
    for axis in axes:
        if axis in sizes and length % (product * sizes[axis]) == 0:
            chosen.append(axis)
            product *= sizes[axis]
    return tuple(chosen) or None


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
