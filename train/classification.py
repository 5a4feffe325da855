"""The task of `classify`: texts with labels, a classification head, and how well it does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from train import models
from train.feeding import Feed
from train.options import ClassifyOptions
from train.run import Batches
from train.step import Batch, Params, Program, make_predict_step
from zamba2_jax import Zamba2Config, Zamba2ForSequenceClassification
from zamba2_jax.sharding import param_shardings

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
_ENDLESS = 1 << 48


@dataclasses.dataclass(frozen=True)
class Example:
    """A text, its label as the file has it, and where it stands."""

    text: str
    label: Any
    place: str


def read_examples(files: Sequence[str]) -> list[Example]:
    """The lines of JSONL files of {"text": ..., "label": ...}; "labels" does for "label".

    Raises:
        ValueError, OSError: a file that cannot be read or is empty, or a line that is not of this form, by number.
    """
    examples = []
    for name in files:
        before = len(examples)
        try:
            with Path(name).open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        examples.append(_read_line(line, f"{name}, line {number}"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 text: {error}.") from error
        if len(examples) == before:
            raise ValueError(f"{name} is empty: it holds no line.")
    return examples


def _read_line(line: str, place: str) -> Example:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}.") from error
    label = values.get("label", values.get("labels")) if isinstance(values, dict) else None
    if label is None or not isinstance(values.get("text"), str):
        raise ValueError(f'{place} must be an object with a "text" and a "label".')
    return Example(values["text"], label, place)


def problem_of(examples: Sequence[Example]) -> str:
    """What the labels look like: with a float anywhere they are quantities, of which some may be written as integers;
    else lists are several labels."""
    if any(isinstance(value, float) for example in examples for value in _as_list(example.label)):
        return REGRESSION
    return MULTI if isinstance(examples[0].label, list) else SINGLE


def class_names(examples: Sequence[Example], config: Zamba2Config, num_labels: int | None) -> dict[int, str]:
    """id -> name of every class: the checkpoint's own if they cover the data's names, else the data's in order.

    Raises:
        ValueError: names and numbers are mixed.
    """
    values = [value for example in examples for value in _as_list(example.label)]
    names = sorted({value for value in values if isinstance(value, str)})
    if names and any(not isinstance(value, str) for value in values):
        raise ValueError("the labels of --data are names in some lines and numbers in others; use one of the two.")
    if names:
        return dict(config.id2label) if set(names) <= config.label2id.keys() else dict(enumerate(names))
    numbers = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    count = num_labels if num_labels is not None else max(2, max(numbers, default=0) + 1)
    return dict(config.id2label) if count == config.num_labels else {i: f"LABEL_{i}" for i in range(count)}


def make_targets(examples: Sequence[Example], problem: str, id2label: dict[int, str]) -> np.ndarray:
    """Labels as the loss takes them: (n,) int32 classes, or (n, labels) float32.

    Raises:
        ValueError: a label out of range or of another kind, naming its line and what would do.
    """
    ids = {name: index for index, name in id2label.items()}
    count = len(id2label)

    def class_of(value: Any, place: str) -> int:
        index = ids.get(value) if isinstance(value, str) else value
        if isinstance(value, bool) or not isinstance(index, int) or not 0 <= index < count:
            shown = ", ".join(list(ids)[:20])
            raise ValueError(
                f"{place} has the label {value!r}, which is out of range: labels are 0 to {count - 1}, or {shown}."
            )
        return index

    rows = []
    for example in examples:
        values = _as_list(example.label)
        if problem == REGRESSION:
            if len(values) != count or not all(_is_number(value) for value in values):
                raise ValueError(
                    f"{example.place} has the label {example.label!r}; regression takes {count} number(s)."
                )
            rows.append(np.asarray(values, np.float32))
        elif problem == MULTI:
            row = np.zeros(count, np.float32)
            row[[class_of(value, example.place) for value in values]] = 1
            rows.append(row)
        elif isinstance(example.label, list):
            raise ValueError(f"{example.place} has a list of labels, {example.label!r}; other lines have one.")
        else:
            rows.append(class_of(example.label, example.place))
    return np.asarray(rows, np.int32 if problem == SINGLE else np.float32)


def _as_list(label: Any) -> list[Any]:
    return label if isinstance(label, list) else [label]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)


class _Rows:
    """Examples as rows, padded on the right; those beyond the last are padding that counts for nothing."""

    def __init__(self, tokens: list[list[int]], targets: np.ndarray, seq_len: int, pad_id: int, length: int):
        self._tokens, self._targets = tokens, targets
        self._seq_len, self._pad_id, self._length = seq_len, pad_id, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        real = index < len(self._tokens)
        tokens = self._tokens[index if real else 0]
        ids = np.full(self._seq_len, self._pad_id, np.int32)
        ids[: len(tokens)] = tokens
        mask = (np.arange(self._seq_len) < len(tokens)).astype(np.int32)
        target = self._targets[index if real else 0]
        return {"input_ids": ids, "attention_mask": mask, "targets": target, "weights": np.int32(real)}


def row_losses(logits: jax.Array, targets: jax.Array, problem: str) -> jax.Array:
    """(b,) float32: each row's loss, whose mean is transformers' loss of the batch."""
    logits = logits.astype(jnp.float32)
    if problem == SINGLE:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]
    if problem == MULTI:
        return jnp.mean(jax.nn.softplus(logits) - targets * logits, axis=1)
    return jnp.mean(jnp.square(logits - targets), axis=1)


def scores(logits: np.ndarray, targets: np.ndarray, problem: str) -> dict[str, float]:
    """Accuracy and F1 (macro: the mean over classes; for several labels also micro: over all decisions), or the mean
    squared error."""
    if problem == REGRESSION:
        return {"mse": float(np.mean(np.square(logits.astype(np.float64) - targets)))}
    if problem == SINGLE:
        chosen = np.argmax(logits, axis=1)
        found, wanted = (np.eye(logits.shape[1], dtype=bool)[index] for index in (chosen, targets))
        result = {"accuracy": float(np.mean(chosen == targets))}
    else:
        found, wanted = logits > 0, targets > 0.5
        result = {"accuracy": float(np.mean(np.all(found == wanted, axis=1))), "f1_micro": _f1(found, wanted)}
    classes = [index for index in range(logits.shape[1]) if wanted[:, index].any() or found[:, index].any()]
    result["f1"] = float(np.mean([_f1(found[:, index], wanted[:, index]) for index in classes])) if classes else 0.0
    return result


def _f1(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(2 * np.sum(found & wanted) / max(np.sum(found) + np.sum(wanted), 1))


class ClassificationTask:
    """Texts with labels, and the head's loss.

    Raises:
        ValueError, OSError: a checkpoint, tokenizer or data that does not do.
    """

    def __init__(self, options: ClassifyOptions):
        self._options = options
        examples = read_examples(options.data)
        self._problem = options.problem_type or problem_of(examples)
        config = models.config_of_checkpoint(options.model, "Zamba2ForSequenceClassification")
        self._stored_labels = config.num_labels
        if config.pad_token_id is None:
            raise ValueError(f"--model {options.model} has no pad_token_id, by which the end of a text is found.")
        if self._problem == REGRESSION:
            count = options.num_labels or len(_as_list(examples[0].label))
            labels = {index: f"LABEL_{index}" for index in range(count)}
        else:
            labels = class_names(examples, config, options.num_labels)
        config = config.replace(id2label=labels, problem_type=self._problem)
        self.config = models.with_dropout(config, options)
        self.tokenizer = models.load_tokenizer(options.tokenizer, options.model)
        self.kind = "lora" if models.adapts(options) else "params"
        self.evaluates = True
        self._dropout = models.has_dropout(self.config, options)
        self._data = self._encode(examples, labels)
        if options.eval_data:
            self._eval_data = self._encode(read_examples(options.eval_data), labels)
        else:
            self._eval_data = self._some_of_data()
        self.data_fingerprint = models.fingerprint(
            [[tokens, target.tolist()] for tokens, target in zip(*self._data, strict=True)]
        )
        self._predict: Any = None

    def _some_of_data(self) -> tuple[list[list[int]], np.ndarray]:
        """Evenly from all of --data, at most as many as the steps take: that costs a part of what training does."""
        tokens, targets = self._data
        count = min(len(tokens), self._options.steps * self._options.batch_size)
        chosen = np.arange(count) * len(tokens) // count
        return [tokens[index] for index in chosen], targets[chosen]

    def _encode(self, examples: list[Example], labels: dict[int, str]) -> tuple[list[list[int]], np.ndarray]:
        targets = make_targets(examples, self._problem, labels)
        tokens = []
        for example in examples:
            ids = self.tokenizer(example.text)["input_ids"][: self._options.seq_len]
            if not ids:
                raise ValueError(f"{example.place} has a text without a token.")
            if max(ids) >= self.config.vocab_size:
                raise ValueError(
                    f"the tokenizer's vocabulary does not fit the model: {example.place} has the id {max(ids)}, the "
                    f"model's vocab_size is {self.config.vocab_size}."
                )
            tokens.append(ids)
        return tokens, targets

    def loss(self, model: Zamba2ForSequenceClassification, rows: Batch, key: Any, count: jax.Array) -> jax.Array:
        logits = model(
            rows["input_ids"], attention_mask=rows["attention_mask"], dropout_key=key if self._dropout else None
        ).logits
        return jnp.sum(row_losses(logits, rows["targets"], self._problem) * rows["weights"]) / count

    def count(self, rows: Batch) -> jax.Array:
        return jnp.sum(rows["weights"])

    def summary(self) -> str:
        names = ", ".join(self.config.id2label.values())
        return f"{len(self._data[0]):,} texts, {self._problem} of {self.config.num_labels} ({names[:200]})"

    def abstract_model(self) -> Zamba2ForSequenceClassification:
        dtype = models.base_dtype(self._options)
        model = models.abstract_model(Zamba2ForSequenceClassification, self.config, self._options, param_dtype=dtype)
        return models.adapted(model, self._options) if models.adapts(self._options) else model

    def trainable(self, model: nnx.Module) -> nnx.filterlib.Filter:
        return models.trainable(model, self._options)

    def initial_model(self, mesh: Mesh) -> Zamba2ForSequenceClassification:
        model = models.load(Zamba2ForSequenceClassification, self._options, mesh)
        if self._stored_labels != self.config.num_labels:  # the checkpoint's head is for other labels
            abstract = self.abstract_model()
            kernel = abstract.score.kernel.get_value()
            sharding = param_shardings(nnx.state(abstract.score), mesh)["kernel"]

            def draw(key: jax.Array) -> jax.Array:
                return self.config.initializer_range * jax.random.normal(key, kernel.shape, jnp.float32)

            key = jax.random.key(self._options.seed)
            model.score.kernel.set_value(jax.jit(draw, out_shardings=sharding)(key).astype(kernel.dtype))
        return model

    def batches(self, share: tuple[int, int]) -> Batches:
        options = self._options
        order = grain.MapDataset.source(self._rows(self._data, 0)).shuffle(options.seed).repeat()
        return self._iterate(order.slice(slice(_ENDLESS)), share)

    def _rows(self, data: tuple[list[list[int]], np.ndarray], padding: int) -> _Rows:
        tokens, targets = data
        return _Rows(tokens, targets, self._options.seq_len, self.config.pad_token_id, len(tokens) + padding)

    def _iterate(self, order: grain.MapDataset, share: tuple[int, int]) -> grain.DatasetIterator:
        index, count = share
        batches = order.batch(self._options.batch_size // count).slice(slice(index, None, count))
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0)))

    def evaluate(self, program: Program, params: Params, frozen: Params) -> dict[str, float]:
        options, (tokens, targets) = self._options, self._eval_data
        if self._predict is None:

            def logits(model: nnx.Module, rows: Batch) -> jax.Array:
                return model(rows["input_ids"], attention_mask=rows["attention_mask"]).logits

            self._predict = make_predict_step(program.skeleton, logits, program.mesh)
        feed = Feed(program.mesh, options.batch_size)
        order = grain.MapDataset.source(self._rows(self._eval_data, -len(tokens) % options.batch_size))
        found = [
            np.asarray(jax.device_get(self._predict(params, frozen, feed.place(batch))), np.float32)
            for batch in self._iterate(order, feed.share)
        ][: options.eval_batches]
        logits = np.concatenate(found)[: len(tokens)]
        targets = targets[: len(logits)]
        loss = float(jnp.mean(row_losses(jnp.asarray(logits), jnp.asarray(targets), self._problem)))
        return {"loss": loss, **scores(logits, targets, self._problem), "texts": len(logits)}

    def samples(self, model: nnx.Module) -> Iterator[tuple[str, str]]:
        return iter(())
