"""The recurrence in fused kernels for NVIDIA GPUs: one walk over the chunks forward, backward from recomputed states.

`pallas_gpu_kernels` says how the kernels work. Here are the preparation of their arguments, their launches' sizes,
chosen by measurement on an H100, and the rule of differentiation.

Pallas has two ways to an NVIDIA GPU. Its Triton backend, used here, is deprecated since JAX 0.11 in favour of Mosaic
GPU; that is one reason for the upper bound on jax in pyproject.toml.
"""

import functools

import jax
import jax.numpy as jnp

from zamba2_jax.ops.ssd import pallas_gpu_kernels as kernels
from zamba2_jax.ops.ssd.pallas_gpu_kernels import NO_MEMORY, Launch

CHUNK = 64
# The smallest side of a Triton matrix product, and the largest tiles that the registers hold.
SMALLEST, LARGEST_HEADDIM, LARGEST_STATE = 16, 128, 256
# One wave of programs: below it, a head is shared by several.
PROGRAMS = 128


def obstacle(x: jax.Array, B: jax.Array) -> str | None:
    """Why the kernels cannot serve these arguments of `api.ssd`, or None where they can."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x has dtype {x.dtype}; it takes bfloat16 and float32"
    headdim, size = x.shape[-1], B.shape[-1]
    if headdim > LARGEST_HEADDIM:
        return f"the head dim is {headdim}; it takes up to {LARGEST_HEADDIM}"
    if size > LARGEST_STATE:
        return f"the state size is {size}; it takes up to {LARGEST_STATE}"
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
    chunk: int = CHUNK,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Arguments and results as in `chunked.ssd`; `chunk` is a power of two of at least 16. Differentiable."""
    length, headdim, size = x.shape[1], x.shape[-1], B.shape[-1]
    a = jnp.maximum(dt * A, NO_MEMORY)
    if resets is not None:
        a = jnp.where(resets[..., None], NO_MEMORY, a)
    steps_last = functools.partial(jnp.moveaxis, source=1, destination=2)

    # Tiles have sides that are powers of two; what is added is zero, adds nothing and is cut off again.
    more_headdim, more_state = _tile(headdim) - headdim, _tile(size) - size
    x = _pad_last(x, more_headdim)
    B, C = (_pad_last(array.astype(x.dtype), more_state) for array in (B, C))
    state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, more_headdim), (0, more_state)))
    # A sequence shorter than a chunk takes a smaller one.
    chunk = min(chunk, _tile(length))
    y, state = _ssd(x, steps_last(dt), steps_last(a), B, C, D, state, chunk, interpret)
    return y[..., :headdim], state[..., :headdim, :size]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _ssd(x, dt, a, B, C, D, state, chunk, interpret):
    s = kernels.sums(a, x.dtype, Launch(chunk, warps=4, stages=1, interpret=interpret))
    walk = Launch(chunk, warps=4, stages=2, split=_split(x), interpret=interpret)
    return kernels.forward(x, dt, s, B, C, D, state, walk)


def _ssd_forward(x, dt, a, B, C, D, state, chunk, interpret):
    return _ssd(x, dt, a, B, C, D, state, chunk, interpret), (x, dt, a, B, C, D, state)


def _ssd_backward(chunk, interpret, residuals, gradients):
    x, dt, a, B, C, D, state = residuals
    dy, dstate = gradients
    launch = functools.partial(Launch, chunk, interpret=interpret)
    s = kernels.sums(a, x.dtype, launch(warps=4, stages=1))
    walk = launch(warps=4, stages=3, split=_split(x))
    starts, _ = kernels.states(x, dt, s, B, state, walk)
    ends, dstate = kernels.states(dy, None, s, C, dstate, walk)
    dx, ddt, ds, at_end, skip, state_at_end = kernels.backward_heads(
        x, dt, s, B, C, D, starts, dy, ends, launch(warps=4, stages=1)
    )
    some = _heads_per_program(x, B.shape[2], chunk)
    dB, dC = kernels.backward_groups(x, dt, s, B, C, starts, dy, ends, launch(warps=8, stages=3, heads=some))
    dB, dC = (partial.sum(axis=0).astype(B.dtype) for partial in (dB, dC))
    da = _sum_to_end(ds, at_end, state_at_end.sum(axis=-1), chunk)
    return dx, ddt, da, dB, dC, None if D is None else skip.sum(axis=(0, 2)), dstate


_ssd.defvjp(_ssd_forward, _ssd_backward)


def _sum_to_end(ds: jax.Array, at_end: jax.Array, state_at_end: jax.Array, chunk: int) -> jax.Array:
    """da_t: the sum of ds (b,h,l) from t to the end of its chunk, and all that is felt there: at_end (b,h,l),
    state_at_end (b,h,c)."""
    batch, heads, length = ds.shape
    chunks = state_at_end.shape[2]

    def by_chunk(array):
        padded = jnp.pad(array, ((0, 0), (0, 0), (0, chunks * chunk - length)))
        return padded.reshape(batch, heads, chunks, chunk)

    later = jnp.tril(jnp.ones((chunk, chunk), jnp.float32))
    da = jnp.matmul(by_chunk(ds), later, precision=jax.lax.Precision.HIGHEST)
    da += (by_chunk(at_end).sum(axis=-1) + state_at_end)[..., None]
    return da.reshape(batch, heads, chunks * chunk)[..., :length]


def _split(x: jax.Array) -> int:
    """Few rows and heads leave the machine idle: each head dim is then halved."""
    batch, _, heads, headdim = x.shape
    return 2 if batch * heads < PROGRAMS and headdim >= 2 * SMALLEST else 1


def _heads_per_program(x: jax.Array, groups: int, chunk: int) -> int:
    """As many heads as add up in registers (32 at most) while four waves of programs are left."""
    batch, length, heads, _ = x.shape
    group_heads = heads // groups
    programs = batch * heads * -(-length // chunk)
    fits = [count for count in range(1, 33) if group_heads % count == 0 and programs // count >= 4 * PROGRAMS]
    return max(fits, default=1)


def _tile(size: int) -> int:
    """The power of two that holds `size`."""
    return max(SMALLEST, 1 << (size - 1).bit_length())


def _pad_last(array: jax.Array, more: int) -> jax.Array:
    return jnp.pad(array, ((0, 0),) * (array.ndim - 1) + ((0, more),)) if more else array
