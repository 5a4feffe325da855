"""Language models: the task of `pretrain` and of `finetune`, their loss, and their evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from train import models
from train.data import Data, open_data
from train.feeding import Feed
from train.options import FinetuneOptions, PretrainOptions, TextOptions
from train.run import Batches
from train.step import Batch, Loss, Params, Program
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
        outputs = model.model(rows["input_ids"], segment_ids=rows["segment_ids"], dropout_key=key if dropout else None)
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


def evaluate(step: Callable[[Batch], tuple[jax.Array, jax.Array]], batches: Iterable[Batch]) -> dict[str, float]:
    """Loss and perplexity over all counted tokens of `batches`.

    Args:
        step: a batch's summed loss and its count.

    Raises:
        ValueError: there is no token to predict.
    """
    total, count = 0.0, 0
    pending: list[tuple[jax.Array, jax.Array]] = []
    for batch in batches:
        pending.append(step(batch))
        if len(pending) > 1:  # read while the next batch runs
            sums = jax.device_get(pending.pop(0))
            total, count = total + float(sums[0]), count + int(sums[1])
    for sums in jax.device_get(pending):
        total, count = total + float(sums[0]), count + int(sums[1])
    if count == 0:
        raise ValueError("the evaluation data holds no token to predict: its documents have one token each, or none.")
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": count}


class LanguageTask:
    """Packed text, and the cross-entropy of the next token.

    Raises:
        ValueError, OSError: a model, tokenizer or data that does not do.
    """

    def __init__(self, options: PretrainOptions | FinetuneOptions):
        self._options = options
        self._adapts = models.adapts(options)
        if isinstance(options, FinetuneOptions):
            config = models.config_of_checkpoint(options.model, "Zamba2ForCausalLM")
        else:
            config = models.config_of_shape(options.model)
        self.config = models.with_dropout(config, options)
        self.tokenizer = models.load_tokenizer(options.tokenizer, options.model)
        self.kind = "lora" if self._adapts else "params"
        self.loss = make_loss(z_loss=options.z_loss, dropout=models.has_dropout(self.config, options))
        self.count = count_tokens
        self._data = self._open(options.data)
        self.evaluates = bool(options.eval_data)
        self._eval_data = self._open(options.eval_data) if options.eval_data else None
        self.data_fingerprint = self._data.fingerprint
        if options.sample_every:
            models.encode_prompts(self.tokenizer, self.config, options.sample_prompts)

    def _open(self, sources: tuple[str, ...]) -> Data:
        options = self._options
        return open_text(options, sources, self.tokenizer, self.config.vocab_size, seed=options.seed, pack=options.pack)

    def summary(self) -> str:
        """What there is to learn from, in a line."""
        found = self._data.statistics
        return (
            f"{found.tokens:,} tokens in {found.documents:,} documents, packed into {found.rows:,} rows of "
            f"{self._options.seq_len} ({found.padding:.1%} padding)"
        )

    def abstract_model(self) -> Zamba2ForCausalLM:
        dtype = models.base_dtype(self._options)
        model = models.abstract_model(Zamba2ForCausalLM, self.config, self._options, param_dtype=dtype)
        return models.adapted(model, self._options) if self._adapts else model

    def initial_model(self, mesh: Mesh) -> Zamba2ForCausalLM:
        options = self._options
        if isinstance(options, PretrainOptions):
            return models.random_model(self.abstract_model(), options.seed, mesh)
        return models.load(Zamba2ForCausalLM, options, mesh)

    def trainable(self, model: nnx.Module) -> nnx.filterlib.Filter:
        return models.trainable(model, self._options)

    def batches(self, share: tuple[int, int]) -> Batches:
        return self._data.batches(self._options.batch_size, shard=share)

    def evaluate(self, program: Program, params: Params, frozen: Params) -> dict[str, float]:
        options = self._options
        feed = Feed(program.mesh, options.batch_size)
        batches = self._eval_data.evaluation_batches(options.batch_size, shard=feed.share, limit=options.eval_batches)
        return evaluate(lambda batch: program.eval_step(params, frozen, batch), map(feed.place, batches))

    def samples(self, model: nnx.Module) -> Iterator[tuple[str, str]]:
        """(prompt, continuation) of each prompt."""
        options = self._options
        for prompt, ids in zip(
            options.sample_prompts,
            models.encode_prompts(self.tokenizer, self.config, options.sample_prompts),
            strict=True,
        ):
            drawn = options.sample_temperature > 0
            output = model.generate(
                np.asarray([ids], np.int32),
                max_new_tokens=options.sample_tokens,
                do_sample=drawn,
                temperature=options.sample_temperature if drawn else None,
                seed=options.seed,
            )
            yield prompt, self.tokenizer.decode(np.asarray(output)[0, len(ids) :], skip_special_tokens=True)


def open_text(
    options: TextOptions, sources: tuple[str, ...], tokenizer: object, vocab_size: int, *, seed: int, pack: bool
) -> Data:
    """Data of the forms that `--data` takes."""
    return open_data(
        sources,
        tokenizer,
        seq_len=options.seq_len,
        vocab_size=vocab_size,
        seed=seed,
        cache_dir=options.data_cache,
        text_field=options.text_field,
        format=options.data_format,
        pack=pack,
    )
