"""The recurrence over rows whose tokens are spread over devices: only states travel.

The recurrence is linear in the state it begins with. So every device runs its own tokens from a state of zero, sends
round what that leaves and by how much its tokens would have shrunk an earlier state, works out from those before it the
state S that it should have begun with, and adds what S would have contributed:

    y_t += exp(sum of dt A up to and including t) S C_t    until the first reset

That is one more product of the size of a chunk's `carried` term, for which no device waits for another's tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def ssd(
    kernel: Callable[..., tuple[jax.Array, jax.Array]],
    axis: str,
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    initial_state: jax.Array,
    resets: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """`kernel` of the tokens that lie on this and the other devices of the mesh axis `axis`, in its order.

    For use in `jax.shard_map`: x, dt, B, C and resets are this device's tokens. Arguments and results are those of the
    kernels; the state after the last token is that of the last device's, on every device.
    """
    y, final = kernel(x, dt, A, B, C, D, jnp.zeros_like(initial_state), resets)
    # A decay is an exponential of a sum of numbers that are not positive, never a quotient of two.
    decays = jnp.cumsum(dt * A, axis=1)  # (b, l, h)
    restarts = jnp.zeros(x.shape[:2], jnp.int32) if resets is None else jnp.cumsum(resets, axis=1, dtype=jnp.int32)

    totals, restarted, finals = jax.lax.all_gather((decays[:, -1], restarts[:, -1] > 0, final), axis)
    states = jnp.concatenate([initial_state[None], finals])  # (devices + 1, b, h, p, n): before each device, from zero
    state = _before(jax.lax.axis_index(axis), totals, restarted, states)
    y = y + _carried(state, C.astype(x.dtype), jnp.where((restarts == 0)[..., None], jnp.exp(decays), 0.0))
    return y.astype(x.dtype), _before(len(finals), totals, restarted, states)


def _before(device: jax.Array | int, totals: jax.Array, restarted: jax.Array, states: jax.Array) -> jax.Array:
    """(b, h, p, n): the state that the tokens of `device` begin with.

    totals (devices, b, h): sums of dt A. restarted (devices, b). states[j] is what the device before j left.
    """
    origin, between = jnp.arange(len(states))[:, None], jnp.arange(len(totals))
    between = ((origin <= between) & (between < device))[:, :, None]  # whether a state passes through a device's tokens
    cut = jnp.any(between & restarted, axis=1)[..., None]
    decay = jnp.exp(jnp.sum(jnp.where(between[..., None], totals, 0.0), axis=1))
    weights = jnp.where((origin <= device)[..., None] & ~cut, decay, 0.0)
    return jnp.sum(weights[..., None, None] * states, axis=0)


# Recomputed in the backward pass, which then holds no (b, l, h, p) numbers in float32.
@jax.checkpoint
def _carried(state: jax.Array, C: jax.Array, decays: jax.Array) -> jax.Array:
    """(b, l, h, p) float32: decays (b, l, h) times state C_t."""
    batch, heads, headdim, state_size = state.shape
    groups = C.shape[2]
    grouped = state.astype(C.dtype).reshape(batch, groups, heads // groups, headdim, state_size)
    read = jnp.einsum("blgn,bgepn->blgep", C, grouped, preferred_element_type=jnp.float32)
    return decays[..., None] * read.reshape(*decays.shape, headdim)
