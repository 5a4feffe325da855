"""Weight-only quantisation: integers for matrices. `zamba2_jax.ops.quantized_products` multiplies by them.

`int8`: w ≈ values * scale, a scale per row or column, values in -127..127. A product takes the scale out of its sum, so
that the matrix unit sees plain integers, which bfloat16 holds exactly.

`int4`: w ≈ (nibble - 8) * scale, a scale per column and group of input channels (`GROUP`). Two successive input
channels share a byte, 2i in the low nibble. Bytes, not `jnp.int4`: that is stored in a whole byte on CPUs and half
of one elsewhere, and no Pallas kernel reads it on every platform. A group's scale minimises its squared error
over a few candidates; that takes a sixth off the error of max / 7 for normal weights.

Integers and scales are constants: a gradient passes through them, and one with respect to a scale is refused.
"""

import functools
import math
from typing import TypeVar

import jax
import jax.numpy as jnp

from zamba2_jax.ops._checks import check_floating

Axis = TypeVar("Axis")

# Input channels that share a scale in int4: 4.25 bits a weight with a bfloat16 scale.
GROUP = 64
# Where 64 does not divide the inputs, the largest power of two that does; below this, scales would outweigh weights.
SMALLEST_GROUP = 8
# Scales tried for a group, as fractions of its value of largest magnitude. That value can be negative: dividing by
# a negative number gives it the sixteenth level, -8, which ±7 would leave unused.
_CANDIDATES = (1 / 7, 1 / 7.5, 1 / 8, 1 / 8.5, -1 / 8, -1 / 8.5, -1 / 9, -1 / 9.5)
_Best = tuple[jax.Array, jax.Array]  # scale and squared error


def group_size(in_features: int) -> int | None:
    """Input channels to a scale for an int4 matrix of so many inputs, or None where int4 does not serve."""
    size = math.gcd(in_features, GROUP)
    return size if size >= SMALLEST_GROUP else None


def scale_axes(axes: tuple[Axis, ...], bits: int, axis: int) -> tuple[Axis | None, ...]:
    """The names of a scale's dimensions, or how they are split, by those of its matrix, which sums over `axis`."""
    # int4: a device's share of the inputs need not hold whole groups; each device has the scales of all of them.
    return (None, *axes[1:]) if bits == 4 else axes[:axis] + axes[axis + 1 :]


@functools.partial(jax.jit, static_argnames=("axis",))
def quantize_int8(weight: jax.Array, *, axis: int) -> tuple[jax.Array, jax.Array]:
    """Rounds to 255 levels, symmetric about zero.

    Args:
      weight: floating, any shape.
      axis: the axis that a product sums over; entries along it share a scale.

    Returns:
      values int8 of weight's shape; scale float32 of that shape without `axis`. Where entries are NaN or infinite
      their scale is too.
    """
    check_floating("weight", weight)
    wide = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=axis, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / 127)
    return jnp.rint(wide / scale).astype(jnp.int8), scale.squeeze(axis)


@jax.jit
def quantize_int4(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds to 16 levels, with a scale per group of inputs and column.

    Args:
      weight: (in, *out), floating.

    Returns:
      values uint8 (in / 2, *out), two inputs to a byte; scale bfloat16 (in / group, *out). Where entries are NaN or
      infinite their scale is too.

    Raises:
      ValueError: `in` is not a multiple of `SMALLEST_GROUP`.
    """
    check_floating("weight", weight)
    size = group_size(weight.shape[0])
    if size is None:
        raise ValueError(
            f"weight has shape {weight.shape}; int4 needs a first axis that is a multiple of {SMALLEST_GROUP}, int8 "
            "takes any"
        )
    # A group at a time: the float32 numbers of a whole matrix would take four times its bfloat16 ones.
    values, scale = jax.lax.map(_quantize_group, weight.reshape(-1, size, *weight.shape[1:]))
    return values.reshape(-1, *weight.shape[1:]), scale


def _quantize_group(group: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(size, *out) -> uint8 (size / 2, *out) and bfloat16 (*out)."""
    group = group.astype(jnp.float32)
    top, bottom = group.max(axis=0), group.min(axis=0)
    largest = jnp.where(top >= -bottom, top, bottom)

    def try_candidate(best: _Best, fraction: jax.Array) -> tuple[_Best, None]:
        # The scale is rounded first: levels are chosen for the scale that will be multiplied by.
        scale = (largest * fraction).astype(jnp.bfloat16).astype(jnp.float32)
        scale = jnp.where(scale == 0, 1.0, scale)
        error = jnp.sum((group - _levels(group, scale) * scale) ** 2, axis=0)
        better = ~(error >= best[1])  # NaN is taken, so that it shows
        return (jnp.where(better, scale, best[0]), jnp.where(better, error, best[1])), None

    start = (jnp.ones_like(largest), jnp.full_like(largest, jnp.inf))
    (scale, _), _ = jax.lax.scan(try_candidate, start, jnp.asarray(_CANDIDATES))
    nibbles = (_levels(group, scale) + 8).astype(jnp.uint8).reshape(-1, 2, *group.shape[1:])
    return nibbles[:, 0] | nibbles[:, 1] << 4, scale.astype(jnp.bfloat16)


def _levels(weight: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.clip(jnp.rint(weight / scale), -8, 7)


def dequantize_int8(values: jax.Array, scale: jax.Array, *, axis: int) -> jax.Array:
    """The float32 weight that `quantize_int8`'s result stands for."""
    return values.astype(jnp.float32) * jnp.expand_dims(constant(scale), axis)


def dequantize_int4(values: jax.Array, scale: jax.Array) -> jax.Array:
    """The float32 weight (in, *out) that `quantize_int4`'s result stands for."""
    halves = widen_int4(values, constant(scale), jnp.float32)
    return jnp.stack(halves, axis=1).reshape(-1, *values.shape[1:])


def take_int8(values: jax.Array, scale: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows of an int8 matrix (v, d) with a scale (v,) per row, at integers of any shape: (*rows, d) float32."""
    return jnp.take(values, rows, axis=0).astype(jnp.float32) * jnp.take(constant(scale), rows, axis=0)[..., None]


def widen_int4(values: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """The even and the odd inputs' rows of an int4 matrix, (in / 2, *out) each, elementwise in the bytes.

    All in `dtype`, not in float32: XLA's TPU compiler then keeps the whole of it inside a product.
    """

    def widen(nibbles: jax.Array) -> jax.Array:
        grouped = (nibbles.astype(jnp.int8) - 8).astype(dtype).reshape(scale.shape[0], -1, *scale.shape[1:])
        return (grouped * scale[:, None].astype(dtype)).reshape(values.shape)

    return widen(values & 15), widen(values >> 4)


@jax.custom_jvp
def constant(scale: jax.Array) -> jax.Array:
    """`scale` itself, with respect to which nothing is differentiated."""
    return scale


@constant.defjvp
def _refuse_gradient(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    raise ValueError(
        "the scales of int8 and int4 weights are constants, as the integers are: gradients pass through a quantized "
        "model to its inputs, to what is not quantized and to LoRAs (add_lora), and not to its matrices; load it "
        "without quantize= to train these."
    )
