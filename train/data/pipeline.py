"""From data files to batches: Grain over random access, so that a position is nothing but a number."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np
from transformers import PreTrainedTokenizerBase

from train.data.cache import TokenCache, default_cache_dir, open_tokens
from train.data.packing import Plan, plan_rows
from train.data.records import FORMATS, read_source
from train.data.rows import PackedRows
from train.data.sources import Source, find_sources
from train.data.tokenizing import check_tokenizer

# Threads read ahead; what they return is in order, so that their number changes nothing but speed.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)

# Rows of an order without end: Grain's own endless length is the largest that Python has, and overflows in batches.
_ENDLESS = 1 << 48


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What the data amounts to.

    Attributes:
        documents, tokens: as tokenised, end tokens included.
        rows: of one pass.
        padding: share of the columns of these rows that hold no token.
    """

    documents: int
    tokens: int
    rows: int
    padding: float


class Data:
    """Tokenised and packed data; `open_data` makes it.

    Attributes:
        statistics: of all sources together.
        fingerprint: of everything that decides which rows come in which order: contents, tokenizer, weights, row
            length, seed. A position saved under another fingerprint means nothing here.
    """

    def __init__(
        self, sources: Sequence[Source], caches: Sequence[TokenCache], plans: Sequence[Plan], pad_id: int, seed: int
    ):
        self._sources, self._caches, self._plans = sources, caches, plans
        self._pad_id, self._seed = pad_id, seed
        rows = sum(plan.rows for plan in plans)
        tokens = sum(len(cache.tokens) for cache in caches)
        self.statistics = Statistics(
            documents=sum(len(cache.lengths) for cache in caches),
            tokens=tokens,
            rows=rows,
            padding=1 - tokens / (rows * plans[0].seq_len),
        )
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> str:
        whole = hashlib.blake2b(str(self._seed).encode(), digest_size=16)
        for source, cache, plan in zip(self._sources, self._caches, self._plans, strict=True):
            whole.update(f"{cache.fingerprint} {source.weight} {plan.seq_len}".encode())
            for array in (plan.start, plan.length, plan.first_piece):
                whole.update(np.ascontiguousarray(array))
        return whole.hexdigest()

    def batches(self, rows: int, *, shard: tuple[int, int] = (0, 1), start: int = 0) -> grain.DatasetIterator:
        """Training batches without end: shuffled anew in each pass, mixed by the sources' weights, or, without weights,
        every row once in a pass.

        Args:
            rows: of the batch over all shards.
            shard: (index, count): this one gets an equal share of each batch's rows, in their order. Whatever the
                count, batch s of all shards together is rows s * `rows` to (s + 1) * `rows` - 1 of the same order.
            start: batches to leave out, without reading them.

        Returns:
            An iterator over dicts of `input_ids`, `labels` and `segment_ids`, (rows / count, seq_len) int32; see
            `PackedRows`. Its `get_state()` is {"next_index": batches so far}, and does for any number of shards.

        Raises:
            ValueError: rows that the shards do not divide.
        """
        share = _share(rows, shard)
        parts = [
            grain.MapDataset.source(PackedRows(cache, plan, self._pad_id))
            for cache, plan in zip(self._caches, self._plans, strict=True)
        ]
        weights = [source.weight for source in self._sources]
        if None in weights:
            order = grain.MapDataset.concatenate(parts).shuffle(_seed_of(self._seed, 0)).repeat()
        else:
            # Each source goes through passes of its own. Grain rounds weights by at most a hundredth of the smallest.
            order = grain.MapDataset.mix(
                [part.shuffle(_seed_of(self._seed, index)).repeat() for index, part in enumerate(parts)], weights
            )
        return _iterate(order.slice(slice(_ENDLESS)), share, shard, start)

    def evaluation_batches(
        self, rows: int, *, shard: tuple[int, int] = (0, 1), limit: int | None = None
    ) -> grain.DatasetIterator:
        """One pass over all rows in their order. The last batch is filled up with empty rows, whose labels are -100.

        Args:
            rows, shard: as for `batches`.
            limit: at most so many batches.

        Raises:
            ValueError: rows that the shards do not divide; sources with weights, which a pass over all has no use for.
        """
        share = _share(rows, shard)
        weighted = next((source.name for source in self._sources if source.weight is not None), None)
        if weighted is not None:
            raise ValueError(
                f"held-out data is read whole, so that {weighted} cannot have a weight there; leave it out."
            )
        total = self.statistics.rows
        count = -(-total // rows) if limit is None else min(limit, -(-total // rows))
        lengths = [plan.rows for plan in self._plans]
        lengths[-1] += -total % rows
        order = grain.MapDataset.concatenate(
            [
                grain.MapDataset.source(PackedRows(cache, plan, self._pad_id, length))
                for cache, plan, length in zip(self._caches, self._plans, lengths, strict=True)
            ]
        )
        return _iterate(order.slice(slice(count * rows)), share, shard, 0)


def open_data(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    vocab_size: int,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    text_field: str = "text",
    format: str | None = None,
    pack: bool = True,
    progress: bool | None = None,
) -> Data:
    """Finds, tokenises (once: see `train.data.cache`) and packs data.

    Args:
        sources: each PATH or PATH=WEIGHT; see `train.data.sources` for what a path may be. Weights are shares of the
            rows, in any unit; without them sources are mixed by size.
        tokenizer: a fast tokenizer of transformers, the model's.
        seq_len: tokens of a row.
        vocab_size: of the model; no id may reach it.
        seed: of the order, and of who shares a row with whom.
        cache_dir: for tokenised data; default: `default_cache_dir()`.
        text_field: the field that holds a document.
        format: text, chat (`messages` or `conversations`) or completion (`prompt` and `completion`); None: by the
            fields that there are.
        pack: False gives each document rows of its own.
        progress: bars on stderr; None: where it is a terminal.

    Raises:
        ValueError, OSError: anything that does not do, naming the file and the line or row.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2, for one token to be predicted from another; got {seq_len}.")
    if format is not None and format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    check_tokenizer(tokenizer, vocab_size)
    found = find_sources(sources)
    readings = [read_source(source, text_field=text_field, format=format) for source in found]
    directory = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    caches = [
        open_tokens(
            source,
            reading,
            tokenizer,
            text_field=text_field,
            vocab_size=vocab_size,
            cache_dir=directory,
            progress=progress,
        )
        for source, reading in zip(found, readings, strict=True)
    ]
    plans = [
        plan_rows(cache.lengths, seq_len, pack=pack, seed=_seed_of(seed, index)) for index, cache in enumerate(caches)
    ]
    pad_id = next(id for id in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if id is not None)
    return Data(found, caches, plans, pad_id, seed)


def _share(rows: int, shard: tuple[int, int]) -> int:
    """Rows of one shard."""
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard must be (index, count) with index from 0 to count - 1, got {shard}.")
    if rows < 1 or rows % count:
        raise ValueError(f"a batch of {rows} rows cannot be split evenly over {count} processes.")
    return rows // count


def _iterate(order: grain.MapDataset, share: int, shard: tuple[int, int], start: int) -> grain.DatasetIterator:
    index, count = shard
    iterator = iter(order.batch(share).slice(slice(index, None, count)).to_iter_dataset(_READ_OPTIONS))
    if start:
        iterator.set_state({"next_index": start})
    return iterator


def _seed_of(seed: int, index: int) -> int:
    """An independent 32-bit seed for each source."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
