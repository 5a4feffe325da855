"""The inner loop of the products: a few rows times a strip of a weight, on the matrix units of a GPU.

Pallas' Triton backend. A weight comes from memory once, so its time is the memory's; what counts is how much of it is
under way. Triton's pipelined copies keep several tiles on their way into shared memory while one is multiplied. It
makes them for operands of the matrix units alone, so one row takes these too: its fifteen idle companions cost nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from zamba2_jax.ops.quantized import Integers

Ref = Any
Weight = jax.Array | Integers

# Rows of a tile of the matrix units; fewer are filled up with copies of the last.
ROWS = 16


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a program reads its strip.

    Attributes:
        columns: width of the strip.
        depth: rows of the weight in one tile.
        warps: of the program.
        stages: tiles under way and in use.
    """

    columns: int = 64
    depth: int = 128
    warps: int = 2
    stages: int = 5

    def programs(self) -> dict[str, int]:
        """What `launch` needs to know of it."""
        return {"warps": self.warps, "stages": self.stages}


def columns_of(first: Any, size: int, width: int) -> tuple[jax.Array, jax.Array | None]:
    """Indices first, first + 1, ... that stay inside the width, and, where it cuts them off, which are real."""
    column = first + jnp.arange(size, dtype=jnp.int32)
    if width % size == 0:
        return column, None
    return jnp.minimum(column, width - 1), column < width


def rows_of(count: int) -> jax.Array:
    """Indices of a tile's rows that stay inside `count`: (ROWS,)."""
    return jnp.minimum(jnp.arange(ROWS, dtype=jnp.int32), count - 1)


def product(
    x: Ref, weight: Ref | Integers, first: Any, tiling: Tiling, *, start: Any = 0, length: int | None = None
) -> jax.Array:
    """x W[:, first : first + columns]: (ROWS, columns) float32, of which the first rows are x's.

    Args:
      x: (rows, K), up to `ROWS`. weight: (K, N), of the same dtype or of integers.
      start, length: read only so many features from `start` on.
    """
    size = x.shape[1] if length is None else length
    depth = tiling.depth
    ragged = size % depth != 0
    row, (column, _) = rows_of(x.shape[0]), columns_of(first, tiling.columns, weight.shape[1])
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    integers = isinstance(weight, Integers)
    scale = plgpu.load(weight.scale.at[column]) if integers else None

    def add(turn, total):
        # Nothing but the copies and the product: work on an operand in between would stall the pipeline. Integers are
        # widened in registers, where the matrix units take them from: (N, K) is the order that they want bytes in.
        offset = turn * depth + jnp.arange(depth, dtype=jnp.int32)
        feature = start + (jnp.minimum(offset, size - 1) if ragged else offset)
        left = plgpu.load(x.at[row[:, None], feature[None, :]])
        if ragged:
            left = jnp.where((offset < size)[None, :], left, jnp.zeros((), left.dtype))
        if integers:
            tile = plgpu.load(weight.values.at[column[:, None], feature[None, :]]).astype(left.dtype)
        else:
            tile = plgpu.load(weight.at[feature[:, None], column[None, :]])
        return total + plgpu.dot(left, tile, trans_b=integers, precision=precision)

    total = jax.lax.fori_loop(0, pl.cdiv(size, depth), add, jnp.zeros((ROWS, tiling.columns), jnp.float32))
    return total * scale[None, :] if integers else total
