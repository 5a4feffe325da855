"""A fused kernel on a mesh: every device runs it on its own rows and heads.

The compiler's partitioner sees through XLA's operations and not into a kernel, so that the split is written down here.
The recurrence needs no communication forward; B and C that several devices share get the sum of their gradients.
"""

from collections.abc import Callable, Iterable

import jax
from jax.sharding import AxisType, PartitionSpec

from zamba2_jax.sharding import BATCH_AXES, RULES


def partitioned(
    kernel: Callable[..., tuple[jax.Array, jax.Array]],
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    initial_state: jax.Array,
    resets: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """`kernel` of these arguments (shapes as in `api.ssd`); in `jax.shard_map` where the mesh has several devices.

    The mesh is that of `jax.set_mesh`. Rows are split over `BATCH_AXES`, heads over the axis of "mamba_heads". Groups
    go with their heads where they divide too; else, where each device's heads are of one group, it picks that group. A
    mesh axis that does not divide is left out: its devices repeat each other's work, as those of "sequence" do.
    """
    arguments = (x, dt, A, B, C, D, initial_state, resets)
    mesh = jax.sharding.get_abstract_mesh()
    # Inside somebody else's shard_map the axes it took are gone, and its arrays are a device's own already.
    sizes = {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    }
    if all(size == 1 for size in sizes.values()):
        return kernel(*arguments)

    batch, _, heads, _ = x.shape
    groups = B.shape[2]
    rows = _dividing(BATCH_AXES, sizes, batch)
    split = RULES["mamba_heads"]
    parts = sizes.get(split, 1)
    if parts == 1 or heads % parts or (groups % parts and parts % groups):
        split, parts = None, 1
    groups_split = split if groups % parts == 0 else None

    def local(x, dt, A, B, C, D, initial_state, resets):
        if groups % parts:
            group = jax.lax.axis_index(split) * groups // parts
            B, C = (jax.lax.dynamic_slice_in_dim(array, group, 1, axis=2) for array in (B, C))
        return kernel(x, dt, A, B, C, D, initial_state, resets)

    by_head = PartitionSpec(rows, None, split)
    by_group = PartitionSpec(rows, None, groups_split)
    vector = PartitionSpec(split)
    state = PartitionSpec(rows, split)
    return jax.shard_map(
        local,
        in_specs=(by_head, by_head, vector, by_group, by_group, vector, state, PartitionSpec(rows)),
        out_specs=(by_head, state),
        axis_names=set(sizes),
        # Kernels do not say over which axes their results vary; without the check, what is not split is taken as equal.
        check_vma=False,
    )(*arguments)


def _dividing(axes: Iterable[str], sizes: dict[str, int], length: int) -> tuple[str, ...] | None:
    """Those of `axes`, in order, whose product divides `length`."""
    chosen, product = [], 1
    for axis in axes:
        if axis in sizes and length % (product * sizes[axis]) == 0:
            chosen.append(axis)
            product *= sizes[axis]
    return tuple(chosen) or None
