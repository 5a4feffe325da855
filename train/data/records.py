"""Reading the files of a source, one record after the other, each with the place where it stands."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from train.data.sources import DATASET_KIND, Source

FORMATS = ("text", "chat", "completion")
CHAT_FIELDS = ("messages", "conversations")
COMPLETION_FIELDS = ("prompt", "completion")
OPTIONAL_FIELDS = {"chat": ("tools",)}

_ROWS = 256  # of a table that are in memory at a time


class Record(NamedTuple):
    """One record of a file.

    Attributes:
        path: of the file.
        unit, number: where it stands there: ("line", 3); number 0 means the whole file.
        value: a string for text files, bytes for ArrayRecord, else a dict of the fields.
        done: how far its source has been read, in units of `Reading.total`.
    """

    path: Path
    unit: str
    number: int
    value: Any
    done: int

    @property
    def place(self) -> str:
        return f"{self.path}, {self.unit} {self.number}" if self.number else str(self.path)


class Reading(NamedTuple):
    """How a source is read.

    Attributes:
        format: what a record is: text, chat, completion, or tokens.
        total: what `Record.done` ends with.
        unit: of `total`: "B" or "rows".
        records: starts to read.
    """

    format: str
    total: int
    unit: str
    records: Callable[[], Iterator[Record]]


def read_source(source: Source, *, text_field: str, format: str | None) -> Reading:
    """Looks at the beginning of a source, to see what its records are.

    Args:
        text_field: the field that holds a document.
        format: text, chat or completion; None: by the fields that there are.

    Raises:
        ValueError: fields that fit no format, or several; files of another kind than their suffix says.
    """
    if source.kind in ("text", "array_record"):
        own = "text" if source.kind == "text" else "tokens"
        if format not in (None, own):
            raise ValueError(f"{source.name} holds {own}, so that the format {format} cannot be had from it.")
        if source.kind == "text":
            return Reading(own, _bytes_of(source), "B", lambda: _text_files(source))
        return Reading(own, _array_records(source), "rows", lambda: _read_array_records(source))
    if source.kind == "jsonl":
        first = next(_json_lines(source), None)
        if first is None:
            raise ValueError(f"{source.name} holds no record, only blank lines.")
        chosen = choose_format(first.value, first.place, text_field=text_field, format=format)
        return Reading(chosen, _bytes_of(source), "B", lambda: _json_lines(source))
    if source.kind == DATASET_KIND:
        return _read_dataset(source, text_field=text_field, format=format)
    return _read_parquet(source, text_field=text_field, format=format)


def choose_format(names: Collection[str], place: str, *, text_field: str, format: str | None) -> str:
    """text, chat or completion, by the names of the fields."""
    possible = []
    if text_field in names:
        possible.append("text")
    if any(field in names for field in CHAT_FIELDS):
        possible.append("chat")
    if all(field in names for field in COMPLETION_FIELDS):
        possible.append("completion")
    found = ", ".join(sorted(names)) or "none"
    if format is not None:
        if format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
        if format not in possible:
            needed = " and ".join(needed_fields(format, names, text_field))
            raise ValueError(f"{place}: the format {format} needs the field {needed}; the fields are: {found}.")
        return format
    if not possible:
        raise ValueError(
            f"{place}: no field {text_field!r}, 'messages', 'conversations', or 'prompt' with 'completion'; "
            f"the fields are: {found}. Name the one that holds the text."
        )
    if len(possible) > 1:
        raise ValueError(
            f"{place}: the fields ({found}) can be read as {' or '.join(possible)}; choose one as the format."
        )
    return possible[0]


def needed_fields(format: str, names: Collection[str], text_field: str) -> tuple[str, ...]:
    """The fields that a format reads, of those that there are."""
    if format == "text":
        return (text_field,)
    if format == "completion":
        return COMPLETION_FIELDS
    return (next((field for field in CHAT_FIELDS if field in names), CHAT_FIELDS[0]),)


def _columns(format: str, names: Collection[str], text_field: str) -> list[str]:
    """What to read of a table."""
    optional = [name for name in OPTIONAL_FIELDS.get(format, ()) if name in names]
    return [*needed_fields(format, names, text_field), *optional]


def _bytes_of(source: Source) -> int:
    return sum(file.stat().st_size for file in source.files)


# ---- files of text


def _text_files(source: Source) -> Iterator[Record]:
    done = 0
    for file in source.files:
        content = file.read_bytes()
        done += len(content)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise ValueError(f"{file}, line {line} is not UTF-8 ({error.reason}); convert the file.") from None
        yield Record(file, "", 0, text, done)


def _json_lines(source: Source) -> Iterator[Record]:
    done = 0
    for file in source.files:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                done += len(line)
                if line.isspace():
                    continue
                try:
                    value = json.loads(line)
                except ValueError as error:  # of JSON or of UTF-8
                    hint = " A JSON array is not JSON Lines: write one object a line." if line[:1] == b"[" else ""
                    raise ValueError(f"{file}, line {number} is not JSON: {error}.{hint}") from None
                if not isinstance(value, dict):
                    raise ValueError(
                        f'{file}, line {number} must be a JSON object such as {{"text": ...}}, got {_type(value)}.'
                    )
                yield Record(file, "line", number, value, done)


def _type(value: Any) -> str:
    """The name of a JSON value's type."""
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


# ---- tables


def _read_parquet(source: Source, *, text_field: str, format: str | None) -> Reading:
    import pyarrow
    import pyarrow.parquet

    total = 0
    for file in source.files:
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                names = table.schema_arrow.names
                total += table.metadata.num_rows
        except pyarrow.ArrowException as error:
            raise ValueError(f"{file} is not Parquet: {error}") from None
        chosen = choose_format(names, str(file), text_field=text_field, format=format)
        format = format or chosen  # the later files must have it too
    if not total:
        raise ValueError(f"{source.name} holds no rows.")

    def records() -> Iterator[Record]:
        done = 0
        for file in source.files:
            with pyarrow.parquet.ParquetFile(file) as table:
                columns = _columns(chosen, table.schema_arrow.names, text_field)
                number = 0
                for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
                    for row in batch.to_pylist():
                        number, done = number + 1, done + 1
                        yield Record(file, "row", number, row, done)

    return Reading(chosen, total, "rows", records)


def _read_dataset(source: Source, *, text_field: str, format: str | None) -> Reading:
    import datasets
    import pyarrow

    path = Path(source.name).expanduser()
    if not any(file.suffix == ".arrow" for file in source.files):  # which datasets itself cannot load
        raise ValueError(f"{source.name} holds no rows.")
    try:
        table = datasets.load_from_disk(str(path))
    except (pyarrow.ArrowException, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{source.name} is no dataset that can be loaded: {error}") from error
    chosen = choose_format(table.column_names, source.name, text_field=text_field, format=format)
    if not len(table):
        raise ValueError(f"{source.name} holds no rows.")
    columns = _columns(chosen, table.column_names, text_field)
    table = table.select_columns(columns).with_format(None)

    def records() -> Iterator[Record]:
        number = 0
        for batch in table.iter(batch_size=_ROWS):
            for values in zip(*(batch[column] for column in columns), strict=True):
                number += 1
                yield Record(path, "row", number, dict(zip(columns, values, strict=True)), number)

    return Reading(chosen, len(table), "rows", records)


# ---- token ids


def _array_records(source: Source) -> int:
    from array_record.python.array_record_module import ArrayRecordReader

    total = 0
    for file in source.files:
        reader = ArrayRecordReader(str(file))
        if not reader.ok() or not reader.num_records():
            raise ValueError(f"{file} holds no ArrayRecord that can be read.")
        total += reader.num_records()
        reader.close()
    return total


def _read_array_records(source: Source) -> Iterator[Record]:
    from array_record.python.array_record_module import ArrayRecordReader

    done = 0
    for file in source.files:
        reader = ArrayRecordReader(str(file))
        count = reader.num_records()
        for first in range(0, count, _ROWS):
            values = reader.read(first, min(first + _ROWS, count))
            for number, value in enumerate(values, first + 1):
                done += 1
                yield Record(file, "record", number, value, done)
        reader.close()
