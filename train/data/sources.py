"""What a `--data` argument names: its weight, its files, and what kind of files they are."""

from __future__ import annotations

import collections
import dataclasses
import glob
import math
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
}
ACCEPTED = (
    "accepted are text (.txt, .text, .md: one document a file), JSON Lines (.jsonl, .ndjson, .json), Parquet "
    "(.parquet), ArrayRecord of token ids (.array_record), a directory or glob of files of one of these kinds, and a "
    "directory written by datasets' save_to_disk"
)
DATASET_KIND = "dataset"


@dataclasses.dataclass(frozen=True)
class Source:
    """Files of one kind.

    Attributes:
        name: as the user gave it, without the weight.
        kind: text, jsonl, parquet, array_record, or dataset (a directory of `datasets.save_to_disk`).
        files: in the order in which they are read: sorted by path. All files of the directory for a dataset.
        weight: share of the rows, in proportion to the other sources' weights; None without one.
    """

    name: str
    kind: str
    files: tuple[Path, ...]
    weight: float | None = None


def find_sources(arguments: Sequence[str]) -> list[Source]:
    """Every argument is PATH or PATH=WEIGHT; a path is a file, a directory (read with all below it) or a glob.

    Nothing but names, sizes and permissions is looked at.

    Raises:
        FileNotFoundError: a path or glob that names nothing.
        ValueError: none given, a kind that is not accepted, files of several kinds, an empty file, a weight that is no
            positive number, or weights for some only.
        OSError: a file that cannot be read.
    """
    if isinstance(arguments, str):
        raise ValueError(f"data sources are a sequence of paths, got the string {arguments!r}; write [{arguments!r}].")
    if not arguments:
        raise ValueError(f"no data source is given; {ACCEPTED}.")
    sources = [_find_source(*_split_weight(str(argument))) for argument in arguments]
    weighted = [source.name for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        without = next(source.name for source in sources if source.weight is None)
        raise ValueError(
            f"{weighted[0]} has a weight and {without} has none; give a weight to all (PATH=0.7) or to none, which "
            "mixes by size."
        )
    return sources


def _split_weight(argument: str) -> tuple[str, float | None]:
    name, equals, text = argument.rpartition("=")
    if not equals or Path(argument).exists():  # a path may hold "=", as in date=2024
        return argument, None
    try:
        weight = float(text)
    except ValueError:
        if Path(name).exists():
            raise ValueError(f"the weight of {name} must be a number, got {text!r} in {argument!r}.") from None
        return argument, None
    if not 0 < weight < math.inf:
        raise ValueError(f"the weight of {name} must be positive and finite, got {text}.")
    return name, weight


def _find_source(name: str, weight: float | None) -> Source:
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = sorted(entry.parent.name for entry in path.glob("*/state.json"))
            raise ValueError(f"{name} holds several splits of a dataset; give one: {path / (splits or ['SPLIT'])[0]}.")
        inside = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path)))
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            return Source(name, DATASET_KIND, _check_files(inside, may_be_empty=True), weight)
        files = [file for file in inside if _kind(file) is not None]
        if not files:
            raise ValueError(f"the directory {name} holds no data; {ACCEPTED}.")
    elif path.is_file():
        files = [path]
        if _kind(path) is None:
            raise ValueError(f"{name} is of no kind that is known by its suffix; {ACCEPTED}.")
    elif path.exists():
        raise ValueError(f"{name} is neither a file nor a directory; {ACCEPTED}.")
    elif any(character in name for character in "*?["):
        files = sorted(Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        if not files:
            raise FileNotFoundError(f"{name} matches no file.")
        unknown = [file for file in files if _kind(file) is None]
        if unknown:
            raise ValueError(f"{name} matches {unknown[0]}, which is of no kind known by its suffix; {ACCEPTED}.")
    else:
        raise FileNotFoundError(f"{name} does not exist; {ACCEPTED}.")

    kinds = collections.Counter(_kind(file) for file in files)
    if len(kinds) > 1:
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        suffix = files[0].suffix
        raise ValueError(
            f"{name} holds files of several kinds ({found}); name one, with a glob such as '{path}/**/*{suffix}'."
        )
    return Source(name, next(iter(kinds)), _check_files(files), weight)


def _kind(file: Path) -> str | None:
    return SUFFIXES.get(file.suffix.lower())


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _check_files(files: Sequence[Path], may_be_empty: bool = False) -> tuple[Path, ...]:
    for file in files:
        with file.open("rb"):  # an OSError that names the file
            pass
        if not may_be_empty and file.stat().st_size == 0:
            raise ValueError(f"{file} is empty.")
    return tuple(files)
