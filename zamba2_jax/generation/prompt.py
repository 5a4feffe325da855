"""Prompts on the host: checks, one alignment for every kind of padding, and the few fixed shapes that the device sees.

All of it is NumPy: an eager JAX operation would compile once per prompt length.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from zamba2_jax.cache import Zamba2Cache
from zamba2_jax.generation.processors import Prompt

# Texts (prompt and new tokens) are served in classes of up to 1024, 4096, 16384, ... tokens. A class has one chunk and
# one number of cache slots, so that it has one program for the prefill and one for the loop, whatever the length.
_SMALLEST_TEXT = 1024
_TEXT_FACTOR = 4
# Columns per prefill call: an eighth of the class, so that a prompt of any length is read in a few calls without being
# padded far, but no more than fill the matrix units.
_CHUNKS_PER_TEXT = 8
_LARGEST_CHUNK = 2048
_SMALLEST_CHUNK = 64
# What is added to a cache is often a line of a conversation, for which the smallest class's chunk is far too wide.
_LINE = 32
# Activations of one call stay within this many tokens, whatever the number of rows.
_TOKENS_PER_CALL = 16384


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """A checked prompt, aligned right: every row's last real token is in the last column.

    Attributes:
        input_ids: (b, l) int32, as the caller gave it.
        tokens, mask: (b, l), rows moved right over their trailing padding; `mask` is True at real tokens.
        moved: (b,), by how many columns.
    """

    input_ids: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray
    moved: np.ndarray

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    def device_prompt(self, copies: int) -> Prompt:
        """The same facts for the programs, every row `copies` times."""
        return Prompt(
            length=np.int32(self.length),
            given=np.repeat(self.moved.astype(np.int32), copies),
            real=np.repeat(self.mask.argmax(axis=1).astype(np.int32), copies),
            tokens=np.repeat(self.mask.sum(axis=1).astype(np.int32), copies),
        )


@dataclasses.dataclass(frozen=True)
class Prefill:
    """What the prefill program reads: `chunks` calls of `chunk` columns.

    Attributes:
        ids, positions, mask: (b, columns); the tokens end in column chunks * chunk - 1.
        chunk, chunks: columns per call, number of calls.
        capacity: slots of the cache, which a given one must be resized to.
    """

    ids: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    chunk: int
    chunks: int
    capacity: int


def read_prompt(
    input_ids: Any,
    attention_mask: Any,
    *,
    vocab_size: int,
    bos_token_id: int | None,
    pad_token_id: int | None,
    eos_token_ids: tuple[int, ...],
) -> PromptBatch:
    """Checks and aligns a prompt.

    Without ids the prompt is the begin-of-sequence token. Without a mask, padding is recognised by `pad_token_id` as in
    transformers: where the prompt holds it and it does not also end sequences.

    Raises:
        ValueError: no tokens, ids that are not integers of the vocabulary, a mask of another shape or with other values
            than 0 and 1, a row without a real token.
    """
    if input_ids is None:
        if bos_token_id is None:
            raise ValueError("input_ids is missing and there is no bos_token_id to start from; pass input_ids.")
        input_ids = np.full((1, 1), bos_token_id)
    ids = _as_ids(input_ids, vocab_size)
    if attention_mask is not None:
        mask = _as_mask(attention_mask, ids.shape)
    elif pad_token_id is not None and pad_token_id not in eos_token_ids:
        mask = ids != pad_token_id
    else:
        mask = np.ones(ids.shape, bool)

    empty = np.flatnonzero(~mask.any(axis=1))
    if empty.size:
        source = "attention_mask" if attention_mask is not None else f"input_ids (all are pad_token_id={pad_token_id})"
        raise ValueError(f"every row needs at least one real token; row {empty[0]} has none by {source}.")
    moved = mask[:, ::-1].argmax(axis=1)
    columns = (np.arange(ids.shape[1]) - moved[:, None]) % ids.shape[1]
    return PromptBatch(ids, np.take_along_axis(ids, columns, 1), np.take_along_axis(mask, columns, 1), moved)


def plan_prefill(
    prompt: PromptBatch,
    *,
    max_new_tokens: int,
    prefill_chunk: int | None,
    cache_length: int | None,
    cache: Zamba2Cache | None,
    guesses: int = 0,
) -> Prefill:
    """Chooses chunk size and capacity and lays the prompt out for the prefill program.

    Both depend on the text's class alone (and the chunk on the number of rows): two programs per class, prefill and
    loop. With a `cache`, each row's first `cache.next_position` real tokens are in it already and are skipped; the
    chunk is then that of the class of the rest, or smaller for a line, because padding would fill the cache. Where the
    loop reads up to `guesses` tokens beyond the text, they have slots too.

    Raises:
        ValueError: too few slots; a cache of another batch or that already holds the whole prompt.
    """
    counts = np.cumsum(prompt.mask, axis=1)
    mask = prompt.mask
    if cache is not None:
        mask = mask & (counts > _cached_tokens(prompt, cache)[:, None])
    length = int(prompt.length - mask.any(axis=0).argmax())
    rows = prompt.input_ids.shape[0]
    chunk = _fixed_chunk(mask[:, prompt.length - length :], prefill_chunk)
    if chunk is None:
        if cache is None:
            chunk = _chunk(length + max_new_tokens + guesses, rows)
        else:
            chunk = _LINE if length <= _LINE else _chunk(length, rows)
    chunks = -(-length // chunk)
    capacity = _capacity(length, chunk * chunks, max_new_tokens, guesses, cache_length, cache)

    columns = capacity if cache is None else _slots(chunk * chunks)
    shape = (rows, columns)
    ids, positions, real = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    target = slice(chunk * chunks - length, chunk * chunks)
    ids[:, target] = prompt.tokens[:, -length:]
    positions[:, target] = np.maximum(counts - 1, 0)[:, -length:]
    real[:, target] = mask[:, -length:]
    return Prefill(ids, positions, real, chunk, chunks, capacity)


def token_buffer(prompt: PromptBatch, columns: int, fill: int) -> np.ndarray:
    """(b, columns) int32: the aligned prompt from column 0, then `fill`, to be replaced by new tokens."""
    buffer = np.full((prompt.input_ids.shape[0], columns), fill, np.int32)
    buffer[:, : prompt.length] = prompt.tokens
    return buffer


def buffer_columns(prompt: PromptBatch, max_new_tokens: int, prefill: Prefill, guesses: int = 0) -> int:
    """Width of the token buffer: the cache's where it is ours, so that both always change together."""
    return max(prefill.capacity, _slots(prompt.length + max_new_tokens + guesses))


def _as_ids(input_ids: Any, vocab_size: int) -> np.ndarray:
    try:
        ids = np.asarray(input_ids)
    except ValueError:
        ids = None
    if ids is None or ids.dtype == object:
        raise ValueError(
            "input_ids must be a rectangular array of integers, got rows of different lengths; pad them and pass "
            "attention_mask."
        )
    if ids.ndim != 2:
        raise ValueError(f"input_ids must have shape (batch, length), got {ids.shape}; a single prompt is [prompt].")
    if ids.size == 0:
        raise ValueError(f"input_ids must hold at least one row and one token, got shape {ids.shape}.")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"input_ids must be integers, got dtype {ids.dtype}.")
    outside = np.argwhere((ids < 0) | (ids >= vocab_size))
    if outside.size:
        row, column = outside[0]
        raise ValueError(
            f"input_ids must be in the vocabulary, from 0 to {vocab_size - 1}, got {ids[row, column]} in row {row}, "
            f"column {column}; is this the checkpoint's own tokenizer?"
        )
    return ids.astype(np.int32)


def _as_mask(attention_mask: Any, shape: tuple[int, int]) -> np.ndarray:
    mask = np.asarray(attention_mask)
    if mask.shape != shape:
        raise ValueError(f"attention_mask must have the shape of input_ids, {shape}, got {mask.shape}.")
    other = mask[~np.isin(mask, (0, 1))]
    if other.size:
        raise ValueError(f"attention_mask must hold 1 at real tokens and 0 at padding only, got {other[0]!r}.")
    return mask.astype(bool)


def _cached_tokens(prompt: PromptBatch, cache: Zamba2Cache) -> np.ndarray:
    if not isinstance(cache, Zamba2Cache):
        raise ValueError(f"past_key_values must be a Zamba2Cache, got {type(cache).__name__}.")
    rows = prompt.input_ids.shape[0]
    if cache.batch_size != rows:
        raise ValueError(f"past_key_values must have one row per prompt, got {cache.batch_size} for {rows} prompts.")
    cached = np.asarray(cache.next_position)
    tokens = prompt.mask.sum(axis=1)
    for row in np.flatnonzero(tokens <= cached):
        raise ValueError(
            f"input_ids must hold the tokens in past_key_values and at least one more; row {row} has {tokens[row]} "
            f"real tokens, {cached[row]} of them cached. Pass the whole text so far."
        )
    return cached


def _fixed_chunk(mask: np.ndarray, prefill_chunk: int | None) -> int | None:
    """Columns per prefill call where the caller or the tokens of `mask` (b, l) decide; None where they are free."""
    length = mask.shape[1]
    start = mask.argmax(axis=1)
    holes = np.flatnonzero(mask.sum(axis=1) < np.where(mask.any(axis=1), length - start, 0))
    if not holes.size:
        return prefill_chunk
    # Between two chunks a masked token would count as padding, which is absent; inside one it is hidden but time
    # passes.
    if prefill_chunk is not None and prefill_chunk < length:
        raise ValueError(
            f"prefill_chunk={prefill_chunk} would cut a prompt with masked tokens between real ones (row "
            f"{holes[0]}), which must be read in one call; leave prefill_chunk out."
        )
    return max(_SMALLEST_CHUNK, 1 << (length - 1).bit_length())


def _chunk(tokens: int, rows: int) -> int:
    """Columns per prefill call for the class of a text of `tokens`, less for many rows."""
    chunk = _class_chunk(_class(tokens))
    while chunk > _SMALLEST_CHUNK and chunk * rows > _TOKENS_PER_CALL:
        chunk //= 2
    return chunk


def _capacity(
    length: int,
    padded: int,
    max_new_tokens: int,
    guesses: int,
    cache_length: int | None,
    cache: Zamba2Cache | None,
) -> int:
    """Slots of the cache. The last new token is never fed back, so it needs none. A given cache that is too small gets
    the smallest class's slots that are enough, and loses those of its padding."""
    needed = padded + max_new_tokens - 1 + guesses
    if cache is None:
        if cache_length is None:
            # The second is the larger one only where prefill_chunk or masked tokens made the padding longer.
            return max(_class_slots(_class(length + max_new_tokens + guesses)), _slots(needed))
        if needed > cache_length:
            also = f" (and {guesses} that are looked up)" if guesses else ""
            raise ValueError(
                f"cache_length must be at least {needed} for a prompt padded to {padded} columns and {max_new_tokens} "
                f"new tokens{also}, got {cache_length}; raise it, or lower prefill_chunk."
            )
        return cache_length
    if cache_length is not None:
        raise ValueError(
            f"cache_length={cache_length} has no use with past_key_values, which has its own; leave it out."
        )
    if needed <= cache.max_length - int(cache.length):
        return cache.max_length
    return _slots(int(np.asarray(cache.slot_mask).sum(axis=1).max()) + needed)


def _class(tokens: int) -> int:
    """The longest text of the class that a text of `tokens` belongs to."""
    longest = _SMALLEST_TEXT
    while longest < tokens:
        longest *= _TEXT_FACTOR
    return longest


def _class_chunk(longest: int) -> int:
    return min(longest // _CHUNKS_PER_TEXT, _LARGEST_CHUNK)


def _class_slots(longest: int) -> int:
    """A chunk more than the longest text: padding a prompt to whole chunks never pushes it out of its class."""
    return longest + _class_chunk(longest)


def _slots(columns: int) -> int:
    """The smallest class's slots that are enough."""
    longest = _SMALLEST_TEXT
    while _class_slots(longest) < columns:
        longest *= _TEXT_FACTOR
    return _class_slots(longest)
