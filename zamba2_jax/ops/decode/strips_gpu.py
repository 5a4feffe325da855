"""The inner loop of the products: a few rows times a strip of a weight, on the matrix units of a GPU.

Pallas' Triton backend. A weight comes from memory once, so its time is the memory's; what counts is how much of it is
under way. Triton's pipelined copies keep several tiles on their way into shared memory while one is multiplied. It
makes them for operands of the matrix units alone, so one row takes these too: its fifteen idle companions cost nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from zamba2_jax.ops.gpu_arithmetic import Arithmetic, nibbles
from zamba2_jax.ops.quantized import Integers

Ref = Any
Weight = jax.Array | Integers

# Rows of a tile of the matrix units; fewer are filled up with zeros.
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
    x: Ref,
    weight: Ref | Integers,
    first: Any,
    tiling: Tiling,
    *,
    start: Any = 0,
    length: int | None = None,
    interpret: bool,
) -> jax.Array:
    """x W[:, first : first + columns]: (ROWS, columns) float32, of which the first rows are x's and the others zeros.

    Args:
      x: (rows, K), up to `ROWS`. weight: (K, N), of the same dtype or of integers.
      start, length: read only so many features from `start` on; of int4, whole groups.
    """
    size = x.shape[1] if length is None else length
    if not isinstance(weight, Integers):
        return _of_numbers(x, weight, first, tiling, start, size)
    if weight.group is None:
        return _of_int8(x, weight, first, tiling, start, size)
    return _of_int4(x, weight, first, tiling, start, size, interpret)


def _of_numbers(x, weight, first, tiling, start, size):
    column, _ = columns_of(first, tiling.columns, weight.shape[1])
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def add(turn, total):
        # Nothing but the copies and the product: work on an operand in between would stall the pipeline.
        left, feature = _features(x, turn, tiling.depth, start, size)
        tile = plgpu.load(weight.at[feature[:, None], column[None, :]])
        return total + plgpu.dot(left, tile, precision=precision)

    return _turns(pl.cdiv(size, tiling.depth), add, tiling)


def _of_int8(x, weight, first, tiling, start, size):
    column, _ = columns_of(first, tiling.columns, weight.shape[1])
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    scale = plgpu.load(weight.scale.at[column])

    def add(turn, total):
        # Widened in registers, where the matrix units take their operands from: (N, K) is the order they want bytes in.
        left, feature = _features(x, turn, tiling.depth, start, size)
        tile = plgpu.load(weight.values.at[column[:, None], feature[None, :]])
        return total + plgpu.dot(left, tile.astype(left.dtype), trans_b=True, precision=precision)

    return _turns(pl.cdiv(size, tiling.depth), add, tiling) * scale[None, :]


def _of_int4(x, weight, first, tiling, start, size, interpret):
    column, _ = columns_of(first, tiling.columns, weight.shape[1])
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    group, arithmetic = weight.group, Arithmetic.of(x.dtype, interpret=interpret)
    half = group // 2
    groups = math.gcd(size // group, max(1, tiling.depth // group))

    def add(turn, total):
        for index in range(groups):
            number = start // group + turn * groups + index
            byte = number * half + jnp.arange(half, dtype=jnp.int32)
            packed = plgpu.load(weight.values.at[column[:, None], byte[None, :]])
            scale = plgpu.load(weight.scale.at[column, number]).astype(jnp.float32)
            # A group's sum is of integers; its scale comes after.
            sums = []
            for part in range(2):
                left, _ = _features(x, part, half, number * group, group)
                wide = nibbles(packed, high=part == 1, dtype=x.dtype, interpret=interpret)
                sums.append(plgpu.dot(left, wide, trans_b=True, precision=precision))
            total = arithmetic.multiply_add(sums[0] + sums[1], scale[None, :], total)
        return total

    return _turns(size // (groups * group), add, tiling)


def _turns(count: int, add: Callable[[Any, jax.Array], jax.Array], tiling: Tiling) -> jax.Array:
    # All programs begin with the same features. Beginning with others each, they read x from more slices of the L2 at a
    # time, and took longer: rows of the memory are then opened more often.
    return jax.lax.fori_loop(0, count, add, jnp.zeros((ROWS, tiling.columns), jnp.float32))


def _features(x: Ref, turn: Any, depth: int, start: Any, size: int) -> tuple[jax.Array, jax.Array]:
    """The turn-th `depth` features of `size` from `start` on, (ROWS, depth) with zeros where there are none, and their
    places in x, (depth,)."""
    row, offset = jnp.arange(ROWS, dtype=jnp.int32), turn * depth + jnp.arange(depth, dtype=jnp.int32)
    # Zeros are written, not read: copies of a row in their place, read by every program, kept the L2 busy for longer
    # than the weights took.
    taken = jnp.broadcast_to((row < x.shape[0])[:, None], (ROWS, depth))
    if size % depth:
        taken &= (offset < size)[None, :]
        offset = jnp.minimum(offset, size - 1)
    feature = start + offset
    return plgpu.load(x.at[row[:, None], feature[None, :]], mask=taken, other=0.0), feature
