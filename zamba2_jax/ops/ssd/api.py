"""The public functions of the state-space recurrence: arguments are checked here, once for all forms, and the form is
chosen."""

import functools
import importlib
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp

from zamba2_jax.ops._checks import check_choice, check_floating, check_integer, check_rank, check_shape
from zamba2_jax.ops._platform import compute_capability, platform
from zamba2_jax.ops.ssd import associative, chunked, reference
from zamba2_jax.ops.ssd.partition import partitioned
from zamba2_jax.ops.ssd.steps import RawSteps

Implementation = Literal["reference", "scan", "chunked", "pallas_gpu", "pallas_tpu"]
IMPLEMENTATIONS = ("reference", "scan", "chunked", "pallas_gpu", "pallas_tpu")
# The fused kernel of each platform that has one.
FUSED = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}

# The result does not depend on the chunk length and the time does: the (q, q) work per token grows with q. On two cores
# in float32 (length 512, 64 heads of 64, state 128), chunks of 32, 64 and 128 took 32, 51 and 74 ms; 16 was no faster.
CPU_CHUNK_SIZE = 32


@functools.partial(jax.jit, static_argnames=("chunk_size", "implementation", "interpret", "keep_states"))
def ssd(
    x: jax.Array,
    dt: jax.Array | RawSteps,
    A: jax.Array | None,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 256,
    implementation: Implementation | None = None,
    interpret: bool = False,
    keep_states: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Runs the state-space recurrence over a sequence.

        state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_tᵀ
        y_t     = state_t C_t + D x_t

    Letters: b batch, l length (at least 1), h heads, p head dim, n state, g groups; h is a multiple of g and head i
    uses group i // (h // g).

    Args:
      x: (b, l, h, p), floating. Matrix products are taken in its dtype and accumulated in float32; everything else is
        float32.
      dt: (b, l, h) time steps, not negative: `time_step` makes them. A token with dt = 0 leaves the state as it is and
        adds nothing to it, so that zero marks padding. Or what they are made of, with A, which is then None.
      A: (h,), negative.
      B, C: (b, l, g, n), floating; cast to x.dtype by the chunked and the fused forms.
      D: (h,) or None, the skip connection.
      initial_state: (b, h, p, n) or None for zeros.
      segment_ids: (b, l) integers or None. Where the id changes from one token to the next, the state is zeroed, so
        that sequences packed in a row do not see each other. The initial state belongs to the segment of the row's
        first token.
      chunk_size: the longest chunk of the chunked form. The result does not depend on it beyond rounding. Chunks are
        made equally long, never longer than the sequence, and on CPU never longer than `CPU_CHUNK_SIZE`, where larger
        ones were measured to be slower. The fused kernels have their own chunks.
      implementation: "reference", the plain recurrence; "scan", a parallel prefix over time that holds every state;
        "chunked", matrix products within chunks, in XLA's operations; "pallas_gpu" and "pallas_tpu", the same in one
        kernel that keeps matrices and states on the chip, for NVIDIA GPUs of compute capability 9.0 and newer and for
        TPUs. None takes the fused kernel where there is one that can serve, and else "chunked". On a mesh
        (`jax.set_mesh`), each device runs it on its own rows, heads and tokens.
      interpret: run the named fused kernel in Pallas' interpreter, on any platform. For tests: it is slow.
      keep_states: leave the states that chunks start with, in x.dtype, to the backward pass rather than have it make
        them again. For a call that is itself made anew in a backward pass (`jax.checkpoint`), so that they live
        shortly: they take n / 64 times the memory of x on GPUs, n / 128 times on TPUs. The kernels for Hopper GPUs and
        for TPUs have them at hand; any other form does without. The result is the same.

    Returns:
      y (b, l, h, p) in x.dtype, and the state after the last token, (b, h, p, n) float32; it belongs to the last
      token's segment.

    Raises:
      ValueError: a shape, dtype or name that does not fit, naming the argument; or a fused kernel that cannot serve,
        saying why.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if interpret and implementation not in FUSED.values():
        raise ValueError(f"interpret is True with implementation {implementation!r}; it is for a named fused kernel")
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size!r}; it must be an integer of at least 1")
    raw = None
    if isinstance(dt, RawSteps):
        if A is not None:
            raise ValueError(f"A has shape {A.shape} and dt is made with an A_log of its own; A must be None")
        # Where a kernel reads dt raw, nobody reads these, and they are left out.
        raw, (dt, A) = dt, dt.made()
    check_rank("x", x, 4, "(b, l, h, p)")
    batch, length, heads, headdim = x.shape
    if length < 1:
        raise ValueError(f"x has shape {x.shape}, a sequence of length 0; it must hold at least one token")
    check_rank("B", B, 4, "(b, l, g, n)")
    groups, state_size = B.shape[2:]
    check_shape("dt", dt, (batch, length, heads), "(b, l, h)")
    _check_common(x, dt, A, B, C, D, groups)
    check_shape("B", B, (batch, length, groups, state_size), "(b, l, g, n)")
    check_shape("C", C, B.shape, "the shape of B, (b, l, g, n)")
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, headdim, state_size), jnp.float32)
    _check_state("initial_state", initial_state, (batch, heads, headdim, state_size))
    resets = None
    if segment_ids is not None:
        check_shape("segment_ids", segment_ids, (batch, length), "(b, l)")
        check_integer("segment_ids", segment_ids)
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]
        resets = jnp.pad(changes, ((0, 0), (1, 0)))

    if implementation is None:
        fused = FUSED.get(platform())
        implementation = fused if fused and _obstacle(fused, x, B) is None else "chunked"
    elif implementation in FUSED.values():
        obstacle = _obstacle(implementation, x, B, interpret=interpret)
        if obstacle is not None:
            raise ValueError(f"implementation {implementation!r} cannot serve: {obstacle}")

    dt, A, D, initial_state = _as_float32(dt, A, D, initial_state)
    if implementation in FUSED.values():
        kernel = functools.partial(_module(implementation).ssd, interpret=interpret, keep_states=keep_states)
        # The gradient of what lies before the raw steps is left unwritten: only where somebody writes it.
        if raw is not None and raw.behind.shares_gradient and implementation == "pallas_gpu":
            return kernel(x, raw, None, B, C, D, initial_state, resets)
    else:
        if resets is None:
            resets = jnp.zeros((batch, length), bool)
        if platform() == "cpu":
            chunk_size = min(chunk_size, CPU_CHUNK_SIZE)
        kernel = {
            "reference": reference.ssd,
            "scan": associative.ssd,
            "chunked": functools.partial(chunked.ssd, chunk_size=chunk_size),
        }[implementation]
    return partitioned(kernel, x, dt, A, B, C, D, initial_state, resets)


@jax.jit
def ssd_step(
    state: jax.Array,
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the recurrence of `ssd` for one token, in float32.

    Args:
      state: (b, h, p, n).
      x: (b, h, p), floating.
      dt: (b, h); rows or heads with dt = 0 keep their state.
      A: (h,). B, C: (b, g, n). D: (h,) or None.

    Returns:
      y (b, h, p) in x.dtype, and the new state, (b, h, p, n) float32.

    Raises:
      ValueError: a shape or dtype that does not fit, naming the argument.
    """
    check_rank("x", x, 3, "(b, h, p)")
    batch, heads, headdim = x.shape
    check_rank("B", B, 3, "(b, g, n)")
    groups, state_size = B.shape[1:]
    check_shape("dt", dt, (batch, heads), "(b, h)")
    _check_common(x, dt, A, B, C, D, groups)
    check_shape("B", B, (batch, groups, state_size), "(b, g, n)")
    check_shape("C", C, B.shape, "the shape of B, (b, g, n)")
    _check_state("state", state, (batch, heads, headdim, state_size))
    dt, A, D, state = _as_float32(dt, A, D, state)
    y, state = reference.update(state, x, dt, A, B, C, D)
    return y.astype(x.dtype), state


@jax.jit
def advance_state(state: jax.Array, x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array) -> jax.Array:
    """The state of `ssd` after a few tokens, without their outputs, in float32.

    Args:
      state: (b, h, p, n), before the first token.
      x: (b, l, h, p), floating.
      dt: (b, l, h); tokens with dt = 0 leave the state as it is.
      A: (h,). B: (b, l, g, n).

    Returns:
      The new state, (b, h, p, n) float32.

    Raises:
      ValueError: a shape or dtype that does not fit, naming the argument.
    """
    check_rank("x", x, 4, "(b, l, h, p)")
    batch, length, heads, headdim = x.shape
    check_rank("B", B, 4, "(b, l, g, n)")
    groups, state_size = B.shape[2:]
    check_shape("dt", dt, (batch, length, heads), "(b, l, h)")
    _check_common(x, dt, A, B, B, None, groups)
    check_shape("B", B, (batch, length, groups, state_size), "(b, l, g, n)")
    _check_state("state", state, (batch, heads, headdim, state_size))
    x, dt, A, B, state = _as_float32(x, dt, A, B, state)
    steps = dt * A
    # The decay that each token meets afterwards is that of a sum over later ones, taken from the last one backwards.
    after = jnp.cumsum(jnp.pad(steps[:, :0:-1], ((0, 0), (1, 0), (0, 0))), axis=1)[:, ::-1]
    inflow = (x * (dt * jnp.exp(after))[..., None]).reshape(batch, length, groups, -1, headdim)
    added = jnp.einsum("blgep,blgn->bgepn", inflow, B, precision=jax.lax.Precision.HIGHEST)
    return jnp.exp(jnp.sum(steps, axis=1))[..., None, None] * state + added.reshape(state.shape)


def _module(name: str) -> ModuleType:
    # Imported when called for: each is of use on one kind of device only.
    return importlib.import_module(f"zamba2_jax.ops.ssd.{name}")


def _obstacle(name: str, x: jax.Array, B: jax.Array, *, interpret: bool = False) -> str | None:
    """Why the fused kernel cannot serve, or None where it can."""
    if not interpret:
        wanted = next(platform for platform, fused in FUSED.items() if fused == name)
        if platform() != wanted:
            return (
                f"it needs a {wanted.upper()}, and this runs on {platform()} (interpret=True runs it anywhere, slowly)"
            )
        if wanted == "gpu" and compute_capability() < 9.0:
            return f"it needs compute capability 9.0 or newer, and this GPU has {compute_capability()}"
    return _module(name).obstacle(x, B)


def _check_common(x, dt, A, B, C, D, groups) -> None:
    heads = x.shape[-2]
    if groups < 1 or heads % groups:
        raise ValueError(f"B has {groups} groups and x has {heads} heads; heads must be a multiple of groups")
    check_shape("A", A, (heads,), "(h,)")
    named = {"x": x, "dt": dt, "A": A, "B": B, "C": C}
    if D is not None:
        check_shape("D", D, (heads,), "(h,)")
        named["D"] = D
    for name, array in named.items():
        check_floating(name, array)


def _check_state(name: str, state: jax.Array, shape: tuple[int, ...]) -> None:
    check_shape(name, state, shape, "(b, h, p, n)")
    check_floating(name, state)


def _as_float32(*arrays: jax.Array | None) -> list[jax.Array | None]:
    return [None if array is None else array.astype(jnp.float32) for array in arrays]
