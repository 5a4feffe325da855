"""Attention of one new token per row, or of a few, to a cache of keys and values, of which the filled part is read."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Literal

import jax
import jax.numpy as jnp

from zamba2_jax.ops._checks import check_boolean, check_choice, check_floating, check_integer, check_rank, check_shape
from zamba2_jax.ops._platform import platform
from zamba2_jax.ops.attention import MASKED_SCORE, attention
from zamba2_jax.ops.decode import attention_gpu
from zamba2_jax.ops.decode.obstacles import no_single_gpu

Implementation = Literal["xla", "pallas_gpu"]
IMPLEMENTATIONS = ("xla", "pallas_gpu")

# Slots that the plain form reads at a time: a long cache is read in such blocks up to its last filled one.
BLOCK = 256
# More heads per key head than this are a matrix product's work.
_MAX_SHARING = 8


@functools.partial(jax.jit, static_argnames=("scale", "implementation", "interpret"))
def cached_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    slot_mask: jax.Array,
    length: jax.Array,
    *,
    scale: float,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale query keyᵀ) value over the slots before `length` that `slot_mask` lets through, in float32.

    Args:
      query: (b, heads, head_dim), floating. Head i reads key head i // (heads // kv_heads).
      key, value: (b, slots, kv_heads, head_dim), floating.
      slot_mask: (b, slots) bool. A row that may see nothing gets an unspecified but finite result.
      length: () integer, from 1 to slots: slots filled. What lies beyond is not read (but for the rest of a block).
      implementation: "xla", a loop over blocks of slots; "pallas_gpu", a kernel. None takes the kernel where it serves.
      interpret: run the named kernel in Pallas' interpreter, on any platform. For tests: it is slow.

    Returns:
      (b, heads, head_dim) in query's dtype.

    Raises:
      ValueError: a shape, dtype or name that does not fit; an implementation that cannot serve, saying why.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    check_rank("query", query, 3, "(b, heads, head_dim)")
    check_rank("key", key, 4, "(b, slots, kv_heads, head_dim)")
    rows, heads, head_dim = query.shape
    slots, kv_heads = key.shape[1:3]
    check_shape("key", key, (rows, slots, kv_heads, head_dim), "(b, slots, kv_heads, head_dim)")
    check_shape("value", value, key.shape, "the shape of key, (b, slots, kv_heads, head_dim)")
    for name, array in (("query", query), ("key", key), ("value", value)):
        check_floating(name, array)
    check_shape("slot_mask", slot_mask, (rows, slots), "(b, slots)")
    check_boolean("slot_mask", slot_mask)
    check_shape("length", length, (), "()")
    check_integer("length", length)
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"key has {kv_heads} heads and query has {heads}; query's must be a multiple of key's")

    obstacle = kernel_obstacle(heads // kv_heads, interpret, (query, key, value))
    if implementation == "pallas_gpu" and obstacle is not None:
        raise ValueError(f"implementation 'pallas_gpu' cannot serve: {obstacle}")
    if implementation == "xla" or obstacle is not None or (interpret and implementation is None):
        return in_blocks(query[:, None], key, value, slot_mask[:, None], length, scale=scale)[:, 0]
    return attention_gpu.cached_attention(
        query, key, value, slot_mask, length, scale=scale, masked_score=MASKED_SCORE, interpret=interpret
    )


def cached_attention_of_several(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, length: jax.Array, *, scale: float
) -> jax.Array:
    """`cached_attention` for a few new tokens per row, the last of which is in slot `length` - 1.

    Args:
      query: (b, l, heads, head_dim). key, value, length, scale: as there.
      mask: (b, l, slots) bool, the slots that each token may see.

    Returns:
      (b, l, heads, head_dim) in query's dtype.
    """
    if platform() == "gpu":  # one kernel for all slots costs less than a launch or two for each block of them
        return attention(query, key.astype(query.dtype), value.astype(query.dtype), mask=mask, scale=scale)
    return in_blocks(query, key, value, mask, length, scale=scale)


def kernel_obstacle(sharing: int, interpret: bool = False, arrays: Iterable[jax.Array] = ()) -> str | None:
    """Why the kernel cannot serve, or None where it can. sharing: heads per key head. arrays: what it would read."""
    if sharing > _MAX_SHARING:
        return f"{sharing} heads share a key head; it takes up to {_MAX_SHARING}"
    return no_single_gpu(interpret, arrays)


def in_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    length: jax.Array,
    *,
    scale: float,
    block: int = BLOCK,
) -> jax.Array:
    """The plain form: blocks of slots, one after the other, their softmax joined as they come (arXiv 1805.02867).

    query (b, l, heads, head_dim), mask (b, l, slots); returns (b, l, heads, head_dim).
    """
    rows, tokens, heads, head_dim = query.shape
    slots, kv_heads = key.shape[1:3]
    block = min(block, slots)
    grouped = jnp.moveaxis(query.reshape(rows, tokens, kv_heads, heads // kv_heads, head_dim), 1, 3)

    def read(index, carry):
        largest, total, mixed = carry
        # The last block is moved back where the cache does not end with it; what it repeats is left out.
        start = jnp.minimum(index * block, slots - block)
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=block)
        place = start + jnp.arange(block)
        counted = (place >= index * block) & (place < length)
        keys, values = part(key, axis=1).astype(query.dtype), part(value, axis=1).astype(query.dtype)
        scores = scale * jnp.einsum("bkgld,bskd->bkgls", grouped, keys, preferred_element_type=jnp.float32)
        scores = jnp.where((part(mask, axis=2) & counted)[:, None, None], scores, MASKED_SCORE)
        peak = jnp.maximum(largest, scores.max(axis=-1))
        weights = jnp.where(counted, jnp.exp(scores - peak[..., None]), 0.0)
        fading = jnp.exp(largest - peak)
        weighed = weights.astype(values.dtype)
        new = jnp.einsum("bkgls,bskd->bkgld", weighed, values, preferred_element_type=jnp.float32)
        return peak, total * fading + weights.sum(axis=-1), mixed * fading[..., None] + new

    start = (
        jnp.full(grouped.shape[:4], MASKED_SCORE, jnp.float32),
        jnp.zeros(grouped.shape[:4], jnp.float32),
        jnp.zeros(grouped.shape, jnp.float32),
    )
    if block == slots:
        _, total, mixed = read(0, start)
    else:
        _, total, mixed = jax.lax.fori_loop(0, (length + block - 1) // block, read, start)
    return jnp.moveaxis(mixed / total[..., None], 3, 1).astype(query.dtype).reshape(query.shape)
