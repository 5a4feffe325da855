"""The short causal convolution before the state-space recurrence."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from zamba2_jax.ops._checks import check_choice, check_floating, check_integer, check_shape
from zamba2_jax.ops._mesh import on_each_device
from zamba2_jax.ops._platform import fused_gpu_obstacle
from zamba2_jax.sharding import BATCH_AXES, RULES, automatic_axes, dividing, length_axis, length_parts

Activation = Literal["silu"]
ACTIVATIONS = ("silu",)
Implementation = Literal["xla", "pallas_gpu"]
IMPLEMENTATIONS = ("xla", "pallas_gpu")


@functools.partial(jax.jit, static_argnames=("activation", "part", "implementation", "interpret"))
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
    part: int | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Convolves every channel with its own k taps, looking back only.

        y_t = activation(bias + sum_i kernel_i x_{t-(k-1)+i})

    Time may pass for only a run of a row's tokens, those from `run_start` to `run_end` - 1; what lies outside is
    padding and is not there at all: the token before the run's first is the last of the initial window.

    Args:
      x: (b, l, ...channels), floating; channels may be one or more axes.
      kernel: (k, ...channels), the last tap at the present token.
      bias: (...channels) or None.
      initial_window: (b, k-1, ...channels), the inputs before the run's first token, oldest first; None for zeros.
      run_start, run_end: (b,) integers with 0 <= run_start <= run_end <= l, or None for 0 and l.
      segment_ids: (b, l) integers or None. No tap reaches across a change of id: inputs on the other side count as
        zero. The initial window belongs to the segment of the run's first token.
      activation: None or "silu".
      part: None, or which part of x (b, l, parts, ...channels) is meant: the kernel reads it where it lies.
      implementation: "xla", or "pallas_gpu", one kernel each way. None takes the kernel on GPUs of compute capability
        9.0 and newer, else xla.
      interpret: for tests: run the kernel's body in plain JAX, on any device, slowly.

    Returns:
      y (b, l, ...channels) in x.dtype, computed in float32; unspecified but finite outside the run. And the window
      after the run, (b, k-1, ...channels) in x.dtype: the inputs that end with the run's last token, with zeros for
      those of another segment than that token's. For an empty run it is the initial window.

    Raises:
      ValueError: a shape, dtype or name that does not fit, naming the argument; or a kernel that cannot serve.
    """
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if x.ndim < 3 + (part is not None):
        raise ValueError(f"x has shape {x.shape}; it must be (b, l, {'...' if part is None else 'parts, ...'}channels)")
    if part is not None and not 0 <= part < x.shape[2]:
        raise ValueError(f"part is {part} and x has shape {x.shape}, (b, l, parts, ...channels)")
    batch, length, *channels = x.shape if part is None else (*x.shape[:2], *x.shape[3:])
    width = _check_kernel(x, kernel, bias, channels)
    from_nothing = initial_window is None
    if from_nothing:
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

    obstacle = None if interpret else fused_gpu_obstacle()
    if implementation == "pallas_gpu" and obstacle is not None:
        raise ValueError(f"implementation 'pallas_gpu' cannot serve: {obstacle}")
    window = initial_window.astype(x.dtype)
    parts = length_parts(length)
    if from_nothing and parts > 1 and length // parts >= width - 1 > 0:
        options = {"activation": activation, "implementation": implementation, "interpret": interpret}
        y = _spread(functools.partial(causal_conv, **options), x, kernel, bias, run_start, segment_ids, part)
        x = x if part is None else x[:, :, part]
        return y, _window_of_tokens(x, window, run_start, run_end, segment_ids)
    if implementation == "xla" or obstacle is not None:
        x = x if part is None else x[:, :, part]
        segment = None if segment_ids is None else _padded_segments(segment_ids, run_start, width)
        padded = _pad(x, window, run_start)
        y = _convolve(padded, kernel, bias, segment, activation, length)
        return y, _final_window(padded, segment, run_end, width)

    y = _fused(x, kernel, bias, window, run_start, segment_ids, activation, part, interpret)
    x = x if part is None else x[:, :, part]
    return y, _window_of_tokens(x, window, run_start, run_end, segment_ids)


def _pad(x: jax.Array, window: jax.Array, run_start: jax.Array | None) -> jax.Array:
    """(b, l + k - 1, ...channels): x[:, t] in place t + k - 1, and the window in the k - 1 places before the run."""
    if run_start is None:
        return jnp.concatenate([window, x], axis=1)
    padded = jnp.pad(x, ((0, 0), (window.shape[1], 0)) + ((0, 0),) * (x.ndim - 2))
    return jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0))(padded, window, run_start)


def _convolve(
    padded: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    segment: jax.Array | None,
    activation: Activation | None,
    length: int,
) -> jax.Array:
    width = kernel.shape[0]
    y = 0.0 if bias is None else bias.astype(jnp.float32)
    for tap in range(width):
        reached = padded[:, tap : tap + length].astype(jnp.float32)
        if segment is not None and tap < width - 1:
            same = segment[:, tap : tap + length] == segment[:, width - 1 :]
            reached = jnp.where(same.reshape(*same.shape, *(1,) * (padded.ndim - 2)), reached, 0.0)
        y = y + kernel[tap].astype(jnp.float32) * reached
    return _activate(y, activation).astype(padded.dtype)


def _fused(x, kernel, bias, window, run_start, segment_ids, activation, part, interpret) -> jax.Array:
    """`_convolve` by the kernel for GPUs, on every device of a mesh for its own rows and channels."""
    # Imported here: Pallas is slow to import, and of use on a GPU only.
    from zamba2_jax.ops import conv_gpu

    batch, length = x.shape[:2]
    width, *channels = kernel.shape
    options = conv_gpu.Options(part=part, activate=activation is not None, interpret=interpret)
    segment = None if segment_ids is None else _padded_segments(segment_ids, None, width)[:, width - 1 :]
    start = None if run_start is None else run_start.astype(jnp.int32)

    def plain(x, kernel, bias, window, start, segment):
        if segment is not None:
            segment = _from_first(jnp.pad(segment, ((0, 0), (width - 1, 0))), start, width)
        return _convolve(_pad(x, window, start), kernel, bias, segment, activation, length)

    def local(x, kernel, bias, window, start, segment):
        rows, all_channels = x.shape[0], math.prod(kernel.shape[1:])

        def flat(array, axes):
            return None if array is None else array.reshape(*array.shape[:axes], all_channels)

        y = conv_gpu.convolve(
            flat(x, 2 if part is None else 3),
            flat(kernel, 1),
            flat(bias, 0),
            flat(window, 2),
            start,
            segment,
            options,
            plain,
        )
        return y.reshape(rows, length, *kernel.shape[1:])

    rows, spread = _split(batch, channels)
    x_spec = PartitionSpec(rows, None, *(() if part is None else (None,)), *spread)
    of_row = PartitionSpec(rows)
    return on_each_device(
        local,
        (x, kernel, bias, window, start, segment),
        (
            x_spec,
            PartitionSpec(None, *spread),
            PartitionSpec(*spread),
            PartitionSpec(rows, None, *spread),
            of_row,
            of_row,
        ),
        PartitionSpec(rows, None, *spread),
    )


def _spread(convolve, x, kernel, bias, run_start, segment_ids, part) -> jax.Array:
    """y where a row's tokens are spread over devices: each is handed the last k - 1 inputs of the one before it, as an
    initial window."""
    batch, length = x.shape[:2]
    width, *channels = kernel.shape
    axis, parts = length_axis(length), length_parts(length)
    if run_start is not None:
        # What precedes the run is absent: as if it were zero, for a run without a window. It is the first token of a
        # run, not of a device's part, that has nothing before it.
        x, part = (x if part is None else x[:, :, part]), None
        inside = jnp.arange(length) >= run_start[:, None]
        x = jnp.where(inside.reshape(*inside.shape, *(1,) * len(channels)), x, jnp.zeros((), x.dtype))

    def from_before(array):
        """The last k - 1 places of the device before; zeros on the first."""
        last = array[:, array.shape[1] - (width - 1) :]
        return jax.lax.ppermute(last, axis, [(device, device + 1) for device in range(parts - 1)])

    def local(x, kernel, bias, segment_ids):
        window = from_before(x if part is None else x[:, :, part])
        if segment_ids is not None:
            # A window is of the first token's segment: what lies before a change of id is zeroed.
            ids = jnp.concatenate([from_before(segment_ids), segment_ids[:, :1]], axis=1)
            changes = jnp.cumsum((ids[:, 1:] != ids[:, :-1])[:, ::-1], axis=1)[:, ::-1]
            same = (changes == 0).reshape(*changes.shape, *(1,) * len(channels))
            window = jnp.where(same, window, jnp.zeros((), window.dtype))
        return convolve(x, kernel, bias, initial_window=window, segment_ids=segment_ids, part=part)[0]

    rows, spread = _split(batch, channels)
    of_x = PartitionSpec(rows, axis, *(() if part is None else (None,)), *spread)
    return on_each_device(
        local,
        (x, kernel, bias, segment_ids),
        (of_x, PartitionSpec(None, *spread), PartitionSpec(*spread), PartitionSpec(rows, axis)),
        PartitionSpec(rows, axis, *spread),
    )


def _split(batch: int, channels: list[int]) -> tuple[tuple[str, ...] | None, tuple[tuple[str, ...] | None, ...]]:
    """The mesh axes of the rows, and of each axis of channels."""
    sizes = automatic_axes()
    rows = dividing(BATCH_AXES, sizes, batch)
    if len(channels) > 1:  # B and C, which all heads of a group read, are on every device
        return rows, (None,) * len(channels)
    return rows, (dividing((RULES["mamba_inner"],), sizes, channels[0]),)  # those of mamba's heads


def _window_of_tokens(
    x: jax.Array,
    window: jax.Array,
    run_start: jax.Array | None,
    run_end: jax.Array | None,
    segment_ids: jax.Array | None,
) -> jax.Array:
    """`_final_window` without padded inputs: the k - 1 tokens that end with the run's last, window included."""
    batch, length = x.shape[:2]
    width = window.shape[1] + 1
    start = jnp.zeros((batch,), jnp.int32) if run_start is None else run_start
    end = jnp.full((batch,), length) if run_end is None else run_end
    token = end[:, None] - (width - 1) + jnp.arange(width - 1)

    def take(array, index):
        index = jnp.clip(index, 0, array.shape[1] - 1)
        return jnp.take_along_axis(array, index.reshape(*index.shape, *(1,) * (array.ndim - 2)), axis=1)

    def where(condition, yes, no):
        return jnp.where(condition.reshape(*condition.shape, *(1,) * (x.ndim - 2)), yes, no)

    old = take(window, token - start[:, None] + width - 1)
    latest = where(token >= start[:, None], take(x, token), old)
    if segment_ids is None or width == 1:
        return latest
    changes = _padded_segments(segment_ids, None, width)[:, width - 1 :]
    segments = take(changes, jnp.maximum(token, start[:, None]))
    return where(segments == segments[:, -1:], latest, jnp.zeros((), latest.dtype))


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
    return _from_first(jnp.pad(changes, ((0, 0), (width, 0))), run_start, width)


def _from_first(padded: jax.Array, run_start: jax.Array | None, width: int) -> jax.Array:
    """`padded` (b, l + k - 1) with every place before the run's first as that one."""
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
