"""The recurrence in fused kernels for NVIDIA GPUs (compute capability 9.0 and newer are measured).

One kernel forward and three backward; `pallas_gpu_kernels` says how they work. Here are their arguments' preparation and
the rule of differentiation.

Pallas has two ways to an NVIDIA GPU. Its Triton backend, used here, is deprecated since JAX 0.11 in favour of Mosaic GPU
(and is the reason, with others, for the upper bound on jax in pyproject.toml).
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
    return kernels.forward(x, dt, a, B, C, D, state, _walk(x, chunk, warps=4, stages=2), interpret)


def _ssd_forward(x, dt, a, B, C, D, state, chunk, interpret):
    return _ssd(x, dt, a, B, C, D, state, chunk, interpret), (x, dt, a, B, C, D, state)


def _ssd_backward(chunk, interpret, residuals, gradients):
    x, dt, a, B, C, D, state = residuals
    dy, dstate = gradients
    walk = _walk(x, chunk, warps=4, stages=3)
    starts, _ = kernels.states(x, dt, a, B, state, walk, interpret, backwards=False)
    ends, dstate = kernels.states(dy, None, a, C, dstate, walk, interpret, backwards=True)
    launch = Launch(chunk, warps=8, stages=2, heads=_heads_per_program(x, B.shape[2], chunk))
    dx, ddt, da, dB, dC, dD = kernels.backward(x, dt, a, B, C, D, starts, dy, ends, launch, interpret)
    dB, dC = (partial.sum(axis=0).astype(B.dtype) for partial in (dB, dC))
    return dx, ddt, da, dB, dC, None if D is None else dD.sum(axis=(0, 2)), dstate


_ssd.defvjp(_ssd_forward, _ssd_backward)


def _walk(x: jax.Array, chunk: int, *, warps: int, stages: int) -> Launch:
    """Few rows and heads leave the machine idle: their head dims are then divided, down to the smallest tile."""
    batch, _, heads, headdim = x.shape
    split = 1
    while batch * heads * split < PROGRAMS and headdim // (2 * split) >= SMALLEST and split < 2:
        split *= 2
    return Launch(chunk, warps=warps, stages=stages, split=split)


def _heads_per_program(x: jax.Array, groups: int, chunk: int) -> int:
    """As many heads as add up in registers (16 at most) while four waves of programs are left."""
    batch, length, heads, _ = x.shape
    group_heads = heads // groups
    programs = batch * heads * -(-length // chunk)
    fits = [count for count in range(1, 17) if group_heads % count == 0 and programs // count >= 4 * PROGRAMS]
    return max(fits, default=1)


def _tile(size: int) -> int:
    """The power of two that holds `size`."""
    return max(SMALLEST, 1 << (size - 1).bit_length())


def _pad_last(array: jax.Array, more: int) -> jax.Array:
    return jnp.pad(array, ((0, 0),) * (array.ndim - 1) + ((0, more),)) if more else array
