"""The recurrence on a mesh: every device runs its own rows, heads and tokens.

Between rows and heads it needs no communication forward; B and C that several devices share get the sum of their
gradients. Between the tokens of a row, states travel (`sequence`).
"""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from zamba2_jax.ops._mesh import on_each_device
from zamba2_jax.ops.ssd import sequence
from zamba2_jax.sharding import BATCH_AXES, RULES, automatic_axes, dividing, length_axis


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
    go with their heads where they divide too; else, where each device's heads are of one group, it picks that group.
    Tokens are split over the axis of "length". A mesh axis that does not divide is left out: its devices repeat each
    other's work.
    """
    arguments = (x, dt, A, B, C, D, initial_state, resets)
    sizes = automatic_axes()
    batch, length, heads, _ = x.shape
    groups = B.shape[2]
    rows = dividing(BATCH_AXES, sizes, batch)
    split = RULES["mamba_heads"]
    parts = sizes.get(split, 1)
    if parts == 1 or heads % parts or (groups % parts and parts % groups):
        split, parts = None, 1
    groups_split = split if groups % parts == 0 else None
    tokens = length_axis(length)

    def local(x, dt, A, B, C, D, initial_state, resets):
        if groups % parts:
            group = jax.lax.axis_index(split) * groups // parts
            B, C = (jax.lax.dynamic_slice_in_dim(array, group, 1, axis=2) for array in (B, C))
        if tokens is not None:
            return sequence.ssd(kernel, tokens, x, dt, A, B, C, D, initial_state, resets)
        return kernel(x, dt, A, B, C, D, initial_state, resets)

    by_head = PartitionSpec(rows, tokens, split)
    by_group = PartitionSpec(rows, tokens, groups_split)
    vector = PartitionSpec(split)
    state = PartitionSpec(rows, split)
    in_specs = (by_head, by_head, vector, by_group, by_group, vector, state, PartitionSpec(rows, tokens))
    return on_each_device(local, arguments, in_specs, (by_head, state))
