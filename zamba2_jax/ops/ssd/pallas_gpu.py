"""The recurrence in fused kernels for NVIDIA GPUs: one walk over the chunks forward, backward from recomputed states.

`pallas_gpu_kernels` says how the kernels work. Here are the preparation of their arguments, their launches' sizes,
chosen by measurement on an H100, and the rule of differentiation.

Of 4 x 4096 tokens, 64 heads of 64 and a state of 128 in bfloat16, the walk forward took 0.22 ms with chunks of 64 (0.35
with 32, 0.44 with 128), where the memory's bandwidth would allow 0.10. Backward, chunks of 128 would make the states
faster (0.13 ms, not 0.19), but the two kernels that read them slower (0.66, not 0.54; 0.85, not 0.34).

Pallas has two ways to an NVIDIA GPU. Its Triton backend, used here, is deprecated since JAX 0.11 in favour of Mosaic
GPU; that is one reason for the upper bound on jax in pyproject.toml. Mosaic GPU was not measured.
"""

import functools

import jax
import jax.numpy as jnp

from zamba2_jax.ops.ssd import pallas_gpu_kernels as kernels
from zamba2_jax.ops.ssd.pallas_gpu_kernels import NO_MEMORY, Launch

CHUNK = 64
# The smallest side of a Triton matrix product, and the largest tiles that the registers hold.
SMALLEST, LARGEST_HEADDIM, LARGEST_STATE = 16, 128, 256
# One wave of programs, one for each of a Hopper's 132 multiprocessors, as a power of two.
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
    launch = functools.partial(Launch, chunk, warps=4, interpret=interpret)
    parts = _parts(x, chunk)
    if parts == 1:
        s = kernels.sums(a, x.dtype, launch(stages=1))
        return kernels.forward(x, dt, s, B, C, D, state, launch(stages=2, split=_split(x)))

    # The parts of a row side by side, as rows of their own: first for the states that they end with, and once it is
    # known what each begins with, for all. A part is whole chunks, so that the sums of its chunks are its own.
    batch, length = x.shape[:2]

    def rows(array):
        """(b,l,...) to (b·parts,l/parts,...)."""
        return array.reshape(batch * parts, length // parts, *array.shape[2:])

    def rows_of_steps(array):
        """(b,h,l) to (b·parts,h,l/parts)."""
        split = array.reshape(batch, -1, parts, length // parts)
        return jnp.moveaxis(split, 2, 1).reshape(batch * parts, -1, length // parts)

    x_rows, dt_rows, a_rows, B_rows = rows(x), rows_of_steps(dt), rows_of_steps(a), rows(B)
    s_rows = kernels.sums(a_rows, x.dtype, launch(stages=1))
    gains = kernels.last_state(x_rows, dt_rows, s_rows, B_rows, launch(stages=3)).reshape(
        batch, parts, *state.shape[1:]
    )
    kept = jnp.exp(a_rows.sum(axis=-1)).reshape(batch, parts, -1, 1, 1)
    starts = [state]
    for part in range(parts - 1):
        starts.append(kept[:, part] * starts[-1] + gains[:, part])
    starts = jnp.stack(starts, axis=1).reshape(batch * parts, *state.shape[1:])
    y, ends = kernels.forward(x_rows, dt_rows, s_rows, B_rows, rows(C), D, starts, launch(stages=2))
    return y.reshape(x.shape), ends.reshape(batch, parts, *state.shape[1:])[:, -1]


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


def _parts(x: jax.Array, chunk: int) -> int:
    """Into how many parts of whole chunks rows are cut, where they and their heads alone leave the machine idle."""
    batch, length, heads, _ = x.shape
    fits = [
        parts
        for parts in (2, 4, 8)
        if batch * heads * parts <= 2 * PROGRAMS and length % (parts * chunk) == 0 and length >= 8 * parts * chunk
    ]
    return max(fits, default=1)


def _split(x: jax.Array) -> int:
    """Where rows cannot be cut either, each head dim is halved."""
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
