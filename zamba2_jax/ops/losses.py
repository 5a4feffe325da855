"""The losses of language modelling and of classification, in float32, with the meanings that transformers gives
them."""

import functools
import math

import jax
import jax.numpy as jnp

from zamba2_jax.ops._checks import check_floating, check_integer, check_rank, check_shape
from zamba2_jax.ops.blocked_cross_entropy import columns_per_block, summed_cross_entropy


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
    total, count = _summed_cross_entropy(logits, _shift(labels, ignore_index), ignore_index)
    return total / (count if num_items is None else num_items)


@functools.partial(jax.jit, static_argnames=("vocab_axis", "ignore_index", "z_loss", "block_columns"))
def linear_causal_lm_loss(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    *,
    vocab_axis: int = 0,
    ignore_index: int = -100,
    num_items: int | jax.Array | None = None,
    z_loss: float = 0.0,
    block_columns: int | None = None,
) -> jax.Array:
    """`causal_lm_loss` of the logits hidden headᵀ, which are never all in memory, in neither direction.

    Scores are made, read and forgotten a block of tokens at a time, and with them the gradient, which is exact; the
    head's is summed over the blocks in float32. Scores are float32, not rounded to hidden's dtype as stored logits are.
    For reverse-mode differentiation (`jax.grad`, and forward over reverse) only.

    Args:
      hidden: (b, l, d), floating; products are taken in its dtype and accumulated in float32.
      head: (v, d), an embedding that serves as the head (vocab_axis 0), or (d, v), a kernel (vocab_axis 1); floating.
      labels, ignore_index, num_items: as in `causal_lm_loss`. A label outside the vocabulary costs the log of the sum
        of all exponentials, as if its own score were zero.
      z_loss: adds so much of each counted token's squared log of the sum of all exponentials, which keeps scores from
        drifting away from zero in bfloat16 training; 1e-4 is usual, 0 is none.
      block_columns: tokens of each row in a block; None takes as many as make 2^26 scores, and at least 128.

    Returns:
      () float32. NaN when no label counts and num_items is None (0 / 0), as in transformers.

    Raises:
      ValueError: a shape, dtype or size that does not fit, naming the argument.
    """
    check_rank("hidden", hidden, 3, "(b, l, d)")
    check_floating("hidden", hidden)
    if vocab_axis not in (0, 1):
        raise ValueError(f"vocab_axis is {vocab_axis!r}; it must be 0 for a head (v, d) or 1 for a head (d, v)")
    check_rank("head", head, 2, "(v, d)" if vocab_axis == 0 else "(d, v)")
    check_floating("head", head)
    if head.shape[1 - vocab_axis] != hidden.shape[-1]:
        raise ValueError(
            f"head has shape {head.shape}; with vocab_axis={vocab_axis} its axis {1 - vocab_axis} must be hidden's d = "
            f"{hidden.shape[-1]}"
        )
    check_shape("labels", labels, hidden.shape[:-1], "(b, l)")
    check_integer("labels", labels)
    if block_columns is None:
        block_columns = columns_per_block(*labels.shape, head.shape[vocab_axis])
    elif block_columns < 1:
        raise ValueError(f"block_columns is {block_columns}; it must be None or at least 1")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss is {z_loss}; it must be 0 or a small positive number such as 1e-4")
    shifted = _shift(labels, ignore_index)
    total = summed_cross_entropy(hidden, head, shifted, vocab_axis, ignore_index, block_columns, float(z_loss))
    return total / (jnp.sum(shifted != ignore_index, dtype=jnp.float32) if num_items is None else num_items)


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


def _shift(labels: jax.Array, ignore_index: int) -> jax.Array:
    """Each position's label is the next one. The labels move, not the logits: no copy of (b, l, v) numbers is made."""
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=ignore_index)


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
