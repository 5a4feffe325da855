"""Causal attention of rows whose tokens are spread over devices: queries stay, keys and values are gathered."""

import jax
import jax.numpy as jnp

from zamba2_jax.ops.blocked_attention import BLOCK, attend_all, heads_first

# Scores of one block of queries, one key head and all rows of a device, float32: 64 MB.
BLOCK_SCORES = 1 << 24
FEWEST_QUERIES = 16


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: tuple[jax.Array, jax.Array] | None,
    *,
    axis: str,
    scale: float,
    masked_score: float,
) -> jax.Array:
    """`blocked_attention.causal_attention` of the tokens on the devices of the mesh axis `axis`, in its order.

    For use in `jax.shard_map`: query (b, l, heads, head_dim), key and value (b, l, kv_heads, head_dim) and the ids (b,
    l) are of this device's tokens. Gathered are the keys and values of one head at a time, here and once more in the
    backward pass, so that a device never holds those of a whole row in all heads, nor a mask or scores of all its
    queries. Every device reads all keys and hides the later ones: those with the row's last tokens need nearly all of
    them, and the others would wait.
    """
    length, head_dim = query.shape[1], query.shape[3]
    grouped, key, value = heads_first(query, key, value)
    batch, kv_heads, sharing = grouped.shape[:3]
    devices = jax.lax.axis_size(axis)
    most = max(FEWEST_QUERIES, BLOCK_SCORES // (batch * sharing * devices * length))
    blocks = -(-length // min(BLOCK, most))
    block = -(-length // blocks)
    padding = blocks * block - length
    first = jax.lax.axis_index(axis) * length
    of_query = of_key = None
    if segment_ids is not None:
        of_query = jnp.pad(segment_ids[0], ((0, 0), (0, padding)))
        of_key = jax.lax.all_gather(segment_ids[1], axis, axis=1, tiled=True)

    @jax.checkpoint
    def of_head(arrays):
        query, key, value = arrays  # (b, 1, sharing, l, head_dim), twice (b, 1, l, head_dim)
        key, value = jax.lax.all_gather((key, value), axis, axis=2, tiled=True)
        query = jnp.pad(query, ((0, 0),) * 3 + ((0, padding), (0, 0)))

        @jax.checkpoint
        def of_block(start):
            visible = first + start + jnp.arange(block)[:, None] >= jnp.arange(key.shape[2])
            if of_key is not None:
                ids = jax.lax.dynamic_slice_in_dim(of_query, start, block, axis=1)
                visible = visible & (ids[:, :, None] == of_key[:, None, :])[:, None, None]
            part = jax.lax.dynamic_slice_in_dim(query, start, block, axis=3)
            return attend_all(part, key, value, visible, scale, masked_score)

        mixed = jnp.moveaxis(jax.lax.map(of_block, jnp.arange(blocks) * block), 0, 3)
        return mixed.reshape(query.shape)[..., :length, :]

    by_head = (jnp.moveaxis(array, 1, 0)[:, :, None] for array in (grouped, key, value))
    mixed = jax.lax.map(of_head, tuple(by_head))  # (kv_heads, b, 1, sharing, l, head_dim)
    mixed = jnp.moveaxis(mixed[:, :, 0], 0, 1).reshape(batch, kv_heads * sharing, length, head_dim)
    return jnp.moveaxis(mixed, 1, 2)
