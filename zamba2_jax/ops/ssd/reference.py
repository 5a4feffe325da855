"""The recurrence as it is defined, one token at a time in float32: the judge of every faster form."""

import jax
import jax.numpy as jnp


def update(
    state: jax.Array, x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, D: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """One token. state (b,h,p,n), x (b,h,p), dt (b,h), A (h,), B and C (b,g,n), D (h,) or None; returns y (b,h,p) and
    the new state.

    state <- exp(dt A) state + dt x Bᵀ
    y      = state C + D x
    """
    batch, heads, headdim, state_size = state.shape
    groups = B.shape[1]
    x, dt, B, C = (array.astype(jnp.float32) for array in (x, dt, B, C))
    # Heads as (groups, heads of a group), so that B and C broadcast to their heads and need not be repeated.
    decay = jnp.exp(dt * A).reshape(batch, groups, -1, 1, 1)
    inflow = (dt[..., None] * x).reshape(batch, groups, -1, headdim, 1) * B[:, :, None, None, :]
    state = decay * state.reshape(batch, groups, -1, headdim, state_size) + inflow
    # A product in full float32 wherever it runs: by default a TPU or GPU would round its operands.
    y = jnp.einsum("bgepn,bgn->bgep", state, C, precision=jax.lax.Precision.HIGHEST).reshape(batch, heads, headdim)
    if D is not None:
        y = y + D[:, None] * x
    return y, state.reshape(batch, heads, headdim, state_size)


def ssd(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    initial_state: jax.Array,
    resets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Shapes as in `api.ssd`. `resets` (b,l) is True at tokens before which the state is zeroed."""

    def step(state, token):
        x, dt, B, C, reset = token
        state = jnp.where(reset[:, None, None, None], 0.0, state)
        y, state = update(state, x, dt, A, B, C, D)
        return state, y

    tokens = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (x, dt, B, C, resets))
    final_state, y = jax.lax.scan(step, initial_state, tokens)
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), final_state
