"""Checks a model call's inputs before any work, and brings them into one form."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from zamba2_jax.cache import Zamba2Cache
from zamba2_jax.config import Zamba2Config


@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """Checked inputs of one call. Exactly one of `ids` (b, l) and `embeds` (b, l, d) is set; the masks are (b, l) or
    None."""

    batch_size: int
    length: int
    ids: Int[Array, "b l"] | None
    embeds: Float[Array, "b l d"] | None
    token_mask: Bool[Array, "b l"] | None
    position_ids: Int[Array, "b l"] | None
    segment_ids: Int[Array, "b l"] | None


def check_inputs(
    config: Zamba2Config,
    input_ids: ArrayLike | None,
    attention_mask: ArrayLike | None,
    position_ids: ArrayLike | None,
    past_key_values: Zamba2Cache | None,
    inputs_embeds: ArrayLike | None,
    segment_ids: ArrayLike | None,
    tentative: bool = False,
) -> ModelInputs:
    """The inputs of `Zamba2Model.__call__`, checked.

    Shapes and dtypes are checked always; values (ids inside the vocabulary, a mask of zeros and ones, room in the
    cache) where they are concrete, which they are not under jit.

    Raises:
        ValueError: naming the argument, what it was, and what would do.
    """
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"pass either input_ids or inputs_embeds, got {given}.")
    ids = embeds = None
    if input_ids is not None:
        ids = check_token_ids(input_ids, config.vocab_size)
        batch_size, length = ids.shape
    else:
        embeds = jnp.asarray(inputs_embeds)
        if embeds.ndim != 3 or embeds.shape[-1] != config.hidden_size:
            raise ValueError(
                f"inputs_embeds must have shape (batch, length, {config.hidden_size}), got {embeds.shape}."
            )
        batch_size, length, _ = embeds.shape
    if batch_size == 0 or length == 0:
        raise ValueError(f"there must be at least one row and one token, got {batch_size} rows of {length} tokens.")

    if past_key_values is not None:
        _check_cache(config, past_key_values, batch_size, length)
        if segment_ids is not None:
            raise ValueError(
                "segment_ids do not go with past_key_values: a packed row holds several documents, and only one could "
                "continue. Run packed rows without a cache."
            )
    if tentative:
        if past_key_values is None:
            raise ValueError("tentative=True needs past_key_values, a cache for its tokens to be taken back from.")
        if attention_mask is not None:
            raise ValueError("tentative=True takes no attention_mask: which of its tokens count is decided afterwards.")
    return ModelInputs(
        batch_size=batch_size,
        length=length,
        ids=ids,
        embeds=embeds,
        token_mask=None if attention_mask is None else _check_mask(attention_mask, batch_size, length, past_key_values),
        position_ids=_check_integers("position_ids", position_ids, ((batch_size, length), (1, length))),
        segment_ids=_check_integers("segment_ids", segment_ids, ((batch_size, length),)),
    )


def check_token_ids(input_ids: ArrayLike, vocab_size: int) -> Int[Array, "b l"]:
    """`input_ids` as a (b, l) integer array with every id in [0, vocab_size).

    Raises:
        ValueError: another rank or dtype, or, where values are concrete, an id outside the vocabulary.
    """
    ids = input_ids if isinstance(input_ids, jax.core.Tracer) else np.asarray(input_ids)
    if ids.ndim != 2:
        raise ValueError(
            f"input_ids must have shape (batch, length), got {ids.shape}; a single prompt is input_ids[None]."
        )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"input_ids must be integers, got {ids.dtype}.")
    if isinstance(ids, np.ndarray):
        outside = np.argwhere((ids < 0) | (ids >= vocab_size))
        if outside.size:
            row, column = outside[0]
            raise ValueError(
                f"input_ids must be in [0, {vocab_size}), the vocabulary; got {ids[row, column]} at row {row}, column "
                f"{column}. Is this the checkpoint's own tokenizer?"
            )
    return jnp.asarray(ids, jnp.int32)


def check_logits_to_keep(logits_to_keep: int | ArrayLike, inputs: ModelInputs) -> None:
    """Refuses what is neither a count of at least 0 nor a 1-D array of columns of this call."""
    if isinstance(logits_to_keep, int | np.integer):
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must be 0 (all), a count, or an index array, got {logits_to_keep}.")
        return
    columns = logits_to_keep if isinstance(logits_to_keep, jax.core.Tracer) else np.asarray(logits_to_keep)
    if columns.ndim != 1 or not jnp.issubdtype(columns.dtype, jnp.integer):
        raise ValueError(
            f"logits_to_keep must be an int or a 1-D integer array, got shape {columns.shape}, dtype {columns.dtype}."
        )
    length = inputs.length
    if isinstance(columns, np.ndarray) and ((columns < -length) | (columns >= length)).any():
        raise ValueError(f"logits_to_keep must index the {length} columns of this call, got {columns.tolist()}.")


def check_labels(labels: ArrayLike, inputs: ModelInputs, vocab_size: int) -> Int[Array, "b l"]:
    """Next-token labels: (b, l) integers, each -100 or in the vocabulary."""
    return _check_class_ids(labels, (inputs.batch_size, inputs.length), vocab_size)


def check_class_labels(
    labels: ArrayLike, batch_size: int, num_labels: int, problem_type: str | None
) -> tuple[str, Array]:
    """The kind of classification problem, as transformers decides it where the config does not, and its labels.

    Regression: (b, num_labels), or (b,) for one label. Single-label: (b,) integers. Multi-label: (b, num_labels).

    Raises:
        ValueError: labels whose shape or dtype does not fit the problem, or a class that does not exist.
    """
    if problem_type is None:
        if num_labels == 1:
            problem_type = "regression"
        elif np.issubdtype(_dtype(labels), np.integer):
            problem_type = "single_label_classification"
        else:
            problem_type = "multi_label_classification"
    if problem_type == "single_label_classification":
        return problem_type, _check_class_ids(labels, (batch_size,), num_labels, f" for {problem_type}")
    shape = (batch_size, num_labels)
    if jnp.shape(labels) != shape and not (num_labels == 1 and jnp.shape(labels) == (batch_size,)):
        raise ValueError(f"labels for {problem_type} must have shape {shape}, got {jnp.shape(labels)}.")
    return problem_type, jnp.asarray(labels).reshape(shape)


def _check_class_ids(labels: ArrayLike, shape: tuple[int, ...], classes: int, purpose: str = "") -> Array:
    if jnp.shape(labels) != shape:
        raise ValueError(f"labels{purpose} must have shape {shape}, got {jnp.shape(labels)}.")
    if not np.issubdtype(_dtype(labels), np.integer):
        raise ValueError(f"labels{purpose} must be integers, got {_dtype(labels)}.")
    if not isinstance(labels, jax.core.Tracer):
        values = np.asarray(labels)
        wrong = values[(values != -100) & ((values < 0) | (values >= classes))]
        if wrong.size:
            raise ValueError(f"labels{purpose} must be -100 or in [0, {classes}), got {wrong[0]}.")
    return jnp.asarray(labels)


def _dtype(values: ArrayLike) -> np.dtype:
    return values.dtype if isinstance(values, jax.core.Tracer) else np.asarray(values).dtype


def _check_mask(
    attention_mask: ArrayLike, batch_size: int, length: int, past: Zamba2Cache | None
) -> Bool[Array, "b l"]:
    shape = jnp.shape(attention_mask)
    allowed = f"({batch_size}, {length})"
    fits = shape == (batch_size, length)
    if past is not None:
        if isinstance(past.length, jax.core.Tracer):
            allowed += " or that of past and new tokens"
            fits = len(shape) == 2 and shape[0] == batch_size and shape[1] >= length
        else:
            allowed += f" or ({batch_size}, {past.get_seq_length() + length}), past and new tokens"
            fits = fits or shape == (batch_size, past.get_seq_length() + length)
    if not fits:
        raise ValueError(f"attention_mask must have shape {allowed}, got {shape}.")
    if not isinstance(attention_mask, jax.core.Tracer):
        values = np.asarray(attention_mask)
        if not np.isin(values, (0, 1)).all():
            raise ValueError("attention_mask must hold 1 (or True) at real tokens and 0 (or False) at padding only.")
    return jnp.asarray(attention_mask)[:, -length:].astype(bool)


def _check_integers(
    name: str, values: ArrayLike | None, shapes: tuple[tuple[int, int], ...]
) -> Int[Array, "b l"] | None:
    if values is None:
        return None
    array = jnp.asarray(values)
    if array.shape not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {array.shape}.")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {array.dtype}.")
    return array


def _check_cache(config: Zamba2Config, cache: Zamba2Cache, batch_size: int, length: int) -> None:
    if not isinstance(cache, Zamba2Cache):
        raise ValueError(f"past_key_values must be a Zamba2Cache (model.init_cache), got {type(cache).__name__}.")
    if cache.batch_size != batch_size:
        raise ValueError(f"past_key_values holds {cache.batch_size} rows, the call has {batch_size}.")
    if len(cache.mamba) != config.num_hidden_layers or len(cache.attention) != config.num_hybrid_layers:
        raise ValueError(
            f"past_key_values holds {len(cache.mamba)} layers and {len(cache.attention)} hybrid ones, the model has "
            f"{config.num_hidden_layers} and {config.num_hybrid_layers}: it was made for another model."
        )
    if length > cache.max_length:
        raise ValueError(f"past_key_values has {cache.max_length} slots, the call alone has {length} tokens.")
    if not isinstance(cache.length, jax.core.Tracer) and cache.get_seq_length() + length > cache.max_length:
        raise ValueError(
            f"past_key_values is full: {cache.get_seq_length()} of {cache.max_length} slots are taken and {length} "
            "tokens are to come. Make it larger: model.init_cache(batch_size, max_length)."
        )
