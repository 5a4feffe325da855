"""Products with matrices that devices store in parts (`sharding.STORAGE_AXES`): gathered where they are used, their
gradients summed and cut in one step."""

import functools

import jax
from jax.sharding import PartitionSpec

from zamba2_jax.ops._mesh import on_each_device
from zamba2_jax.sharding import constrain, constrain_gathered, spec_in_use, storage_axes, stored_whole

Axes = tuple[str | None, ...]


def product(x: jax.Array, kernel: jax.Array, axes: Axes) -> jax.Array:
    """x (..., in) times kernel (in, *out), whose dimensions carry the logical names `axes`."""
    if stored_whole():
        return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
    return _product_with_parts(x, kernel, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product_with_parts(x: jax.Array, kernel: jax.Array, axes: Axes) -> jax.Array:
    """Gathers the kernel here and once more on the way back: kept from one to the other, the gathered kernels of all
    layers would be a copy of the model on every device."""
    return jax.lax.dot_general(x, constrain_gathered(kernel, *axes), (((x.ndim - 1,), (0,)), ((), ())))


def _forward(x, kernel, axes):
    return _product_with_parts(x, kernel, axes), (x, kernel)


def _backward(axes, residuals, cotangent):
    # Behind the barrier, or the compiler would see the forward pass's gathering in this one and keep its result.
    (x, kernel), cotangent = jax.lax.optimization_barrier((residuals, cotangent))
    out = tuple(range(x.ndim - 1, cotangent.ndim))
    whole = constrain_gathered(kernel, *axes)
    of_x = jax.lax.dot_general(cotangent, whole, ((out, tuple(range(1, kernel.ndim))), ((), ())))
    return of_x, summed_outer_product(x, cotangent, axes)


_product_with_parts.defvjp(_forward, _backward)


def summed_outer_product(
    left: jax.Array, right: jax.Array, axes: Axes, dtype: jax.typing.DTypeLike = None
) -> jax.Array:
    """The sum over tokens of left (b, l, in) times right (b, l, *out): (in, *out), stored as a parameter with `axes`.

    Each device multiplies its own tokens. Where they are of all devices that store parts, those sum and cut in one step
    (reduce-scatter), said here in so many words: not every compiler makes one of a sum and a cut.
    """
    leading = tuple(range(left.ndim - 1))

    def multiply(left, right):
        return jax.lax.dot_general(left, right, ((leading, leading), ((), ())), preferred_element_type=dtype)

    tokens = spec_in_use(left.shape[:2], ("batch", "length"))
    summed = [axis for entry in tokens for axis in entry]
    stored = spec_in_use((*left.shape[len(leading) :], *right.shape[len(leading) :]), axes)
    if left.ndim != 3 or set(storage_axes()) - set(summed):
        return constrain(multiply(left, right), *axes)
    parts = [tuple(axis for axis in entry if axis in storage_axes()) for entry in stored]
    whole = [tuple(axis for axis in entry if axis not in storage_axes()) for entry in stored]
    rest = tuple(axis for axis in summed if axis not in sum(parts, ()))

    def local(left, right):
        product = multiply(left, right)
        for dimension, axes in enumerate(parts):
            if axes:
                product = jax.lax.psum_scatter(product, axes, scatter_dimension=dimension, tiled=True)
        return jax.lax.psum(product, rest) if rest else product

    return on_each_device(
        local,
        (left, right),
        (PartitionSpec(*tokens, whole[0]), PartitionSpec(*tokens, *whole[1:])),
        PartitionSpec(*stored),
    )
