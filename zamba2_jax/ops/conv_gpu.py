"""The short causal convolution in one kernel forward and one backward, for NVIDIA GPUs (Pallas, Triton backend).

A program owns some channels of a stretch of tokens and walks the tokens with the last k - 1 inputs in registers: every
number is read once, where XLA reads each for every tap and takes three passes over the data backward. Padding, windows
and segments mean the same as in `ops.conv`.

Channels come from and go to where they lie, in runs (`Stream`): several convolutions are one launch, and the parts of
an array neither cut out nor put together.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from zamba2_jax.ops.gpu_arithmetic import Arithmetic

# Tokens and channels per program, and tokens whose loads are on their way together.
TOKENS, CHANNELS, TOGETHER = 64, 512, 8
# Fewer tokens, forward and backward, where there are fewer programs than this, which a large card has room for. The
# gradients of a stretch take k - 1 tokens more than it has: short ones cost more there.
_PROGRAMS, _FEW_TOKENS, _FEW_TOKENS_BACKWARD = 396, 8, 16

Arrays = tuple[jax.Array | None, ...]


@dataclasses.dataclass(frozen=True)
class Stream:
    """A run of channels, which becomes an array of its own.

    Attributes:
        source: which of the sources (b, l, channels) it is read from, and
        offset: its first channel there.
        kernel: which of the kernels (k, channels), with their biases and windows, it is convolved by, and
        first: its first channel there.
        channels: how many.
    """

    source: int
    offset: int
    kernel: int
    first: int
    channels: int

    @property
    def block(self) -> int:
        """Channels per program."""
        return min(CHANNELS, 1 << (self.channels - 1).bit_length())

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.channels, self.block)


@dataclasses.dataclass(frozen=True)
class Options:
    """What does not change from call to call.

    Attributes:
        streams: together all channels of all kernels, and of every source but those handed on.
        activate: SiLU after the convolution.
        keep_windows: whether the last k - 1 inputs are wanted; of at least that many tokens, without start and segment.
        hand_on: which sources are results too, for others to read what is not convolved of them.
        interpret: run the body in plain JAX, on any device.
    """

    streams: tuple[Stream, ...]
    activate: bool
    keep_windows: bool
    hand_on: tuple[int, ...]
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def convolve(
    sources: Arrays,
    kernels: Arrays,
    biases: Arrays,
    windows: Arrays,
    start: jax.Array | None,
    segment: jax.Array | None,
    options: Options,
    plain: Callable[..., jax.Array],
) -> tuple[Arrays, Arrays, Arrays]:
    """Several convolutions in one launch.

    Args:
      sources: (b,l,c_s) each. kernels: (k,c_k) each. biases, windows: (c_k,) and (b,k-1,c_k) for each kernel, or None.
      start: (b,) int32 or None for 0, the token that the windows stand before.
      segment: (b,l) int32 or None, the number of changes of segment before each token.
      plain: one kernel's convolution in XLA's operations, of (inputs, kernel, bias, window, start, segment); it serves
        the gradient of the window, which training does not ask for and the compiler then removes.

    Returns:
      For each stream (b,l,c). For each kernel the last inputs (b,k-1,c_k), or nothing. The sources handed on; in their
      gradients, what others leave in the place of channels that are convolved is not looked at but written over.
    """
    return _forward(sources, kernels, biases, windows, start, segment, options)


def _convolve_forward(sources, kernels, biases, windows, start, segment, options, plain):
    results = _forward(sources, kernels, biases, windows, start, segment, options)
    return results, (sources, kernels, biases, windows, start, segment)


def _convolve_backward(options, plain, residuals, gradients):
    sources, kernels, biases, windows, start, segment = residuals
    dys, dlast, handed_on = gradients
    dsources, dkernels, dbiases = _backward(*residuals, dys, handed_on, options)
    if options.keep_windows:
        dsources = list(dsources)
        for stream in options.streams:
            part = dlast[stream.kernel][:, :, stream.first : stream.first + stream.channels]
            last, own = slice(-part.shape[1], None), slice(stream.offset, stream.offset + stream.channels)
            dsources[stream.source] = dsources[stream.source].at[:, last, own].add(part)
        dsources = tuple(dsources)

    def of_window(index):
        if windows[index] is None:
            return None
        own = [
            (sources[stream.source][:, :, stream.offset : stream.offset + stream.channels], dy)
            for stream, dy in zip(options.streams, dys, strict=True)
            if stream.kernel == index
        ]
        inputs, dy = (jnp.concatenate(arrays, axis=2) for arrays in zip(*own, strict=True))
        _, pull = jax.vjp(
            lambda window: plain(inputs, kernels[index], biases[index], window, start, segment), windows[index]
        )
        return pull(dy)[0]

    dkernels = tuple(
        gradient.sum(axis=(0, 1)).astype(kernel.dtype) for gradient, kernel in zip(dkernels, kernels, strict=True)
    )
    dbiases = tuple(
        None if bias is None else gradient.sum(axis=(0, 1)).astype(bias.dtype)
        for gradient, bias in zip(dbiases, biases, strict=True)
    )
    return dsources, dkernels, dbiases, tuple(map(of_window, range(len(windows)))), None, None


convolve.defvjp(_convolve_forward, _convolve_backward)


class _Tokens:
    """Reads the inputs of one row and block of a stream's channels, and says which taps count."""

    def __init__(
        self,
        refs: dict,
        stream: Stream,
        index: jax.Array,
        first: jax.Array,
        length: int,
        width: int,
        arithmetic: Arithmetic,
    ):
        self.arithmetic = arithmetic
        self._refs, self._stream, self._length, self._width = refs, stream, length, width
        self.first = first
        self.block = stream.block
        self._channel = index * self.block
        self._inside = self._channel + jnp.arange(self.block) < stream.channels
        self._start = refs["start"][...] if "start" in refs else 0
        self.taps = [self._vector("kernel", tap) for tap in range(width)]
        has_bias = f"bias{stream.kernel}" in refs
        self.bias = self._vector("bias") if has_bias else jnp.zeros((self.block,), jnp.float32)

    def _of_kernel(self, name: str) -> jax.Array | None:
        return self._refs.get(f"{name}{self._stream.kernel}")

    def among(self, ref, first: int, *row):
        """The block's place in rows of channels of which the stream's begin with `first`."""
        return ref.at[(*row, pl.ds(first + self._channel, self.block))]

    def _vector(self, name: str, *row: int) -> jax.Array:
        part = self.among(self._of_kernel(name), self._stream.first, *map(jnp.int32, row))
        return plgpu.load(part, mask=self._inside, other=0).astype(jnp.float32)

    def store_vector(self, name: str, value: jax.Array, *row: int) -> None:
        ref = self._of_kernel(name)
        part = self.among(ref, self._stream.first, *map(jnp.int32, row))
        plgpu.store(part, value.astype(ref.dtype), mask=self._inside)

    def read(self, token, *, before: bool) -> tuple[jax.Array, jax.Array]:
        """The input of a token, which may lie outside the row, and the number of its segment. `before`: whether the
        token can stand before the row's first."""
        exists = (token >= self._start) & (token < self._length)
        place = jnp.clip(token, 0, self._length - 1)
        source = self.among(self._refs[f"source{self._stream.source}"], self._stream.offset, place)
        value = plgpu.load(source, mask=self._inside & exists, other=0).astype(jnp.float32)
        window = self._of_kernel("window")
        if window is not None and (before or "start" in self._refs):
            place = token - self._start + self._width - 1
            in_window = (place >= 0) & (place < self._width - 1)
            source = self.among(window, self._stream.first, jnp.clip(place, 0, self._width - 2))
            value += plgpu.load(source, mask=self._inside & in_window, other=0).astype(jnp.float32)
        if "segment" not in self._refs:
            return value, 0
        return value, self._refs["segment"][jnp.clip(jnp.maximum(token, self._start), 0, self._length - 1)]

    def last(self, token) -> list[tuple[jax.Array, jax.Array]]:
        """The k - 1 tokens before `token`."""
        return [self.read(token - back, before=True) for back in range(self._width - 1, 0, -1)]

    def felt(self, value, one, other) -> jax.Array:
        """`value`, or zeros where two segments are not the same."""
        return value * (one == other).astype(jnp.float32) if "segment" in self._refs else value

    def product(self, window: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
        """bias + Σ taps · inputs, `window` being the token and those before it, oldest first."""
        _, present = window[-1]
        total = self.bias
        for tap, (value, segment) in zip(self.taps, window, strict=True):
            total = self.arithmetic.multiply_add(tap, self.felt(value, segment, present), total)
        return total

    def dx_counts(self, token) -> jax.Array:
        return (token >= self._start) & (token < self._length)

    def load_at(self, ref, token) -> jax.Array:
        """Of rows that hold the stream's channels alone; zeros beyond the length."""
        place = jnp.clip(token, 0, self._length - 1)
        return plgpu.load(self.among(ref, 0, place), mask=self._inside & (token < self._length), other=0)

    def store_at(self, ref, token, value, first: int, condition) -> None:
        part = self.among(ref, first, jnp.clip(token, 0, self._length - 1))
        plgpu.store(part, value.astype(ref.dtype), mask=self._inside & condition)


class _Call:
    """The operands of both passes by name with their blocks, and how the work is cut."""

    def __init__(self, sources, kernels, biases, windows, start, segment, options: Options, few_tokens: int):
        self.options = options
        self.batch, self.length = sources[0].shape[:2]
        self.width = kernels[0].shape[0]
        self._arithmetic = Arithmetic.of(sources[0].dtype, interpret=options.interpret)
        named = {}
        for name, arrays in {"source": sources, "kernel": kernels, "bias": biases, "window": windows}.items():
            named |= {f"{name}{index}": array for index, array in enumerate(arrays)}
        if self.width == 1:
            named = {name: None if name.startswith("window") else array for name, array in named.items()}
        named |= {"start": start, "segment": segment}
        self.operands = {name: array for name, array in named.items() if array is not None}
        blocks, stretch = sum(stream.blocks for stream in options.streams), TOKENS
        if blocks * pl.cdiv(self.length, stretch) * self.batch < _PROGRAMS:
            stretch = min(stretch, few_tokens)
        self.stretch = stretch
        self.grid = (blocks, pl.cdiv(self.length, stretch), self.batch)

    def run(self, name: str, body: Callable, outputs: dict, written_into: dict[str, str] | None = None) -> dict:
        """The outputs by name, of `body(refs by name, tokens, stream)` for every block of every stream.

        Args:
          outputs: by name, as `output` and `sums` make them.
          written_into: operands by name, whose memory becomes that of the output of the name given.
        """
        operands, results = list(self.operands), list(outputs)

        def kernel(*refs):
            named = dict(zip([*operands, *results], refs, strict=True))

            first_token = pl.program_id(1) * self.stretch

            def of_stream(stream, index):
                place = (named, stream, index, first_token, self.length, self.width)
                body(named, _Tokens(*place, self._arithmetic), stream)

            block, first = pl.program_id(0), 0
            if len(self.options.streams) == 1:
                of_stream(self.options.streams[0], block)
                return
            for stream in self.options.streams:
                mine = (block >= first) & (block < first + stream.blocks)
                pl.when(mine)(functools.partial(of_stream, stream, block - first))
                first += stream.blocks

        arrays = pl.pallas_call(
            kernel,
            grid=self.grid,
            in_specs=[self._spec(key, array) for key, array in self.operands.items()],
            out_specs=[spec for _, spec in outputs.values()],
            out_shape=[shape for shape, _ in outputs.values()],
            input_output_aliases={
                operands.index(operand): results.index(result) for operand, result in (written_into or {}).items()
            },
            compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
            interpret=self.options.interpret,
            name=name,
        )(*self.operands.values())
        return dict(zip(results, arrays, strict=True))

    def output(self, *shape: int, of: jax.Array) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """(b, *shape), of `of`'s dtype."""
        return jax.ShapeDtypeStruct((self.batch, *shape), of.dtype), self._of_row(*shape)

    def sums(self, *shape: int) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """(b, stretches, *shape) in float32: what each program adds up."""
        spec = pl.BlockSpec((None, None, *shape), lambda c, t, b: (b, t, *(0 for _ in shape)))
        return jax.ShapeDtypeStruct((self.batch, self.grid[1], *shape), jnp.float32), spec

    def _spec(self, name: str, array: jax.Array) -> pl.BlockSpec:
        if name.startswith(("kernel", "bias")):
            return pl.BlockSpec(array.shape, lambda c, t, b: (0,) * array.ndim)
        return self._of_row(*array.shape[1:])

    def _of_row(self, *shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda c, t, b: (b, *(0 for _ in shape)))


def _forward(sources, kernels, biases, windows, start, segment, options: Options):
    call = _Call(sources, kernels, biases, windows, start, segment, options, _FEW_TOKENS)
    length, width = call.length, call.width

    def body(refs, tokens, stream):
        y_ref = refs[f"y{options.streams.index(stream)}"]

        def some(step, last):
            begin = tokens.first + step * TOGETHER
            window = [*last, *(tokens.read(begin + ahead, before=False) for ahead in range(TOGETHER))]
            for ahead in range(TOGETHER):
                y = tokens.product(window[ahead : ahead + len(last) + 1])
                if options.activate:
                    y *= tokens.arithmetic.sigmoid(y)
                tokens.store_at(y_ref, begin + ahead, y, 0, begin + ahead < length)
            return window[TOGETHER:]

        jax.lax.fori_loop(0, call.stretch // TOGETHER, some, tokens.last(tokens.first))
        if options.keep_windows and width > 1:

            @pl.when(tokens.first + call.stretch >= length)
            def _():
                for place, (value, _) in enumerate(tokens.last(length)):
                    tokens.store_vector("last", value, place)

    outputs = {
        f"y{index}": call.output(call.length, stream.channels, of=sources[stream.source])
        for index, stream in enumerate(options.streams)
    }
    if options.keep_windows:
        source_of = {stream.kernel: stream.source for stream in options.streams}
        outputs |= {
            f"last{index}": call.output(width - 1, kernel.shape[1], of=sources[source_of[index]])
            for index, kernel in enumerate(kernels)
        }
    results = call.run("causal_conv", body, outputs)
    ys, last = (tuple(array for name, array in results.items() if name.startswith(kind)) for kind in ("y", "last"))
    return ys, last, tuple(sources[index] for index in options.hand_on)


def _backward(sources, kernels, biases, windows, start, segment, dys, handed_on, options: Options):
    """The gradients of the sources; of kernels (b,blocks,k,c) and biases (b,blocks,c), float32, to be added over their
    first two."""
    call = _Call(sources, kernels, biases, windows, start, segment, options, _FEW_TOKENS_BACKWARD)
    call.operands |= {f"dy{index}": dy for index, dy in enumerate(dys)}
    length, width = call.length, call.width

    def body(refs, tokens, stream):
        dy_ref, dx_ref = refs[f"dy{options.streams.index(stream)}"], refs[f"dsource{stream.source}"]
        first, arithmetic = tokens.first, tokens.arithmetic
        zeros = jnp.zeros((stream.block,), jnp.float32)

        def advance(begin, count, last, later, sums):
            """Reads `count` tokens. `later` are the k - 1 latest gradients before the activation, with their segments,
            from which, once complete, a token's dx is made."""
            window = [*last, *(tokens.read(begin + ahead, before=False) for ahead in range(count))]
            gradients = [tokens.load_at(dy_ref, begin + ahead) for ahead in range(count)]
            dkernel, dbias = sums
            for ahead in range(count):
                reached = window[ahead : ahead + width]
                _, present = reached[-1]
                gradient = gradients[ahead].astype(jnp.float32)
                if options.activate:
                    y = tokens.product(reached)
                    gate = arithmetic.sigmoid(y)
                    gradient *= gate * arithmetic.multiply_add(y, 1 - gate, 1.0)
                later = [*later, (gradient, present)]
                token = begin + ahead
                mine = jnp.where(token < first + call.stretch, gradient, 0.0)
                dkernel = [
                    arithmetic.multiply_add(mine, tokens.felt(value, other, present), total)
                    for total, (value, other) in zip(dkernel, reached, strict=True)
                ]
                dbias += mine
                # The token k - 1 back has now been reached by all that can reach it, each with its own tap.
                _, of_token = reached[0]
                dx = zeros
                for tap, (value, other) in zip(reversed(tokens.taps), later, strict=True):
                    dx = arithmetic.multiply_add(tap, tokens.felt(value, other, of_token), dx)
                token -= width - 1
                dx = jnp.where(tokens.dx_counts(token), dx, 0.0)
                tokens.store_at(dx_ref, token, dx, stream.offset, (token >= first) & (token < length))
                later = later[1:]
            return window[count:], later, (dkernel, dbias)

        carry = (
            tokens.last(first),
            [(zeros, jnp.zeros((), jnp.int32) if segment is not None else 0) for _ in range(width - 1)],
            ([zeros] * width, zeros),
        )
        carry = jax.lax.fori_loop(
            0,
            call.stretch // TOGETHER,
            lambda step, carry: advance(first + step * TOGETHER, TOGETHER, *carry),
            carry,
        )
        _, _, (dkernel, dbias) = advance(first + call.stretch, width - 1, *carry)
        for tap in range(width):
            tokens.store_vector("dkernel", dkernel[tap], tap)
        tokens.store_vector("dbias", dbias)

    outputs = {f"dsource{index}": call.output(*source.shape[1:], of=source) for index, source in enumerate(sources)}
    for index, kernel in enumerate(kernels):
        outputs[f"dkernel{index}"] = call.sums(*kernel.shape)
        outputs[f"dbias{index}"] = call.sums(kernel.shape[1])
    written_into = {}
    for index, gradient in zip(options.hand_on, handed_on, strict=True):
        call.operands[f"handed_on{index}"] = gradient
        written_into[f"handed_on{index}"] = f"dsource{index}"
    results = call.run("causal_conv_backward", body, outputs, written_into)
    return tuple(
        tuple(array for name, array in results.items() if name.startswith(kind))
        for kind in ("dsource", "dkernel", "dbias")
    )
