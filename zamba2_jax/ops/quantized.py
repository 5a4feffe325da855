"""Weight-only quantisation: integers for matrices, and products that widen the integers as they read them.

`int8`: w ≈ values * scale, a scale per row or column, values in -127..127. A product takes the scale out of its sum, so
that the matrix unit sees plain integers, which bfloat16 holds exactly.

`int4`: w ≈ (nibble - 8) * scale, a scale per column and group of input channels (`GROUP`). Two successive input
channels share a byte, 2i in the low nibble. Bytes, not `jnp.int4`: that is stored in a whole byte on CPUs and half
of one elsewhere, and no Pallas kernel reads it on every platform. A group's scale minimises its squared error
over a few candidates; that takes a sixth off the error of max / 7 for normal weights.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from zamba2_jax.ops._checks import check_choice, check_floating, check_shape
from zamba2_jax.ops._platform import platform

Implementation = Literal["fused", "blocked"]
IMPLEMENTATIONS = ("fused", "blocked")

# Input channels that share a scale in int4: 4.25 bits a weight with a bfloat16 scale.
GROUP = 64
# Where 64 does not divide the inputs, the largest power of two that does; below this, scales would outweigh weights.
SMALLEST_GROUP = 8
# Scales tried for a group, as fractions of its value of largest magnitude. That value can be negative: dividing by
# a negative number gives it the sixteenth level, -8, which ±7 would leave unused.
_CANDIDATES = (1 / 7, 1 / 7.5, 1 / 8, 1 / 8.5, -1 / 8, -1 / 8.5, -1 / 9, -1 / 9.5)
_Best = tuple[jax.Array, jax.Array]  # scale and squared error
# Elements that the blocked product widens at a time: 4 MB in float32, about what a core's cache holds.
BLOCK = 1 << 20


def group_size(in_features: int) -> int | None:
    """Input channels to a scale for an int4 matrix of so many inputs, or None where int4 does not serve."""
    size = math.gcd(in_features, GROUP)
    return size if size >= SMALLEST_GROUP else None


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
    return _inference_only(values.astype(jnp.float32) * jnp.expand_dims(scale, axis))


def dequantize_int4(values: jax.Array, scale: jax.Array) -> jax.Array:
    """The float32 weight (in, *out) that `quantize_int4`'s result stands for."""
    halves = [_widen_int4(half, scale, jnp.float32) for half in _nibbles(values)]
    return _inference_only(jnp.stack(halves, axis=1).reshape(-1, *values.shape[1:]))


@functools.partial(jax.jit, static_argnames=("axis", "implementation", "block"))
def dot_int8(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    *,
    axis: int,
    implementation: Implementation | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """x times an int8 matrix.

    Args:
      x: (..., in), floating; the product is taken in this dtype and summed in float32.
      values: int8, `in` along `axis`: 0, or the last one.
      scale: float32, the shape of values without `axis`.
      implementation: "fused" leaves it to XLA to widen the integers inside the product, as its TPU and GPU compilers
        do; its CPU compiler would make a copy of the matrix. "blocked", for that one, widens some rows at a time, to
        float32, and multiplies in float32 too. None chooses by platform.
      block: how many integers "blocked" widens at a time, or a few more.

    Returns:
      (..., *out) in x.dtype. Not differentiable.

    Raises:
      ValueError: a shape, dtype or name that does not fit, naming the argument.
    """
    check_floating("x", x)
    if values.dtype != jnp.int8 or axis not in (0, values.ndim - 1):
        raise ValueError(f"values is {values.dtype}{values.shape}, axis {axis}; it must be int8, axis first or last")
    out = values.shape[:axis] + values.shape[axis + 1 :]
    check_shape("x", x, (*x.shape[:-1], values.shape[axis]), "(..., in)")
    check_shape("scale", scale, out, "(*out)")
    if _choose(implementation) == "fused":
        x, values = _now(x, values)
        summed = _dot(x, values.astype(x.dtype), axis)
    elif axis == 0:
        wide, size = x.astype(jnp.float32), _block_size(values.shape[0], math.prod(out), block)

        def product(index: jax.Array) -> jax.Array:
            return _dot(_slice(wide, index, size, -1), _slice(values, index, size).astype(jnp.float32), 0)

        summed = _sum_blocks(product, values.shape[0] // size, (*x.shape[:-1], *out))
    else:
        summed = _stack_blocks(x.astype(jnp.float32), values, block)
    return _inference_only((summed * scale).astype(x.dtype))


@functools.partial(jax.jit, static_argnames=("implementation", "block"))
def dot_int4(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    *,
    implementation: Implementation | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """x times an int4 matrix: values uint8 (in / 2, *out), scale (in / group, *out). The rest as in `dot_int8`."""
    check_floating("x", x)
    if values.dtype != jnp.uint8:
        raise ValueError(f"values has dtype {values.dtype}; it must be uint8, two int4 to a byte")
    in_features, out = 2 * values.shape[0], values.shape[1:]
    check_shape("x", x, (*x.shape[:-1], in_features), "(..., in)")
    groups = in_features // (group_size(in_features) or in_features)
    check_shape("scale", scale, (groups, *out), "(in / group, *out)")
    # Two products, of even and of odd inputs, each with a matrix that is elementwise in the bytes: interleaving the
    # nibbles into one matrix would be a copy of it.
    if _choose(implementation) == "fused":
        x, values = _now(x, values)
        even, odd = (_widen_int4(half, scale, x.dtype) for half in _nibbles(values))
        return _inference_only((_dot(x[..., 0::2], even, 0) + _dot(x[..., 1::2], odd, 0)).astype(x.dtype))

    rows = values.shape[0] // groups  # bytes of a group, in one column
    size = _block_size(groups, 2 * rows * math.prod(out), block)
    halves = [x[..., parity::2].astype(jnp.float32) for parity in (0, 1)]

    def product(index: jax.Array) -> jax.Array:
        nibbles, scales = _nibbles(_slice(values, index, size * rows)), _slice(scale, index, size)
        parts = [_slice(half, index, size * rows, -1) for half in halves]
        even, odd = (_dot(p, _widen_int4(n, scales, jnp.float32), 0) for p, n in zip(parts, nibbles, strict=True))
        return even + odd

    return _inference_only(_sum_blocks(product, groups // size, (*x.shape[:-1], *out)).astype(x.dtype))


def take_int8(values: jax.Array, scale: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows of an int8 matrix (v, d) with a scale (v,) per row, at integers of any shape: (*rows, d) float32."""
    taken = jnp.take(values, rows, axis=0).astype(jnp.float32) * jnp.take(scale, rows, axis=0)[..., None]
    return _inference_only(taken)


def _choose(implementation: Implementation | None) -> Implementation:
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation is None:
        return "blocked" if platform() == "cpu" else "fused"
    return implementation


def _now(x: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ties the integers to an input that changes. XLA may else widen them once, before a loop over tokens, and keep
    what they were to save."""
    return jax.lax.optimization_barrier((x, values))


def _dot(x: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
    contracted = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, matrix, contracted, preferred_element_type=jnp.float32)


def _nibbles(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    return values & 15, values >> 4


def _widen_int4(nibbles: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    # All in the dtype of the product, not in float32: XLA's TPU compiler then keeps the whole of it inside the product.
    grouped = (nibbles.astype(jnp.int8) - 8).astype(dtype).reshape(scale.shape[0], -1, *scale.shape[1:])
    return (grouped * scale[:, None].astype(dtype)).reshape(nibbles.shape)


def _block_size(count: int, elements: int, block: int) -> int:
    """The largest divisor of `count` for which so many times `elements` are at most `block`."""
    limit = max(min(block // elements, count), 1)
    return max(size for size in range(1, limit + 1) if count % size == 0)


def _slice(array: jax.Array, index: jax.Array, size: int, axis: int = 0) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis)


def _sum_blocks(product: Callable[[jax.Array], jax.Array], blocks: int, shape: tuple[int, ...]) -> jax.Array:
    """The sum of product(0), product(1), … in float32, one after the other."""
    return jax.lax.fori_loop(0, blocks, lambda index, total: total + product(index), jnp.zeros(shape, jnp.float32))


def _stack_blocks(x: jax.Array, values: jax.Array, block: int) -> jax.Array:
    """x (..., in) times values (v, in) transposed, some rows of values at a time."""
    if values.ndim != 2:
        raise ValueError(f"values has shape {values.shape}; summed over its last axis it must be (v, in)")
    rows, width = values.shape
    size = min(max(block // width, 1), rows)

    def add(index: jax.Array, result: jax.Array) -> jax.Array:
        start = jnp.minimum(index * size, rows - size)  # the last block overlaps the one before, with equal results
        part = jax.lax.dynamic_slice_in_dim(values, start, size).astype(jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(result, _dot(x, part, 1), start, axis=x.ndim - 1)

    return jax.lax.fori_loop(0, -(-rows // size), add, jnp.zeros((*x.shape[:-1], rows), jnp.float32))


@jax.custom_jvp
def _inference_only(y: jax.Array) -> jax.Array:
    return y


@_inference_only.defjvp
def _refuse_gradient(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    raise ValueError(
        "a quantized model is for inference: gradients do not pass through its int8 and int4 weights; load it without "
        "quantize= to train it."
    )
