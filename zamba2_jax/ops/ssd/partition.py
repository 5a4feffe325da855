"""A fused kernel on a mesh: every device runs it on its own rows and heads.

The recurrence needs no communication forward; B and C that several devices share get the sum of their gradients.
"""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from zamba2_jax.ops._mesh import on_each_device
from zamba2_jax.sharding import BATCH_AXES, RULES, automatic_axes, dividing


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
    sizes = automatic_axes()
    batch, _, heads, _ = x.shape
    groups = B.shape[2]
    rows = dividing(BATCH_AXES, sizes, batch)
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
    in_specs = (by_head, by_head, vector, by_group, by_group, vector, state, PartitionSpec(rows))
    return on_each_device(local, arguments, in_specs, (by_head, state))
