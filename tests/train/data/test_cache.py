"""Tokens on disk: made once, never half, never for something else."""

import errno
import json
import os
import subprocess
import sys
import time
from concurrent import futures

import numpy as np
import pytest

from tests.train.data.conftest import VOCAB_SIZE, make_tokenizer
from train.data import cache, open_data, tokenizing


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"the fox {index}"}) + "\n" for index in range(20)))
    return path


@pytest.fixture
def encoded(monkeypatch):
    """How often records are tokenised."""
    calls = []
    original = tokenizing.make_encode
    monkeypatch.setattr(tokenizing, "make_encode", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    return calls


def open_small(path, tokenizer, **options):
    options = {"seq_len": 32, "vocab_size": VOCAB_SIZE, "cache_dir": path.parent / "cache"} | options
    return open_data([str(path)], tokenizer, **options)


def entries(path):
    """The finished and unfinished caches."""
    return [entry for entry in (path.parent / "cache").iterdir() if entry.name != "digests" and entry.is_dir()]


def test_what_is_there_is_not_made_again(path, tokenizer, encoded):
    first = next(open_small(path, tokenizer).batches(4))
    again = next(open_small(path, tokenizer).batches(4))
    assert len(encoded) == 1
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    # Neither the name nor the row length is part of it.
    moved = path.rename(path.with_name("b.jsonl"))
    open_small(moved, tokenizer, seq_len=64)
    assert len(encoded) == 1


def test_other_content_tokenizer_or_options_are_made_anew(path, tokenizer, encoded):
    open_small(path, tokenizer)
    open_small(path, make_tokenizer(begin=False))
    open_small(path, make_tokenizer(end=False))
    assert len(encoded) == 3
    # Of the same size.
    path.write_text(path.read_text().replace("the fox 7", "the box 7"))
    data = open_small(path, tokenizer)
    assert len(encoded) == 4
    texts = [tokenizer.decode(row) for batch in data.evaluation_batches(1) for row in batch["input_ids"]]
    assert any("the box 7" in text for text in texts)
    assert not any("the fox 7" in text for text in texts)


def test_the_content_is_read_again_only_when_a_file_has_changed(path, tokenizer, monkeypatch):
    open_small(path, tokenizer)
    blocks = []
    original = cache.hashlib.blake2b

    class Counting:
        def __init__(self, *args, **kwargs):
            self.hash = original(*args, **kwargs)
            self.hexdigest = self.hash.hexdigest

        def update(self, block):
            blocks.append(block)
            self.hash.update(block)

    monkeypatch.setattr(cache.hashlib, "blake2b", Counting)
    data = open_small(path, tokenizer)
    read = [block for block in blocks if b"the fox" in bytes(block)]
    assert not read
    os.utime(path)
    assert open_small(path, tokenizer).fingerprint == data.fingerprint
    assert [block for block in blocks if b"the fox" in bytes(block)]


def test_a_failure_leaves_nothing_behind(path, tokenizer):
    with path.open("a") as file:
        file.write("no JSON\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 21 is not JSON"):
        open_small(path, tokenizer)
    assert entries(path) == []


def test_a_full_disk_is_told_and_leaves_nothing_behind(path, tokenizer, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "encode_records", full)
    with pytest.raises(OSError, match=r"the disk is full: .*a\.jsonl cannot be tokenised into .*cache"):
        open_small(path, tokenizer)
    assert entries(path) == []


def test_what_a_killed_process_left_goes_when_it_is_old(path, tokenizer):
    open_small(path, tokenizer)
    (finished,) = entries(path)
    finished_name = finished.name
    for name, age in (("killed", 2 * 3600), ("living", 0)):
        leftover = finished.with_name(f"{finished_name}.writing-{name}")
        leftover.mkdir()
        (leftover / "tokens").write_bytes(b"half")
        for file in (leftover / "tokens", leftover):
            os.utime(file, (time.time() - age,) * 2)
    finished.rename(finished.with_name("elsewhere"))
    open_small(path, tokenizer)
    assert {entry.name for entry in entries(path)} == {finished_name, "elsewhere", f"{finished_name}.writing-living"}


def test_the_first_of_two_that_finish_stays(path, tokenizer, monkeypatch):
    """On a disk whose locks do not hold, two processes may write at once."""
    original = cache._write_files

    def overtaken(source, reading, tokenizer, text_field, directory, progress):
        original(source, reading, tokenizer, text_field, directory, progress)
        monkeypatch.setattr(cache, "_write_files", original)
        final = directory.with_name(directory.name.partition(".")[0])
        cache._write(source, reading, tokenizer, text_field, final, progress)

    monkeypatch.setattr(cache, "_write_files", overtaken)
    assert open_small(path, tokenizer).statistics.documents == 20
    assert len(entries(path)) == 1


def test_of_several_at_once_one_makes_it_and_the_others_wait(path, tokenizer, encoded):
    with futures.ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: open_small(path, tokenizer), range(4)))
    assert len(encoded) == 1
    assert len({data.fingerprint for data in opened}) == 1


@pytest.mark.slow
def test_several_processes_make_it_once_and_agree(path, tokenizer):
    tokenizer.save_pretrained(path.parent / "tokenizer")
    program = (
        "import sys; from transformers import AutoTokenizer; from train.data import open_data\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])\n"
        f"data = open_data([sys.argv[1]], tokenizer, seq_len=32, vocab_size={VOCAB_SIZE}, cache_dir=sys.argv[3])\n"
        "print(data.fingerprint)"
    )
    command = [sys.executable, "-c", program, str(path), str(path.parent / "tokenizer"), str(path.parent / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {process.communicate()[0] for process in running}
    assert all(process.returncode == 0 for process in running)
    assert len(outputs) == 1
    assert len(entries(path)) == 1


def test_a_damaged_cache_is_refused(path, tokenizer):
    open_small(path, tokenizer)
    (entry,) = entries(path)
    (entry / "tokens").write_bytes(b"12")
    with pytest.raises(ValueError, match=r"the token cache .* is damaged \(tokens\); delete it and start again"):
        open_small(path, tokenizer)


def test_ids_take_two_bytes_where_they_fit(path, tokenizer):
    data = open_small(path, tokenizer)
    (entry,) = entries(path)
    assert (entry / "tokens").stat().st_size == 2 * data.statistics.tokens
    assert not (entry / "counted").exists()


def test_long_documents_are_taken_in_small_batches(path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizing, "_BATCH_CHARACTERS", 25)
    sizes = []
    original = tokenizing.make_encode

    def make_encode(*args, **kwargs):
        encode = original(*args, **kwargs)
        return lambda records: sizes.append(len(records)) or encode(records)

    monkeypatch.setattr(tokenizing, "make_encode", make_encode)
    assert open_small(path, tokenizer).statistics.documents == 20
    assert max(sizes) == 3
    assert sum(sizes) == 20


def test_long_work_shows_a_bar(path, tokenizer, monkeypatch, capsys):
    original = tokenizing.tqdm
    monkeypatch.setattr(tokenizing, "tqdm", lambda **options: original(**options | {"delay": 0}))
    open_small(path, tokenizer, progress=True)
    shown = capsys.readouterr().err
    assert f"tokenising {path}: 100%" in shown
    open_small(path, make_tokenizer(begin=False), progress=False)
    assert capsys.readouterr().err == ""
