"""Kernel bodies of the recurrence on NVIDIA GPUs, and their launches (Pallas, Triton backend).

In the letters of `chunked`, with a_t = dt_t A, s the sums of a within a chunk of q tokens, S the state (p, n) that the
chunk starts with, G = C Bᵀ, L_ij = exp(s_i - s_j) for j <= i, and M = G∘L:

- `prepare` makes s, which all others read.
- `forward`: one program per row and head walks the chunks with the state in registers.

      y = (M∘dt_j) x + exp(s_i) (C Sᵀ) + D x,    S <- exp(s_q) S + (exp(s_q - s_j) dt_j x)ᵀ B

- `states`, the first half of the backward pass, is the same walk for the states alone: forwards from the inputs (S of
  every chunk) or backwards from the outputs' gradients (dS, the gradient of the state that a chunk ends with:
  dS <- exp(s_q) dS + (exp(s_i) dy)ᵀ C). These (p, n) matrices, one per chunk, are all that goes through memory.
- `backward_heads` and `backward_groups`, the second half, have a program per row, chunk and block of heads. With
  P = dy xᵀ and V = M∘P, the first makes what each head owns,

      k_j = exp(s_q - s_j) x_j·(B dSᵀ)_j,    ddt_j = Σ_i V_ij + k_j
      dx = dt_j (Mᵀ dy + exp(s_q - s_j) B dSᵀ) + D dy
      ds_i = Σ_j V_ij dt_j + exp(s_i) dy_i·(C Sᵀ)_i - dt_i ddt_i,  ds_q += exp(s_q) <dS, S> + Σ_j dt_j k_j

  (da is the reverse sum of ds within the chunk), the second what heads share, added up in registers:

      dG = Σ P∘L∘dt_j,  dC = dG B + Σ exp(s_i) dy S,  dB = dGᵀ C + Σ (exp(s_q - s_j) dt_j x) dS.

Derived from the equations of Dao and Gu, "Transformers are SSMs" (2024), section 6. Nothing of size length × chunk is
written. All sides of a tile are powers of two, as Triton wants; lengths are masked.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from zamba2_jax.ops.ssd.steps import RawSteps

# A decay's logarithm below this is as good as minus infinity: exp(-120) is 0 in float32. A reset is written as this.
NO_MEMORY = -120.0

# dt (b,l,h) and A (h,), float32, or what both are made of.
OfTime = tuple[jax.Array, jax.Array] | RawSteps
# The sums s as the kernels hand them on: (rests,) or (rests, wholes), see `prepare`.
Sums = tuple[jax.Array, ...]
# What parts of rows leave of the state, see `last_states`.
Before = tuple[jax.Array, jax.Array]
# Heads per program of the kernels that turn steps from tokens side by side to heads side by side.
_HEADS = 16


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
      `_unit`.
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
            unit = _unit(launch.chunk)
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


def forward(x, dt, s: Sums, B, C, D, state, launch: Launch, before: Before | None = None):
    """The outputs, and the state after all tokens.

    Args:
      x: (b,l,h,p). dt: (b,h,l) float32. s: as `prepare` makes them. B, C: (b,l,g,n) of x.dtype. D: (h,) float32 or
        None. state: (b,h,p,n) float32.
      before: None, or where rows are cut into parts, b·parts of them above, what `last_states` leaves of all parts but
        the last: the states that the others begin with are made of it. `state` has the b rows themselves.

    Returns:
      y of x's shape and dtype, state (b,h,p,n) float32.
    """
    batch, length, heads, headdim = x.shape
    size = B.shape[3]
    parts = batch // state.shape[0]
    of_head = _OneHead.of(x, B, launch, parts=parts)
    operands, specs = _optional(D, of_head.scalar)
    earlier, earlier_specs = ([], []) if before is None else (list(before), [of_head.gains, of_head.kept])

    def kernel(x_ref, dt_ref, *refs):
        s_refs, (B_ref, C_ref, state_ref, *refs) = refs[: len(s)], refs[len(s) :]
        D_ref, *refs = refs if D is not None else (None, *refs)
        gains_ref, kept_ref, *refs = refs if before is not None else (None, None, *refs)
        y_ref, final_ref = refs
        lower = _lower_triangle(launch.chunk)
        part = pl.program_id(1) % parts

        def walk(index, state):
            rows = _Rows(index, launch, length)
            x, B, C, dt, decay = (
                rows.load(x_ref),
                rows.load(B_ref),
                rows.load(C_ref),
                rows.load(dt_ref),
                rows.decay(s_refs),
            )
            weights = _dot(C, B, (1, 1)) * decay.between(lower) * dt[None, :]
            y = _dot(C, state.astype(x.dtype), (1, 1)) * decay.from_start()[:, None]
            y += _dot(weights.astype(x.dtype), x, (1, 0))
            wide = x.astype(jnp.float32)
            if D_ref is not None:
                y += D_ref[...] * wide
            rows.store(y_ref, y)
            inflow = (wide * (dt * decay.to_end())[:, None]).astype(x.dtype)
            return decay.total() * state + _dot(inflow, B, (0, 0))

        start = state_ref[...]
        if before is not None:
            start = jax.lax.fori_loop(0, part, lambda j, state: kept_ref[j] * state + gains_ref[j], start)
        end = jax.lax.fori_loop(0, pl.cdiv(length, launch.chunk), walk, start)
        if before is None:
            final_ref[...] = end
        else:
            is_last = jnp.broadcast_to(part == parts - 1, end.shape)
            plgpu.store(final_ref.at[pl.ds(0, end.shape[0]), pl.ds(0, size)], end, mask=is_last)

    return launch.call(
        kernel,
        "ssd_forward",
        grid=(heads * launch.split, batch),
        in_specs=[
            of_head.tokens,
            *[of_head.steps] * (1 + len(s)),
            *[of_head.group] * 2,
            of_head.state,
            *specs,
            *earlier_specs,
        ],
        out_specs=[of_head.tokens, of_head.state],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((batch // parts, heads, headdim, size), jnp.float32),
        ],
    )(x, dt, *s, B, C, state, *operands, *earlier)


def states(u, dt, s: Sums, V, state, launch: Launch) -> tuple[jax.Array, jax.Array]:
    """The state that each chunk starts with, and the one after all.

    With dt, forwards: u = x, V = B, S <- exp(s_q) S + (exp(s_q - s_j) dt_j x)ᵀ B. Without, backwards from the last
    chunk: u = dy, V = C, dS <- exp(s_q) dS + (exp(s_i) dy)ᵀ C, and a chunk "starts" with its end.

    Returns:
      (b,h,c,p,n) of u.dtype, (b,h,p,n) float32.
    """
    batch, length, heads, headdim = u.shape
    size = V.shape[3]
    of_head = _OneHead.of(u, V, launch)
    chunks = pl.cdiv(length, launch.chunk)
    steps, steps_specs = _optional(dt, of_head.steps)

    def kernel(u_ref, *refs):
        s_refs, (V_ref, *refs) = refs[: len(s)], refs[len(s) :]
        dt_ref, state_ref, all_ref, final_ref = refs if dt is not None else (None, *refs)

        def walk(step, state):
            index = step if dt_ref is not None else chunks - 1 - step
            all_ref[index] = state.astype(all_ref.dtype)
            kept, gain = _through_chunk(_Rows(index, launch, length), u_ref, V_ref, dt_ref, s_refs)
            return kept * state + gain

        final_ref[...] = jax.lax.fori_loop(0, chunks, walk, state_ref[...])

    return launch.call(
        kernel,
        "ssd_states" if dt is not None else "ssd_states_backwards",
        grid=(heads * launch.split, batch),
        in_specs=[of_head.tokens, *[of_head.steps] * len(s), of_head.group, *steps_specs, of_head.state],
        out_specs=[of_head.states(chunks), of_head.state],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, chunks, headdim, size), u.dtype),
            jax.ShapeDtypeStruct((batch, heads, headdim, size), jnp.float32),
        ],
    )(u, *s, V, *steps, state)


def last_states(x, dt, s: Sums, B, parts: int, launch: Launch) -> Before:
    """Of rows that are cut into `parts`, as `prepare` does, what each part but a row's last leaves of the state: the
    state after its tokens from none before them, (b,parts-1,h,p,n) float32, and the factor by which they shrink an
    earlier one, (b,parts-1,h) float32. Other arguments as in `forward`."""
    batch, length, heads, headdim = x.shape
    rows, size = batch // parts, B.shape[3]
    of_head = _OneHead.of(x, B, launch, skipping=parts)
    chunks = pl.cdiv(length, launch.chunk)

    def kernel(x_ref, dt_ref, *refs):
        s_refs, (B_ref, state_ref, kept_ref) = refs[: len(s)], refs[len(s) :]

        def walk(index, carry):
            state, all_kept = carry
            kept, gain = _through_chunk(_Rows(index, launch, length), x_ref, B_ref, dt_ref, s_refs)
            return kept * state + gain, kept * all_kept

        nothing = jnp.zeros(state_ref.shape, jnp.float32), jnp.ones((), jnp.float32)
        state_ref[...], kept_ref[...] = jax.lax.fori_loop(0, chunks, walk, nothing)

    return launch.call(
        kernel,
        "ssd_last_states",
        grid=(heads * launch.split, rows * (parts - 1)),
        in_specs=[of_head.tokens, *[of_head.steps] * (1 + len(s)), of_head.group],
        out_specs=[of_head.gain, of_head.kept_of_part],
        out_shape=[
            jax.ShapeDtypeStruct((rows, parts - 1, heads, headdim, size), jnp.float32),
            jax.ShapeDtypeStruct((rows, parts - 1, heads), jnp.float32),
        ],
    )(x, dt, *s, B)


def _through_chunk(rows: _Rows, u_ref, V_ref, dt_ref, s_refs) -> tuple[jax.Array, jax.Array]:
    """The factor by which a chunk shrinks a state that comes to it, and what it adds: see `states`."""
    u, V, decay = rows.load(u_ref), rows.load(V_ref), rows.decay(s_refs)
    weight = decay.from_start() if dt_ref is None else rows.load(dt_ref) * decay.to_end()
    inflow = (u.astype(jnp.float32) * weight[:, None]).astype(u.dtype)
    return decay.total(), _dot(inflow, V, (0, 0))


def backward_heads(x, dt, s: Sums, B, C, D, starts, dy, ends, launch: Launch) -> tuple[jax.Array, ...]:
    """What each head owns, from `starts`, the states that chunks start with, and `ends`, the gradients of the states
    that they end with, both (b,h,c,p,n) of x.dtype; dy (b,l,h,p) of x.dtype, the others as in `forward`.

    Returns:
      dx (b,l,h,p) of x.dtype. (ddt, ds) (b,h,l) float32, without what is felt at the chunk's end. What is felt there,
      exp(s_q) <dS, S> + Σ_j dt_j k_j, (b,h,c) float32. Σ dy·x, (b,h,c) float32.
    """
    batch, length = x.shape[:2]
    blocks = _HeadBlocks.of(x, B, launch)
    operands, specs = _optional(D, blocks.scalars)

    def kernel(x_ref, dt_ref, *refs):
        s_refs, (B_ref, C_ref, starts_ref, dy_ref, ends_ref, *refs) = refs[: len(s)], refs[len(s) :]
        D_ref, dx_ref, ddt_ref, ds_ref, end_ref, skip_ref = refs if D is not None else (None, *refs)
        rows = _Rows(pl.program_id(1), launch, length)
        lower = _lower_triangle(launch.chunk)

        def one_head(head, _):
            B, C = rows.load(B_ref), rows.load(C_ref)
            x, dy = rows.load(x_ref, column=head), rows.load(dy_ref, column=head)
            dt, decay = rows.load(dt_ref, row=head), rows.decay(s_refs, row=head)
            start, end = starts_ref[head], ends_ref[head]
            wide_x, wide_dy = x.astype(jnp.float32), dy.astype(jnp.float32)

            mixing = _dot(C, B, (1, 1)) * decay.between(lower)
            pairs = mixing * _dot(dy, x, (1, 1))
            kept = _dot(B, end, (1, 1)) * decay.to_end()[:, None]
            felt = jnp.sum(wide_x * kept, axis=1)
            dx = (_dot(mixing.astype(x.dtype), dy, (0, 0)) + kept) * dt[:, None]
            if D_ref is not None:
                dx += D_ref[head] * wide_dy
            rows.store(dx_ref, dx, column=head)

            # Rows and columns of the same products, in float32: rounded apart, they would not cancel in A's gradient.
            ddt = jnp.sum(pairs, axis=0) + felt
            carried = jnp.sum(wide_dy * _dot(C, start, (1, 1)), axis=1) * decay.from_start()
            rows.store(ddt_ref, ddt, row=head)
            rows.store(ds_ref, jnp.sum(pairs * dt[None, :], axis=1) + carried - dt * ddt, row=head)
            product = start.astype(jnp.float32) * end.astype(jnp.float32)
            end_ref[head] = decay.total() * jnp.sum(jnp.sum(product, axis=1)) + jnp.sum(dt * felt)
            skip_ref[head] = jnp.sum(jnp.sum(wide_dy * wide_x, axis=1))
            return 0

        jax.lax.fori_loop(0, launch.heads, one_head, 0)

    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    dx, ddt, ds, at_end, skip = launch.call(
        kernel,
        "ssd_backward_heads",
        grid=(blocks.count, pl.cdiv(length, launch.chunk), batch),
        in_specs=[*blocks.operands(s), *specs],
        out_specs=[blocks.tokens, *[blocks.steps] * 2, *[blocks.of_chunk] * 2],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            *[float32(dt.shape)] * 2,
            *[float32(starts.shape[:3])] * 2,
        ],
    )(x, dt, *s, B, C, starts, dy, ends, *operands)
    return dx, (ddt, ds), at_end, skip


def backward_groups(x, dt, s: Sums, B, C, starts, dy, ends, launch: Launch) -> tuple[jax.Array, jax.Array]:
    """What the heads of a group share: dB, dC (k,b,l,g,n) float32, to be added over the k blocks of its heads.
    Arguments as in `backward_heads`."""
    batch, length = x.shape[:2]
    size = B.shape[3]
    blocks = _HeadBlocks.of(x, B, launch)

    def kernel(x_ref, dt_ref, *refs):
        s_refs, (B_ref, C_ref, starts_ref, dy_ref, ends_ref, dB_ref, dC_ref) = refs[: len(s)], refs[len(s) :]
        rows = _Rows(pl.program_id(1), launch, length)
        lower = _lower_triangle(launch.chunk)

        def add_head(head, sums_of_heads):
            dB, dC, dG = sums_of_heads
            x, dy = rows.load(x_ref, column=head), rows.load(dy_ref, column=head)
            dt, decay = rows.load(dt_ref, row=head), rows.decay(s_refs, row=head)
            outflow = (dy.astype(jnp.float32) * decay.from_start()[:, None]).astype(x.dtype)
            inflow = (x.astype(jnp.float32) * (dt * decay.to_end())[:, None]).astype(x.dtype)
            dG += _dot(dy, x, (1, 1)) * decay.between(lower) * dt[None, :]
            dC += _dot(outflow, starts_ref[head], (1, 0))
            dB += _dot(inflow, ends_ref[head], (1, 0))
            return dB, dC, dG

        nothing = jnp.zeros((launch.chunk, size), jnp.float32)
        dG = jnp.zeros((launch.chunk, launch.chunk), jnp.float32)
        dB, dC, dG = jax.lax.fori_loop(0, launch.heads, add_head, (nothing, nothing, dG))
        dG = dG.astype(x_ref.dtype)
        rows.store(dB_ref, dB + _dot(dG, rows.load(C_ref), (0, 0)))
        rows.store(dC_ref, dC + _dot(dG, rows.load(B_ref), (1, 0)))

    return launch.call(
        kernel,
        "ssd_backward_groups",
        grid=(blocks.count, pl.cdiv(length, launch.chunk), batch),
        in_specs=blocks.operands(s),
        out_specs=[blocks.partial] * 2,
        out_shape=[jax.ShapeDtypeStruct((blocks.per_group, *B.shape), jnp.float32)] * 2,
    )(x, dt, *s, B, C, starts, dy, ends)


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
        later = _lower_triangle(launch.chunk).astype(jnp.float32)
        ds = functools.reduce(jnp.add, [tile.load_by_head(ref, row) for ref in ds_refs])
        da = _dot(ds, later, (1, 0)) + tile.load_of_chunk(end_ref, row)[:, None]
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


@dataclasses.dataclass(frozen=True)
class _OneHead:
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
    def of(cls, x: jax.Array, B: jax.Array, launch: Launch, *, parts: int = 1, skipping: int = 1) -> _OneHead:
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
class _HeadBlocks:
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
    def of(cls, x: jax.Array, B: jax.Array, launch: Launch) -> _HeadBlocks:
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


def _optional(array: jax.Array | None, spec: pl.BlockSpec) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
    return ([], []) if array is None else ([array], [spec])


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


class _Rows:
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

    def decay(self, s_refs, row=None) -> _Decay:
        ends = [ref[self._last] if row is None else ref[row, self._last] for ref in s_refs]
        values = [self.load(ref, row=row) for ref in s_refs]
        if self._inside is not None:  # no time passes beyond the length
            values = [jnp.where(self._inside, value, end) for value, end in zip(values, ends, strict=True)]
        return _Decay(values, ends, self._launch)


class _Decay:
    """Exponentials of a chunk's sums s and of differences between them."""

    def __init__(self, values: list[jax.Array], ends: list[jax.Array], launch: Launch):
        self._values, self._ends = values, ends
        self._unit = _unit(launch.chunk)
        # The hardware's exponential, good to 22 bits, is what bfloat16 needs; there is none in interpret mode.
        self._exp2 = jnp.exp2 if launch.interpret or len(values) == 2 else _fast_exp2

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


def _unit(chunk: int) -> float:
    """What the integer sums count: |NO_MEMORY| / log 2 < 2^8, so that a chunk of them stays below 2^31."""
    return chunk * 2.0**-23


def _fast_exp2(x: jax.Array) -> jax.Array:
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    [result] = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[shape]
    )
    return result


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
