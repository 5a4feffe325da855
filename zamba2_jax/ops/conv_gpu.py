"""The short causal convolution in one kernel forward and one backward, for NVIDIA GPUs (Pallas, Triton backend).

A program owns some channels of a stretch of tokens and walks the tokens with the last k - 1 inputs in registers: every
number is read once, where XLA reads each for every tap and takes three passes over the data backward. Padding, windows
and segments mean the same as in `ops.conv`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# Tokens and channels per program, and tokens whose loads are on their way together.
TOKENS, CHANNELS, TOGETHER = 64, 512, 8
# Fewer tokens where there are fewer programs than this, which a large card has room for.
_PROGRAMS, _FEW_TOKENS = 264, 16


@dataclasses.dataclass(frozen=True)
class Options:
    """What does not change from call to call.

    Attributes:
        part: None, or which of the parts (b, l, parts, channels) of the input is convolved.
        activate: SiLU after the convolution.
        interpret: run the body in plain JAX, on any device.
    """

    part: int | None
    activate: bool
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def convolve(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    window: jax.Array | None,
    start: jax.Array | None,
    segment: jax.Array | None,
    options: Options,
    plain,
) -> jax.Array:
    """x (b,l,c), or (b,l,parts,c); kernel (k,c), bias (c,), window (b,k-1,c) or None -> y (b,l,c) of x.dtype.

    Args:
      start: (b,) int32 or None for 0, the token that the window stands before.
      segment: (b,l) int32 or None, the number of changes of segment before each token.
      plain: the same function in XLA's operations, of (x of this part, kernel, bias, window); it serves the gradient of
        the window, which training does not ask for and the compiler then removes.
    """
    return _forward(x, kernel, bias, window, start, segment, options)


def _convolve_forward(x, kernel, bias, window, start, segment, options, plain):
    return _forward(x, kernel, bias, window, start, segment, options), (x, kernel, bias, window, start, segment)


def _convolve_backward(options, plain, residuals, dy):
    x, kernel, bias, window, start, segment = residuals
    dx, dkernel, dbias = _backward(x, kernel, bias, window, start, segment, dy, options)
    dwindow = None
    if window is not None:
        own = x if options.part is None else x[:, :, options.part]
        _, of_window = jax.vjp(lambda window: plain(own, kernel, bias, window, start, segment), window)
        [dwindow] = of_window(dy)
    if options.part is not None:
        # A padding, which XLA fuses with the sum of the parts' gradients; an update of zeros it would write out.
        before, after = options.part, x.shape[2] - 1 - options.part
        dx = jnp.pad(dx[:, :, None], ((0, 0), (0, 0), (before, after), (0, 0)))
    dkernel = dkernel.sum(axis=(0, 1)).astype(kernel.dtype)
    dbias = None if bias is None else dbias.sum(axis=(0, 1)).astype(bias.dtype)
    return dx, dkernel, dbias, dwindow, None, None


convolve.defvjp(_convolve_forward, _convolve_backward)


class _Tokens:
    """Reads the inputs of one row and block of channels, and says which taps count."""

    def __init__(self, refs: dict, length: int, width: int, block: int, channels: int, offset: int):
        self._refs, self._length, self._width = refs, length, width
        self._channel = pl.program_id(0) * block
        self._inside = self._channel + jnp.arange(block) < channels
        self._block, self._offset = block, offset
        self._start = refs["start"][...] if "start" in refs else 0
        self.taps = [self._vector("kernel", tap) for tap in range(width)]
        self.bias = self._vector("bias") if "bias" in refs else jnp.zeros((block,), jnp.float32)

    def _vector(self, name: str, *row: int) -> jax.Array:
        part = self._refs[name].at[(*map(jnp.int32, row), pl.ds(self._channel, self._block))]
        return plgpu.load(part, mask=self._inside, other=0).astype(jnp.float32)

    def read(self, token, *, before: bool) -> tuple[jax.Array, jax.Array]:
        """The input of a token, which may lie outside the row, and the number of its segment. `before`: whether the
        token can stand before the row's first."""
        exists = (token >= self._start) & (token < self._length)
        place = jnp.clip(token, 0, self._length - 1)
        source = self._refs["x"].at[place, pl.ds(self._offset + self._channel, self._block)]
        value = plgpu.load(source, mask=self._inside & exists, other=0).astype(jnp.float32)
        if "window" in self._refs and (before or "start" in self._refs):
            place = token - self._start + self._width - 1
            in_window = (place >= 0) & (place < self._width - 1)
            source = self._refs["window"].at[jnp.clip(place, 0, self._width - 2), pl.ds(self._channel, self._block)]
            value += plgpu.load(source, mask=self._inside & in_window, other=0).astype(jnp.float32)
        if "segment" not in self._refs:
            return value, 0
        return value, self._refs["segment"][jnp.clip(jnp.maximum(token, self._start), 0, self._length - 1)]

    def last(self, token) -> list[tuple[jax.Array, jax.Array]]:
        """The k - 1 tokens before `token`."""
        return [self.read(token - back, before=True) for back in range(self._width - 1, 0, -1)]

    def counts(self, one, other) -> jax.Array | float:
        return (one == other).astype(jnp.float32) if "segment" in self._refs else 1.0

    def product(self, window: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
        """bias + Σ taps · inputs, `window` being the token and those before it, oldest first."""
        _, present = window[-1]
        total = self.bias
        for tap, (value, segment) in zip(self.taps, window, strict=True):
            total += tap * value * self.counts(segment, present)
        return total

    def dx_counts(self, token) -> jax.Array:
        return (token >= self._start) & (token < self._length)

    def mask(self, condition) -> jax.Array:
        return self._inside & condition

    def at(self, ref, token):
        return ref.at[jnp.clip(token, 0, self._length - 1), pl.ds(self._channel, self._block)]


def _prepare(x, kernel, bias, window, start, segment, options: Options):
    """The operands by name with their blocks, the grid, the tokens per program, and what it reads them with."""
    batch, length = x.shape[:2]
    width, channels = kernel.shape
    block = min(CHANNELS, 1 << (channels - 1).bit_length())
    offset = 0 if options.part is None else options.part * channels
    x = x.reshape(batch, length, -1)

    def of_row(*shape):
        return pl.BlockSpec((None, *shape), lambda c, t, b: (b, *(0 for _ in shape)))

    def whole(*shape):
        return pl.BlockSpec(shape, lambda c, t, b: tuple(0 for _ in shape))

    operands = {
        "x": (x, of_row(length, x.shape[2])),
        "kernel": (kernel, whole(*kernel.shape)),
        "bias": (bias, whole(channels)),
        "window": (None if window is None or width == 1 else window.astype(x.dtype), of_row(width - 1, channels)),
        "start": (start, of_row()),
        "segment": (segment, of_row(length)),
    }
    operands = {name: pair for name, pair in operands.items() if pair[0] is not None}
    blocks, stretch = pl.cdiv(channels, block), TOKENS
    if blocks * pl.cdiv(length, stretch) * batch < _PROGRAMS:
        stretch = min(stretch, _FEW_TOKENS)
    grid = (blocks, pl.cdiv(length, stretch), batch)
    tokens = functools.partial(_Tokens, length=length, width=width, block=block, channels=channels, offset=offset)
    return operands, grid, stretch, tokens, of_row


def _forward(x, kernel, bias, window, start, segment, options: Options) -> jax.Array:
    operands, grid, stretch, make_tokens, of_row = _prepare(x, kernel, bias, window, start, segment, options)
    batch, length = x.shape[:2]
    channels = kernel.shape[1]

    def body(*refs):
        y_ref = refs[-1]
        tokens = make_tokens(dict(zip(operands, refs, strict=False)))
        first = pl.program_id(1) * stretch

        def some(step, last):
            begin = first + step * TOGETHER
            window = [*last, *(tokens.read(begin + ahead, before=False) for ahead in range(TOGETHER))]
            for ahead in range(TOGETHER):
                y = tokens.product(window[ahead : ahead + len(last) + 1])
                if options.activate:
                    y *= jax.nn.sigmoid(y)
                inside = tokens.mask(begin + ahead < length)
                plgpu.store(tokens.at(y_ref, begin + ahead), y.astype(y_ref.dtype), mask=inside)
            return window[TOGETHER:]

        jax.lax.fori_loop(0, stretch // TOGETHER, some, tokens.last(first))

    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=[spec for _, spec in operands.values()],
        out_specs=of_row(length, channels),
        out_shape=jax.ShapeDtypeStruct((batch, length, channels), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=options.interpret,
        name="causal_conv",
    )(*(array for array, _ in operands.values()))


def _backward(x, kernel, bias, window, start, segment, dy, options: Options) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dx (b,l,c) of x.dtype; dkernel (b,blocks,k,c), dbias (b,blocks,c) float32, to be added over their first two."""
    operands, grid, stretch, make_tokens, of_row = _prepare(x, kernel, bias, window, start, segment, options)
    operands["dy"] = (dy, of_row(*dy.shape[1:]))
    batch, length, channels = dy.shape
    width = kernel.shape[0]

    def body(*refs):
        dx_ref, dkernel_ref, dbias_ref = refs[-3:]
        named = dict(zip(operands, refs, strict=False))
        tokens = make_tokens(named)
        block = tokens.bias.shape[0]
        first = pl.program_id(1) * stretch

        def advance(begin, count, last, later, sums):
            """Reads `count` tokens. `later` are the k - 1 latest gradients before the activation, with their segments,
            from which, once complete, a token's dx is made."""
            window = [*last, *(tokens.read(begin + ahead, before=False) for ahead in range(count))]
            gradients = [
                plgpu.load(tokens.at(named["dy"], begin + ahead), mask=tokens.mask(begin + ahead < length), other=0)
                for ahead in range(count)
            ]
            dkernel, dbias = sums
            for ahead in range(count):
                reached = window[ahead : ahead + width]
                _, present = reached[-1]
                gradient = gradients[ahead].astype(jnp.float32)
                if options.activate:
                    y = tokens.product(reached)
                    gate = jax.nn.sigmoid(y)
                    gradient *= gate * (1 + y * (1 - gate))
                later = [*later, (gradient, present)]
                token = begin + ahead
                mine = jnp.where(token < first + stretch, gradient, 0.0)
                dkernel = [
                    total + mine * value * tokens.counts(other, present)
                    for total, (value, other) in zip(dkernel, reached, strict=True)
                ]
                dbias += mine
                # The token k - 1 back has now been reached by all that can reach it, each with its own tap.
                _, of_token = reached[0]
                dx = jnp.zeros((block,), jnp.float32)
                for tap, (value, other) in zip(reversed(tokens.taps), later, strict=True):
                    dx += tap * value * tokens.counts(other, of_token)
                token -= width - 1
                plgpu.store(
                    tokens.at(dx_ref, token),
                    jnp.where(tokens.dx_counts(token), dx, 0.0).astype(dx_ref.dtype),
                    mask=tokens.mask((token >= first) & (token < length)),
                )
                later = later[1:]
            return window[count:], later, (dkernel, dbias)

        zeros = jnp.zeros((block,), jnp.float32)
        carry = (
            tokens.last(first),
            [(zeros, jnp.zeros((), jnp.int32) if "segment" in named else 0) for _ in range(width - 1)],
            ([zeros] * width, zeros),
        )
        carry = jax.lax.fori_loop(
            0,
            stretch // TOGETHER,
            lambda step, carry: advance(first + step * TOGETHER, TOGETHER, *carry),
            carry,
        )
        _, _, (dkernel, dbias) = advance(first + stretch, width - 1, *carry)
        for tap in range(width):
            _store_vector(dkernel_ref, dkernel[tap], tap)
        _store_vector(dbias_ref, dbias)

    def _store_vector(ref, value, *row):
        block = value.shape[0]
        channel = pl.program_id(0) * block
        plgpu.store(
            ref.at[(*map(jnp.int32, row), pl.ds(channel, block))], value, mask=channel + jnp.arange(block) < channels
        )

    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=[spec for _, spec in operands.values()],
        out_specs=[
            of_row(length, channels),
            pl.BlockSpec((None, None, width, channels), lambda c, t, b: (b, t, 0, 0)),
            pl.BlockSpec((None, None, channels), lambda c, t, b: (b, t, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(dy.shape, x.dtype),
            jax.ShapeDtypeStruct((batch, grid[1], width, channels), jnp.float32),
            jax.ShapeDtypeStruct((batch, grid[1], channels), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=options.interpret,
        name="causal_conv_backward",
    )(*(array for array, _ in operands.values()))
