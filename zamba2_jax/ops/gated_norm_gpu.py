"""The gated RMSNorm in one kernel forward and one backward, for NVIDIA GPUs (Pallas, Triton backend).

A program owns one group of channels of some tokens and holds a token's group in registers: every number is read once
and nothing in float32 is written but the scale's gradient. XLA takes three passes forward and six backward.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from zamba2_jax.ops.gate import Z
from zamba2_jax.ops.gpu_arithmetic import Arithmetic

# Tokens per program of the backward pass, which adds up the scale's gradient over them, and how many of them are being
# loaded while one is worked on.
TOKENS, AHEAD = 32, 1
# The longest group that a program holds in registers.
LARGEST_GROUP = 16384


@dataclasses.dataclass(frozen=True)
class Options:
    """What does not change from call to call.

    Attributes:
        groups: the channels of y are this many groups, each normalised by itself.
        eps: added to the mean square.
        fills_gradient: whether the gradient of a gate that lies beside x is zero in x's place; else nothing is written
            there.
        interpret: run the body in plain JAX, on any device.
    """

    groups: int
    eps: float
    fills_gradient: bool
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalise(y: jax.Array, gate: jax.Array, scale: jax.Array, options: Options) -> jax.Array:
    """y (t,e), gate (t,e) or (t,2,e) with x beside it, scale (e,) -> (t,e) of y.dtype; as
    `ops.gated_norm.gated_rms_norm`."""
    return _forward(y, gate, scale, options)


def _normalise_forward(y, gate, scale, options):
    return _forward(y, gate, scale, options), (y, gate, scale)


def _normalise_backward(options, residuals, dout):
    y, gate, scale = residuals
    dy, dgate, dscale = _backward(y, gate, scale, dout, options)
    if gate.ndim == 3 and options.fills_gradient:
        # A padding, which XLA fuses with the sum of the parts' gradients; an update of zeros it would write out.
        dgate = jnp.pad(dgate[:, None], ((0, 0), (Z, gate.shape[1] - 1 - Z), (0, 0)))
    return dy, dgate, dscale.sum(axis=0).astype(scale.dtype)


normalise.defvjp(_normalise_forward, _normalise_backward)


class Group:
    """One group of channels of a token: loads, stores, and the float32 values that both passes need."""

    def __init__(self, size: int, eps: float):
        self._block = _block(size)
        self._first = pl.program_id(1) * size
        self._inside = jnp.arange(self._block) < size
        self._masked = self._block != size
        self._size, self._eps = size, eps

    def read(self, ref, *row, offset: int = 0) -> jax.Array:
        part = ref.at[(*row, pl.ds(offset + self._first, self._block))]
        return plgpu.load(part, mask=self._inside, other=0) if self._masked else plgpu.load(part)

    def load(self, ref, *row, offset: int = 0) -> jax.Array:
        return self.read(ref, *row, offset=offset).astype(jnp.float32)

    def store(self, ref, value, *row, offset: int = 0) -> None:
        part = ref.at[(*row, pl.ds(offset + self._first, self._block))]
        plgpu.store(part, value.astype(ref.dtype), mask=self._inside if self._masked else None)

    def mean(self, value) -> jax.Array:
        return jnp.sum(value) / self._size

    def inverse_rms(self, gated) -> jax.Array:
        return jax.lax.rsqrt(self.mean(gated * gated) + self._eps)


def _gate_rows(y, gate) -> tuple[jax.Array, int]:
    """The rows that the gate lies in, and its first channel there."""
    return gate.reshape(y.shape[0], -1), 0 if gate.ndim == 2 else Z * y.shape[1]


def warps_for(size: int, per_thread: int) -> int:
    """So many that a thread holds `per_thread` channels of a group: a power of two, as Triton wants."""
    return max(1, min(16, _block(size) // (32 * per_thread)))


def _block(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _forward(y, gate, scale, options: Options) -> jax.Array:
    gate, offset = _gate_rows(y, gate)
    size = y.shape[1] // options.groups
    arithmetic = Arithmetic.of(y.dtype, interpret=options.interpret)

    def body(y_ref, gate_ref, scale_ref, out_ref):
        group = Group(size, options.eps)
        gate = group.load(gate_ref, offset=offset)
        gated = group.load(y_ref) * gate * arithmetic.sigmoid(gate)
        # Rounded before the scale, as the checkpoints were trained.
        rounded = arithmetic.rounded_to(out_ref.dtype, gated * group.inverse_rms(gated))
        group.store(out_ref, rounded * group.load(scale_ref))

    def row(array):
        return pl.BlockSpec((None, array.shape[1]), lambda t, g: (t, 0))

    return pl.pallas_call(
        body,
        grid=(y.shape[0], options.groups),
        in_specs=[row(y), row(gate), pl.BlockSpec(scale.shape, lambda t, g: (0,))],
        out_specs=row(y),
        out_shape=jax.ShapeDtypeStruct(y.shape, y.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=warps_for(size, 16), num_stages=1),
        interpret=options.interpret,
        name="gated_rms_norm",
    )(y, gate, scale)


def _backward(y, gate, scale, dout, options: Options) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dy (t,e); dgate (t,e) or, where its gradient is not filled, of gate's shape; dscale (blocks,e) float32, to be
    added over blocks of tokens."""
    shape = y.shape if options.fills_gradient else gate.shape
    gate, offset = _gate_rows(y, gate)
    dgate_rows, to = (y.shape, 0) if options.fills_gradient else (gate.shape, offset)
    tokens, channels = y.shape
    size = channels // options.groups
    blocks = pl.cdiv(tokens, TOKENS)
    arithmetic = Arithmetic.of(y.dtype, interpret=options.interpret)

    def body(y_ref, gate_ref, scale_ref, dout_ref, dy_ref, dgate_ref, dscale_ref):
        group = Group(size, options.eps)
        scale = group.load(scale_ref)
        first = pl.program_id(0) * TOKENS
        last = jnp.minimum(first + TOKENS, tokens)

        def read(token):
            token = jnp.minimum(token, last - 1)
            return (
                group.read(y_ref, token),
                group.read(gate_ref, token, offset=offset),
                group.read(dout_ref, token),
            )

        def one(token, carry):
            dscale, under_way = carry
            [now, *under_way] = [*under_way, read(token + AHEAD)]
            y, gate, dout = (value.astype(jnp.float32) for value in now)
            sigmoid = arithmetic.sigmoid(gate)
            silu = gate * sigmoid
            slope = arithmetic.multiply_add(silu, 1 - sigmoid, sigmoid)
            gated = y * silu
            inverse = group.inverse_rms(gated)
            normed = gated * inverse
            dnormed = dout * scale
            dgated = inverse * arithmetic.multiply_add(-normed, group.mean(dnormed * normed), dnormed)
            group.store(dy_ref, dgated * silu, token)
            group.store(dgate_ref, dgated * y * slope, token, offset=to)
            normed = arithmetic.rounded_to(dout_ref.dtype, normed)
            return arithmetic.multiply_add(dout, normed, dscale), under_way

        start = jnp.zeros_like(scale), [read(first + ahead) for ahead in range(AHEAD)]
        dscale, _ = jax.lax.fori_loop(first, last, one, start)
        group.store(dscale_ref, dscale)

    def whole(array):
        return pl.BlockSpec(array.shape, lambda t, g: (0,) * array.ndim)

    dgate = jax.ShapeDtypeStruct(dgate_rows, gate.dtype)
    dy, dgate, dscale = pl.pallas_call(
        body,
        grid=(blocks, options.groups),
        in_specs=[whole(y), whole(gate), whole(scale), whole(dout)],
        out_specs=[whole(y), whole(dgate), pl.BlockSpec((None, channels), lambda t, g: (t, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(y.shape, y.dtype),
            dgate,
            jax.ShapeDtypeStruct((blocks, channels), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=warps_for(size, 8), num_stages=1),
        interpret=options.interpret,
        name="gated_rms_norm_backward",
    )(y, gate, scale, dout)
    return dy, dgate.reshape(shape), dscale
