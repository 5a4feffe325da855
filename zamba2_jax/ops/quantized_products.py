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
from zamba2_jax.ops.quantized import constant, group_size, join_halves, split_halves, widen_int4
from zamba2_jax.sharding import automatic_axes, constrain_gathered

Implementation = Literal["fused", "blocked"]
IMPLEMENTATIONS = ("fused", "blocked")
Axes = tuple[str | None, ...]

# Elements that the blocked product widens at a time: 4 MB in float32, about what a core's cache holds.
BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class _How:
    """The arguments of a product that are no arrays: those of `dot_int8`."""

    implementation: Implementation
    block: int
    axes: Axes | None


@functools.partial(jax.jit, static_argnames=("axes", "implementation", "block"))
def dot_int8(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    *,
    axes: Axes | None = None,
    implementation: Implementation | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """x times an int8 matrix. Differentiable in x, in reverse mode; the matrix is a constant.

    Args:
      x: (..., in), floating; the product is taken in this dtype and summed in float32.
      values: int8 (*out, in).
      scale: float32 (*out).
      axes: logical names of values' dimensions. What devices store in parts is then gathered for the product, and once
        more for its gradient; None leaves it to the partitioner.
      implementation: "fused" leaves it to XLA to widen the integers inside the product, as its TPU and GPU compilers
        do; its CPU compiler would make a copy of the matrix. "blocked", for that one, widens some outputs at a time, to
        float32, and multiplies in float32 too. None chooses by platform; on a mesh "fused", for the partitioner
        follows no block of outputs that devices hold in parts.
      block: how many integers "blocked" widens at a time, or a few more.

    Returns:
      (..., *out) in x.dtype.

    Raises:
      ValueError: a shape, dtype or name that does not fit, naming the argument. Where it is differentiated: scale is
        not a constant.
    """
    check_floating("x", x)
    if values.dtype != jnp.int8:
        raise ValueError(f"values has dtype {values.dtype}; it must be int8")
    *out, in_features = values.shape
    check_shape("x", x, (*x.shape[:-1], in_features), "(..., in)")
    check_shape("scale", scale, tuple(out), "(*out)")
    return _product(x, values, constant(scale), _How(_choose(implementation), block, axes))


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
    """x times an int4 matrix: values uint8 (*out, in / 2), scale (*out, in / group). The rest as in `dot_int8`."""
    check_floating("x", x)
    if values.dtype != jnp.uint8:
        raise ValueError(f"values has dtype {values.dtype}; it must be uint8, two int4 to a byte")
    *out, stored = values.shape
    in_features = 2 * stored
    check_shape("x", x, (*x.shape[:-1], in_features), "(..., in)")
    groups = in_features // (group_size(in_features) or in_features)
    check_shape("scale", scale, (*out, groups), "(*out, in / group)")
    return _product(x, values, constant(scale), _How(_choose(implementation), block, axes))


def _choose(implementation: Implementation | None) -> Implementation:
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation is None:
        alone = math.prod(automatic_axes().values()) == 1
        return "blocked" if platform() == "cpu" and alone else "fused"
    return implementation


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: jax.Array, values: jax.Array, scale: jax.Array, how: _How) -> jax.Array:
    return _forward(x, values, scale, how)[0]


def _forward(x, values, scale, how):
    residuals = values, scale
    x, values, scale = _at_hand(x, values, scale, how)
    y = _multiply(_sum_over_inputs, x, values, scale, how, x.dtype)
    if values.dtype == jnp.int8:
        y = y * scale
    return y.astype(x.dtype), residuals


def _backward(how, residuals, slope):
    slope, values, scale = _at_hand(slope, *residuals, how)
    dtype = slope.dtype
    if values.dtype == jnp.int8:
        slope = slope.astype(jnp.float32) * scale
    return _multiply(_sum_over_outputs, slope, values, scale, how, dtype).astype(dtype), None, None


_product.defvjp(_forward, _backward)


def _at_hand(x, values, scale, how):
    """The three, with the matrix whole on every device that uses it.

    The barrier ties the matrix to an input that changes. XLA may else widen or gather it once, before a loop over
    tokens, or in the forward pass for both, and keep what was to be saved; or the scales, spread out to all rows.
    """
    x, values, scale = jax.lax.optimization_barrier((x, values, scale))
    if how.axes is not None:
        values = constrain_gathered(values, *how.axes)
        groups = (None,) * (scale.ndim - values.ndim + 1)
        scale = constrain_gathered(scale, *how.axes[:-1], *groups)
    return x, values, scale


def _multiply(
    contract: Callable[..., jax.Array],
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    how: _How,
    dtype: jnp.dtype,
) -> jax.Array:
    """`contract` of x with the matrix, without int8's scale, in float32; `dtype` is of a fused product's operands."""
    if how.implementation == "fused":
        return contract(x.astype(dtype), values, scale, dtype)
    return _by_blocks(contract, x.astype(jnp.float32), values, scale, how.block)


def _sum_over_inputs(x: jax.Array, values: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """(..., in) -> (..., *out)."""
    axis = (values.ndim - 1,)

    def dot(x: jax.Array, matrix: jax.Array) -> jax.Array:
        return _dot(x, (x.ndim - 1,), matrix, axis)

    if values.dtype == jnp.int8:
        return dot(x, values.astype(dtype))
    # Halves apart: to put an int4 matrix together would be to copy it.
    return sum(map(dot, split_halves(x, scale.shape[-1]), widen_int4(values, scale, dtype)))


def _sum_over_outputs(x: jax.Array, values: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """(..., *out) -> (..., in)."""
    outputs = tuple(range(values.ndim - 1))
    leading = x.ndim - len(outputs)

    def dot(matrix: jax.Array) -> jax.Array:
        return _dot(x, tuple(range(leading, x.ndim)), matrix, outputs)

    if values.dtype == jnp.int8:
        return dot(values.astype(dtype))
    return join_halves([dot(half) for half in widen_int4(values, scale, dtype)], scale.shape[-1])


def _dot(x: jax.Array, x_axes: tuple[int, ...], matrix: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jax.lax.dot_general(x, matrix, ((x_axes, axes), ((), ())), preferred_element_type=jnp.float32)


def _by_blocks(
    contract: Callable[..., jax.Array], x: jax.Array, values: jax.Array, scale: jax.Array, block: int
) -> jax.Array:
    """`contract` with the widened matrix, some of its outputs at a time."""
    out = values.shape[:-1]
    over_inputs = contract is _sum_over_inputs
    count, stored = math.prod(out), values.shape[-1]
    values, scale = values.reshape(count, stored), scale.reshape(count, *scale.shape[len(out) :])
    inputs = stored * (1 if values.dtype == jnp.int8 else 2)
    size = min(max(block // inputs, 1), count)
    leading = x.shape[:-1] if over_inputs else x.shape[: x.ndim - len(out)]
    if not over_inputs:
        x = x.reshape(*leading, count)

    def step(start: jax.Array | int, size: int, result: jax.Array) -> jax.Array:
        part = _slice(values, start, size), _slice(scale, start, size), jnp.float32
        if over_inputs:
            return jax.lax.dynamic_update_slice_in_dim(result, contract(x, *part), start, axis=result.ndim - 1)
        return result + contract(_slice(x, start, size, axis=x.ndim - 1), *part)

    result = jnp.zeros((*leading, count if over_inputs else inputs), jnp.float32)
    whole, rest = divmod(count, size)
    result = jax.lax.fori_loop(0, whole, lambda index, result: step(index * size, size, result), result)
    result = step(whole * size, rest, result) if rest else result
    return result.reshape(*leading, *out) if over_inputs else result


def _slice(array: jax.Array, start: jax.Array | int, size: int, axis: int = 0) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)
