"""cuDNN's flash attention as `jax.nn.dot_product_attention` offers it, for causal rows that are padded, and for odd
lengths.

Through that function cuDNN knows no hidden keys but those of a mask with a number for every pair of tokens. Padding
needs none: with a row's real tokens moved to its front, in their order, causality alone hides the others from them.
"""

import jax
import jax.numpy as jnp


def cudnn_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    mask: jax.Array | None,
    is_causal: bool,
    token_mask: jax.Array | None,
) -> jax.Array:
    """Shapes as in `ops.attention.attention`, the mask (b, 1, l, s); token_mask with is_causal and no mask only."""
    if token_mask is None:
        return _even(query, key, value, scale, mask, is_causal)
    order = jnp.argsort(~token_mask, axis=1, stable=True)
    place = jnp.argsort(order, axis=1)
    query, key, value = (_permute(array, order, place) for array in (query, key, value))
    return _permute(_even(query, key, value, scale, mask, is_causal), place, order)


def _even(query, key, value, scale, mask, is_causal) -> jax.Array:
    """The gradient with a mask takes even lengths only: an odd one is given a row more, which nobody sees."""
    queries, keys = query.shape[1], key.shape[1]
    odd_queries, odd_keys = queries % 2, keys % 2
    if odd_keys and not is_causal and mask is None:
        mask = jnp.ones((query.shape[0], 1, queries, keys), bool)
    if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, odd_queries), (0, odd_keys)))
    query = jnp.pad(query, ((0, 0), (0, odd_queries), (0, 0), (0, 0)))
    key, value = (jnp.pad(array, ((0, 0), (0, odd_keys), (0, 0), (0, 0))) for array in (key, value))
    out = jax.nn.dot_product_attention(
        query, key, value, mask=mask, scale=scale, is_causal=is_causal, implementation="cudnn"
    )
    return out[:, :queries]


@jax.custom_vjp
def _permute(array: jax.Array, order: jax.Array, place: jax.Array) -> jax.Array:
    """Row by row, `array` (b, l, ...) in the order given; place (b, l) is the inverse, by which the gradient goes back
    without a scatter."""
    return jnp.take_along_axis(array, order.reshape(order.shape + (1,) * (array.ndim - 2)), axis=1)


def _permute_forward(array, order, place):
    return _permute(array, order, place), (order, place)


def _permute_backward(residuals, cotangent):
    order, place = residuals
    return _permute(cotangent, place, order), None, None


_permute.defvjp(_permute_forward, _permute_backward)
