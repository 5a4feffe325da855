"""The recurrence in fused kernels for NVIDIA GPUs: one walk over the chunks forward, backward from recomputed states.

`pallas_gpu_kernels` says how the kernels work; those of the time steps are in `pallas_gpu_steps`. Here are the
preparation of their arguments, their launches' sizes, chosen by measurement, and the rule of differentiation.

Pallas has two ways to an NVIDIA GPU. Its Triton backend, in which all kernels are written, is deprecated since JAX 0.11
in favour of Mosaic GPU; that is one reason for the upper bound on jax in pyproject.toml. In Mosaic, for Hopper GPUs and
the sizes of Zamba2 (`hopper_obstacle`), are also those that cost most: `hopper_forward`, and `hopper_backward`, which
reads once what two of Triton's read twice.

Of Triton's, on an H100, with 4 x 4096 tokens, 64 heads of 64 and a state of 128 in bfloat16: the walk forward took
0.22 ms with chunks of 64 (0.35 with 32, 0.44 with 128), where the memory's bandwidth would allow 0.10. Backward, chunks
of 128 would make the states faster (0.13 ms, not 0.19), but the two kernels that read them slower (0.66, not 0.54;
0.85, not 0.34). One kernel in place of these two was slower: forward and backward 1.71 ms instead of 1.46, its sums of
all heads having left no registers for the rest.
"""

import functools

import jax
import jax.numpy as jnp

from zamba2_jax.ops._platform import compute_capability
from zamba2_jax.ops.ssd import pallas_gpu_kernels as kernels
from zamba2_jax.ops.ssd import pallas_gpu_steps as time_steps
from zamba2_jax.ops.ssd.pallas_gpu_tiles import Launch
from zamba2_jax.ops.ssd.steps import RawSteps

CHUNK = 64
# The smallest side of a Triton matrix product, and the largest tiles that the registers hold.
SMALLEST, LARGEST_HEADDIM, LARGEST_STATE = 16, 128, 256
# The first JAX with the interface that the kernels for Hopper GPUs are written for; chunks, head dims and states.
HOPPER_JAX = (0, 11, 0)
HOPPER_SIZES = ((64, 64, 64), (64, 64, 128))
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


def hopper_obstacle(x: jax.Array, B: jax.Array, chunk: int) -> str | None:
    """Why the kernels for Hopper GPUs cannot serve these arguments and chunks, or None where they can."""
    length, heads, headdim = x.shape[1:]
    if jax.__version_info__ < HOPPER_JAX:
        return f"this is JAX {jax.__version__}; they take {'.'.join(map(str, HOPPER_JAX))} or newer"
    if int(compute_capability()) != 9:
        return f"their matrix instructions are Hopper's, and this GPU has compute capability {compute_capability()}"
    if x.dtype != jnp.bfloat16:
        return f"x has dtype {x.dtype}; they take bfloat16"
    sizes = chunk, headdim, B.shape[-1]
    if sizes not in HOPPER_SIZES:
        return f"chunk, head dim and state are {sizes}; they take {' or '.join(map(str, HOPPER_SIZES))}"
    if length % chunk:
        return f"there are {length} tokens; they take multiples of {chunk}"
    if (group_heads := heads // B.shape[2]) % 2:
        return f"a group has {group_heads} heads; they take an even number"
    return None


def ssd(
    x: jax.Array,
    dt: jax.Array | RawSteps,
    A: jax.Array | None,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    initial_state: jax.Array,
    resets: jax.Array | None,
    *,
    chunk: int = CHUNK,
    interpret: bool = False,
    keep_states: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Arguments and results as in `chunked.ssd`; `chunk` is a power of two of at least 16. Differentiable.

    dt may be raw, with A None: the gradient of its columns is then written for the raw steps alone. `keep_states` is
    `api.ssd`'s.
    """
    length, headdim, size = x.shape[1], x.shape[-1], B.shape[-1]
    # Tiles have sides that are powers of two; what is added is zero, adds nothing and is cut off again.
    more_headdim, more_state = _tile(headdim) - headdim, _tile(size) - size
    x = _pad_last(x, more_headdim)
    B, C = (_pad_last(array.astype(x.dtype), more_state) for array in (B, C))
    state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, more_headdim), (0, more_state)))
    # A sequence shorter than a chunk takes a smaller one.
    chunk = min(chunk, _tile(length))
    resets = None if resets is None else resets.astype(jnp.int32)
    of_time = dt if isinstance(dt, RawSteps) else (dt, A)
    y, state = _ssd(x, of_time, B, C, D, state, resets, chunk, interpret, keep_states)
    return y[..., :headdim], state[..., :headdim, :size]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _ssd(x, of_time, B, C, D, state, resets, chunk, interpret, keep_states):
    return _run(x, of_time, B, C, D, state, resets, chunk, interpret, keep_states=False)[:2]


def _run(x, of_time, B, C, D, state, resets, chunk, interpret, *, keep_states):
    """y, the last state, and, if they are kept and this kernel can, the states that chunks start with."""
    launch = functools.partial(Launch, chunk, warps=4, interpret=interpret)
    parts = _parts(x, chunk)
    steps, s = time_steps.prepare(of_time, resets, parts, x.dtype, launch(stages=1))
    forward = functools.partial(kernels.forward, launch=launch(stages=2, split=_split(x) if parts == 1 else 1))
    if not interpret and hopper_obstacle(x, B, chunk) is None:
        from zamba2_jax.ops.ssd import hopper_forward

        forward = functools.partial(hopper_forward.forward, keep_states=keep_states)
    if parts == 1:
        return forward(x, steps, s, B, C, D, state)

    # The parts of a row side by side, as rows of their own: first for the states that they end with, and once those are
    # known, for all. A part is whole chunks, so that the sums of its chunks are its own.
    batch, length = x.shape[:2]

    def rows(array):
        """(b,l,...) to (b·parts,l/parts,...)."""
        return array.reshape(batch * parts, length // parts, *array.shape[2:])

    before = kernels.last_states(rows(x), steps, s, rows(B), parts, launch(stages=3))
    y, *states = forward(rows(x), steps, s, rows(B), rows(C), D, state, before=before)
    return y.reshape(x.shape), *states


def _ssd_forward(x, of_time, B, C, D, state, resets, chunk, interpret, keep_states):
    y, last, *starts = _run(x, of_time, B, C, D, state, resets, chunk, interpret, keep_states=keep_states)
    return (y, last), (x, of_time, B, C, D, state, resets, starts)


def _ssd_backward(chunk, interpret, keep_states, residuals, gradients):
    x, of_time, B, C, D, state, resets, starts = residuals
    dy, dstate = gradients
    launch = functools.partial(Launch, chunk, interpret=interpret)
    steps, s = time_steps.prepare(of_time, resets, 1, x.dtype, launch(warps=4, stages=1))
    walk = launch(warps=4, stages=3, split=_split(x))
    [starts] = starts or [kernels.states(x, steps, s, B, state, walk)[0]]
    ends, dstate = kernels.states(dy, None, s, C, dstate, walk)
    some = _heads_per_program(x, B.shape[2], chunk)
    if not interpret and hopper_obstacle(x, B, chunk) is None:
        from zamba2_jax.ops.ssd import hopper_backward

        dx, of_steps, at_end, skip, dB, dC = hopper_backward.backward(
            x, steps, s, B, C, D, starts, dy, ends, heads=some
        )
        at_end = at_end.sum(axis=3)
    else:
        dx, of_steps, at_end, skip = kernels.backward_heads(
            x, steps, s, B, C, D, starts, dy, ends, launch(warps=4, stages=1)
        )
        dB, dC = kernels.backward_groups(x, steps, s, B, C, starts, dy, ends, launch(warps=8, stages=3, heads=some))
    dB, dC = (partial.sum(axis=0).astype(B.dtype) for partial in (dB, dC))
    dtime = time_steps.backward_steps(of_time, resets, of_steps, at_end, launch(warps=4, stages=1))
    dD = None if D is None else skip.sum(axis=(0, 2))
    return dx, dtime, dB, dC, dD, dstate, None


_ssd.defvjp(_ssd_forward, _ssd_backward)


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
