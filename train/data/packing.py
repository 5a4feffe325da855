"""Which document goes into which row, from the documents' lengths alone."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows made of pieces of documents.

    Row i holds the pieces `first_piece[i]` to `first_piece[i + 1] - 1`, one after the other from column 0.

    Attributes:
        start: (pieces,) int64, each piece's first token, counted over all documents laid end to end.
        length: (pieces,) int32, its number of tokens, at least 1.
        first_piece: (rows + 1,) int64.
        seq_len: tokens that a row has room for.
    """

    start: Int[np.ndarray, " pieces"]
    length: Int[np.ndarray, " pieces"]
    first_piece: Int[np.ndarray, " rows_and_one"]
    seq_len: int

    @property
    def rows(self) -> int:
        return len(self.first_piece) - 1

    @property
    def padding(self) -> float:
        """The share of the rows' columns that hold no token."""
        return 1 - int(self.length.sum(dtype=np.int64)) / (self.rows * self.seq_len)


def plan_rows(lengths: Int[np.ndarray, " documents"], seq_len: int, *, pack: bool = True, seed: int = 0) -> Plan:
    """Best fit, decreasing: the longest piece first, each into the fullest row that has room for it.

    A document longer than a row is cut into pieces of `seq_len` and a rest, each a segment of its own: no token is
    lost, but the first of each further piece is not predicted. Among pieces of one length, `seed` decides.

    Args:
        lengths: tokens of each document, at least 1.
        pack: False gives every piece a row of its own, in the order of the documents.
    """
    start, length = _cut(np.asarray(lengths, np.int64), seq_len)
    if not pack:
        return Plan(start, length, np.arange(len(length) + 1), seq_len)
    row = _best_fit_decreasing(length, seq_len, np.random.default_rng(seed))
    order = np.argsort(row, kind="stable")
    first_piece = np.concatenate([[0], np.cumsum(np.bincount(row))])
    return Plan(start[order], length[order], first_piece, seq_len)


def _cut(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of every piece, in the order of the tokens."""
    pieces = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), pieces)
    # Which piece of its document each one is.
    index = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = (np.cumsum(lengths) - lengths)[document] + index * seq_len
    length = np.minimum(lengths[document] - index * seq_len, seq_len)
    return start, length.astype(np.int32)


def _best_fit_decreasing(lengths: np.ndarray, seq_len: int, rng: np.random.Generator) -> np.ndarray:
    """The row of each piece.

    All pieces of one length are placed together, and all rows with the same room alike, so that the work grows with the
    number of different lengths rather than of pieces.
    """
    shuffled = rng.permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    row = np.empty(len(lengths), np.int64)
    rows = 0
    # Rows by the room that is left in them. Bit r of `some` is set where there are rows with room r.
    with_room: dict[int, list[np.ndarray]] = {}
    some = 0

    def put(numbers: np.ndarray, room: int) -> None:
        nonlocal some
        if len(numbers) and room:
            with_room.setdefault(room, []).append(numbers)
            some |= 1 << room

    sizes, counts = np.unique(lengths, return_counts=True)
    placed = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = placed + count
        while placed < end:
            large_enough = some >> size
            if large_enough:
                room = size + (large_enough & -large_enough).bit_length() - 1
                numbers = np.concatenate(with_room.pop(room))
                some ^= 1 << room
            else:
                room = seq_len
                numbers = np.arange(rows, rows - (placed - end) // (seq_len // size))
                rows += len(numbers)
            # The fullest row stays the fullest until it has no room left for this size.
            each = room // size
            taken = min(end - placed, each * len(numbers))
            full, rest = divmod(taken, each)
            row[order[placed : placed + taken]] = np.repeat(numbers[: full + 1], each)[:taken]
            put(numbers[:full], room - each * size)
            if rest:
                put(numbers[full : full + 1], room - rest * size)
            put(numbers[full + bool(rest) :], room)
            placed += taken
    return row
