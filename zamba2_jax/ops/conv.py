"""The short causal convolution before the state-space recurrence."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from zamba2_jax.ops._checks import check_choice, check_floating, check_integer, check_shape

Activation = Literal["silu"]
ACTIVATIONS = ("silu",)


@functools.partial(jax.jit, static_argnames=("activation",))
def causal_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    initial_window: jax.Array | None = None,
    run_start: jax.Array | None = None,
    run_end: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    activation: Activation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Convolves every channel with its own k taps, looking back only.

        y_t = activation(bias + sum_i kernel_i x_{t-(k-1)+i})

    Time may pass for only a run of a row's tokens, those from `run_start` to `run_end` - 1; what lies outside is
    padding and is not
    there at all: the token before the run's first is the last of the initial window.

    Args:
      x: (b, l, ...channels), floating; channels may be one or more axes.
      kernel: (k, ...channels), the last tap at the present token.
      bias: (...channels) or None.
      initial_window: (b, k-1, ...channels), the inputs before the run's first token, oldest first; None for zeros.
      run_start, run_end: (b,) integers with 0 <= run_start <= run_end <= l, or None for 0 and l.
      segment_ids: (b, l) integers or None. No tap reaches across a change of id: inputs on the other side count as
        zero. The initial window belongs to the segment of the run's first token.
      activation: None or "silu".

    Returns:
      y (b, l, ...channels) in x.dtype, computed in float32; unspecified but finite outside the run. And the window
      after the run, (b, k-1, ...channels) in x.dtype: the inputs that end with the run's last token, with zeros for
      those of another segment than that token's. For an empty run it is the initial window.

    Raises:
      ValueError: a shape, dtype or name that does not fit, naming the argument.
    """
    check_choice("activation", activation, ACTIVATIONS)
    if x.ndim < 3:
        raise ValueError(f"x has shape {x.shape}; it must be (b, l, ...channels)")
    batch, length, *channels = x.shape
    width = _check_kernel(x, kernel, bias, channels)
    if initial_window is None:
        initial_window = jnp.zeros((batch, width - 1, *channels), x.dtype)
    check_shape("initial_window", initial_window, (batch, width - 1, *channels), "(b, k-1, ...channels)")
    check_floating("initial_window", initial_window)
    for name, bound in (("run_start", run_start), ("run_end", run_end)):
        if bound is not None:
            check_shape(name, bound, (batch,), "(b,)")
            check_integer(name, bound)
    if segment_ids is not None:
        check_shape("segment_ids", segment_ids, (batch, length), "(b, l)")
        check_integer("segment_ids", segment_ids)

    # padded[:, t + k - 1] is x[:, t], and the window lies in the k - 1 places before the run's first token.
    window = initial_window.astype(x.dtype)
    if run_start is None:
        padded = jnp.concatenate([window, x], axis=1)
    else:
        padded = jnp.pad(x, ((0, 0), (width - 1, 0)) + ((0, 0),) * len(channels))
        padded = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0))(padded, window, run_start)

    segment = None if segment_ids is None else _padded_segments(segment_ids, run_start, width)
    y = 0.0 if bias is None else bias.astype(jnp.float32)
    for tap in range(width):
        reached = padded[:, tap : tap + length].astype(jnp.float32)
        if segment is not None and tap < width - 1:
            same = segment[:, tap : tap + length] == segment[:, width - 1 :]
            reached = jnp.where(same.reshape(batch, length, *(1,) * len(channels)), reached, 0.0)
        y = y + kernel[tap].astype(jnp.float32) * reached
    return _activate(y, activation).astype(x.dtype), _final_window(padded, segment, run_end, width)


@functools.partial(jax.jit, static_argnames=("activation",))
def causal_conv_step(
    x: jax.Array,
    window: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs `causal_conv` for one token.

    Args:
      x: (b, ...channels), floating.
      window: (b, k-1, ...channels), the inputs before this one, oldest first.
      kernel: (k, ...channels). bias: (...channels) or None. activation: None or "silu".

    Returns:
      y (b, ...channels) in x.dtype, and the new window, (b, k-1, ...channels) in window.dtype.

    Raises:
      ValueError: a shape, dtype or name that does not fit, naming the argument.
    """
    check_choice("activation", activation, ACTIVATIONS)
    if x.ndim < 2:
        raise ValueError(f"x has shape {x.shape}; it must be (b, ...channels)")
    batch, *channels = x.shape
    width = _check_kernel(x, kernel, bias, channels)
    check_shape("window", window, (batch, width - 1, *channels), "(b, k-1, ...channels)")
    check_floating("window", window)
    inputs = jnp.concatenate([window, x[:, None].astype(window.dtype)], axis=1)
    y = jnp.sum(inputs.astype(jnp.float32) * kernel.astype(jnp.float32), axis=1)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return _activate(y, activation).astype(x.dtype), inputs[:, 1:]


def _check_kernel(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, channels: list[int]) -> int:
    check_floating("x", x)
    check_floating("kernel", kernel)
    if kernel.ndim < 1 or kernel.shape[0] < 1 or list(kernel.shape[1:]) != channels:
        raise ValueError(
            f"kernel has shape {kernel.shape}; it must be (k, ...channels) with k >= 1 and channels {tuple(channels)}"
        )
    if bias is not None:
        check_shape("bias", bias, channels, "(...channels)")
    return kernel.shape[0]


def _padded_segments(segment_ids: jax.Array, run_start: jax.Array | None, width: int) -> jax.Array:
    """(b, l + k - 1): the changes of id before each place of the padded inputs. The window shares the run's first."""
    changes = jnp.cumsum(segment_ids[:, 1:] != segment_ids[:, :-1], axis=1, dtype=jnp.int32)
    padded = jnp.pad(changes, ((0, 0), (width, 0)))
    if run_start is None:
        return padded
    first = jnp.take_along_axis(padded, run_start[:, None] + width - 1, axis=1, mode="clip")
    place = jnp.arange(padded.shape[1])
    return jnp.where(place < run_start[:, None] + width - 1, first, padded)


def _final_window(padded: jax.Array, segment: jax.Array | None, run_end: jax.Array | None, width: int) -> jax.Array:
    """(b, k-1, ...channels): the k - 1 places of the padded inputs that end with the run's last token."""
    if run_end is None:
        run_end = jnp.full(padded.shape[:1], padded.shape[1] - (width - 1))

    def cut(row, start, size):
        return jax.lax.dynamic_slice_in_dim(row, start, size)

    window = jax.vmap(functools.partial(cut, size=width - 1))(padded, run_end)
    if segment is None or width == 1:
        return window
    segments = jax.vmap(functools.partial(cut, size=width - 1))(segment, run_end)
    same = segments == segments[:, -1:]
    return jnp.where(same.reshape(same.shape + (1,) * (window.ndim - 2)), window, jnp.zeros((), window.dtype))


def _activate(y: jax.Array, activation: Activation | None) -> jax.Array:
    return jax.nn.silu(y) if activation == "silu" else y
