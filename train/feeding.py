"""Batches onto the devices: each process reads the rows that its own devices need."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from train.step import Batch, rows_sharding

# Arrays of tokens, (b, l). Others have one entry, or several labels, a row.
_OF_TOKENS = ("input_ids", "labels", "segment_ids", "attention_mask")


class Feed:
    """How batches of `rows` rows are spread over a mesh.

    Attributes:
        share: (index, count): of `count` equal parts of a batch's rows, this process reads the one with this index.
            Usually one per process; where a row's tokens are spread over several processes, each of them reads it.
    """

    def __init__(self, mesh: Mesh, rows: int):
        self._mesh = mesh
        self._rows = rows
        slices = rows_sharding(mesh, 1).addressable_devices_indices_map((rows,)).values()
        spans = {index[0].indices(rows)[:2] for index in slices}
        first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
        length = last - first
        # Devices can be laid out so that a process has rows here and there; it then reads them all.
        whole = sum(stop - start for start, stop in spans) == length and first % length == 0 and rows % length == 0
        self.share = (first // length, rows // length) if whole else (0, 1)

    def place(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """This process's share of a batch, as arrays of the whole batch on the devices of all."""
        return {name: self._place(np.asarray(array), 2 if name in _OF_TOKENS else 1) for name, array in batch.items()}

    def _place(self, array: np.ndarray, spread_axes: int) -> jax.Array:
        first = self.share[0] * (self._rows // self.share[1])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(self._rows)
            return array[(slice(start - first, stop - first), *index[1:])]

        shape = (self._rows, *array.shape[1:])
        return jax.make_array_from_callback(shape, rows_sharding(self._mesh, spread_axes), part)
