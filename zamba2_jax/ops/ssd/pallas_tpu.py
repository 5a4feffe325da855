"""The recurrence in fused kernels for TPUs: the layout of their arguments, and the rule of differentiation.

`pallas_tpu_kernels` says how they work.
"""

import functools

import jax
import jax.numpy as jnp

from zamba2_jax.ops.ssd import pallas_tpu_kernels as kernels
from zamba2_jax.ops.ssd.chunked import split_cumsum
from zamba2_jax.ops.ssd.pallas_tpu_kernels import LANES, Plan

# Work over two tokens grows with the chunk; shorter ones would leave lanes idle.
CHUNK = 128
# Lanes of one program, whose blocks and temporaries must fit into VMEM beside the states: near the first, up to the
# second where the number of heads divides no better.
BLOCK_LANES, LARGEST_BLOCK_LANES = 512, 1024
LARGEST_HEADDIM, LARGEST_STATE = 256, 256
# Bytes of VMEM for the states of a group's heads, of the 16 MiB that the compiler grants a kernel by default.
STATES_MEMORY = 4 * 2**20


def obstacle(x: jax.Array, B: jax.Array) -> str | None:
    """Why the kernels cannot serve these arguments of `api.ssd`, or None where they can."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x has dtype {x.dtype}; it takes bfloat16 and float32"
    if x.shape[-1] > LARGEST_HEADDIM:
        return f"the head dim is {x.shape[-1]}; it takes up to {LARGEST_HEADDIM}"
    if B.shape[-1] > LARGEST_STATE:
        return f"the state size is {B.shape[-1]}; it takes up to {LARGEST_STATE}"
    plan = _plan(x, B, interpret=False)
    memory = 4 * plan.blocks * plan.state * plan.lanes
    if memory > STATES_MEMORY:
        return f"the states of a group's heads take {memory} bytes; it takes up to {STATES_MEMORY}"
    return None


def ssd(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    initial_state: jax.Array,
    resets: jax.Array | None,
    *,
    interpret: bool = False,
    keep_states: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Arguments and results as in `chunked.ssd`; resets None is none. Differentiable. `keep_states` is `api.ssd`'s."""
    B, C = B.astype(x.dtype), C.astype(x.dtype)
    return _ssd(x, dt, A, B, C, D, initial_state, resets, _plan(x, B, interpret), keep_states)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _ssd(x, dt, A, B, C, D, state, resets, plan, keep_states):
    return _run(x, dt, A, B, C, D, state, resets, plan, keep_states=False)[:2]


def _run(x, dt, A, B, C, D, state, resets, plan, *, keep_states):
    """y, the last state, and, if they are kept, the states that chunks start with, as `kernels.states` makes them."""
    laid_out = _lay_out(plan, resets, x, dt, A, B, C, D, state)
    y, final, *starts = kernels.forward(plan, *laid_out, keep_states=keep_states)
    heads, group_heads, size = state.shape[1], state.shape[1] // plan.groups, state.shape[3]
    y = y.reshape(*y.shape[:2], plan.groups, -1, plan.headdim)
    y = y[:, : x.shape[1], :, :group_heads, : x.shape[3]].reshape(x.shape)
    final = final.reshape(plan.batch, plan.state, plan.groups, -1, plan.headdim)
    final = final[:, :size, :, :group_heads, : x.shape[3]].reshape(plan.batch, size, heads, -1)
    return y, jnp.moveaxis(final, 1, 3), *starts


def _ssd_forward(x, dt, A, B, C, D, state, resets, plan, keep_states):
    y, final, *starts = _run(x, dt, A, B, C, D, state, resets, plan, keep_states=keep_states)
    return (y, final), (x, dt, A, B, C, D, state, resets, starts)


def _ssd_backward(plan, keep_states, residuals, gradients):
    *arguments, resets, starts = residuals
    dy, dfinal = gradients
    (x, rows, B, C, D, state), to_arguments = jax.vjp(functools.partial(_lay_out, plan, resets), *arguments)
    [starts] = starts or [kernels.states(plan, x, rows, B, state)]
    dx, drows, dB, dC, dD, dinitial = kernels.backward(
        plan, x, rows, B, C, D, starts, _lay_out_tokens(plan, dy), _lay_out_state(plan, dfinal)
    )
    dD = None if D is None else dD.sum(axis=(0, 1)).reshape(D.shape)
    return *to_arguments((dx, drows, dB, dC, dD, dinitial)), None


_ssd.defvjp(_ssd_forward, _ssd_backward)


def _plan(x: jax.Array, B: jax.Array, interpret: bool) -> Plan:
    batch, length, heads, headdim = x.shape
    groups, size = B.shape[2:]
    headdim = next((width for width in (32, 64) if headdim <= width), _up(headdim, LANES))
    shared = max(1, LANES // headdim)
    group_heads = _up(heads // groups, shared)
    fitting = range(shared, LARGEST_BLOCK_LANES // headdim + 1, shared)
    dividing = (count for count in reversed(fitting) if group_heads % count == 0)
    block = min(dividing, key=lambda count: abs(count * headdim - BLOCK_LANES))
    return Plan(
        batch=batch,
        groups=groups,
        blocks=group_heads // block,
        heads=block,
        headdim=headdim,
        state=64 if size <= 64 else _up(size, LANES),
        chunks=-(-length // CHUNK),
        chunk=CHUNK,
        dtype=x.dtype,
        interpret=interpret,
    )


def _lay_out(plan, resets, x, dt, A, B, C, D, state):
    """The arguments of `kernels.forward`. Whatever is added to a size is zero, so that it adds nothing."""
    if D is not None:
        D = _lay_out_heads(plan, jnp.broadcast_to(D[:, None], x.shape[2:])).reshape(-1, 1, plan.lanes)
    return (
        _lay_out_tokens(plan, x),
        _lay_out_rows(plan, dt, dt * A, resets),
        _lay_out_groups(plan, B),
        _lay_out_groups(plan, C),
        D,
        _lay_out_state(plan, state),
    )


def _lay_out_heads(plan: Plan, array: jax.Array) -> jax.Array:
    """(..., h, p) to (..., lanes of all blocks)."""
    leading, (heads, headdim) = array.shape[:-2], array.shape[-2:]
    group_heads = heads // plan.groups
    more = ((0, plan.blocks * plan.heads - group_heads), (0, plan.headdim - headdim))
    array = array.reshape(*leading, plan.groups, group_heads, headdim)
    return _pad(array, *more).reshape(*leading, -1)


def _lay_out_tokens(plan: Plan, array: jax.Array) -> jax.Array:
    """(b, l, h, p) to (b, l, lanes of all blocks)."""
    array = _lay_out_heads(plan, array)
    return _pad(array, (0, plan.chunks * plan.chunk - array.shape[1]), (0, 0))


def _lay_out_groups(plan: Plan, array: jax.Array) -> jax.Array:
    """(b, l, g, n) to (b, g, l, n)."""
    length, _, size = array.shape[1:]
    return _pad(jnp.swapaxes(array, 1, 2), (0, plan.chunks * plan.chunk - length), (0, plan.state - size))


def _lay_out_state(plan: Plan, state: jax.Array) -> jax.Array:
    """(b, h, p, n) to (b, n, lanes of all blocks)."""
    state = _lay_out_heads(plan, jnp.moveaxis(state, 3, 1))
    return _pad(state, (0, plan.state - state.shape[1]), (0, 0))


def _lay_out_rows(plan: Plan, dt: jax.Array, a: jax.Array, resets: jax.Array | None) -> jax.Array:
    """(b, blocks, plan.rows, l): the sums of `a` within chunks (high and low), dt, and how many resets a chunk has seen
    so far. Padding has dt = 0 and no reset, which leaves the state alone."""
    batch, length, _ = dt.shape
    more = plan.chunks * plan.chunk - length

    def by_block(array):
        array = jnp.swapaxes(array, 1, 2).reshape(batch, plan.groups, -1, length)
        array = _pad(array, (0, plan.blocks * plan.heads - array.shape[2]), (0, more))
        array = array.reshape(batch, plan.groups * plan.blocks, plan.heads, plan.chunks, plan.chunk)
        return _pad(array, (0, plan.row_heads - plan.heads), (0, 0), (0, 0))

    high, low = split_cumsum(by_block(a))
    if resets is None:
        segments = jnp.zeros((batch, plan.chunks, plan.chunk), jnp.float32)
    else:
        segments = _pad(resets, (0, more)).reshape(batch, plan.chunks, plan.chunk)
        segments = jnp.cumsum(segments, axis=-1, dtype=jnp.float32)
    shape = (batch, high.shape[1], plan.rows - 3 * plan.row_heads, plan.chunks, plan.chunk)
    segments = jnp.broadcast_to(segments[:, None, None], shape)
    rows = jnp.concatenate([high, low, by_block(dt), segments], axis=2)
    return rows.reshape(batch, -1, plan.rows, plan.chunks * plan.chunk)


def _pad(array: jax.Array, *last: tuple[int, int]) -> jax.Array:
    """Zeros before and after each of the last axes."""
    if not any(map(any, last)):
        return array
    return jnp.pad(array, ((0, 0),) * (array.ndim - len(last)) + last)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
