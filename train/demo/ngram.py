"""A 5-gram model with interpolated modified Kneser-Ney smoothing: what a small neural model has to beat.

Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1999), section 3: the highest
order counts occurrences, lower orders count the distinct tokens that precede; each order has three discounts, for
counts of one, two, and three or more; below the single tokens stands the uniform distribution.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class _Order:
    """Counts of one n-gram length, sorted by key.

    Attributes:
        grams, counts: the n-grams as integers, and how often each counts.
        contexts: their first n-1 tokens, as integers, each once.
        totals: sum of the counts after each context.
        kinds: (contexts, 3), how many n-grams after it count once, twice, more often.
        discounts: what is taken from a count of one, two, more.
    """

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray
    discounts: np.ndarray


class NGramModel:
    """Probabilities of tokens after the `order - 1` before them, within one document.

    Args:
        documents: arrays of token ids in [0, vocab_size); each document's first token is given, never predicted.
        vocab_size: at most 4096 for order 5: an n-gram is one 64-bit integer.
        order: tokens of the longest n-gram.

    Raises:
        ValueError: n-grams that do not fit, or documents without a single n-gram.
    """

    def __init__(self, documents: Sequence[np.ndarray], vocab_size: int, order: int = 5):
        self.vocab_size, self.order = vocab_size, order
        self._bits = max(1, int(vocab_size - 1).bit_length())
        if self._bits * order > 63:
            raise ValueError(
                f"{order}-grams of {vocab_size} tokens do not fit into 64 bits; take a smaller vocabulary or order."
            )
        self._orders: list[_Order] = []
        grams, counts = np.unique(self._grams(documents, order), return_counts=True)
        if not grams.size:
            raise ValueError(f"no document holds {order} tokens.")
        for length in range(order, 0, -1):
            self._orders.insert(0, self._make_order(grams, counts))
            if length == 1:
                break
            # Of the next shorter length, what counts is in how many contexts it occurs; n-grams at the beginning of a
            # document have nothing before them, and count as often as they occur.
            shorter = np.unique(grams) & ((1 << self._bits * (length - 1)) - 1)
            first = self._grams([document[: length - 1] for document in documents], length - 1)
            grams, counts = np.unique(np.concatenate([shorter, first]), return_counts=True)

    def log_probabilities(self, document: np.ndarray) -> np.ndarray:
        """(tokens - 1,) float64: the natural log of each token's probability after those before it."""
        length = len(document) - 1
        probability = np.full(length, 1.0 / self.vocab_size)
        known = np.arange(1, length + 1)  # tokens that stand before each
        for size, order in enumerate(self._orders, start=1):
            at = np.nonzero(known >= size - 1)[0]
            key = np.zeros(len(at), np.int64)
            for back in range(size - 1, -1, -1):
                key = (key << self._bits) | document[at + 1 - back].astype(np.int64)
            probability[at] = self._interpolated(order, key, probability[at])
        return np.log(probability)

    def _interpolated(self, order: _Order, key: np.ndarray, lower: np.ndarray) -> np.ndarray:
        place, seen = _find(order.contexts, key >> self._bits)
        gram, counted = _find(order.grams, key)
        count = np.where(counted, order.counts[gram], 0)
        discount = np.where(counted, order.discounts[np.minimum(count, 3) - 1], 0.0)
        total = np.where(seen, order.totals[place], 1)
        left_over = order.kinds[place] @ order.discounts / total
        return np.where(seen, (count - discount) / total + left_over * lower, lower)

    def _grams(self, documents: Sequence[np.ndarray], size: int) -> np.ndarray:
        """Every `size` neighbours of every document, as integers, the last token in the lowest bits."""
        found = []
        for document in documents:
            if len(document) >= size > 0:
                key = np.zeros(len(document) - size + 1, np.int64)
                for start in range(size):
                    key = (key << self._bits) | document[start : len(document) - size + 1 + start].astype(np.int64)
                found.append(key)
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _make_order(self, grams: np.ndarray, counts: np.ndarray) -> _Order:
        contexts, inverse = np.unique(grams >> self._bits, return_inverse=True)
        totals = np.bincount(inverse, weights=counts)
        kinds = np.stack(
            [np.bincount(inverse, weights=kind) for kind in (counts == 1, counts == 2, counts >= 3)], axis=1
        )
        n1, n2, n3, n4 = (max(1, int(np.sum(counts == number))) for number in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        discounts = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        # Few n-grams can make the estimate leave its range.
        return _Order(grams, counts, contexts, totals, kinds, np.clip(discounts, 0.0, [1.0, 2.0, 3.0]))


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in the sorted table each key is, and whether it is there."""
    place = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return place, table[place] == keys
