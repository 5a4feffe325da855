"""The recurrence as a parallel prefix over time.

Two stretches of tokens, one after the other, act on a state as (decay, inflow): state <- decay state + inflow. Their
composition is again such a pair, so that `jax.lax.associative_scan` gives the state after every token in log2(l)
rounds. All l states are held at once, l·p·n numbers per head, so that this form is for short sequences.
"""

import jax
import jax.numpy as jnp


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
    """Shapes as in `api.ssd`. `resets` (b,l) is True at tokens before which the state is zeroed. In float32."""
    batch, length, _, headdim = x.shape
    groups, state_size = B.shape[2:]
    values, B, C = (array.astype(jnp.float32) for array in (x, B, C))

    # A reset is a decay of zero: whatever came before is multiplied away.
    decay = jnp.where(resets[..., None], 0.0, jnp.exp(dt * A)).reshape(batch, length, groups, -1, 1, 1)
    inflow = (dt[..., None] * values).reshape(batch, length, groups, -1, headdim, 1) * B[:, :, :, None, None, :]
    initial = initial_state.reshape(batch, groups, -1, headdim, state_size)
    inflow = inflow.at[:, 0].add(decay[:, 0] * initial)

    def compose(earlier, later):
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    _, states = jax.lax.associative_scan(compose, (decay, inflow), axis=1)
    y = jnp.einsum("blgepn,blgn->blgep", states, C, precision=jax.lax.Precision.HIGHEST).reshape(x.shape)
    if D is not None:
        y = y + D[:, None] * values
    return y.astype(x.dtype), states[:, -1].reshape(initial_state.shape)
