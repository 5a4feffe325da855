"""Rows of a plan by their number: what Grain shuffles, mixes and batches."""

from __future__ import annotations

import numpy as np

from train.data.cache import TokenCache
from train.data.packing import Plan

IGNORED = -100
"""The label of a token that is not predicted."""

Row = dict[str, np.ndarray]


class PackedRows:
    """Random access to the rows of one source. Reading is safe from several threads.

    Args:
        cache: the tokens.
        plan: which of them are in which row.
        pad_id: the id in columns without a token.
        length: as many rows as that; those beyond the plan's are empty. Default: the plan's.
    """

    def __init__(self, cache: TokenCache, plan: Plan, pad_id: int, length: int | None = None):
        self._cache, self._plan, self._pad_id = cache, plan, pad_id
        self._length = plan.rows if length is None else length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        """`input_ids`, `labels`, `segment_ids`, all (l,) int32.

        Segments are counted from 1, padding is segment 0. Labels are the ids, not shifted, and -100 in padding, where a
        token does not count, and at the first token of a segment: nothing stands before it to predict it from.
        """
        length = self._plan.seq_len
        ids = np.full(length, self._pad_id, np.int32)
        labels = np.full(length, IGNORED, np.int32)
        segments = np.zeros(length, np.int32)
        row = {"input_ids": ids, "labels": labels, "segment_ids": segments}
        if not 0 <= index < self._plan.rows:
            if not 0 <= index < self._length:
                raise IndexError(f"row {index} of {self._length}")
            return row

        first, last = self._plan.first_piece[index : index + 2]
        column = 0
        for segment, piece in enumerate(range(first, last), 1):
            start, size = int(self._plan.start[piece]), int(self._plan.length[piece])
            end = column + size
            ids[column:end] = self._cache.tokens[start : start + size]
            segments[column:end] = segment
            predicted = ids[column + 1 : end]
            if self._cache.counted is not None:
                predicted = np.where(self._cache.counted[start + 1 : start + size], predicted, IGNORED)
            labels[column + 1 : end] = predicted
            column = end
        return row
