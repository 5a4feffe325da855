"""Kernel bodies of the recurrence on NVIDIA GPUs, and their launches (Pallas, Triton backend).

In the letters of `chunked`, with a_t = dt_t A, s the sums of a within a chunk of q tokens, S the state (p, n) that the
chunk starts with, G = C Bᵀ, L_ij = exp(s_i - s_j) for j <= i, and M = G∘L:

- `pallas_gpu_steps.prepare` makes s, which all others read.
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

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from zamba2_jax.ops.ssd.pallas_gpu_tiles import HeadBlocks, Launch, OneHead, Rows, Sums, dot, lower_triangle, optional

# What parts of rows leave of the state, see `last_states`.
Before = tuple[jax.Array, jax.Array]


def forward(x, dt, s: Sums, B, C, D, state, launch: Launch, before: Before | None = None):
    """The outputs, and the state after all tokens.

    Args:
      x: (b,l,h,p). dt: (b,h,l) float32. s: as `pallas_gpu_steps.prepare` makes them. B, C: (b,l,g,n) of x.dtype. D:
        (h,) float32 or None. state: (b,h,p,n) float32.
      before: None, or where rows are cut into parts, b·parts of them above, what `last_states` leaves of all parts but
        the last: the states that the others begin with are made of it. `state` has the b rows themselves.

    Returns:
      y of x's shape and dtype, state (b,h,p,n) float32.
    """
    batch, length, heads, headdim = x.shape
    size = B.shape[3]
    parts = batch // state.shape[0]
    of_head = OneHead.of(x, B, launch, parts=parts)
    operands, specs = optional(D, of_head.scalar)
    earlier, earlier_specs = ([], []) if before is None else (list(before), [of_head.gains, of_head.kept])

    def kernel(x_ref, dt_ref, *refs):
        s_refs, (B_ref, C_ref, state_ref, *refs) = refs[: len(s)], refs[len(s) :]
        D_ref, *refs = refs if D is not None else (None, *refs)
        gains_ref, kept_ref, *refs = refs if before is not None else (None, None, *refs)
        y_ref, final_ref = refs
        lower = lower_triangle(launch.chunk)
        part = pl.program_id(1) % parts

        def walk(index, state):
            rows = Rows(index, launch, length)
            x, B, C, dt, decay = (
                rows.load(x_ref),
                rows.load(B_ref),
                rows.load(C_ref),
                rows.load(dt_ref),
                rows.decay(s_refs),
            )
            weights = dot(C, B, (1, 1)) * decay.between(lower) * dt[None, :]
            y = dot(C, state.astype(x.dtype), (1, 1)) * decay.from_start()[:, None]
            y += dot(weights.astype(x.dtype), x, (1, 0))
            wide = x.astype(jnp.float32)
            if D_ref is not None:
                y += D_ref[...] * wide
            rows.store(y_ref, y)
            inflow = (wide * (dt * decay.to_end())[:, None]).astype(x.dtype)
            return decay.total() * state + dot(inflow, B, (0, 0))

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
    of_head = OneHead.of(u, V, launch)
    chunks = pl.cdiv(length, launch.chunk)
    steps, steps_specs = optional(dt, of_head.steps)

    def kernel(u_ref, *refs):
        s_refs, (V_ref, *refs) = refs[: len(s)], refs[len(s) :]
        dt_ref, state_ref, all_ref, final_ref = refs if dt is not None else (None, *refs)

        def walk(step, state):
            index = step if dt_ref is not None else chunks - 1 - step
            all_ref[index] = state.astype(all_ref.dtype)
            kept, gain = _through_chunk(Rows(index, launch, length), u_ref, V_ref, dt_ref, s_refs)
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
    of_head = OneHead.of(x, B, launch, skipping=parts)
    chunks = pl.cdiv(length, launch.chunk)

    def kernel(x_ref, dt_ref, *refs):
        s_refs, (B_ref, state_ref, kept_ref) = refs[: len(s)], refs[len(s) :]

        def walk(index, carry):
            state, all_kept = carry
            kept, gain = _through_chunk(Rows(index, launch, length), x_ref, B_ref, dt_ref, s_refs)
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


def _through_chunk(rows: Rows, u_ref, V_ref, dt_ref, s_refs) -> tuple[jax.Array, jax.Array]:
    """The factor by which a chunk shrinks a state that comes to it, and what it adds: see `states`."""
    u, V, decay = rows.load(u_ref), rows.load(V_ref), rows.decay(s_refs)
    weight = decay.from_start() if dt_ref is None else rows.load(dt_ref) * decay.to_end()
    inflow = (u.astype(jnp.float32) * weight[:, None]).astype(u.dtype)
    return decay.total(), dot(inflow, V, (0, 0))


def backward_heads(x, dt, s: Sums, B, C, D, starts, dy, ends, launch: Launch) -> tuple[jax.Array, ...]:
    """What each head owns, from `starts`, the states that chunks start with, and `ends`, the gradients of the states
    that they end with, both (b,h,c,p,n) of x.dtype; dy (b,l,h,p) of x.dtype, the others as in `forward`.

    Returns:
      dx (b,l,h,p) of x.dtype. (ddt, ds) (b,h,l) float32, without what is felt at the chunk's end. What is felt there,
      exp(s_q) <dS, S> + Σ_j dt_j k_j, (b,h,c) float32. Σ dy·x, (b,h,c) float32.
    """
    batch, length = x.shape[:2]
    blocks = HeadBlocks.of(x, B, launch)
    operands, specs = optional(D, blocks.scalars)

    def kernel(x_ref, dt_ref, *refs):
        s_refs, (B_ref, C_ref, starts_ref, dy_ref, ends_ref, *refs) = refs[: len(s)], refs[len(s) :]
        D_ref, dx_ref, ddt_ref, ds_ref, end_ref, skip_ref = refs if D is not None else (None, *refs)
        rows = Rows(pl.program_id(1), launch, length)
        lower = lower_triangle(launch.chunk)

        def one_head(head, _):
            B, C = rows.load(B_ref), rows.load(C_ref)
            x, dy = rows.load(x_ref, column=head), rows.load(dy_ref, column=head)
            dt, decay = rows.load(dt_ref, row=head), rows.decay(s_refs, row=head)
            start, end = starts_ref[head], ends_ref[head]
            wide_x, wide_dy = x.astype(jnp.float32), dy.astype(jnp.float32)

            mixing = dot(C, B, (1, 1)) * decay.between(lower)
            pairs = mixing * dot(dy, x, (1, 1))
            kept = dot(B, end, (1, 1)) * decay.to_end()[:, None]
            felt = jnp.sum(wide_x * kept, axis=1)
            dx = (dot(mixing.astype(x.dtype), dy, (0, 0)) + kept) * dt[:, None]
            if D_ref is not None:
                dx += D_ref[head] * wide_dy
            rows.store(dx_ref, dx, column=head)

            # Rows and columns of the same products, in float32: rounded apart, they would not cancel in A's gradient.
            ddt = jnp.sum(pairs, axis=0) + felt
            carried = jnp.sum(wide_dy * dot(C, start, (1, 1)), axis=1) * decay.from_start()
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
    blocks = HeadBlocks.of(x, B, launch)

    def kernel(x_ref, dt_ref, *refs):
        s_refs, (B_ref, C_ref, starts_ref, dy_ref, ends_ref, dB_ref, dC_ref) = refs[: len(s)], refs[len(s) :]
        rows = Rows(pl.program_id(1), launch, length)
        lower = lower_triangle(launch.chunk)

        def add_head(head, sums_of_heads):
            dB, dC, dG = sums_of_heads
            x, dy = rows.load(x_ref, column=head), rows.load(dy_ref, column=head)
            dt, decay = rows.load(dt_ref, row=head), rows.decay(s_refs, row=head)
            outflow = (dy.astype(jnp.float32) * decay.from_start()[:, None]).astype(x.dtype)
            inflow = (x.astype(jnp.float32) * (dt * decay.to_end())[:, None]).astype(x.dtype)
            dG += dot(dy, x, (1, 1)) * decay.between(lower) * dt[None, :]
            dC += dot(outflow, starts_ref[head], (1, 0))
            dB += dot(inflow, ends_ref[head], (1, 0))
            return dB, dC, dG

        nothing = jnp.zeros((launch.chunk, size), jnp.float32)
        dG = jnp.zeros((launch.chunk, launch.chunk), jnp.float32)
        dB, dC, dG = jax.lax.fori_loop(0, launch.heads, add_head, (nothing, nothing, dG))
        dG = dG.astype(x_ref.dtype)
        rows.store(dB_ref, dB + dot(dG, rows.load(C_ref), (0, 0)))
        rows.store(dC_ref, dC + dot(dG, rows.load(B_ref), (1, 0)))

    return launch.call(
        kernel,
        "ssd_backward_groups",
        grid=(blocks.count, pl.cdiv(length, launch.chunk), batch),
        in_specs=blocks.operands(s),
        out_specs=[blocks.partial] * 2,
        out_shape=[jax.ShapeDtypeStruct((blocks.per_group, *B.shape), jnp.float32)] * 2,
    )(x, dt, *s, B, C, starts, dy, ends)
