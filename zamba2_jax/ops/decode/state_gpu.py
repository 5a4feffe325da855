"""Kernel for GPUs: the state-space recurrence for one token with its skip connection and gate."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from zamba2_jax.ops.decode.launch_gpu import launch


@functools.partial(jax.jit, static_argnames=("groups", "rows_per_program", "warps", "interpret"))
def state_step(
    state: jax.Array,
    x: jax.Array,
    z: jax.Array | None,
    bc: jax.Array,
    dt: jax.Array,
    A_log: jax.Array,
    D: jax.Array,
    scale: jax.Array | None = None,
    *,
    groups: int,
    rows_per_program: int | None = None,
    warps: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """state <- exp(-dt exp(A_log)) state + dt x Bᵀ; y = state C + D x; y · silu(z). The state is updated in place.

    A program reads some rows of one head's state. With one sequence there must be many such programs; with many, larger
    pieces were measured to be a little faster.

    Args:
      state: (b, h, p, n), floating; p and n are powers of two.
      x, z: (b, h p); z None for no gate. bc: (b, 2 g n), B before C.
      dt: (b, h) float32; where it is 0, the state stays.
      A_log, D: (h,).
      scale: (h p,), of a norm that follows; None for none.

    Returns:
      y · silu(z), or without a gate y, (b, h p) in x's dtype, and the new state in the given one's dtype. With a scale,
      the first is multiplied by it, and third come sums of its squares before that, (b, g, m) float32, to be added over
      m. Arithmetic is in float32.
    """
    batch, heads, headdim, size = state.shape
    if rows_per_program is None:
        rows_per_program, warps = (16, 2) if batch == 1 else (32, 4)
    block = min(rows_per_program, headdim)

    def mamba_state_step(state_in, x_in, bc_in, dt_in, a_in, d_in, *refs):
        *optional_in, gated_out, state_out = refs[: len(refs) - (scale is not None)]
        row, head = pl.program_id(0), pl.program_id(1)
        first = pl.program_id(2) * block
        group = head // (heads // groups)
        inner = pl.ds(head * headdim + first, block)
        tile = pl.ds(first, block)
        # All loads before the first use of one: they are waited for once.
        old = plgpu.load(state_in.at[row, head, tile, :])
        step = plgpu.load(dt_in.at[row, head])
        a_log = plgpu.load(a_in.at[head])
        skip = plgpu.load(d_in.at[head])
        value = plgpu.load(x_in.at[row, inner])
        key = plgpu.load(bc_in.at[row, pl.ds(group * size, size)])
        query = plgpu.load(bc_in.at[row, pl.ds((groups + group) * size, size)])
        optional_in = iter(optional_in)
        gate = None if z is None else plgpu.load(next(optional_in).at[row, inner])
        factor = None if scale is None else plgpu.load(next(optional_in).at[inner])

        value, key, query = (part.astype(jnp.float32) for part in (value, key, query))
        new = jnp.exp(-step * jnp.exp(a_log)) * old.astype(jnp.float32) + (step * value)[:, None] * key[None, :]
        plgpu.store(state_out.at[row, head, tile, :], new.astype(state_out.dtype))
        y = (new * query[None, :]).sum(axis=1) + skip * value
        if gate is not None:
            gate = gate.astype(jnp.float32)
            y = y * gate * jax.nn.sigmoid(gate)
        if factor is not None:
            plgpu.store(refs[-1].at[row, head, pl.program_id(2)], (y * y).sum(axis=0))
            y = y * factor.astype(jnp.float32)
        plgpu.store(gated_out.at[row, inner], y.astype(gated_out.dtype))

    blocks = headdim // block
    operands = [state, x, bc, dt, A_log, D, *(array for array in (z, scale) if array is not None)]
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(state.shape, state.dtype)]
    if scale is not None:
        outputs.append(jax.ShapeDtypeStruct((batch, heads, blocks), jnp.float32))
    gated, state, *squares = launch(
        mamba_state_step,
        "mamba_state_step",
        (batch, heads, blocks),
        operands,
        outputs,
        warps=warps,
        in_place={0: 1},
        interpret=interpret,
    )
    return gated, state, *(part.reshape(batch, groups, -1) for part in squares)
