"""What pretrain, finetune and eval have in common: a language model, its loss, and its evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from train.step import Batch, Count, Loss, Params, Program
from zamba2_jax import Zamba2ForCausalLM
from zamba2_jax.ops.losses import linear_causal_lm_loss

IGNORED = -100


def make_loss(*, z_loss: float = 0.0, dropout: bool = False) -> Loss:
    """The cross-entropy of packed rows, summed over the counted tokens and divided by `count`.

    Args:
        z_loss: as in `zamba2_jax.ops.losses.linear_causal_lm_loss`.
        dropout: whether the model has any to switch on.
    """

    def loss(model: Zamba2ForCausalLM, rows: Batch, key: jax.Array | None, count: jax.Array) -> jax.Array:
        outputs = model.model(
            rows["input_ids"], segment_ids=rows["segment_ids"], dropout_key=key if dropout else None
        )
        head = model.model.embed_tokens if model.lm_head is None else model.lm_head
        return linear_causal_lm_loss(
            outputs.last_hidden_state,
            head.matrix(),
            counted_labels(rows),
            vocab_axis=0 if model.lm_head is None else 1,
            num_items=count,
            z_loss=z_loss,
        )

    return loss


def counted_labels(rows: Batch) -> jax.Array:
    """(b, l): the labels without those that nothing predicts, a row's and a document's first."""
    segments = rows["segment_ids"]
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jnp.where(first, IGNORED, rows["labels"])


def count_tokens(rows: Batch) -> jax.Array:
    """() int32: the tokens that the loss is the mean of."""
    return jnp.sum(counted_labels(rows) != IGNORED, dtype=jnp.int32)


COUNT: Count = count_tokens


def evaluate(program: Program, params: Params, frozen: Params, batches: Iterable[Batch]) -> dict[str, float]:
    """Loss and perplexity over all counted tokens of `batches`, which are spread over the program's mesh.

    Raises:
        ValueError: there are none.
    """
    total, count = 0.0, 0
    pending = None
    for batch in batches:  # a batch's sums are read while the next one runs
        sums = program.eval_step(params, frozen, batch)
        if pending is not None:
            total, count = total + float(pending[0]), count + int(pending[1])
        pending = sums
    if pending is not None:
        total, count = total + float(pending[0]), count + int(pending[1])
    if count == 0:
        raise ValueError("the evaluation data holds no token to predict: its documents have one token each, or none.")
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": count}


Evaluate = Callable[[Program, Params, Params], dict[str, float]]
