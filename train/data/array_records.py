"""ArrayRecord files of token ids.

A record is one document: a little-endian uint32 per token, with nothing before, between or behind. The highest bit is
set where a token is read but not predicted, such as a user's in a conversation. Documents are taken as they are, so
that they hold their begin and end tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

NOT_COUNTED = np.uint32(1 << 31)


def to_bytes(ids: Int[np.ndarray, " l"], counted: Bool[np.ndarray, " l"] | None) -> bytes:
    """The record of a document. `counted`: whether each token is to be predicted; None: all are."""
    values = ids.astype("<u4")
    if counted is not None:
        values[~counted] |= NOT_COUNTED
    return values.tobytes()


def from_bytes(value: bytes, place: str) -> tuple[Int[np.ndarray, " l"], Bool[np.ndarray, " l"]]:
    """What `to_bytes` was given.

    Raises:
        ValueError: not a whole number of tokens, naming the place.
    """
    if len(value) % 4:
        raise ValueError(f"{place} has {len(value)} bytes; a document is one little-endian uint32 per token.")
    values = np.frombuffer(value, "<u4")
    return (values & ~NOT_COUNTED).astype(np.int64), values < NOT_COUNTED


def write_records(path: Path, records: Iterable[bytes]) -> int:
    """Writes a file; returns the number of records."""
    from array_record.python.array_record_module import ArrayRecordWriter

    # One record a group, as Grain's own random access wants it.
    writer = ArrayRecordWriter(str(path), "group_size:1")
    count = 0
    for record in records:
        writer.write(record)
        count += 1
    writer.close()
    return count
