"""The short causal convolutions before the state-space recurrence."""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from zamba2_jax.ops._checks import check_choice, check_floating, check_integer, check_shape
from zamba2_jax.ops._mesh import on_each_device
from zamba2_jax.ops._platform import fused_gpu_obstacle
from zamba2_jax.ops.gate import Behind, Gate, X
from zamba2_jax.sharding import BATCH_AXES, RULES, automatic_axes, dividing, length_axis, length_parts

Activation = Literal["silu"]
ACTIVATIONS = ("silu",)
Implementation = Literal["xla", "pallas_gpu"]
IMPLEMENTATIONS = ("xla", "pallas_gpu")


@functools.partial(jax.jit, static_argnames=("activation", "implementation", "interpret"))
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
    _check_options(activation, implementation, interpret)
    if x.ndim < 3:
        raise ValueError(f"x has shape {x.shape}; it must be (b, l, ...channels)")
    batch, length, *channels = x.shape
    width = _check_kernel(x, kernel, bias, channels)
    from_nothing = initial_window is None
    if from_nothing:
        initial_window = jnp.zeros((batch, width - 1, *channels), x.dtype)
    check_shape("initial_window", initial_window, (batch, width - 1, *channels), "(b, k-1, ...channels)")
    check_floating("initial_window", initial_window)
    _check_rows(batch, length, run_start, run_end, segment_ids)

    window = initial_window.astype(x.dtype)
    if from_nothing and _is_spread(length, width):
        options = {"activation": activation, "implementation": implementation, "interpret": interpret}
        y = _spread(functools.partial(causal_conv, **options), x, kernel, bias, run_start, segment_ids)
        return y, _window_of_tokens(x, window, run_start, run_end, segment_ids)
    if not _takes_kernel(implementation, interpret):
        segment = None if segment_ids is None else _padded_segments(segment_ids, run_start, width)
        padded = _pad(x, window, run_start)
        y = _convolve(padded, kernel, bias, segment, activation, length)
        return y, _final_window(padded, segment, run_end, width)

    def streams(conv_gpu, channels):
        return [conv_gpu.Stream(source=0, offset=0, kernel=0, first=0, channels=channels[0])]

    to_kernel = None if from_nothing else window
    (y,), _, _ = _fused((x,), (kernel,), (bias,), (to_kernel,), run_start, segment_ids, activation, interpret, streams)
    return y, _window_of_tokens(x, window, run_start, run_end, segment_ids)


class MixerConvs(NamedTuple):
    """What `mixer_convs` returns.

    Attributes:
        x: (b, l, e).
        B, C: (b, l, s) each.
        windows: ((b, k-1, e), (b, k-1, 2, s)), those after the run of what x and of what B and C were made of; None
            unless they were wanted.
        gate: z.
        behind: the columns behind B and C, or None where there are none.
    """

    x: jax.Array
    B: jax.Array
    C: jax.Array
    windows: tuple[jax.Array, jax.Array] | None
    gate: Gate
    behind: Behind | None


@functools.partial(jax.jit, static_argnames=("activation", "keep_windows", "implementation", "interpret"))
def mixer_convs(
    zx: jax.Array,
    bc: jax.Array,
    conv_x: tuple[jax.Array, jax.Array | None],
    conv_bc: tuple[jax.Array, jax.Array | None],
    *,
    initial_windows: tuple[jax.Array, jax.Array] | None = None,
    run_start: jax.Array | None = None,
    run_end: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    activation: Activation | None = None,
    keep_windows: bool = True,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> MixerConvs:
    """Runs both convolutions of a Mamba2 mixer, of x and of B and C, as `causal_conv` would one.

    On a GPU in one launch, which reads x where it lies beside z and leaves B and C apart, and in another for the
    gradients, which puts those of z and x into one array.

    Args:
      zx: (b, l, 2, e), z and x; only x is convolved.
      bc: (b, l, 2, s), B and C; or (b, l, w), these 2 s columns first and then others, which are not convolved.
      conv_x, conv_bc: kernels (k, e) and (k, 2, s), each with its bias (e,) and (2, s) or None.
      initial_windows: ((b, k-1, e), (b, k-1, 2, s)) or None for zeros.
      keep_windows: whether the windows after the run are wanted.
      The others as in `causal_conv`.

    Raises:
      ValueError: as `causal_conv`.
    """
    _check_options(activation, implementation, interpret)
    if zx.ndim != 4 or zx.shape[2] != 2:
        raise ValueError(f"zx has shape {zx.shape}; it must be (b, l, 2, e)")
    batch, length, _, inner = zx.shape
    kernel_bc = conv_bc[0]
    both = list(kernel_bc.shape[1:])
    has_others = bc.ndim == 3 and bc.shape[:2] == zx.shape[:2] and len(both) == 2 and bc.shape[2] >= math.prod(both)
    if not has_others and (bc.ndim != 4 or bc.shape[:3] != zx.shape[:3]):
        raise ValueError(
            f"bc has shape {bc.shape}; it must be (b, l, 2, s) = {(batch, length, 2, 's')}, or (b, l, w) with at least "
            f"the columns of conv_bc, whose kernel has shape {kernel_bc.shape}"
        )
    behind = Behind(bc) if has_others else None
    if has_others and math.prod(automatic_axes().values()) > 1:
        # Devices that share B and C by groups would share all columns.
        bc, has_others = _columns_of_bc(bc, both), False
    only_bc = _columns_of_bc(bc, both) if has_others else bc
    width = _check_kernel(zx, *conv_x, [inner])
    if _check_kernel(bc, *conv_bc, both if has_others else list(bc.shape[2:])) != width:
        raise ValueError(f"conv_bc has {conv_bc[0].shape[0]} taps and conv_x {width}; they must have as many")
    options = {"activation": activation, "implementation": implementation, "interpret": interpret}
    rows = {"run_start": run_start, "run_end": run_end, "segment_ids": segment_ids}
    from_nothing = initial_windows is None
    if not _takes_kernel(implementation, interpret) or (from_nothing and _is_spread(length, width)):
        windows = (None, None) if from_nothing else initial_windows
        x, window_x = causal_conv(zx[:, :, X], *conv_x, initial_window=windows[0], **rows, **options)
        bc, window_bc = causal_conv(only_bc, *conv_bc, initial_window=windows[1], **rows, **options)
        windows = (window_x, window_bc) if keep_windows else None
        return MixerConvs(x, bc[:, :, 0], bc[:, :, 1], windows, Gate(zx), behind)

    _check_rows(batch, length, **rows)
    shapes = (batch, width - 1, inner), (batch, width - 1, *both)
    if not from_nothing:
        for index, (window, shape) in enumerate(zip(initial_windows, shapes, strict=True)):
            check_shape(f"initial_windows[{index}]", window, shape, "(b, k-1, ...channels)")
            check_floating(f"initial_windows[{index}]", window)
        initial_windows = initial_windows[0].astype(zx.dtype), initial_windows[1].astype(bc.dtype)

    def streams(conv_gpu, channels):
        inner, state = channels[0], channels[1] // 2
        return [
            conv_gpu.Stream(source=0, offset=inner, kernel=0, first=0, channels=inner),
            conv_gpu.Stream(source=1, offset=0, kernel=1, first=0, channels=state),
            conv_gpu.Stream(source=1, offset=state, kernel=1, first=state, channels=state),
        ]

    # The kernel leaves the windows of whole rows alone.
    by_kernel = keep_windows and all(array is None for array in rows.values()) and length >= width - 1 > 0
    (x, B, C), windows, (for_gate, *columns) = _fused(
        (zx, bc),
        *zip(conv_x, conv_bc, strict=True),
        (None, None) if from_nothing else initial_windows,
        run_start,
        segment_ids,
        activation,
        interpret,
        streams,
        keep_windows=by_kernel,
        hand_on=(0, 1) if has_others else (0,),
    )
    if keep_windows and not by_kernel:
        if from_nothing:
            initial_windows = tuple(jnp.zeros(shape, of.dtype) for shape, of in zip(shapes, (zx, bc), strict=True))
        windows = tuple(
            _window_of_tokens(inputs, window, **rows)
            for inputs, window in zip((zx[:, :, X], only_bc), initial_windows, strict=True)
        )
    gate = Gate(for_gate, shares_gradient=True)
    if has_others:
        behind = Behind(*columns, shares_gradient=True)
    return MixerConvs(x, B, C, windows if keep_windows else None, gate, behind)


def _columns_of_bc(columns: jax.Array, both: list[int]) -> jax.Array:
    """(b, l, w) to (b, l, *both)."""
    return columns[..., : math.prod(both)].reshape(*columns.shape[:2], *both)


def _is_spread(length: int, width: int) -> bool:
    """Whether a row's tokens lie on several devices, none with fewer than reach across to the next."""
    parts = length_parts(length)
    return parts > 1 and length // parts >= width - 1 > 0


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


def _fused(
    sources,
    kernels,
    biases,
    windows,
    run_start,
    segment_ids,
    activation,
    interpret,
    streams,
    *,
    keep_windows=False,
    hand_on=(),
):
    """`conv_gpu.convolve` on every device of a mesh for its own rows and channels.

    Sources, kernels and the rest have the axes of channels that they have outside. `streams` makes the streams, of the
    module `conv_gpu` and the channels of each kernel on one device.
    """
    # Imported here: of use on a GPU only.
    from zamba2_jax.ops import conv_gpu

    batch, length = sources[0].shape[:2]
    width = kernels[0].shape[0]
    segment = None if segment_ids is None else _padded_segments(segment_ids, None, width)[:, width - 1 :]
    start = None if run_start is None else run_start.astype(jnp.int32)

    def plain(x, kernel, bias, window, start, segment):
        if segment is not None:
            segment = _from_first(jnp.pad(segment, ((0, 0), (width - 1, 0))), start, width)
        return _convolve(_pad(x, window, start), kernel, bias, segment, activation, length)

    def local(sources, kernels, biases, windows, start, segment):
        def flat(arrays, axes):
            return tuple(
                None if array is None else array.reshape(*array.shape[:axes], math.prod(array.shape[axes:]))
                for array in arrays
            )

        channels = [math.prod(kernel.shape[1:]) for kernel in kernels]
        options = conv_gpu.Options(
            streams=tuple(streams(conv_gpu, channels)),
            activate=activation is not None,
            keep_windows=keep_windows,
            hand_on=hand_on,
            interpret=interpret,
        )
        ys, last, handed_on = conv_gpu.convolve(
            flat(sources, 2),
            flat(kernels, 1),
            flat(biases, 0),
            flat(windows, 2),
            start,
            segment,
            options,
            plain,
        )
        if len(ys) == 1:
            ys = (ys[0].reshape(*sources[0].shape[:2], *kernels[0].shape[1:]),)
        last = tuple(
            array.reshape(*array.shape[:2], *kernel.shape[1:]) for array, kernel in zip(last, kernels, strict=False)
        )
        handed_on = tuple(array.reshape(sources[index].shape) for array, index in zip(handed_on, hand_on, strict=True))
        return ys, last, handed_on

    rows, spreads = _split(batch, [kernel.shape[1:] for kernel in kernels])
    of_row = PartitionSpec(rows)
    of_sources = tuple(
        # An axis of parts, in one array, comes before those of channels.
        PartitionSpec(rows, None, *(None,) * (source.ndim - 2 - len(spread)), *spread)
        for source, spread in zip(sources, spreads, strict=True)
    )
    of_windows = tuple(PartitionSpec(rows, None, *spread) for spread in spreads)
    of_ys = of_windows if len(kernels) == 1 else (of_windows[0], of_row, of_row)
    return on_each_device(
        local,
        (sources, kernels, biases, windows, start, segment),
        (
            of_sources,
            tuple(PartitionSpec(None, *spread) for spread in spreads),
            tuple(PartitionSpec(*spread) for spread in spreads),
            of_windows,
            of_row,
            of_row,
        ),
        (of_ys, of_windows if keep_windows else (), tuple(of_sources[index] for index in hand_on)),
    )


def _spread(convolve, x, kernel, bias, run_start, segment_ids) -> jax.Array:
    """y where a row's tokens are spread over devices: each is handed the last k - 1 inputs of the one before it, as an
    initial window."""
    batch, length = x.shape[:2]
    width, *channels = kernel.shape
    axis, parts = length_axis(length), length_parts(length)
    if run_start is not None:
        # What precedes the run is absent: as if it were zero, for a run without a window. It is the first token of a
        # run, not of a device's part, that has nothing before it.
        inside = jnp.arange(length) >= run_start[:, None]
        x = jnp.where(inside.reshape(*inside.shape, *(1,) * len(channels)), x, jnp.zeros((), x.dtype))

    def from_before(array):
        """The last k - 1 places of the device before; zeros on the first."""
        last = array[:, array.shape[1] - (width - 1) :]
        return jax.lax.ppermute(last, axis, [(device, device + 1) for device in range(parts - 1)])

    def local(x, kernel, bias, segment_ids):
        window = from_before(x)
        if segment_ids is not None:
            # A window is of the first token's segment: what lies before a change of id is zeroed.
            ids = jnp.concatenate([from_before(segment_ids), segment_ids[:, :1]], axis=1)
            changes = jnp.cumsum((ids[:, 1:] != ids[:, :-1])[:, ::-1], axis=1)[:, ::-1]
            same = (changes == 0).reshape(*changes.shape, *(1,) * len(channels))
            window = jnp.where(same, window, jnp.zeros((), window.dtype))
        return convolve(x, kernel, bias, initial_window=window, segment_ids=segment_ids)[0]

    rows, [spread] = _split(batch, [channels])
    of_x = PartitionSpec(rows, axis, *spread)
    return on_each_device(
        local,
        (x, kernel, bias, segment_ids),
        (of_x, PartitionSpec(None, *spread), PartitionSpec(*spread), PartitionSpec(rows, axis)),
        of_x,
    )


def _split(batch: int, kernels: list) -> tuple[tuple[str, ...] | None, list[tuple[tuple[str, ...] | None, ...]]]:
    """The mesh axes of the rows, and of each axis of each kernel's channels."""
    sizes = automatic_axes()

    def spread(channels):
        if len(channels) > 1:  # B and C, which all heads of a group read, are on every device
            return (None,) * len(channels)
        return (dividing((RULES["mamba_inner"],), sizes, channels[0]),)  # those of mamba's heads

    return dividing(BATCH_AXES, sizes, batch), [spread(channels) for channels in kernels]


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


def _takes_kernel(implementation: Implementation | None, interpret: bool) -> bool:
    obstacle = None if interpret else fused_gpu_obstacle()
    return implementation != "xla" and obstacle is None


def _check_options(activation: Activation | None, implementation: Implementation | None, interpret: bool) -> None:
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "pallas_gpu" and not interpret and (obstacle := fused_gpu_obstacle()) is not None:
        raise ValueError(f"implementation 'pallas_gpu' cannot serve: {obstacle}")


def _check_rows(batch: int, length: int, run_start, run_end, segment_ids) -> None:
    for name, bound in (("run_start", run_start), ("run_end", run_end)):
        if bound is not None:
            check_shape(name, bound, (batch,), "(b,)")
            check_integer(name, bound)
    if segment_ids is not None:
        check_shape("segment_ids", segment_ids, (batch, length), "(b, l)")
        check_integer("segment_ids", segment_ids)


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
