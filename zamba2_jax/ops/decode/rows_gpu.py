"""Kernels for GPUs: what a decoding step does to whole rows between its products, RMSNorms and sums of pieces.

They stand apart from the products on purpose. A product that scaled its operand on the way was measured to take twice
as long on an H100 (32 µs instead of 15 for 34 MB): every program would do it again, between two tiles of a pipeline
that must not stall.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from zamba2_jax.ops.decode.launch_gpu import launch

# Columns of a program where rows need not be whole.
_COLUMNS = 512


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def rms_norm(
    parts: Sequence[Sequence[jax.Array]], scale: jax.Array, *, eps: float, interpret: bool = False
) -> jax.Array:
    """RMSNorm of rows that are put together first; one launch.

    Args:
      parts: of each row, one beside the other; each the sum of arrays (b, width), rounded as such.
      scale: (all widths,).

    Returns:
      (b, all widths) in the arrays' dtype.
    """
    arrays = [array for part in parts for array in part]
    rows, dtype = arrays[0].shape[0], arrays[0].dtype
    widths = [part[0].shape[1] for part in parts]
    total = sum(widths)

    def kernel(*refs):
        row, scale_in, output = pl.program_id(0), refs[len(arrays)], refs[-1]
        given = iter(refs)
        loaded = []
        for part, width in zip(parts, widths, strict=True):
            columns = _Columns.of(width)
            values = [columns.load(next(given), row) for _ in part]
            loaded.append((columns, sum(values[1:], values[0]).astype(jnp.float32)))
        squares = sum(columns.keep(values * values).sum(axis=0) for columns, values in loaded)
        factor = jax.lax.rsqrt(squares / total + eps)
        first = 0
        for columns, values in loaded:
            scaled = values * factor * columns.load(scale_in, first=first).astype(jnp.float32)
            columns.store(output, scaled, row, first=first)
            first += columns.width

    output = jax.ShapeDtypeStruct((rows, total), dtype)
    return launch(kernel, "rms_norm", (rows,), [*arrays, scale], [output], warps=8, interpret=interpret)[0]


@functools.partial(jax.jit, static_argnames=("groups", "width", "gate_eps", "eps", "dtype", "interpret"))
def join(
    pieces: jax.Array,
    squares: jax.Array | None = None,
    residual: jax.Array | None = None,
    scale: jax.Array | None = None,
    beside: jax.Array | None = None,
    *,
    groups: int = 1,
    width: int | None = None,
    gate_eps: float = 0.0,
    eps: float | None = None,
    dtype: jax.typing.DTypeLike,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Adds the pieces of `split_matmul`: finishes the norm of what was multiplied, adds the residual, norms the sum.

    Args:
      pieces: (splits, b, N) float32.
      squares: (b, groups, m) float32, whose sums over m are the sums of squares of `width` features each: the RMSNorm
        by groups of what was multiplied is completed with `gate_eps`. `splits` is a multiple of `groups`. None for no
        such norm.
      residual: (b, N) or None.
      scale, eps: of an RMSNorm (N + M,) of the result with what is beside it; None for none.
      beside: (b, M), what follows the result in the rows that are normed; None for nothing.

    Returns:
      The sum (b, N) in `dtype`, to which it is rounded before anything is done with it, as the plain form does; and its
      norm (b, N + M), or None.
    """
    splits, rows, outputs = pieces.shape
    columns = _Columns.of(outputs, None if scale is not None else _COLUMNS)
    more = 0 if beside is None else beside.shape[1]
    named = {"pieces": pieces, "squares": squares, "residual": residual, "scale": scale, "beside": beside}
    named = {name: array for name, array in named.items() if array is not None}

    def kernel(*refs):
        given, results = dict(zip(named, refs, strict=False)), refs[len(named) :]
        row, first = pl.program_id(0), pl.program_id(1) * columns.size
        values = [columns.load(given["pieces"], piece, row, first=first) for piece in range(splits)]
        of_residual = columns.load(given["residual"], row, first=first) if "residual" in given else None
        of_scale = columns.load(given["scale"], first=first) if "scale" in given else None
        if "squares" in given:
            sums = _Columns.of(squares.shape[2])
            factors = [
                jax.lax.rsqrt(sums.keep(sums.load(given["squares"], row, group)).sum(axis=0) / width + gate_eps)
                for group in range(groups)
            ]
            values = [value * factors[piece * groups // splits] for piece, value in enumerate(values)]
        total = sum(values[1:], values[0]).astype(dtype)
        if of_residual is not None:
            total = total + of_residual.astype(dtype)
        columns.store(results[0], total, row, first=first)
        if of_scale is not None:
            wide = total.astype(jnp.float32)
            sum_of_squares = columns.keep(wide * wide).sum(axis=0)
            if "beside" in given:
                others = _Columns.of(more)
                of_beside = others.load(given["beside"], row).astype(jnp.float32)
                sum_of_squares += others.keep(of_beside * of_beside).sum(axis=0)
            factor = jax.lax.rsqrt(sum_of_squares / (outputs + more) + eps)
            columns.store(results[1], wide * factor * of_scale.astype(jnp.float32), row)
            if "beside" in given:
                scale_beside = others.load(given["scale"], first=outputs).astype(jnp.float32)
                others.store(results[1], of_beside * factor * scale_beside, row, first=outputs)

    grid = (rows, pl.cdiv(outputs, columns.size))
    output = jax.ShapeDtypeStruct((rows, outputs), dtype)
    results = [output] if scale is None else [output, jax.ShapeDtypeStruct((rows, outputs + more), dtype)]
    warps = 4 if scale is None else 8
    total, *normed = launch(kernel, "join", grid, list(named.values()), results, warps=warps, interpret=interpret)
    return total, normed[0] if normed else None


@dataclasses.dataclass(frozen=True)
class _Columns:
    """A vector of a power of two, `size`, of columns of an array that has `width` of them."""

    width: int
    size: int

    @classmethod
    def of(cls, width: int, most: int | None = None) -> _Columns:
        size = pl.next_power_of_2(width)
        return cls(width, size if most is None else min(size, most))

    def load(self, ref, *leading, first=0) -> jax.Array:
        """From `first` on; beyond the width, its last."""
        place = jnp.arange(self.size, dtype=jnp.int32)
        if self.size > self.width:
            place = jnp.minimum(place, self.width - 1)
        column = first + place
        if self.size <= self.width and self.width % self.size:
            column = jnp.minimum(column, self.width - 1)
        return plgpu.load(ref.at[(*leading, column)])

    def keep(self, values: jax.Array) -> jax.Array:
        """Zeros beyond the width, of a vector that holds all of it."""
        return values if self.size == self.width else jnp.where(jnp.arange(self.size) < self.width, values, 0.0)

    def store(self, ref, values: jax.Array, *leading, first=0) -> None:
        place = jnp.arange(self.size, dtype=jnp.int32)
        inside = None
        if self.size > self.width:
            inside = place < self.width
        elif self.width % self.size:
            inside = first + place < self.width
        plgpu.store(ref.at[(*leading, first + place)], values.astype(ref.dtype), mask=inside)
