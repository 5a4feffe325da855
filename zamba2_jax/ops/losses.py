"""The losses of language modelling and of classification, in float32, with the meanings that transformers gives
them."""

import functools

import jax
import jax.numpy as jnp

from zamba2_jax.ops._checks import check_floating, check_integer, check_shape


@functools.partial(jax.jit, static_argnames=("ignore_index",))
def causal_lm_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    ignore_index: int = -100,
    num_items: int | jax.Array | None = None,
) -> jax.Array:
    """Cross-entropy of each position's logits with the next position's label.

    Args:
      logits: (b, l, v), floating.
      labels: (b, l) integers, aligned with the inputs: the shift happens here. Those equal to `ignore_index` do not
        count, nor does the first of each row, which nothing predicts.
      num_items: what the summed loss is divided by, for gradient accumulation; None divides by the number of labels
        that count.

    Returns:
      () float32. NaN when no label counts and num_items is None (0 / 0), as in transformers.

    Raises:
      ValueError: a shape or dtype that does not fit, naming the argument.
    """
    if logits.ndim != 3:
        raise ValueError(f"logits has shape {logits.shape}; it must be (b, l, v)")
    check_shape("labels", labels, logits.shape[:-1], "(b, l)")
    # The labels move, not the logits: a copy of (b, l, v) numbers is not made.
    shifted = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=ignore_index)
    total, count = _summed_cross_entropy(logits, shifted, ignore_index)
    return total / (count if num_items is None else num_items)


@functools.partial(jax.jit, static_argnames=("ignore_index",))
def cross_entropy(logits: jax.Array, labels: jax.Array, ignore_index: int = -100) -> jax.Array:
    """Mean cross-entropy of logits (..., v) with integer labels (...), over the labels that are not `ignore_index`.

    Returns () float32; NaN when no label counts. Raises ValueError, naming the argument, where a shape or dtype does
    not fit.
    """
    total, count = _summed_cross_entropy(logits, labels, ignore_index)
    return total / count


@jax.jit
def binary_cross_entropy_with_logits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over all entries of -[y log sigmoid(z) + (1 - y) log(1 - sigmoid(z))], for logits z and labels y in 0...1 of
    one shape.

    Returns () float32. Raises ValueError, naming the argument, where a shape or dtype does not fit.
    """
    check_floating("logits", logits)
    check_shape("labels", labels, logits.shape, "the shape of logits")
    logits, labels = logits.astype(jnp.float32), labels.astype(jnp.float32)
    return jnp.mean(jax.nn.softplus(logits) - labels * logits)


@jax.jit
def mean_squared_error(predictions: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over all entries of (prediction - label)², of one shape.

    Returns () float32. Raises ValueError, naming the argument, where a shape or dtype does not fit.
    """
    check_floating("predictions", predictions)
    check_shape("labels", labels, predictions.shape, "the shape of predictions")
    return jnp.mean(jnp.square(predictions.astype(jnp.float32) - labels.astype(jnp.float32)))


def _summed_cross_entropy(logits: jax.Array, labels: jax.Array, ignore_index: int) -> tuple[jax.Array, jax.Array]:
    if logits.ndim < 1:
        raise ValueError(f"logits has shape {logits.shape}; it must be (..., v)")
    check_floating("logits", logits)
    check_shape("labels", labels, logits.shape[:-1], "the shape of logits without its last axis")
    check_integer("labels", labels)
    counts = labels != ignore_index
    # An ignored label may be no index at all; zero stands in for it.
    target = jnp.where(counts, labels, 0)[..., None]
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, target, axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(jnp.where(counts, losses, 0.0)), jnp.sum(counts, dtype=jnp.float32)
