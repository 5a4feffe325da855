"""Finds what repeats in a model's list of layers, so that one compiled body can serve all repetitions.

1.2B    6 x [5 layers, hybrid], 2 layers
2.7B    [6, h0], 3 x [5, h1, 5, h0], [4, h1], [3, h0], 2       h0, h1: hybrid layers of the two shared blocks
7B      [6, h0], [4, h1], 5 x [5, h0, 5, h1], [5, h0], 3
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Stage:
    """Equal mamba layers, `plain` of them from index `start` on, and then a hybrid layer, use `use` of a shared block,
    or none (use None)."""

    start: int
    plain: int
    use: int | None


def stages(kinds: Sequence[Hashable], use_of_layer: Mapping[int, int]) -> list[Stage]:
    """The layers, cut after every hybrid layer and wherever neighbours differ in kind.

    Args:
        kinds: per layer; equal for layers that differ in the values of their arrays only.
        use_of_layer: for each hybrid layer, which use of a shared block it is.
    """
    found, start = [], 0
    for index, kind in enumerate(kinds):
        if index > start and kind != kinds[start] and index not in use_of_layer:
            found.append(Stage(start, index - start, None))
            start = index
        if index in use_of_layer:
            found.append(Stage(start, index - start, use_of_layer[index]))
            start = index + 1
    if start < len(kinds):
        found.append(Stage(start, len(kinds) - start, None))
    return found


def repetitions(kinds: Sequence[Hashable]) -> list[tuple[int, int, int]]:
    """Cuts a sequence into (first, period, count): `period` items from `first` on, `count` times over.

    From left to right, each time as many items as repeat, by the shortest period that reaches as far; an item that
    begins no repetition stands alone.
    """
    found, first = [], 0
    while first < len(kinds):
        best = (1, 1)
        for period in range(1, (len(kinds) - first) // 2 + 1):
            pattern, count = kinds[first : first + period], 1
            while kinds[first + count * period : first + (count + 1) * period] == pattern:
                count += 1
            if count > 1 and period * count > best[0] * best[1]:
                best = (period, count)
        found.append((first, *best))
        first += best[0] * best[1]
    return found
