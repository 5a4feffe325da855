"""Attention in plain XLA, a block of queries at a time: no (l, l) scores in memory, and little work above the
diagonal.

What `jax.nn.dot_product_attention` does for the same arguments takes all scores at once; on two CPU cores, float32, 12
heads of 128, this took 206 ms where that took 337 at length 2048; at length 512 both took 15 ms.
"""

import jax
import jax.numpy as jnp

BLOCK = 256
# Blocks are run in at most this many groups; those of a group take the same keys, up to the group's last query, one
# block after the other.
GROUPS = 8


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    segment_ids: tuple[jax.Array, jax.Array] | None,
    masked_score: float,
) -> jax.Array:
    """Shapes as in `ops.attention.attention`, with as many queries as keys. The backward pass recomputes each block's
    weights."""
    length, head_dim = query.shape[1], query.shape[3]
    grouped, key, value = heads_first(query, key, value)

    @jax.checkpoint
    def attend(query, of_query, key, value, of_key, start):
        visible = start + jnp.arange(query.shape[3])[:, None] >= jnp.arange(key.shape[2])
        if of_query is not None:
            visible = visible & (of_query[:, :, None] == of_key[:, None, :])[:, None, None]
        return attend_all(query, key, value, visible, scale, masked_score)

    def of_block(start):
        return (
            jax.lax.dynamic_slice_in_dim(grouped, start, BLOCK, axis=3),
            None if segment_ids is None else jax.lax.dynamic_slice_in_dim(segment_ids[0], start, BLOCK, axis=1),
        )

    whole_blocks = length // BLOCK
    group = max(1, -(-whole_blocks // GROUPS))
    parts = []
    for first in range(0, whole_blocks, group):
        blocks = min(group, whole_blocks - first)
        end = (first + blocks) * BLOCK
        keys = (key[:, :, :end], value[:, :, :end], None if segment_ids is None else segment_ids[1][:, :end])
        if blocks == 1:
            parts.append(attend(*of_block(first * BLOCK), *keys, first * BLOCK))
            continue
        starts = (first + jnp.arange(blocks)) * BLOCK
        mixed = jax.lax.map(lambda start, keys=keys: attend(*of_block(start), *keys, start), starts)
        parts.append(jnp.moveaxis(mixed, 0, 3).reshape(*grouped.shape[:3], blocks * BLOCK, head_dim))
    if whole_blocks * BLOCK < length:
        start = whole_blocks * BLOCK
        of_query, of_key = (None, None) if segment_ids is None else (segment_ids[0][:, start:], segment_ids[1])
        parts.append(attend(grouped[..., start:, :], of_query, key, value, of_key, start))
    return jnp.moveaxis(jnp.concatenate(parts, axis=3), 3, 1).reshape(query.shape)


def masked_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, *, scale: float, masked_score: float
) -> jax.Array:
    """The same for a mask (b, 1, l, s): many tokens at once read a cache. Blocks are as small as the cache is long."""
    length, slots = query.shape[1], key.shape[1]
    block = rows_per_block(slots)
    blocks = -(-length // block)
    padding = blocks * block - length
    grouped, key, value = heads_first(query, key, value)
    grouped = jnp.pad(grouped, ((0, 0),) * 3 + ((0, padding), (0, 0)))
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, padding), (0, 0)))

    @jax.checkpoint
    def attend(start):
        part = jax.lax.dynamic_slice_in_dim(grouped, start, block, axis=3)
        visible = jax.lax.dynamic_slice_in_dim(mask, start, block, axis=2)
        return attend_all(part, key, value, visible[:, :, None], scale, masked_score)

    mixed = jnp.moveaxis(jax.lax.map(attend, jnp.arange(blocks) * block), 0, 3)
    mixed = mixed.reshape(*grouped.shape)[..., :length, :]
    return jnp.moveaxis(mixed, 3, 1).reshape(query.shape)


def rows_per_block(slots: int) -> int:
    """Queries per block against so many slots: scores of one head stay within 4 MB where a block of 16 allows it."""
    return min(BLOCK, max(16, (1 << 20) // slots))


def heads_first(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(b, kv_heads, heads per kv_head, l, head_dim), twice (b, kv_heads, s, head_dim): plain batched products."""
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = jnp.moveaxis(query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim), 1, 3)
    return grouped, jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 2)


def attend_all(query, key, value, visible, scale, masked_score) -> jax.Array:
    scores = jnp.einsum("bkgld,bksd->bkgls", query, key, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(visible, scores, masked_score)
    # Normalised after the product with the values: that is head_dim numbers a query instead of one for every key.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    mixed = jnp.einsum("bkgls,bksd->bkgld", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (mixed / weights.sum(axis=-1, keepdims=True)).astype(query.dtype)
