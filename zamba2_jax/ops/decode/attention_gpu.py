"""Kernels for GPUs: one token's attention to a cache, in two launches.

The first finishes query, key and value (adapter, rotation) and writes key and value into their slot; the second reads
the slots that are filled. Where rows and heads are too few to occupy the card, the slots are split over programs, whose
results are joined afterwards (arXiv 2311.01282 calls it flash decoding).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from zamba2_jax.ops.decode.launch_gpu import launch

# Programs that keep a large card busy.
PROGRAMS = 512
# Slots that a program reads at a time.
SLOTS = 64


def row_block(rows: int) -> int:
    """Rows of a tile: one is multiplied by hand, more go to the matrix units, which take 16 or more."""
    return 1 if rows == 1 else max(16, pl.next_power_of_2(rows))


def indices(first: Any, size: int, bound: int | None = None) -> jax.Array:
    """first, first + 1, ...; with a bound, no more than bound - 1, so that a ragged edge reads what is there."""
    index = first + jnp.arange(size, dtype=jnp.int32)
    return index if bound is None else jnp.minimum(index, bound - 1)


@functools.partial(jax.jit, static_argnames=("interpret",))
def rotate_and_store(
    projected: tuple[jax.Array, jax.Array, jax.Array],
    low_rank: tuple[jax.Array, jax.Array, jax.Array] | None,
    up: tuple[jax.Array, jax.Array, jax.Array] | None,
    rotation: tuple[jax.Array, jax.Array] | None,
    key_cache: jax.Array,
    value_cache: jax.Array,
    slot: jax.Array,
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds adapters, rotates query and key, and writes key and value into their slot of the caches, in place.

    A program serves one head of query, key or value, for all rows.

    Args:
      projected: query (b, heads * head_dim), key and value (b, kv_heads * head_dim).
      low_rank, up: per query, key and value the adapter's (b, r) and its weight (r, ...); None for none.
      rotation: cosines and sines (b, head_dim / 2); None for no rotation.
      key_cache, value_cache: (b, slots, kv_heads, head_dim). slot: () int32.

    Returns:
      The query (b, heads * head_dim) and the two caches.
    """
    rows = projected[0].shape[0]
    kv_heads, head_dim = key_cache.shape[2:]
    heads = projected[0].shape[1] // head_dim
    half = head_dim // 2
    width = pl.next_power_of_2(half)
    block = row_block(rows)
    operands = {
        "slot": slot.reshape(1),
        "query": projected[0],
        "key": projected[1],
        "value": projected[2],
        "key_cache": key_cache,
        "value_cache": value_cache,
    }
    if low_rank is not None:
        operands |= {f"low_{name}": array for name, array in zip(("query", "key", "value"), low_rank, strict=True)}
        operands |= {f"up_{name}": array for name, array in zip(("query", "key", "value"), up, strict=True)}
    if rotation is not None:
        operands |= {"cos": rotation[0], "sin": rotation[1]}

    def rotate_and_store(*refs):
        given = dict(zip(operands, refs, strict=False))
        query_out, key_out, value_out = refs[len(operands) :]
        program = pl.program_id(0)
        slot = given["slot"][0]
        row = indices(0, block, rows if block != rows else None)[:, None]
        true_row = indices(0, block)[:, None]
        within = indices(0, width)[None, :]
        inside = jnp.broadcast_to((true_row < rows) & (within < half), (block, width))

        def read(ref, column):
            return plgpu.load(ref.at[row, jnp.minimum(column, ref.shape[1] - 1)])

        def halves(name, head):
            columns = [head * head_dim + first + within for first in (0, half)]
            results = [read(given[name], column) for column in columns]
            if low_rank is not None:
                added = _adapter(given[f"low_{name}"], given[f"up_{name}"], columns, row, results[0].dtype)
                results = [result.astype(jnp.float32) + more for result, more in zip(results, added, strict=True)]
            return [result.astype(jnp.float32) for result in results]

        def rotated(name, head):
            first, second = halves(name, head)
            if rotation is None:
                return first, second
            # The plain form rounds before it rotates.
            first, second = (part.astype(projected[0].dtype).astype(jnp.float32) for part in (first, second))
            cos, sin = read(given["cos"], within), read(given["sin"], within)
            return first * cos - second * sin, second * cos + first * sin

        def write(output, at, pair):
            for first, part in zip((0, half), pair, strict=True):
                plgpu.store(output.at[(*at, first + within)], part.astype(output.dtype), mask=inside)

        @pl.when(program < heads)
        def _():
            for first, part in zip((0, half), rotated("query", program), strict=True):
                column = program * head_dim + first + within
                plgpu.store(query_out.at[true_row, column], part.astype(query_out.dtype), mask=inside)

        @pl.when((program >= heads) & (program < heads + kv_heads))
        def _():
            write(key_out, (true_row, slot, program - heads), rotated("key", program - heads))

        @pl.when(program >= heads + kv_heads)
        def _():
            head = program - heads - kv_heads
            write(value_out, (true_row, slot, head), halves("value", head))

    names = list(operands)
    outputs = (projected[0], key_cache, value_cache)
    return tuple(
        launch(
            rotate_and_store,
            "rotate_and_store",
            (heads + 2 * kv_heads,),
            list(operands.values()),
            [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in outputs],
            warps=4,
            stages=2,
            in_place={names.index("key_cache"): 1, names.index("value_cache"): 2},
            interpret=interpret,
        )
    )


def _adapter(low, up, columns, row, dtype):
    """The low-rank product for some columns each, rounded as the plain form rounds it: (row block, columns) float32.

    All is asked for before anything is computed with: a program has little to read, and would wait for it twice.
    """
    rank = low.shape[1]
    # The matrix units take 16 features or more: of fewer, Triton's compiler was seen to make nonsense.
    depth = max(16, min(128, pl.next_power_of_2(rank)))
    block = row.shape[0]
    totals = [jnp.zeros((block, column.shape[1]), jnp.float32) for column in columns]
    for first in range(0, rank, depth):
        offset = first + jnp.arange(depth, dtype=jnp.int32)
        inside = offset < rank
        offset = jnp.minimum(offset, rank - 1)
        tiles = [plgpu.load(up.at[offset[:, None], jnp.minimum(column, up.shape[1] - 1)]) for column in columns]
        left = plgpu.load(low.at[row, offset[None, :]])
        left = jnp.where(inside[None, :], left, jnp.zeros((), left.dtype))
        if block == 1:
            factors = left.astype(jnp.float32).reshape(depth, 1)
            products = [(factors * right.astype(jnp.float32)).sum(axis=0)[None, :] for right in tiles]
        else:
            highest = jax.lax.Precision.HIGHEST
            products = [plgpu.dot(left.astype(right.dtype), right, precision=highest) for right in tiles]
        totals = [total + product for total, product in zip(totals, products, strict=True)]
    return [total.astype(dtype).astype(jnp.float32) for total in totals]


def splits(rows: int, kv_heads: int) -> int:
    """Over how many programs the slots of one head of one row are spread."""
    return min(pl.next_power_of_2(max(1, PROGRAMS // (rows * kv_heads))), 32)


def cached_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    slot_mask: jax.Array,
    length: jax.Array,
    *,
    scale: float,
    masked_score: float,
    interpret: bool,
    warps: int = 4,
    slots_per_step: int = SLOTS,
    parts: int | None = None,
) -> jax.Array:
    """As `cached_attention.cached_attention`, all arguments checked."""
    rows, heads, head_dim = query.shape
    slots, kv_heads = key.shape[1:3]
    sharing = heads // kv_heads
    width = pl.next_power_of_2(head_dim)
    parts = splits(rows, kv_heads) if parts is None else parts
    block = slots_per_step

    def cached_attention(length_in, query_in, key_in, value_in, mask_in, mixed_out, *sums_out):
        row, kv_head, part = (pl.program_id(axis) for axis in range(3))
        dim = jnp.arange(width, dtype=jnp.int32)
        inside = dim < head_dim
        place = jnp.minimum(dim, head_dim - 1) if width != head_dim else dim
        filled = length_in[0]
        # Every part takes as many blocks, the last ones what is left.
        blocks = (filled + block - 1) // block
        share = (blocks + parts - 1) // parts
        first, last = part * share, jnp.minimum((part + 1) * share, blocks)
        queries = []
        for index in range(sharing):
            vector = plgpu.load(query_in.at[row, kv_head * sharing + index, place]).astype(jnp.float32)
            queries.append(jnp.where(inside, vector * scale, 0.0))

        def step(index, carry):
            slot = index * block + jnp.arange(block, dtype=jnp.int32)
            taken = slot < filled
            slot = jnp.minimum(slot, slots - 1)
            keys = plgpu.load(key_in.at[row, slot[:, None], kv_head, place[None, :]])
            values = plgpu.load(value_in.at[row, slot[:, None], kv_head, place[None, :]])
            visible = taken & (plgpu.load(mask_in.at[row, slot]) != 0)
            keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
            new = []
            for vector, (largest, total, mixed) in zip(queries, carry, strict=True):
                score = (keys * vector[None, :]).sum(axis=1)
                score = jnp.where(visible, score, masked_score)
                peak = jnp.maximum(largest, score.max(axis=0))
                weight = jnp.where(taken, jnp.exp(score - peak), 0.0)
                fading = jnp.exp(largest - peak)
                new.append(
                    (peak, total * fading + weight.sum(axis=0), mixed * fading + (weight[:, None] * values).sum(0))
                )
            return tuple(new)

        start = (jnp.float32(masked_score), jnp.float32(0.0))
        carry = tuple((*start, jnp.zeros((width,), jnp.float32)) for _ in range(sharing))
        carry = jax.lax.fori_loop(first, last, step, carry)
        for index, (largest, total, mixed) in enumerate(carry):
            head = kv_head * sharing + index
            if parts == 1:
                plgpu.store(mixed_out.at[row, head, dim], (mixed / total).astype(mixed_out.dtype), mask=inside)
            else:
                plgpu.store(mixed_out.at[row, head, part, dim], mixed, mask=inside)
                plgpu.store(sums_out[0].at[row, head, part], largest)
                plgpu.store(sums_out[1].at[row, head, part], total)

    operands = (length.reshape(1), query, key, value, slot_mask.astype(jnp.int8))
    if parts == 1:
        outputs = [jax.ShapeDtypeStruct(query.shape, query.dtype)]
    else:
        sums = jax.ShapeDtypeStruct((rows, heads, parts), jnp.float32)
        outputs = [jax.ShapeDtypeStruct((rows, heads, parts, head_dim), jnp.float32), sums, sums]
    grid = (rows, kv_heads, parts)
    mixed, *sums = launch(
        cached_attention, "cached_attention", grid, operands, outputs, warps=warps, interpret=interpret
    )
    if parts == 1:
        return mixed
    largest, total = sums
    weight = jnp.exp(largest - largest.max(axis=-1, keepdims=True))
    joined = (mixed * weight[..., None]).sum(axis=2) / (total * weight).sum(axis=-1)[..., None]
    return joined.astype(query.dtype)
