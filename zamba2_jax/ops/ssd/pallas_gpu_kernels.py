"""Kernel bodies of the recurrence on NVIDIA GPUs, and their launches (Pallas, Triton backend).

Three kernels, in the letters of `chunked`, with a_t = dt_t A, s the sums of a within a chunk of q tokens, S the state
(p, n) at the chunk's start, and G = C Bᵀ, L_ij = exp(s_i - s_j) for j <= i, M = G∘L:

- `forward`: one program per row and head walks the chunks with the state in registers.

      y = (M∘dt_j) x + exp(s_i) (C Sᵀ) + D x,    S <- exp(s_q) S + (exp(s_q - s_j) dt_j x)ᵀ B

- `states`: the first half of the backward pass. The same walk for the states alone, forwards from the inputs (S at the
  start of every chunk) or backwards from the outputs' gradients (dS at the end of every chunk:
  dS <- exp(s_q) dS + (exp(s_i) dy)ᵀ C). These (p, n) matrices, one per chunk, are all that goes through memory.
- `backward`: the second half. One program per row, chunk and block of heads recomputes what a chunk needs and adds the
  gradients of B and C over its heads in registers; G and the heads' sum of dG serve all heads of a group at once.

      P = dy xᵀ,  dG = Σ_heads P∘L∘dt_j,  dC = dG B + Σ exp(s_i) dy S,  dB = dGᵀ C + Σ (exp(s_q - s_j) dt_j x) dS
      u = Mᵀ dy + exp(s_q - s_j) B dSᵀ,  dx = dt_j u + D dy,  ddt_j = x_j·u_j
      ds_i = Σ_j (M∘P)_ij dt_j + exp(s_i) dy_i·(C Sᵀ)_i - dt_i ddt_i,  ds_q += <dS, state at the chunk's end>

  and da is the reverse sum of ds within the chunk.

Derived from the equations of Dao and Gu, "Transformers are SSMs" (2024), section 6. Nothing of size length × chunk is
written. All sizes of a tile are powers of two, as Triton wants; lengths are masked.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# A decay's logarithm below this is as good as minus infinity: exp(-120) is 0 in float32. A reset is written as this.
NO_MEMORY = -120.0


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a kernel is cut and compiled.

    Attributes:
        chunk: tokens q per chunk, a power of two of at least 16.
        warps, stages: of Triton's compiler.
        split: the head dim of one head is divided over this many programs (`forward` and `states`).
        heads: heads per program (`backward`), dividing the heads of a group.
    """

    chunk: int
    warps: int
    stages: int
    split: int = 1
    heads: int = 1

    @property
    def params(self) -> plgpu.CompilerParams:
        return plgpu.CompilerParams(num_warps=self.warps, num_stages=self.stages)


def forward(x, dt, a, B, C, D, state, launch: Launch, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """x (b,l,h,p), dt and a (b,h,l) float32, B and C (b,l,g,n) of x.dtype, D (h,) float32 or None, state (b,h,p,n)
    float32 -> y (b,l,h,p) of x.dtype, state (b,h,p,n) float32."""
    batch, length, heads, headdim = x.shape
    groups, size = B.shape[2:]
    part = headdim // launch.split
    of_head = _per_head(length, part, heads // groups, launch.split)
    skip = () if D is None else (D,)

    def kernel(x_ref, dt_ref, a_ref, B_ref, C_ref, state_ref, *rest):
        D_ref, (y_ref, final_ref) = (None, rest) if D is None else (rest[0], rest[1:])
        lower = _lower_triangle(launch.chunk)

        def walk(index, state):
            rows = _Rows(index, launch.chunk, length)
            x, B, C = rows.load(x_ref), rows.load(B_ref), rows.load(C_ref)
            dt, sums = rows.load(dt_ref), Sums(rows.load(a_ref), x.dtype)
            weights = _dot(C, B, (1, 1)) * _decay(sums, lower) * dt[None, :]
            y = _dot(C, state.astype(x.dtype), (1, 1)) * jnp.exp(sums.from_start())[:, None]
            y += _dot(weights.astype(x.dtype), x, (1, 0))
            wide = x.astype(jnp.float32)
            if D_ref is not None:
                y += D_ref[...] * wide
            rows.store(y_ref, y)
            inflow = (wide * (dt * jnp.exp(sums.to_end()))[:, None]).astype(x.dtype)
            return jnp.exp(sums.total()) * state + _dot(inflow, B, (0, 0))

        final_ref[...] = jax.lax.fori_loop(0, pl.cdiv(length, launch.chunk), walk, state_ref[...])

    return pl.pallas_call(
        kernel,
        grid=(heads * launch.split, batch),
        in_specs=[
            of_head.tokens,
            of_head.steps,
            of_head.steps,
            of_head.group(size),
            of_head.group(size),
            of_head.state(size),
        ]
        + [of_head.scalar for _ in skip],
        out_specs=[of_head.tokens, of_head.state(size)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)],
        compiler_params=launch.params,
        interpret=interpret,
        name="ssd_forward",
    )(x, dt, a, B, C, state, *skip)


def states(u, dt, a, V, state, launch: Launch, interpret: bool, *, backwards: bool) -> tuple[jax.Array, jax.Array]:
    """The state that each chunk starts with, and the one after all.

    Forwards: u = x, V = B, S <- exp(s_q) S + (exp(s_q - s_j) dt_j x)ᵀ B.
    Backwards, in the chunks' reverse order: u = dy, V = C, dt None, dS <- exp(s_q) dS + (exp(s_i) dy)ᵀ C; "start" is then
    the chunk's end.

    Returns:
      (b,h,c,p,n) of u.dtype, (b,h,p,n) float32.
    """
    batch, length, heads, headdim = u.shape
    groups, size = V.shape[2:]
    part = headdim // launch.split
    of_head = _per_head(length, part, heads // groups, launch.split)
    chunks = pl.cdiv(length, launch.chunk)

    def kernel(u_ref, a_ref, V_ref, state_ref, *rest):
        dt_ref, (all_ref, final_ref) = (None, rest) if backwards else (rest[0], rest[1:])

        def walk(step, state):
            index = chunks - 1 - step if backwards else step
            rows = _Rows(index, launch.chunk, length)
            all_ref[index] = state.astype(all_ref.dtype)
            u, V, sums = rows.load(u_ref), rows.load(V_ref), Sums(rows.load(a_ref), u_ref.dtype)
            if backwards:
                weight = jnp.exp(sums.from_start())
            else:
                weight = rows.load(dt_ref) * jnp.exp(sums.to_end())
            inflow = (u.astype(jnp.float32) * weight[:, None]).astype(u.dtype)
            return jnp.exp(sums.total()) * state + _dot(inflow, V, (0, 0))

        final_ref[...] = jax.lax.fori_loop(0, chunks, walk, state_ref[...])

    steps = () if backwards else (dt,)
    return pl.pallas_call(
        kernel,
        grid=(heads * launch.split, batch),
        in_specs=[of_head.tokens, of_head.steps, of_head.group(size), of_head.state(size)]
        + [of_head.steps for _ in steps],
        out_specs=[of_head.states(chunks, size), of_head.state(size)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, chunks, headdim, size), u.dtype),
            jax.ShapeDtypeStruct((batch, heads, headdim, size), jnp.float32),
        ],
        compiler_params=launch.params,
        interpret=interpret,
        name="ssd_states_backwards" if backwards else "ssd_states",
    )(u, a, V, state, *steps)


def backward(x, dt, a, B, C, D, starts, dy, ends, launch: Launch, interpret: bool) -> tuple[jax.Array, ...]:
    """Gradients of one chunk from `starts`, the states that chunks start with, and `ends`, the gradients of the states
    that they end with, both (b,h,c,p,n) of x.dtype; dy (b,l,h,p) of x.dtype, the others as in `forward`.

    Returns:
      dx (b,l,h,p) of x.dtype; ddt, da (b,h,l) float32; dB, dC (k,b,l,g,n) float32, to be added over k blocks of heads;
      dD (b,h,c) float32, the sums dy·x of each chunk.
    """
    batch, length, heads, headdim = x.shape
    groups, size = B.shape[2:]
    group_heads = heads // groups
    blocks = group_heads // launch.heads
    chunks = pl.cdiv(length, launch.chunk)
    skip = () if D is None else (D,)

    def kernel(x_ref, dt_ref, a_ref, B_ref, C_ref, starts_ref, dy_ref, ends_ref, *rest):
        D_ref, rest = (None, rest) if D is None else (rest[0], rest[1:])
        dx_ref, ddt_ref, da_ref, dB_ref, dC_ref, dD_ref = rest
        rows = _Rows(pl.program_id(0), launch.chunk, length)
        lower = _lower_triangle(launch.chunk)
        B, C = rows.load(B_ref), rows.load(C_ref)
        scores = _dot(C, B, (1, 1))

        def add_head(head, sums_of_heads):
            dB, dC, dG = sums_of_heads
            x, dy = rows.load(x_ref, column=head), rows.load(dy_ref, column=head)
            dt, sums = rows.load(dt_ref, row=head), Sums(rows.load(a_ref, row=head), x.dtype)
            start, end = starts_ref[head], ends_ref[head]
            wide_x, wide_dy = x.astype(jnp.float32), dy.astype(jnp.float32)
            from_start, to_end = jnp.exp(sums.from_start()), jnp.exp(sums.to_end())

            decay = _decay(sums, lower)
            pairs = _dot(dy, x, (1, 1))
            dG_head = pairs * decay * dt[None, :]
            within = jnp.sum(scores * dG_head, axis=1)
            weights = (scores * decay).astype(x.dtype)

            kept = _dot(B, end, (1, 1)) * to_end[:, None]
            outflow = _dot(weights, dy, (0, 0)) + kept
            ddt = jnp.sum(wide_x * outflow, axis=1)
            dx = outflow * dt[:, None]
            if D_ref is not None:
                dx += D_ref[head] * wide_dy
            rows.store(dx_ref, dx, column=head)
            rows.store(ddt_ref, ddt, row=head)

            carried = jnp.sum(wide_dy * _dot(C, start, (1, 1)), axis=1) * from_start
            ds = within + carried - dt * ddt
            at_end = jnp.exp(sums.total()) * jnp.sum(start.astype(jnp.float32) * end.astype(jnp.float32))
            at_end += jnp.sum(dt * jnp.sum(wide_x * kept, axis=1))
            da = ds + (jnp.sum(ds) + at_end - jnp.cumsum(ds))
            rows.store(da_ref, da, row=head)
            dD_ref[head] = jnp.sum(wide_dy * wide_x)

            dC += _dot((wide_dy * from_start[:, None]).astype(x.dtype), start, (1, 0))
            dB += _dot((wide_x * (dt * to_end)[:, None]).astype(x.dtype), end, (1, 0))
            return dB, dC, dG + dG_head

        nothing = jnp.zeros((launch.chunk, size), jnp.float32)
        empty = jnp.zeros((launch.chunk, launch.chunk), jnp.float32)
        dB, dC, dG = jax.lax.fori_loop(0, launch.heads, add_head, (nothing, nothing, empty))
        dG = dG.astype(x_ref.dtype)
        rows.store(dB_ref, dB + _dot(dG, C, (0, 0)))
        rows.store(dC_ref, dC + _dot(dG, B, (1, 0)))

    def spec(shape, index):
        return pl.BlockSpec(shape, index)

    squeezed = None
    tokens = spec((squeezed, length, launch.heads, headdim), lambda c, k, b: (b, 0, k, 0))
    steps = spec((squeezed, launch.heads, length), lambda c, k, b: (b, k, 0))
    group = spec((squeezed, length, squeezed, size), lambda c, k, b: (b, 0, k // blocks, 0))
    state = spec((squeezed, launch.heads, squeezed, headdim, size), lambda c, k, b: (b, k, c, 0, 0))
    partial = spec((squeezed, squeezed, length, squeezed, size), lambda c, k, b: (k % blocks, b, 0, k // blocks, 0))
    per_chunk = spec((squeezed, launch.heads, squeezed), lambda c, k, b: (b, k, c))
    per_head = spec((launch.heads,), lambda c, k, b: (k,))
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return pl.pallas_call(
        kernel,
        grid=(chunks, groups * blocks, batch),
        in_specs=[tokens, steps, steps, group, group, state, tokens, state] + [per_head for _ in skip],
        out_specs=[tokens, steps, steps, partial, partial, per_chunk],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            float32(dt.shape),
            float32(dt.shape),
            float32((blocks, *B.shape)),
            float32((blocks, *B.shape)),
            float32((batch, heads, chunks)),
        ],
        compiler_params=launch.params,
        interpret=interpret,
        name="ssd_backward",
    )(x, dt, a, B, C, starts, dy, ends, *skip)


@dataclasses.dataclass(frozen=True)
class _PerHead:
    """Blocks of a program that serves one head of one row (or a part of its head dim). Grid: (heads · split, batch)."""

    tokens: pl.BlockSpec
    steps: pl.BlockSpec
    scalar: pl.BlockSpec
    length: int
    part: int
    group_heads: int
    split: int

    def group(self, size: int) -> pl.BlockSpec:
        heads = self.group_heads * self.split
        return pl.BlockSpec((None, self.length, None, size), lambda i, b: (b, 0, i // heads, 0))

    def state(self, size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, self.part, size), lambda i, b: (b, i // self.split, i % self.split, 0))

    def states(self, chunks: int, size: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, chunks, self.part, size), lambda i, b: (b, i // self.split, 0, i % self.split, 0)
        )


def _per_head(length: int, part: int, group_heads: int, split: int) -> _PerHead:
    return _PerHead(
        tokens=pl.BlockSpec((None, length, None, part), lambda i, b: (b, 0, i // split, i % split)),
        steps=pl.BlockSpec((None, None, length), lambda i, b: (b, i // split, 0)),
        scalar=pl.BlockSpec((None,), lambda i, b: (i // split,)),
        length=length,
        part=part,
        group_heads=group_heads,
        split=split,
    )


class _Rows:
    """The tokens of one chunk. Those beyond the length are read as zeros, which no state feels, and never written."""

    def __init__(self, index, chunk: int, length: int):
        self._slice = pl.ds(index * chunk, chunk)
        self._inside = None if length % chunk == 0 else index * chunk + jnp.arange(chunk) < length

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


class Sums:
    """Sums s of a chunk's log-decays a (q,), each from `NO_MEMORY` to 0, and differences of them.

    In a bfloat16 model a float32 sum will do: its error is a hundredth of a weight's. For float32 the sums are taken in
    integers, multiples of a unit so fine that they fill 31 bits, beside a sum of the rests: exact to 1e-10, where a plain
    sum that has reached -1000 has lost the digits that the decay between neighbours is made of.
    """

    def __init__(self, a: jax.Array, dtype: jax.typing.DTypeLike):
        self._unit = 0.0
        if dtype == jnp.float32:
            self._unit = a.shape[0] * 2.0**-24
            multiples = (a * (1.0 / self._unit)).astype(jnp.int32)
            rest = a - multiples.astype(jnp.float32) * self._unit
            self._whole, self._total_whole = jnp.cumsum(multiples), jnp.sum(multiples)
            self._rest, self._total_rest = jnp.cumsum(rest), jnp.sum(rest)
        else:
            self._rest, self._total_rest = jnp.cumsum(a), jnp.sum(a)

    def _value(self, rest, whole):
        return whole().astype(jnp.float32) * self._unit + rest if self._unit else rest

    def from_start(self) -> jax.Array:
        """s_i (q,)."""
        return self._value(self._rest, lambda: self._whole)

    def to_end(self) -> jax.Array:
        """s_q - s_j (q,)."""
        return self._value(self._total_rest - self._rest, lambda: self._total_whole - self._whole)

    def total(self) -> jax.Array:
        """s_q ()."""
        return self._value(self._total_rest, lambda: self._total_whole)

    def between(self) -> jax.Array:
        """s_i - s_j (q, q)."""
        return self._value(
            self._rest[:, None] - self._rest[None, :], lambda: self._whole[:, None] - self._whole[None, :]
        )


def _decay(sums: Sums, lower: jax.Array) -> jax.Array:
    """L (q, q): masked before exp, whose argument above the diagonal is positive and may be large."""
    return jnp.exp(jnp.where(lower, sums.between(), NO_MEMORY))


def _lower_triangle(chunk: int) -> jax.Array:
    return jnp.arange(chunk)[:, None] >= jnp.arange(chunk)[None, :]


def _dot(left: jax.Array, right: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product over the given axis of each, accumulated in float32; float32 operands are not rounded to tf32."""
    return jax.lax.dot_general(
        left,
        right,
        ((contract[:1], contract[1:]), ((), ())),
        precision=jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
