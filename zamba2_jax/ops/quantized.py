"""Weight-only quantisation: integers for matrices. `zamba2_jax.ops.quantized_products` multiplies by them.

A matrix is stored (*out, in): what a product sums over lies side by side, as a GPU's matrix units take it. Sixteen-bit
numbers they can turn as they load them, bytes not.

`int8`: w ≈ values * scale, a scale per output, values in -127..127. A product takes the scale out of its sum, so that
the matrix unit sees plain integers, which bfloat16 holds exactly.

`int4`: w ≈ (nibble - 8) * scale, a scale per output and group of inputs (`GROUP`). A group's first half is in the low
nibbles of its bytes, its second in the high ones. Bytes, not `jnp.int4`: that is stored in a whole byte on CPUs and
half of one elsewhere, and no Pallas kernel reads it on every platform. A group's scale minimises its squared error
over a few candidates; that takes a sixth off the error of max / 7 for normal weights.

Integers and scales are constants: a gradient passes through them, and one with respect to a scale is refused.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Integers:
    """A matrix (in, out) of integers as one value: an operand of a kernel, or references to it inside.

    Attributes:
        values: int8 (out, in) or uint8 (out, in / 2). scale: float32 (out,) or bfloat16 (out, in / group).
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        out, stored = self.values.shape
        return (stored if self.group is None else 2 * stored), out

    @property
    def group(self) -> int | None:
        """Inputs that share a scale, of int4; None for int8."""
        return None if self.values.dtype == jnp.int8 else 2 * self.values.shape[1] // self.scale.shape[1]


def group_size(in_features: int) -> int | None:
    """Input channels to a scale for an int4 matrix of so many inputs, or None where int4 does not serve."""
    size = math.gcd(in_features, GROUP)
    return size if size >= SMALLEST_GROUP else None


def stored_axes(axes: tuple[Axis, ...], bits: int, axis: int) -> tuple[tuple[Axis, ...], tuple[Axis | None, ...]]:
    """The names of the dimensions of integers and of their scale, or how they are split, by those of the matrix, which
    sums over `axis`."""
    out = axes[:axis] + axes[axis + 1 :]
    # int4: a device's share of the inputs need not hold whole groups; each device has the scales of all of them.
    return (*out, axes[axis]), out if bits == 8 else (*out, None)


@functools.partial(jax.jit, static_argnames=("axis",))
def quantize_int8(weight: jax.Array, *, axis: int = -1) -> tuple[jax.Array, jax.Array]:
    """Rounds to 255 levels, symmetric about zero.

    Args:
      weight: floating, any shape.
      axis: the axis that a product sums over, which becomes the last; entries along it share a scale.

    Returns:
      values int8 (*out, in); scale float32 (*out). Where entries are NaN or infinite their scale is too.
    """
    check_floating("weight", weight)
    wide = jnp.moveaxis(weight, axis, -1).astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1)
    scale = jnp.where(largest == 0, 1.0, largest / 127)
    return jnp.rint(wide / scale[..., None]).astype(jnp.int8), scale


@functools.partial(jax.jit, static_argnames=("axis",))
def quantize_int4(weight: jax.Array, *, axis: int = -1) -> tuple[jax.Array, jax.Array]:
    """Rounds to 16 levels, with a scale per output and group of inputs.

    Args:
      weight: floating, any shape.
      axis: the axis that a product sums over, which becomes the last.

    Returns:
      values uint8 (*out, in / 2), two inputs to a byte; scale bfloat16 (*out, in / group). Where entries are NaN or
      infinite their scale is too.

    Raises:
      ValueError: `in` is not a multiple of `SMALLEST_GROUP`.
    """
    check_floating("weight", weight)
    size = group_size(weight.shape[axis])
    if size is None:
        raise ValueError(
            f"weight has shape {weight.shape}; int4 needs an axis {axis} that is a multiple of {SMALLEST_GROUP}, int8 "
            "takes any"
        )
    weight = jnp.moveaxis(weight, axis, 0)
    # A group at a time: the float32 numbers of a whole matrix would take four times its bfloat16 ones.
    values, scale = jax.lax.map(_quantize_group, weight.reshape(-1, size, *weight.shape[1:]))
    values = jnp.moveaxis(values.reshape(-1, *weight.shape[1:]), 0, -1)
    return values, jnp.moveaxis(scale, 0, -1)


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
    low, high = jnp.split((_levels(group, scale) + 8).astype(jnp.uint8), 2)
    return low | high << 4, scale.astype(jnp.bfloat16)


def _levels(weight: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.clip(jnp.rint(weight / scale), -8, 7)


def dequantize_int8(values: jax.Array, scale: jax.Array) -> jax.Array:
    """The float32 weight (*out, in) that `quantize_int8`'s result stands for."""
    return values.astype(jnp.float32) * constant(scale)[..., None]


def dequantize_int4(values: jax.Array, scale: jax.Array) -> jax.Array:
    """The float32 weight (*out, in) that `quantize_int4`'s result stands for."""
    return join_halves(widen_int4(values, constant(scale), jnp.float32), scale.shape[-1])


def take_int8(values: jax.Array, scale: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows of an int8 matrix (v, d) with a scale (v,) per row, at integers of any shape: (*rows, d) float32."""
    return jnp.take(values, rows, axis=0).astype(jnp.float32) * jnp.take(constant(scale), rows, axis=0)[..., None]


def widen_int4(values: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """The first and the second halves of an int4 matrix's groups, (*out, in / 2) each, elementwise in the bytes.

    All in `dtype`, not in float32: XLA's TPU compiler then keeps the whole of it inside a product.
    """
    grouped = values.reshape(*scale.shape, -1)

    def widen(nibbles: jax.Array) -> jax.Array:
        return ((nibbles.astype(jnp.int8) - 8).astype(dtype) * scale[..., None].astype(dtype)).reshape(values.shape)

    return widen(grouped & 15), widen(grouped >> 4)


def split_halves(x: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """The first and the second halves of an input's groups: (..., in) -> (..., in / 2) each."""
    halves = x.reshape(*x.shape[:-1], groups, 2, -1)
    return tuple(halves[..., part, :].reshape(*x.shape[:-1], -1) for part in range(2))


def join_halves(halves: Sequence[jax.Array], groups: int) -> jax.Array:
    """The inverse of `split_halves`."""
    leading = halves[0].shape[:-1]
    parts = [half.reshape(*leading, groups, -1) for half in halves]
    return jnp.stack(parts, axis=-2).reshape(*leading, -1)


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
