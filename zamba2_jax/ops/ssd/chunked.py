"""The recurrence in chunks of q tokens: the work inside a chunk is matrix products, and only a state passes between
chunks.

With a_t = dt_t A and s_t the sum of a over the chunk's tokens up to and including t, a chunk that begins with the state
S gives

    y_i = sum_{j<=i} exp(s_i - s_j) (C_i·B_j) dt_j x_j  +  exp(s_i) S C_i  +  D x_i
    S   <- exp(s_q) S  +  sum_j exp(s_q - s_j) dt_j x_j B_jᵀ

Written from the equations of Dao and Gu, "Transformers are SSMs" (2024), section 6.
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
    *,
    chunk_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Shapes as in `api.ssd`. `resets` (b,l) is True at tokens before which the state is zeroed.

    Time steps, decays, sums and states are float32; matrix products take operands of x.dtype and accumulate in float32.
    """
    batch, length, heads, headdim = x.shape
    groups, state_size = B.shape[2:]
    group_heads = heads // groups
    dtype = x.dtype

    q = chunk_length(length, chunk_size)
    chunks = -(-length // q)
    padding = chunks * q - length

    def split(array):
        """(b, l, ...) to (c, b, q, ...). Padding has dt = 0 and no reset, which leaves the state alone."""
        if padding:
            array = jnp.pad(array, ((0, 0), (0, padding)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(array.reshape(batch, chunks, q, *array.shape[2:]), 1, 0)

    # Heads are (groups, heads of a group) throughout, so that a group's B and C serve its heads without being repeated.
    dt_chunks = jnp.moveaxis(split(dt.reshape(batch, length, groups, group_heads)), 2, -1)  # (c, b, g, e, q)
    high, low = split_cumsum(dt_chunks * A.reshape(groups, group_heads, 1))
    segment = jnp.cumsum(split(resets).astype(jnp.int32), axis=-1)  # (c, b, q): resets so far in the chunk
    x_chunks = split(x.reshape(batch, length, groups, group_heads, headdim))
    B_chunks, C_chunks = split(B.astype(dtype)), split(C.astype(dtype))
    causal = jnp.tril(jnp.ones((q, q), bool))

    def product(spec, left, right):
        return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)

    # Recomputed in the backward pass, which then holds (q, q) matrices for one chunk at a time instead of for all.
    @jax.checkpoint
    def step(state, chunk):
        x, B, C, dt, high, low, segment = chunk
        wide = x.astype(jnp.float32)
        same = causal & (segment[:, :, None] == segment[:, None, :])
        from_start = (segment == 0)[:, None, None, :]
        to_end = (segment == segment[:, -1:])[:, None, None, :]

        # Masked before exp: the differences above the diagonal are positive, and their exponentials could be infinite.
        between = (high[..., :, None] - high[..., None, :]) + (low[..., :, None] - low[..., None, :])
        decay_between = jnp.exp(jnp.where(same[:, None, None], between, -jnp.inf))  # (b, g, e, q, q)
        decay_from_start = jnp.exp(jnp.where(from_start, high + low, -jnp.inf))  # (b, g, e, q)
        to_go = (high[..., -1:] - high) + (low[..., -1:] - low)
        decay_to_end = jnp.exp(jnp.where(to_end, to_go, -jnp.inf))

        scores = product("bign,bjgn->bgij", C, B)
        weights = (scores[:, :, None] * decay_between * dt[..., None, :]).astype(dtype)
        # Tokens are moved to their place afterwards: asked for directly, XLA transposes the result number by number.
        y = jnp.moveaxis(product("bgeij,bjgep->bgeip", weights, x), 3, 1)
        carried = product("bign,bgepn->bigep", C, state.astype(dtype))
        y = y + carried * jnp.moveaxis(decay_from_start, -1, 1)[..., None]
        if D is not None:
            y = y + D.reshape(groups, group_heads, 1) * wide

        inflow = (wide * jnp.moveaxis(decay_to_end * dt, -1, 1)[..., None]).astype(dtype)
        state = decay_from_start[..., -1, None, None] * state + product("bjgep,bjgn->bgepn", inflow, B)
        return state, y.astype(dtype)

    state = initial_state.reshape(batch, groups, group_heads, headdim, state_size)
    state, y = jax.lax.scan(step, state, (x_chunks, B_chunks, C_chunks, dt_chunks, high, low, segment))
    y = jnp.moveaxis(y, 0, 1).reshape(batch, chunks * q, heads, headdim)[:, :length]
    return y, state.reshape(initial_state.shape)


def chunk_length(length: int, chunk_size: int) -> int:
    """The chunk length actually used: the fewest chunks of at most `chunk_size` tokens, made equally long.

    Equal chunks waste at most a few tokens of padding: 257 tokens become two chunks of 136 rather than 256 and 1, five
    tokens one of 5.
    """
    if length <= chunk_size:
        return length
    even = -(-length // -(-length // chunk_size))
    return min(chunk_size, -(-even // 8) * 8)


@jax.custom_jvp
def split_cumsum(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The cumulative sum of float32 `a` over its last axis as high + low, two float32 arrays that hold it to 40 bits.

    A plain float32 sum that has reached -1000 has lost the digits that the decay between two neighbouring tokens is
    made of. Here every term is split into a multiple of a unit, chosen as a power of two so coarse that the sum of the
    multiples stays below 2^23 units and is exact, and a rest of at most half a unit, whose sum rounds below that.
    """
    total = jnp.sum(jnp.abs(a), axis=-1, keepdims=True)
    # With no bits of mantissa only the power of two is left; the maximum keeps a sum of zeros from dividing by zero.
    unit = jax.lax.reduce_precision(jnp.maximum(total, 1e-20), exponent_bits=8, mantissa_bits=0) * 2.0**-22
    multiple = jnp.round(a / unit)
    return unit * jnp.cumsum(multiple, axis=-1), jnp.cumsum(a - unit * multiple, axis=-1)


@split_cumsum.defjvp
def _split_cumsum_jvp(primals, tangents):
    # The derivative is that of the sum: rounding to units has no slope of its own.
    high, low = split_cumsum(*primals)
    tangent = jnp.cumsum(tangents[0], axis=-1)
    return (high, low), (tangent, jnp.zeros_like(tangent))
