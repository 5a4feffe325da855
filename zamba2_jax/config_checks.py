"""Checks of single values for `Zamba2Config`: each returns the value in plain Python form or raises `ValueError`."""

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class LabelMap(Mapping):
    """A hashable, immutable mapping between label ids and label names; equal to a dict of the same items."""

    def __init__(self, items: Mapping):
        self._items = dict(items)

    def __getitem__(self, key: Any) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def integer(name: str, value: Any) -> int:
    """An integer of any type but bool."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return operator.index(value)


def size(name: str, value: Any) -> int:
    """An integer of at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return operator.index(value)


def number(name: str, value: Any) -> float:
    """A finite int or float, as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def interval(name: str, value: Any) -> tuple[float, float]:
    """A pair with 0 <= low < high; high may be infinite."""
    pair = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    good = len(pair) == 2 and all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in pair)
    if not good or not 0 <= pair[0] < pair[1]:
        raise ValueError(f"{name} must be None or a pair (low, high) with 0 <= low < high, got {value!r}")
    return float(pair[0]), float(pair[1])


def labels(num_labels: Any, id2label: Any, label2id: Any) -> tuple[int, LabelMap, LabelMap]:
    """`num_labels`, `id2label` and `label2id` made complete and consistent; either map decides the number.

    Keys and ids may be strings of digits, since JSON has no other keys.
    """
    if id2label is not None:
        names = {_label_id(index): label for index, label in _mapping("id2label", id2label).items()}
    elif label2id is not None:
        names = {_label_id(index): label for label, index in _mapping("label2id", label2id).items()}
    else:
        names = {index: f"LABEL_{index}" for index in range(size("num_labels", num_labels))}
    names = dict(sorted(names.items()))
    indices = {label: index for index, label in names.items()}
    if not names or tuple(names) != tuple(range(len(names))) or len(indices) != len(names):
        raise ValueError(f"id2label must give each of the ids 0, 1, ... a name of its own, got {names!r}")
    if label2id is not None:
        given = {label: _label_id(index) for label, index in _mapping("label2id", label2id).items()}
        if given != indices:
            raise ValueError(f"label2id must be None or the inverse of id2label {names!r}, got {given!r}")
    if num_labels not in (2, len(names)):  # 2 is the default, which a map overrides
        raise ValueError(f"num_labels={num_labels!r} contradicts the {len(names)} labels of id2label; give one of them")
    return len(names), LabelMap(names), LabelMap(indices)


def _mapping(name: str, value: Any) -> Mapping:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be None or a mapping between ids 0, 1, ... and names, got {value!r}")
    return value


def _label_id(value: Any) -> int:
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    return integer("a label's id", value)
