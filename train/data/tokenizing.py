"""The one way from a source to documents, for the cache and for files of token ids alike."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from train.data.array_records import to_bytes, write_records
from train.data.encoding import Document, make_encode
from train.data.records import Reading, Record, read_source
from train.data.sources import SUFFIXES, find_sources

_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 1 << 22


def tokenize(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    target: str | Path,
    *,
    vocab_size: int | None = None,
    text_field: str = "text",
    format: str | None = None,
    progress: bool | None = None,
) -> int:
    """Writes the documents of some sources, one source after the other, into one ArrayRecord file of token ids, which
    needs no tokenizer to train on; `train.data.array_records` describes it.

    Args:
        target: a new file, named .array_record.
        vocab_size: of a model that it must do for; default: as many as the tokenizer has.
        sources, tokenizer, text_field, format, progress: as for `open_data`; no weights.

    Returns:
        The number of documents.

    Raises:
        ValueError, OSError: as `open_data`; a target that exists or has another suffix. Nothing is left behind.
    """
    target = Path(target).expanduser()
    if target.exists():
        raise ValueError(f"{target} exists; give a new file.")
    if SUFFIXES.get(target.suffix) != "array_record":
        raise ValueError(f"{target} must end in .array_record, so that its kind is known when it is read.")
    if vocab_size is None:
        vocab_size = largest_id(tokenizer) + 1
    check_tokenizer(tokenizer, vocab_size)
    found = find_sources(sources)
    for source in found:
        if source.weight is not None:
            raise ValueError(f"{source.name} has a weight, which a file of token ids cannot hold; leave it out.")
    readings = [read_source(source, text_field=text_field, format=format) for source in found]

    def records() -> Iterator[bytes]:
        for source, reading in zip(found, readings, strict=True):
            for ids, counted in encode_records(
                reading, tokenizer, text_field=text_field, description=f"tokenising {source.name}", progress=progress
            ):
                if ids.max() >= vocab_size:
                    raise ValueError(
                        f"{source.name} holds the token id {ids.max()}, the model's vocab_size is {vocab_size}."
                    )
                yield to_bytes(ids, counted)

    temporary = target.with_name(f".{target.name}.writing-{unique_suffix()}")
    try:
        count = write_records(temporary, records())
        if not count:
            raise ValueError("the sources hold no document with any content.")
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def encode_records(
    reading: Reading, tokenizer: PreTrainedTokenizerBase, *, text_field: str, description: str, progress: bool | None
) -> Iterator[Document]:
    """All documents of a source but those without a token, such as an empty text; a batch of records in memory at a
    time."""
    encode = make_encode(reading.format, tokenizer, text_field=text_field)
    with progress_bar(description, reading.total, reading.unit, progress) as bar:
        for batch in _batches(reading.records()):
            yield from (document for document in encode(batch) if len(document.ids))
            bar.update(batch[-1].done - bar.n)


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += len(record.value) if isinstance(record.value, str | bytes) else _characters(record.value)
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(fields: dict[str, Any]) -> int:
    return sum(len(value) for value in fields.values() if isinstance(value, str))


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id that a text can become."""
    return max(tokenizer.get_vocab().values())


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuses a tokenizer that does not do for a model with `vocab_size` tokens."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer; one with a tokenizer.json is needed, which "
            "says where in the text each token stands."
        )
    largest = largest_id(tokenizer)
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer's vocabulary does not fit the model: it has ids up to {largest}, the model's vocab_size is "
            f"{vocab_size}. Give the tokenizer that belongs to the model."
        )


def progress_bar(description: str, total: int, unit: str, progress: bool | None) -> tqdm:
    """A bar on stderr for what takes longer than a moment. `progress` None: only where stderr is a terminal."""
    return tqdm(
        desc=description,
        total=total,
        unit=unit,
        unit_scale=True,
        delay=2,
        disable=None if progress is None else not progress,
    )


def unique_suffix() -> str:
    """A name that no other process has."""
    return f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
