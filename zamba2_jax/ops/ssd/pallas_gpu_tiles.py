"""Tiles of the recurrence's kernels on NVIDIA GPUs (Pallas, Triton backend): which part of every array a program sees,
the tokens of a chunk, their decays, and products of tiles."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from zamba2_jax.ops.gpu_arithmetic import Arithmetic

# A decay's logarithm below this is as good as minus infinity: exp(-120) is 0 in float32. A reset is written as this.
NO_MEMORY = -120.0

# The sums s as the kernels hand them on: (rests,) or (rests, wholes), see `pallas_gpu_steps.prepare`.
Sums = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a kernel is cut and compiled.

    Attributes:
        chunk: tokens q per chunk, a power of two of at least 16.
        warps, stages: of Triton's compiler.
        split: the head dim of one head is divided over this many programs (`forward` and `states`).
        heads: heads per program (`backward_*`), dividing the heads of a group.
        interpret: run the body in plain JAX, on any device.
    """

    chunk: int
    warps: int
    stages: int
    split: int = 1
    heads: int = 1
    interpret: bool = False

    def call(self, kernel, name: str, **arguments):
        params = plgpu.CompilerParams(num_warps=self.warps, num_stages=self.stages)
        return pl.pallas_call(kernel, name=name, compiler_params=params, interpret=self.interpret, **arguments)


@dataclasses.dataclass(frozen=True)
class OneHead:
    """Blocks of a program that serves one head of one row, or a part of its head dim. Grid: (heads · split, rows)."""

    tokens: pl.BlockSpec  # (l, part)
    steps: pl.BlockSpec  # (l,)
    group: pl.BlockSpec  # (l, n)
    state: pl.BlockSpec  # (part, n)
    scalar: pl.BlockSpec  # ()
    gains: pl.BlockSpec  # (parts - 1, part, n), of all parts but the last of the row
    kept: pl.BlockSpec  # (parts - 1,)
    gain: pl.BlockSpec  # (part, n), of one of them
    kept_of_part: pl.BlockSpec  # ()
    split: int

    @classmethod
    def of(cls, x: jax.Array, B: jax.Array, launch: Launch, *, parts: int = 1, skipping: int = 1) -> OneHead:
        """With `parts`, rows of the grid are parts of rows of the states; with `skipping`, that many parts make a row
        and the grid has none of the last ones."""
        _, length, heads, headdim = x.shape
        groups, size = B.shape[2:]
        split = launch.split
        programs, part = heads // groups * split, headdim // split
        others = max(parts, skipping) - 1

        def row(b):
            return b if skipping == 1 else b // others * skipping + b % others

        def place(b):
            return b // others, b % others

        return cls(
            tokens=pl.BlockSpec((None, length, None, part), lambda i, b: (row(b), 0, i // split, i % split)),
            steps=pl.BlockSpec((None, None, length), lambda i, b: (row(b), i // split, 0)),
            group=pl.BlockSpec((None, length, None, size), lambda i, b: (row(b), 0, i // programs, 0)),
            state=pl.BlockSpec((None, None, part, size), lambda i, b: (b // parts, i // split, i % split, 0)),
            scalar=pl.BlockSpec((None,), lambda i, b: (i // split,)),
            gains=pl.BlockSpec(
                (None, others, None, part, size), lambda i, b: (b // parts, 0, i // split, i % split, 0)
            ),
            kept=pl.BlockSpec((None, others, None), lambda i, b: (b // parts, 0, i // split)),
            gain=pl.BlockSpec((None, None, None, part, size), lambda i, b: (*place(b), i // split, i % split, 0)),
            kept_of_part=pl.BlockSpec((None, None, None), lambda i, b: (*place(b), i // split)),
            split=split,
        )

    def states(self, chunks: int) -> pl.BlockSpec:
        part, size = self.state.block_shape[2:]
        return pl.BlockSpec((None, None, chunks, part, size), lambda i, b: (b, i // self.split, 0, i % self.split, 0))


@dataclasses.dataclass(frozen=True)
class HeadBlocks:
    """Blocks of a program that serves some heads of a group in one chunk of one row. Grid: (count, chunks, batch)."""

    tokens: pl.BlockSpec  # (l, heads, p)
    steps: pl.BlockSpec  # (heads, l)
    group: pl.BlockSpec  # (l, n)
    partial: pl.BlockSpec  # (l, n) of one block
    state: pl.BlockSpec  # (heads, p, n)
    of_chunk: pl.BlockSpec  # (heads,)
    scalars: pl.BlockSpec  # (heads,)
    count: int
    per_group: int

    @classmethod
    def of(cls, x: jax.Array, B: jax.Array, launch: Launch) -> HeadBlocks:
        _, length, heads, headdim = x.shape
        groups, size = B.shape[2:]
        some = launch.heads
        each = heads // groups // some
        return cls(
            tokens=pl.BlockSpec((None, length, some, headdim), lambda k, c, b: (b, 0, k, 0)),
            steps=pl.BlockSpec((None, some, length), lambda k, c, b: (b, k, 0)),
            group=pl.BlockSpec((None, length, None, size), lambda k, c, b: (b, 0, k // each, 0)),
            partial=pl.BlockSpec((None, None, length, None, size), lambda k, c, b: (k % each, b, 0, k // each, 0)),
            state=pl.BlockSpec((None, some, None, headdim, size), lambda k, c, b: (b, k, c, 0, 0)),
            of_chunk=pl.BlockSpec((None, some, None), lambda k, c, b: (b, k, c)),
            scalars=pl.BlockSpec((some,), lambda k, c, b: (k,)),
            count=groups * each,
            per_group=each,
        )

    def operands(self, s: Sums) -> list[pl.BlockSpec]:
        """x, dt, s, B, C, starts, dy, ends: what both halves of the backward pass read."""
        steps = [self.steps] * (1 + len(s))
        return [self.tokens, *steps, self.group, self.group, self.state, self.tokens, self.state]


def optional(array: jax.Array | None, spec: pl.BlockSpec) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
    return ([], []) if array is None else ([array], [spec])


class Rows:
    """The tokens of one chunk. Those beyond the length are read as zeros, which no state feels, and never written."""

    def __init__(self, index, launch: Launch, length: int):
        chunk = launch.chunk
        self._launch = launch
        self._slice = pl.ds(index * chunk, chunk)
        ragged = length % chunk != 0
        self._inside = index * chunk + jnp.arange(chunk) < length if ragged else None
        self._last = jnp.minimum((index + 1) * chunk, length) - 1

    def _at(self, ref, row, column):
        if row is not None:
            return ref.at[row, self._slice]
        if column is not None:
            return ref.at[self._slice, column, :]
        return ref.at[self._slice] if len(ref.shape) == 1 else ref.at[self._slice, :]

    def _mask(self, shape):
        if self._inside is None or len(shape) == 1:
            return self._inside
        return jnp.broadcast_to(self._inside[:, None], shape)

    def load(self, ref, row=None, column=None):
        part = self._at(ref, row, column)
        mask = self._mask(part.shape)
        return plgpu.load(part) if mask is None else plgpu.load(part, mask=mask, other=0)

    def store(self, ref, value, row=None, column=None):
        part = self._at(ref, row, column)
        plgpu.store(part, value.astype(ref.dtype), mask=self._mask(part.shape))

    def decay(self, s_refs, row=None) -> Decay:
        ends = [ref[self._last] if row is None else ref[row, self._last] for ref in s_refs]
        values = [self.load(ref, row=row) for ref in s_refs]
        if self._inside is not None:  # no time passes beyond the length
            values = [jnp.where(self._inside, value, end) for value, end in zip(values, ends, strict=True)]
        return Decay(values, ends, self._launch)


class Decay:
    """Exponentials of a chunk's sums s and of differences between them."""

    def __init__(self, values: list[jax.Array], ends: list[jax.Array], launch: Launch):
        self._values, self._ends = values, ends
        self._unit = unit_of(launch.chunk)
        # Sums in two parts are of float32 inputs.
        self._exp2 = Arithmetic(rounded=len(values) == 1, interpret=launch.interpret).exp2

    def _difference(self, left: list[jax.Array], right: list[jax.Array]) -> jax.Array:
        rest = left[0] - right[0]
        return rest if len(left) == 1 else (left[1] - right[1]).astype(jnp.float32) * self._unit + rest

    def _log(self, values: list[jax.Array]) -> jax.Array:
        return values[0] if len(values) == 1 else values[1].astype(jnp.float32) * self._unit + values[0]

    def from_start(self) -> jax.Array:
        """exp(s_i) (q,)."""
        return self._exp2(self._log(self._values))

    def to_end(self) -> jax.Array:
        """exp(s_q - s_j) (q,)."""
        return self._exp2(self._difference(self._ends, self._values))

    def total(self) -> jax.Array:
        """exp(s_q) ()."""
        return jnp.exp2(self._log(self._ends))

    def between(self, lower: jax.Array) -> jax.Array:
        """L (q, q): masked before the exponential, whose argument above the diagonal is positive and may be large."""
        rows, columns = ([value[index] for value in self._values] for index in (_COLUMN, _ROW))
        return self._exp2(jnp.where(lower, self._difference(rows, columns), 2 * NO_MEMORY))


_COLUMN, _ROW = (slice(None), None), (None, slice(None))


def unit_of(chunk: int) -> float:
    """What the integer sums count: |NO_MEMORY| / log 2 < 2^8, so that a chunk of them stays below 2^31."""
    return chunk * 2.0**-23


def lower_triangle(chunk: int) -> jax.Array:
    return jnp.arange(chunk)[:, None] >= jnp.arange(chunk)[None, :]


def dot(left: jax.Array, right: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product over the given axis of each, accumulated in float32; float32 operands are not rounded to tf32."""
    return jax.lax.dot_general(
        left,
        right,
        ((contract[:1], contract[1:]), ((), ())),
        precision=jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
