"""Products with int8 and int4 matrices (`zamba2_jax.ops.quantized`) that widen the integers as they read them, and the
gradient of such a product in its input: the product with the matrix transposed, which reads the same integers.

Nothing is kept from the one for the other. Left to differentiation, every widened matrix would be: a copy of the model.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from zamba2_jax.ops._checks import check_choice, check_floating, check_shape
from zamba2_jax.ops._platform import platform
from zamba2_jax.ops.quantized import constant, group_size, scale_axes, widen_int4
from zamba2_jax.sharding import constrain_gathered

Implementation = Literal["fused", "blocked"]
IMPLEMENTATIONS = ("fused", "blocked")
Axes = tuple[str | None, ...]

# Elements that the blocked product widens at a time: 4 MB in float32, about what a core's cache holds.
BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class _How:
    """The arguments of a product that are no arrays: those of `dot_int8`."""

    axis: int
    implementation: Implementation
    block: int
    axes: Axes | None


@functools.partial(jax.jit, static_argnames=("axis", "axes", "implementation", "block"))
def dot_int8(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    *,
    axis: int,
    axes: Axes | None = None,
    implementation: Implementation | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """x times an int8 matrix. Differentiable in x, in reverse mode; the matrix is a constant.

    Args:
      x: (..., in), floating; the product is taken in this dtype and summed in float32.
      values: int8, (in, *out) for axis 0, (out, in) for axis 1.
      scale: float32 (*out).
      axes: logical names of values' dimensions. What devices store in parts is then gathered for the product, and once
        more for its gradient; None leaves it to the partitioner.
      implementation: "fused" leaves it to XLA to widen the integers inside the product, as its TPU and GPU compilers
        do; its CPU compiler would make a copy of the matrix. "blocked", for that one, widens some rows at a time, to
        float32, and multiplies in float32 too. None chooses by platform.
      block: how many integers "blocked" widens at a time, or a few more.

    Returns:
      (..., *out) in x.dtype.

    Raises:
      ValueError: a shape, dtype or name that does not fit, naming the argument. Where it is differentiated: scale is
        not a constant.
    """
    check_floating("x", x)
    if values.dtype != jnp.int8 or not (axis == 0 or (axis == 1 and values.ndim == 2)):
        raise ValueError(
            f"values is {values.dtype}{values.shape}, axis {axis}; it must be int8, (in, *out) for axis 0 or (out, in) "
            "for axis 1"
        )
    out = values.shape[:axis] + values.shape[axis + 1 :]
    check_shape("x", x, (*x.shape[:-1], values.shape[axis]), "(..., in)")
    check_shape("scale", scale, out, "(*out)")
    return _product(x, values, constant(scale), _How(axis, _choose(implementation), block, axes))


@functools.partial(jax.jit, static_argnames=("axes", "implementation", "block"))
def dot_int4(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    *,
    axes: Axes | None = None,
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
    return _product(x, values, constant(scale), _How(0, _choose(implementation), block, axes))


def _choose(implementation: Implementation | None) -> Implementation:
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation is None:
        return "blocked" if platform() == "cpu" else "fused"
    return implementation


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: jax.Array, values: jax.Array, scale: jax.Array, how: _How) -> jax.Array:
    return _forward(x, values, scale, how)[0]


def _forward(x, values, scale, how):
    residuals = values, scale
    x, values, scale = _at_hand(x, values, scale, how)
    y = _multiply(x, values, scale, how, x.dtype, over_rows=how.axis == 0)
    if values.dtype == jnp.int8:
        y = y * scale
    return y.astype(x.dtype), residuals


def _backward(how, residuals, slope):
    slope, values, scale = _at_hand(slope, *residuals, how)
    dtype = slope.dtype
    if values.dtype == jnp.int8:
        slope = slope.astype(jnp.float32) * scale
    return _multiply(slope, values, scale, how, dtype, over_rows=how.axis != 0).astype(dtype), None, None


_product.defvjp(_forward, _backward)


def _at_hand(x, values, scale, how):
    """The three, with the matrix whole on every device that uses it.

    The barrier ties the matrix to an input that changes. XLA may else widen or gather it once, before a loop over
    tokens, or in the forward pass for both, and keep what was to be saved; or the scales, spread out to all rows.
    """
    x, values, scale = jax.lax.optimization_barrier((x, values, scale))
    if how.axes is not None:
        values = constrain_gathered(values, *how.axes)
        bits = 8 if values.dtype == jnp.int8 else 4
        scale = constrain_gathered(scale, *scale_axes(how.axes, bits, how.axis))
    return x, values, scale


def _multiply(
    x: jax.Array, values: jax.Array, scale: jax.Array, how: _How, dtype: jnp.dtype, *, over_rows: bool
) -> jax.Array:
    """x times the matrix (rows, *columns), without int8's scale, in float32.

    Args:
      x: (..., rows) or, not `over_rows`, (..., *columns).
      dtype: of the operands of a fused product.
      over_rows: the sum is over rows, and the result (..., *columns); else over columns, and it is (..., rows).
    """
    contract = _sum_over_rows if over_rows else _sum_over_columns
    if how.implementation == "fused":
        return contract(x.astype(dtype), _widen(values, scale, dtype))
    return _by_blocks(contract, x.astype(jnp.float32), values, scale, how.block, over_rows)


def _widen(values: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """The matrix, or those of even and of odd rows: interleaving int4's nibbles into one would be a copy of it."""
    return (values.astype(dtype),) if values.dtype == jnp.int8 else widen_int4(values, scale, dtype)


def _sum_over_rows(x: jax.Array, matrices: tuple[jax.Array, ...]) -> jax.Array:
    """(..., rows) -> (..., *columns)."""
    count = len(matrices)
    products = [_dot(x[..., i::count], (x.ndim - 1,), matrix, (0,)) for i, matrix in enumerate(matrices)]
    return functools.reduce(jnp.add, products)


def _sum_over_columns(x: jax.Array, matrices: tuple[jax.Array, ...]) -> jax.Array:
    """(..., *columns) -> (..., rows)."""
    columns = tuple(range(1, matrices[0].ndim))
    leading = x.ndim - len(columns)
    parts = [_dot(x, tuple(range(leading, x.ndim)), matrix, columns) for matrix in matrices]
    return parts[0] if len(parts) == 1 else jnp.stack(parts, axis=-1).reshape(*x.shape[:leading], -1)


def _dot(x: jax.Array, x_axes: tuple[int, ...], matrix: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jax.lax.dot_general(x, matrix, ((x_axes, axes), ((), ())), preferred_element_type=jnp.float32)


def _by_blocks(
    contract: Callable[..., jax.Array],
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    block: int,
    over_rows: bool,
) -> jax.Array:
    """`contract` with the widened matrix, some of its rows at a time: whole groups of int4's."""
    int8 = values.dtype == jnp.int8
    units, per_byte = (values.shape[0], 1) if int8 else (scale.shape[0], 2)
    stored = values.shape[0] // units  # of a unit's rows, two to a byte in int4
    rows = stored * per_byte
    size = min(max(block // (rows * math.prod(values.shape[1:])), 1), units)

    def step(start: jax.Array | int, size: int, result: jax.Array) -> jax.Array:
        part = _slice(values, start * stored, size * stored)
        matrices = _widen(part, scale if int8 else _slice(scale, start, size), jnp.float32)
        if over_rows:
            return result + contract(_slice(x, start * rows, size * rows, axis=x.ndim - 1), matrices)
        return jax.lax.dynamic_update_slice_in_dim(result, contract(x, matrices), start * rows, axis=result.ndim - 1)

    leading = x.shape[: x.ndim - (1 if over_rows else values.ndim - 1)]
    result = jnp.zeros((*leading, *(values.shape[1:] if over_rows else (units * rows,))), jnp.float32)
    whole, rest = divmod(units, size)
    result = jax.lax.fori_loop(0, whole, lambda index, result: step(index * size, size, result), result)
    return step(whole * size, rest, result) if rest else result


def _slice(array: jax.Array, start: jax.Array | int, size: int, axis: int = 0) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)
