"""The order of batches: a pure function of the seed, whoever reads it and wherever it starts."""

import collections
import itertools
import json

import grain
import numpy as np
import pytest

from tests.train.data.conftest import VOCAB_SIZE
from train.data import open_data
from train.data.rows import PackedRows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sources of 61 and 23 documents, told apart by their first letter."""
    folder = tmp_path_factory.mktemp("order")
    for letter, count in (("q", 61), ("x", 23)):
        lines = [json.dumps({"text": f"{letter}{index}" + " the fox" * (index % 11)}) for index in range(count)]
        (folder / f"{letter}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def open_small(folder, tokenizer):
    def open_small(*names, **options):
        options = {"seq_len": 16, "vocab_size": VOCAB_SIZE, "cache_dir": folder / "cache", "pack": False} | options
        return open_data([str(folder / name) for name in names], tokenizer, **options)

    return open_small


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_equal(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def join(shards):
    """Global batches of the shards' batches."""
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shards, strict=True)
    ]


def keys_of(batches):
    return [tuple(row) for batch in batches for row in batch["input_ids"].tolist()]


@pytest.mark.parametrize("names", [("q.jsonl", "x.jsonl"), ("q.jsonl=3", "x.jsonl=1")], ids=["by size", "by weight"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_of_any_number_make_the_same_batches(open_small, names, count):
    data = open_small(*names)
    whole = take(data.batches(8), 20)
    assert_equal(join([take(data.batches(8, shard=(index, count)), 20) for index in range(count)]), whole)


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_position_continues_with_another_number_of_shards(open_small, before, after):
    data = open_small("q.jsonl=3", "x.jsonl=1")
    whole = take(data.batches(4), 30)
    saved = []
    for index in range(before):
        iterator = data.batches(4, shard=(index, before))
        take(iterator, 17)
        saved.append(json.loads(json.dumps(iterator.get_state())))
    assert saved == [{"next_index": 17}] * before

    shards = []
    for index in range(after):
        iterator = data.batches(4, shard=(index, after))
        take(iterator, 3)  # a state is set on whatever came before
        iterator.set_state(saved[0])
        shards.append(take(iterator, 13))
    assert_equal(join(shards), whole[17:])
    assert_equal(take(data.batches(4, start=17), 13), whole[17:])


def test_a_position_far_on_is_reached_without_reading_up_to_it(open_small, monkeypatch):
    data, read = open_small("q.jsonl"), []
    original = PackedRows.__getitem__
    monkeypatch.setattr(PackedRows, "__getitem__", lambda self, index: read.append(index) or original(self, index))
    next(data.batches(2, start=1_000_000))
    assert len(read) < 100


def test_a_pass_holds_every_row_once_and_the_next_in_another_order(open_small):
    data = open_small("q.jsonl", "x.jsonl")
    rows = data.statistics.rows
    passes = keys_of(take(data.batches(1), 2 * rows))
    held_out = keys_of(data.evaluation_batches(1))
    assert sorted(passes[:rows]) == sorted(passes[rows:]) == sorted(held_out)
    assert passes[:rows] != passes[rows:]
    assert passes[:rows] != held_out


def test_the_order_follows_from_the_seed(open_small):
    first, again, other = (take(open_small("q.jsonl", seed=seed).batches(4), 5) for seed in (3, 3, 4))
    assert_equal(first, again)
    assert keys_of(first) != keys_of(other)


def test_more_threads_do_not_change_the_order(open_small, monkeypatch):
    data = open_small("q.jsonl=1", "x.jsonl=2")
    whole = take(data.batches(4), 20)
    for options in (grain.ReadOptions(0, 0), grain.ReadOptions(8, 50)):
        monkeypatch.setattr("train.data.pipeline._READ_OPTIONS", options)
        assert_equal(take(data.batches(4), 20), whole)


@pytest.mark.parametrize(("weights", "share"), [(("0.7", "0.3"), 0.7), (("1", "3"), 0.25), (("9", "1"), 0.9)])
def test_weights_are_shares_of_the_rows_throughout(open_small, tokenizer, weights, share):
    data = open_small(f"q.jsonl={weights[0]}", f"x.jsonl={weights[1]}")
    (q,) = tokenizer("q", add_special_tokens=False)["input_ids"]
    rows = np.concatenate([batch["input_ids"] for batch in take(data.batches(10), 60)])
    of_q = rows[:, 1] == q
    # Short rests of cut documents begin with another letter: count the rows that begin a document.
    begins = rows[:, 0] == tokenizer.bos_token_id
    whole = {name: open_small(name).statistics for name in ("q.jsonl", "x.jsonl")}
    expected = share * 61 / whole["q.jsonl"].rows
    assert np.mean(of_q & begins) == pytest.approx(expected, abs=0.02)
    for part in np.split(of_q & begins, 3):
        assert np.mean(part) == pytest.approx(expected, abs=0.05)


def test_a_small_source_of_great_weight_repeats_whole_passes(open_small, tokenizer):
    data = open_small("q.jsonl=1", "x.jsonl=4")
    # The rests of cut documents are alike in both sources.
    of_x = {key for key in keys_of(open_small("x.jsonl").evaluation_batches(1)) if key[0] == tokenizer.bos_token_id}
    seen = collections.Counter(key for key in keys_of(take(data.batches(5), 100)) if key in of_x)
    assert len(of_x) == 23
    assert set(seen) == of_x
    assert max(seen.values()) - min(seen.values()) <= 1


@pytest.mark.parametrize("count", [1, 2, 4])
def test_evaluation_is_one_pass_in_order_filled_up_with_empty_rows(open_small, tokenizer, count):
    data = open_small("q.jsonl", "x.jsonl")
    rows = data.statistics.rows
    batches = join([list(data.evaluation_batches(8, shard=(index, count))) for index in range(count)])
    assert len(batches) == -(-rows // 8)
    every = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    assert (every["segment_ids"][:rows, 0] == 1).all()
    assert rows % 8
    assert (every["segment_ids"][rows:] == 0).all()
    assert (every["labels"][rows:] == -100).all()
    assert (every["input_ids"][rows:] == tokenizer.pad_token_id).all()
    # In order: the first row begins the first document.
    assert tokenizer.decode(every["input_ids"][0]).startswith("<s>q0</s>")


def test_an_evaluation_can_be_cut_short(open_small):
    data = open_small("q.jsonl")
    whole = list(data.evaluation_batches(4))
    assert_equal(list(data.evaluation_batches(4, limit=3)), whole[:3])
    assert_equal(list(data.evaluation_batches(4, limit=10_000)), whole)


def test_the_fingerprint_tells_what_would_change_the_order(open_small):
    same = [open_small("q.jsonl").fingerprint, open_small("q.jsonl").fingerprint]
    others = [
        open_small("q.jsonl", seed=1),
        open_small("q.jsonl", seq_len=17),
        open_small("q.jsonl", pack=True),
        open_small("x.jsonl"),
        open_small("q.jsonl", "x.jsonl"),
        open_small("q.jsonl=1", "x.jsonl=1"),
        open_small("q.jsonl=1", "x.jsonl=2"),
    ]
    assert len(set(same)) == 1
    assert len({*same, *(data.fingerprint for data in others)}) == 1 + len(others)


def test_rows_that_the_processes_do_not_divide_are_refused(open_small):
    data = open_small("q.jsonl")
    with pytest.raises(ValueError, match="a batch of 6 rows cannot be split evenly over 4 processes"):
        data.batches(6, shard=(0, 4))
    with pytest.raises(ValueError, match=r"index from 0 to count - 1, got \(2, 2\)"):
        data.evaluation_batches(4, shard=(2, 2))


def test_weights_are_refused_for_a_pass_over_everything(open_small):
    with pytest.raises(ValueError, match=r"q\.jsonl cannot have a weight there"):
        open_small("q.jsonl=1").evaluation_batches(4)
