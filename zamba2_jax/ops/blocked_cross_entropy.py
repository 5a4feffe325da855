"""Cross entropy of a linear head, a block of tokens at a time: the (b, l, v) scores are never in memory together.

The gradient is worked out in the same pass as the loss, while a block's scores are at hand: three matrix products in
all, where recomputing the scores on the way back would take four. That is exact because a sum of losses has one
cotangent, a number, by which the stored gradients are multiplied.
"""

import functools

import jax
import jax.numpy as jnp

from zamba2_jax.ops.stored import summed_outer_product
from zamba2_jax.sharding import constrain, constrain_gathered, length_parts

# Scores of one block on one device, float32: 256 MB. At v = 32000 that is 2048 tokens, enough for a matrix product to
# run at full speed and for the (v, d) sum of the head's gradient to be read, written, and on a mesh summed, seldom.
BLOCK_SCORES = 1 << 26
# At least so many columns of a row: of a batch spread over many devices, few tokens lie on each.
FEWEST_COLUMNS = 128


def columns_per_block(batch_size: int, length: int, vocab_size: int) -> int:
    """How many of a row's tokens one block takes. Devices of a mesh in use (`jax.set_mesh`) share its scores."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size
    return min(length, max(FEWEST_COLUMNS, devices * BLOCK_SCORES // (batch_size * vocab_size)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def summed_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    vocab_axis: int,
    ignore_index: int,
    columns: int,
    z_loss: float = 0.0,
) -> jax.Array:
    """The sum over labels that count of -log softmax(s)[label] + z_loss logsumexp(s)², for scores s = hidden headᵀ.

    hidden (b, l, d), labels (b, l), head (v, d) for vocab_axis 0 and (d, v) for 1; `columns` tokens of each row make a
    block. Products take operands of hidden's dtype and accumulate in float32, as do softmax, sum, and the head's
    gradient over the blocks. Returns () float32.
    """
    return _run(hidden, head, labels, vocab_axis, ignore_index, columns, z_loss, with_gradients=False)[0]


def _forward(hidden, head, labels, vocab_axis, ignore_index, columns, z_loss):
    total, *slopes = _run(hidden, head, labels, vocab_axis, ignore_index, columns, z_loss, with_gradients=True)
    # The empty array tells the backward pass the head's dtype: the sum over blocks stays float32 until it is scaled.
    return total, (*slopes, jnp.zeros((0,), head.dtype))


def _backward(vocab_axis, ignore_index, columns, z_loss, residuals, cotangent):
    hidden_slope, head_slope, of_head = residuals
    hidden_slope = (cotangent * hidden_slope.astype(jnp.float32)).astype(hidden_slope.dtype)
    return hidden_slope, (cotangent * head_slope).astype(of_head.dtype), None


summed_cross_entropy.defvjp(_forward, _backward)


def _run(hidden, head, labels, vocab_axis, ignore_index, columns, z_loss, *, with_gradients):
    batch, length, features = hidden.shape
    head_axes = ("vocab", "embed") if vocab_axis == 0 else ("embed", "vocab")
    weights = constrain_gathered(head.astype(hidden.dtype), *head_axes)
    blocks = -(-length // columns)
    parts = length_parts(length)
    columns = parts * -(-length // (blocks * parts))

    def split(array, filler):
        """(b, l, ...) to (blocks, b, columns, ...). A block takes every so many-th token, not neighbours: so each holds
        an equal part of every device's tokens where rows are spread over devices by length."""
        padding = ((0, 0), (0, blocks * columns - length)) + ((0, 0),) * (array.ndim - 2)
        array = jnp.pad(array, padding, constant_values=filler)
        return jnp.moveaxis(array.reshape(batch, columns, blocks, *array.shape[2:]), 2, 0)

    def add_block(carry, block):
        total, head_slope = carry
        hidden, labels = block
        hidden, labels = constrain(hidden, "batch", "length", None), constrain(labels, "batch", "length")
        scores = constrain(_product(hidden, weights, (2,), (1 - vocab_axis,)), "batch", "length", "vocab")
        normaliser = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        # A comparison, not a look-up: it stays where it is when the vocabulary is spread over devices.
        is_label = jax.lax.broadcasted_iota(labels.dtype, scores.shape, 2) == labels[..., None]
        losses = normaliser[..., 0] - jnp.sum(jnp.where(is_label, scores, 0.0), axis=-1)
        if z_loss:
            losses = losses + z_loss * jnp.square(normaliser[..., 0])
        counts = labels != ignore_index
        total = total + jnp.sum(jnp.where(counts, losses, 0.0))
        if not with_gradients:
            return (total, None), None

        probabilities = jnp.exp(scores - normaliser)
        if z_loss:  # they are the gradient of the normaliser, too
            probabilities = probabilities * (1.0 + 2.0 * z_loss * normaliser)
        slope = jnp.where(counts[..., None], probabilities - is_label, 0.0).astype(hidden.dtype)
        hidden_slope = _product(slope, weights, (2,), (vocab_axis,)).astype(hidden.dtype)
        pair = (slope, hidden) if vocab_axis == 0 else (hidden, slope)
        head_slope = head_slope + summed_outer_product(*pair, head_axes, jnp.float32)
        return (total, head_slope), constrain(hidden_slope, "batch", "length", None)

    head_slope = constrain(jnp.zeros(head.shape, jnp.float32), *head_axes) if with_gradients else None
    start = (jnp.zeros((), jnp.float32), head_slope)
    if blocks == 1:
        (total, head_slope), hidden_slope = add_block(start, (hidden, labels))
        return total, hidden_slope, head_slope
    tokens = (split(hidden, 0), split(labels, ignore_index))
    (total, head_slope), hidden_slope = jax.lax.scan(add_block, start, tokens)
    if with_gradients:
        hidden_slope = jnp.moveaxis(hidden_slope, 0, 2).reshape(batch, blocks * columns, features)[:, :length]
    return total, hidden_slope, head_slope


def _product(left, right, left_axes, right_axes) -> jax.Array:
    return jax.lax.dot_general(left, right, ((left_axes, right_axes), ((), ())), preferred_element_type=jnp.float32)
