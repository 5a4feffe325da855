"""Kernels for the time steps of the recurrence on NVIDIA GPUs (Pallas, Triton backend): the sums that its other kernels
read, before them, and after them the gradients of what the steps were made of."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from zamba2_jax.ops.ssd.pallas_gpu_tiles import NO_MEMORY, Launch, Sums, dot, lower_triangle, unit_of
from zamba2_jax.ops.ssd.steps import RawSteps

# dt (b,l,h) and A (h,), float32, or what both are made of.
OfTime = tuple[jax.Array, jax.Array] | RawSteps
# Heads per program: the steps turn from tokens side by side to heads side by side.
_HEADS = 16


def prepare(of_time: OfTime, resets, parts: int, dtype: jax.typing.DTypeLike, launch: Launch) -> tuple[jax.Array, Sums]:
    """What all other kernels read: dt with a head's steps side by side, and the sums s of every chunk, for data of
    `dtype`, in units of log 2.

    In a bfloat16 model a float32 sum will do: its error is a hundredth of a weight's. For float32 the sums are taken in
    integers, multiples of a unit so fine that they fill 31 bits, beside a sum of the rests: exact to 1e-10, where a
    plain sum that has reached -1000 has lost the digits that the decay between neighbours is made of.

    Args:
      of_time: dt (b,l,h) and A (h,), both float32, or what they are made of here. resets: (b,l) int32 or None, where
        not 0 the state is zeroed before.
      parts: a row is cut into so many, which become rows of their own. With several, `launch.chunk` divides l / parts.

    Returns:
      dt (b·parts,h,l/parts) float32; s of the same shape, float32 rests and, for float32 data, int32 multiples of
      `unit_of`.
    """
    source = _TimeSource(of_time)
    batch, length, heads = source.shape
    of_part = length // parts
    exact = dtype == jnp.float32
    optional = [] if resets is None else [resets]

    def kernel(*refs):
        source_refs, refs = refs[: len(source.operands)], refs[len(source.operands) :]
        resets_ref, dt_out_ref, rest_ref, *whole_ref = refs if resets is not None else (None, *refs)
        tile = _StepTile(launch.chunk, of_part, heads)
        row, part = pl.program_id(2) // parts, pl.program_id(2) % parts
        dt, A, _ = source.read(tile, source_refs, row, part * of_part)
        a = _decay_logs(tile, dt, A, resets_ref, row, part * of_part) * (1 / math.log(2))
        tile.store_by_head(dt_out_ref, dt, pl.program_id(2))
        if exact:
            unit = unit_of(launch.chunk)
            wholes = (a * (1 / unit)).astype(jnp.int32)
            a -= wholes.astype(jnp.float32) * unit
            tile.store_by_head(whole_ref[0], jnp.cumsum(wholes, axis=0), pl.program_id(2))
        tile.store_by_head(rest_ref, jnp.cumsum(a, axis=0), pl.program_id(2))

    by_head = (batch * parts, heads, of_part)
    kinds = (jnp.float32, jnp.float32, jnp.int32)[: 3 if exact else 2]
    dt, *s = launch.call(
        kernel,
        "ssd_prepare",
        grid=(pl.cdiv(heads, _HEADS), pl.cdiv(of_part, launch.chunk), batch * parts),
        out_shape=[jax.ShapeDtypeStruct(by_head, kind) for kind in kinds],
    )(*source.operands, *optional)
    return dt, tuple(s)


def backward_steps(of_time: OfTime, resets, of_steps, at_end, launch: Launch) -> OfTime:
    """The gradients of `of_time`; those of raw steps' columns are written in the steps' place alone.

    of_time and resets as in `prepare`, the others as `backward_heads` makes them; ds may come in parts to be added up.
    """
    source = _TimeSource(of_time)
    batch, length, heads = source.shape
    chunks = at_end.shape[2]
    optional = [] if resets is None else [resets]

    def kernel(*refs):
        source_refs, refs = refs[: len(source.operands)], refs[len(source.operands) :]
        resets_ref, ddt_ref, *refs = refs if resets is not None else (None, *refs)
        ds_refs, (end_ref, out_ref, *of_head_refs) = refs[: len(of_steps) - 1], refs[len(of_steps) - 1 :]
        tile, row = _StepTile(launch.chunk, length, heads), pl.program_id(2)
        dt, A, slope = source.read(tile, source_refs, row)
        # da_t: the sum of ds from t to the end of its chunk, and all that is felt there.
        later = lower_triangle(launch.chunk).astype(jnp.float32)
        ds = functools.reduce(jnp.add, [tile.load_by_head(ref, row) for ref in ds_refs])
        da = dot(ds, later, (1, 0)) + tile.load_of_chunk(end_ref, row)[:, None]
        # A step whose a is the least there is, or that comes after a reset, is no longer felt in it.
        da = jnp.where(_decay_logs(tile, dt, A, resets_ref, row) > NO_MEMORY, da.T, 0.0)
        ddt, dA = tile.load_by_head(ddt_ref, row).T + da * A, da * dt
        if source.is_raw:  # dA / dA_log = A
            ddt, dA = ddt * slope, dA * A
            tile.store_of_chunk(of_head_refs[1], jnp.sum(ddt, axis=0), row)
        tile.store_by_token(out_ref, ddt.astype(out_ref.dtype), row, column=source.column)
        tile.store_of_chunk(of_head_refs[0], jnp.sum(dA, axis=0), row)

    read = source.operands[0]
    gradient, *of_head = launch.call(
        kernel,
        "ssd_backward_steps",
        grid=(pl.cdiv(heads, _HEADS), chunks, batch),
        out_shape=[
            jax.ShapeDtypeStruct(read.shape, read.dtype),
            *[jax.ShapeDtypeStruct((batch, chunks, heads), jnp.float32)] * (2 if source.is_raw else 1),
        ],
    )(*source.operands, *optional, *of_steps, at_end)
    return source.gradients(gradient, *of_head)


class _TimeSource:
    """Where `prepare` and `backward_steps` have dt and A from."""

    def __init__(self, of_time: OfTime):
        self._raw = of_time if isinstance(of_time, RawSteps) else None
        if self._raw is None:
            self.operands = list(of_time)
            self.shape = of_time[0].shape
            return
        columns = self._raw.behind.columns
        self.shape = *columns.shape[:2], self._raw.heads
        self.operands = [columns, self._raw.A_log, self._raw.bias]
        if self._raw.mask is not None:
            self.operands.append(self._raw.mask.astype(jnp.int32))

    @property
    def is_raw(self) -> bool:
        return self._raw is not None

    @property
    def column(self) -> int:
        """The first head's place in a token's row of what is read."""
        return self.operands[0].shape[2] - self.shape[2]

    def read(self, tile: _StepTile, refs, row, first=0) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """dt (q, heads) of a tile's steps, which are those of `row` from token `first` of it on, and A (1, heads); of
        raw steps also how much dt grows with them, (q, heads)."""
        steps_ref, of_head_ref, *refs = refs
        steps = tile.load_by_token(steps_ref, row, first, column=self.column)
        of_head = tile.load_of_head(of_head_ref)[None, :]
        if self._raw is None:
            return steps, of_head, None
        bias_ref, *mask_refs = refs
        raw = steps.astype(jnp.float32) + tile.load_of_head(bias_ref)[None, :]
        dt, slope = jnp.maximum(raw, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(raw))), jax.nn.sigmoid(raw)
        if self._raw.limit is not None:
            low, high = self._raw.limit
            slope = jnp.where((dt > low) & (dt < high), slope, 0.0)
            dt = jnp.clip(dt, low, high)
        passes = tile.inside()
        for mask_ref in mask_refs:
            passes &= tile.load_of_token(mask_ref, row, first)[:, None] != 0
        return jnp.where(passes, dt, 0.0), -jnp.exp(of_head), jnp.where(passes, slope, 0.0)

    def gradients(self, gradient, of_head, of_bias=None) -> OfTime:
        """Of what the source was made of: those of what is read, and of single heads those to be added up."""
        of_head = of_head.sum(axis=(0, 1))
        if self._raw is None:
            return gradient, of_head
        return dataclasses.replace(
            self._raw,
            behind=dataclasses.replace(self._raw.behind, columns=gradient),
            bias=of_bias.sum(axis=(0, 1)).astype(self._raw.bias.dtype),
            A_log=of_head.astype(self._raw.A_log.dtype),
            mask=None,
        )


def _decay_logs(tile: _StepTile, dt, A, resets_ref, row, first=0):
    """a (q, heads) of a tile's steps."""
    a = jnp.maximum(dt * A, NO_MEMORY)
    if resets_ref is None:
        return a
    return jnp.where(tile.load_of_token(resets_ref, row, first)[:, None] != 0, NO_MEMORY, a)


class _StepTile:
    """Steps of a chunk of tokens by some heads (q, heads): read with heads side by side, as the model has them, or with
    tokens side by side, as the other kernels do. Grid: (blocks of heads, chunks, rows)."""

    def __init__(self, chunk: int, length: int, heads: int):
        first = pl.program_id(0) * _HEADS, pl.program_id(1) * chunk
        self._first_head = first[0]
        self._heads, self._tokens = self._heads_from(0), pl.ds(first[1], chunk)
        self._head_inside = first[0] + jnp.arange(_HEADS) < heads
        self._token_inside = first[1] + jnp.arange(chunk) < length
        self._first, self._chunk = first[1], chunk

    def inside(self):
        return self._token_inside[:, None] & self._head_inside[None, :]

    def _heads_from(self, column: int):
        return pl.ds(column + self._first_head, _HEADS)

    def load_of_head(self, ref):
        return plgpu.load(ref.at[self._heads], mask=self._head_inside, other=0)

    def load_of_token(self, ref, row, first):
        return plgpu.load(ref.at[row, pl.ds(first + self._first, self._chunk)], mask=self._token_inside, other=0)

    def load_by_token(self, ref, row, first=0, column=0):
        """(q, heads), of rows in which the first head stands at `column`."""
        part = ref.at[row, pl.ds(first + self._first, self._chunk), self._heads_from(column)]
        return plgpu.load(part, mask=self.inside(), other=0)

    def store_by_token(self, ref, value, row, column=0):
        plgpu.store(ref.at[row, self._tokens, self._heads_from(column)], value, mask=self.inside())

    def load_by_head(self, ref, row):
        """(heads, q)."""
        return plgpu.load(ref.at[row, self._heads, self._tokens], mask=self.inside().T, other=0)

    def store_by_head(self, ref, value, row):
        """Of (q, heads)."""
        plgpu.store(ref.at[row, self._heads, self._tokens], value.T, mask=self.inside().T)

    def load_of_chunk(self, ref, row):
        """(heads,), of (..., heads, chunks)."""
        return plgpu.load(ref.at[row, self._heads, pl.program_id(1)], mask=self._head_inside, other=0)

    def store_of_chunk(self, ref, value, row):
        """Of (heads,), to (..., chunks, heads)."""
        plgpu.store(ref.at[row, pl.program_id(1), self._heads], value, mask=self._head_inside)
