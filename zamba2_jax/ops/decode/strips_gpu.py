"""The inner loop of the products: a few rows times a strip of a weight, on the plain units of a GPU.

Pallas' Triton backend. It is deprecated in favour of Mosaic GPU, but these kernels need nothing of Hopper's own (they
only stream memory), they run in interpret mode on a CPU, and one source serves other cards too. With few rows Triton's
matrix units were measured to be slower than plain multiplication: 36 µs instead of 24 for a 35 MB weight on an H100.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

Ref = Any

# A thread reads 16 bytes at a time.
_PER_THREAD = 8


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a program reads its strip.

    Attributes:
        columns: width of the strip.
        warps: of the program.
        fold: loads of 16 bytes that a thread issues as one tile. More make fewer operations, in whose number Triton's
            time to compile grows faster than linearly; fewer make fewer registers, so that two programs fit where one
            waits.
        turns: tiles under way at a time; while one is multiplied, the others arrive.
    """

    columns: int = 64
    warps: int = 8
    fold: int = 2
    turns: int = 4

    @property
    def lanes(self) -> int:
        """Rows of the weight that the threads read in one go."""
        return max(1, self.warps * 32 * _PER_THREAD // self.columns)

    @property
    def depth(self) -> int:
        """Rows of the weight per round of the loop."""
        return self.lanes * self.fold * self.turns

    def compiler_params(self) -> plgpu.CompilerParams:
        return plgpu.CompilerParams(num_warps=self.warps, num_stages=1)


@dataclasses.dataclass(frozen=True)
class Norm:
    """RMSNorm of the rows: `scale` (K,), or a scale alone where `eps` is None."""

    scale: Ref
    eps: float | None


def columns_of(first: Any, size: int, width: int) -> tuple[jax.Array, jax.Array | None]:
    """Indices first, first + 1, ... that stay inside the width, and, where it cuts them off, which are real."""
    column = first + jnp.arange(size, dtype=jnp.int32)
    if width % size == 0:
        return column, None
    return jnp.minimum(column, width - 1), column < width


def product(
    x: Ref,
    weight: Ref,
    first: Any,
    tiling: Tiling,
    *,
    norm: Norm | None = None,
    start: Any = 0,
    length: int | None = None,
) -> list[jax.Array]:
    """norm(x) W[:, first : first + columns]: per row (columns,) float32.

    The norm's factor is one number per row, so it is applied to the sum and the squares are added up on the way: no
    pass over x before the first weight arrives.

    Args:
      x: (rows, K). weight: (K, N).
      start, length: read only so many features from `start` on (without an eps).
    """
    rows = x.shape[0]
    size = x.shape[1] if length is None else length
    lanes, fold, turns = tiling.lanes, tiling.fold, tiling.turns
    rounds = pl.cdiv(size, tiling.depth)
    ragged = size % tiling.depth != 0
    column, _ = columns_of(first, tiling.columns, weight.shape[1])
    squared = norm is not None and norm.eps is not None
    # Neighbouring threads read neighbouring rows of the weight; `fold` is each thread's own.
    place_in_tile = jnp.arange(fold, dtype=jnp.int32)[:, None] * lanes + jnp.arange(lanes, dtype=jnp.int32)[None, :]

    def place(turn):
        offset = turn * (fold * lanes) + place_in_tile
        if not ragged:
            return start + offset, None
        return start + jnp.minimum(offset, size - 1), offset < size

    def load_weight(turn):
        row, _ = place(turn)
        return plgpu.load(weight.at[row[:, :, None], column[None, None, :]])

    def add(sums, squares, turn, tile):
        row, inside = place(turn)
        tile = tile.astype(jnp.float32)
        scale = None if norm is None else plgpu.load(norm.scale.at[row]).astype(jnp.float32)
        new_sums, new_squares = [], []
        for index, total in enumerate(sums):
            value = plgpu.load(x.at[index, row]).astype(jnp.float32)
            if inside is not None:
                value = jnp.where(inside, value, 0.0)
            if squared:
                new_squares.append(squares[index] + value * value)
            if scale is not None:
                value = value * scale
            new_sums.append(total + (value[:, :, None] * tile).sum(axis=0))
        return new_sums, new_squares

    sums = [jnp.zeros((lanes, tiling.columns), jnp.float32) for _ in range(rows)]
    squares = [jnp.zeros((fold, lanes), jnp.float32) for _ in range(rows if squared else 0)]
    tiles = [load_weight(turn) for turn in range(turns)]

    def one_round(index, carry):
        sums, squares, tiles = carry
        fresh = []
        for turn, tile in enumerate(tiles):
            sums, squares = add(sums, squares, index * turns + turn, tile)
            # The registers just read take the tile of the next round.
            fresh.append(load_weight((index + 1) * turns + turn))
        return sums, squares, fresh

    sums, squares, tiles = jax.lax.fori_loop(0, rounds - 1, one_round, (sums, squares, tiles))
    for turn, tile in enumerate(tiles):
        sums, squares = add(sums, squares, (rounds - 1) * turns + turn, tile)

    totals = [values.sum(axis=0) for values in sums]
    if squared:
        factors = [jax.lax.rsqrt(values.sum() / size + norm.eps) for values in squares]
        totals = [total * factor for total, factor in zip(totals, factors, strict=True)]
    return totals
