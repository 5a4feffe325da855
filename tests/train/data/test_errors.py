"""What does not do is refused before any work, with what came and what would do."""

import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import PythonBackend

from tests.train.data.conftest import VOCAB_SIZE
from train.data import array_records, open_data, tokenize
from train.data.sources import find_sources


def open_small(*paths, tokenizer, **options):
    options = {"seq_len": 16, "vocab_size": VOCAB_SIZE} | options
    return open_data([str(path) for path in paths], tokenizer, **options)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The default cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.jsonl"
    path.write_text('{"text": "the fox"}\n')
    return path


# ---- paths and weights


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([], ValueError, r"no data source is given; accepted are text \(\.txt"),
        ("good.jsonl", ValueError, r"a sequence of paths, got the string 'good\.jsonl'"),
        (["missing.jsonl"], FileNotFoundError, r"missing\.jsonl does not exist; accepted are text"),
        (["*.none"], FileNotFoundError, r"\*\.none matches no file"),
        (["good.jsonl=0"], ValueError, r"the weight of good\.jsonl must be positive and finite, got 0"),
        (["good.jsonl=-1"], ValueError, r"the weight of good\.jsonl must be positive and finite, got -1"),
        (["good.jsonl=nan"], ValueError, r"the weight of good\.jsonl must be positive and finite, got nan"),
        (["good.jsonl=inf"], ValueError, r"the weight of good\.jsonl must be positive and finite, got inf"),
        (["good.jsonl=much"], ValueError, r"the weight of good\.jsonl must be a number, got 'much'"),
        (
            ["good.jsonl=1", "good.jsonl"],
            ValueError,
            r"good\.jsonl has a weight and good\.jsonl has none; give a weight",
        ),
        (["picture.png"], ValueError, r"picture\.png is of no kind that is known by its suffix; accepted are"),
        (["p*.png"], ValueError, r"p\*\.png matches picture\.png, which is of no kind known by its suffix"),
        (["pictures"], ValueError, r"the directory pictures holds no data; accepted are"),
        (
            ["mixed"],
            ValueError,
            r"mixed holds files of several kinds \(1 jsonl, 2 text\); name one, with a glob such as",
        ),
        (["empty.txt"], ValueError, r"empty\.txt is empty"),
        (["splits"], ValueError, r"splits holds several splits of a dataset; give one: splits/test"),
    ],
)
def test_sources_that_do_not_do(tmp_path, monkeypatch, good, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "picture.png").write_text("1")
    for folder, names in (("pictures", ["a.png"]), ("mixed", ["a.txt", "b.jsonl", "README.md"])):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text("1")
    (tmp_path / "splits" / "test").mkdir(parents=True)
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    (tmp_path / "splits" / "test" / "state.json").write_text("{}")
    with pytest.raises(error, match=message):
        find_sources(arguments)


def test_a_file_that_cannot_be_read(good, monkeypatch):
    """The mode does not stop root, as which containers run."""
    original = type(good).open

    def refuse(self, *args, **kwargs):
        if self == good:
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(good), "open", refuse)
    with pytest.raises(PermissionError, match=r"good\.jsonl"):
        find_sources([str(good)])


def test_every_source_is_looked_at_before_the_first_is_tokenised(tmp_path, good, tokenizer):
    other = tmp_path / "other.jsonl"
    other.write_text('{"body": "the fox"}\n')
    with pytest.raises(ValueError, match=r"other\.jsonl, line 1: no field 'text'"):
        open_small(good, other, tokenizer=tokenizer)
    assert not (tmp_path / "cache").exists()


# ---- contents


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON: Expecting value"),
        (b'{"text": "a"}\n\n{"text": "b"} x\n', r"a\.jsonl, line 3 is not JSON: Extra data"),
        (b'[\n{"text": "a"}]', r"line 1 is not JSON: .* A JSON array is not JSON Lines: write one object a line"),
        (b'{"text": "a"}\n["a"]\n', r"line 2 must be a JSON object such as \{\"text\": \.\.\.\}, got a list"),
        (b'{"text": "a"}\nnull\n', r"line 2 must be a JSON object such as .*, got null"),
        (b'{"text": "a"}\n3.5\n', r"line 2 must be a JSON object such as .*, got a number"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2 is not JSON: .*can't decode byte 0xff"),
        (b'{"text": "a"}\n{"txt": "b", "id": 1}\n', r"line 2 has no field 'text'; its fields are: id, txt"),
        (b'{"text": "a"}\n{}\n', r"line 2 has no field 'text'; its fields are: none"),
        (b'{"text": "a"}\n{"text": null}\n', r"line 2: 'text' must be a string, got null"),
        (b'{"text": 5}\n', r"line 1: 'text' must be a string, got 5"),
        (b'{"text": ["%s"]}\n' % (b"a" * 99), r"line 1: 'text' must be a string, got \[\"a{35}\.\.\."),
        (b'{"body": "a"}\n', r"line 1: no field 'text', 'messages', 'conversations', or 'prompt' with 'completion'"),
        (b"\n \n", r"a\.jsonl holds no record, only blank lines"),
        (b'{"text": ""}\n', r"a\.jsonl holds no document with any content"),
    ],
)
def test_lines_that_do_not_do(tmp_path, tokenizer, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_small(path, tokenizer=tokenizer)


def test_text_that_is_not_utf8(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_bytes("die Füchse\n".encode() + "die Füchse".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt, line 2 is not UTF-8 \(invalid .*\); convert the file"):
        open_small(path, tokenizer=tokenizer)


def test_parquet_that_does_not_do(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 it is not")
    with pytest.raises(ValueError, match=r"a\.parquet is not Parquet"):
        open_small(path, tokenizer=tokenizer)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: no field 'text', .*; the fields are: body\. Name the one"):
        open_small(path, tokenizer=tokenizer)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: 'text' must be a string, got null"):
        open_small(path, tokenizer=tokenizer)
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(ValueError, match=r"a\.parquet holds no rows"):
        open_small(path, tokenizer=tokenizer)


def test_parquet_files_that_differ(tmp_path, tokenizer):
    folder = tmp_path / "parts"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), folder / "0.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), folder / "1.parquet")
    with pytest.raises(ValueError, match=r"1\.parquet: the format text needs the field text; the fields are: body"):
        open_small(folder, tokenizer=tokenizer)


def test_a_saved_dataset_that_does_not_do(tmp_path, tokenizer):
    datasets.Dataset.from_dict({"text": ["a"], "id": [1]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved: no field 'body', .*; the fields are: id, text"):
        open_small(tmp_path / "saved", tokenizer=tokenizer, text_field="body")
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match="none holds no rows"):
        open_small(tmp_path / "none", tokenizer=tokenizer)
    datasets.Dataset.from_dict({"text": ["a", None]}).save_to_disk(tmp_path / "null")
    with pytest.raises(ValueError, match="null, row 2: 'text' must be a string, got null"):
        open_small(tmp_path / "null", tokenizer=tokenizer)
    (tmp_path / "null" / "state.json").write_text("[]")
    with pytest.raises(ValueError, match="null is no dataset that can be loaded: "):
        open_small(tmp_path / "null", tokenizer=tokenizer)
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.write_bytes(b"it is not")
    with pytest.raises(ValueError, match="saved is no dataset that can be loaded: "):
        open_small(tmp_path / "saved", tokenizer=tokenizer)


def test_array_records_that_do_not_do(tmp_path, tokenizer):
    path = tmp_path / "a.array_record"
    path.write_bytes(b"it is not")
    with pytest.raises(ValueError, match=r"a\.array_record holds no ArrayRecord that can be read"):
        open_small(path, tokenizer=tokenizer)
    array_records.write_records(path, [b"1234", b"12345"])
    with pytest.raises(ValueError, match=r"record 2 has 5 bytes; a document is one little-endian uint32 per token"):
        open_small(path, tokenizer=tokenizer)
    array_records.write_records(path, [array_records.to_bytes(np.array([5, VOCAB_SIZE]), None)])
    with pytest.raises(
        ValueError, match=r"holds the token id 400, but the model's vocabulary has 400: .* does not fit"
    ):
        open_small(path, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="holds tokens, so that the format chat cannot be had from it"):
        open_small(path, tokenizer=tokenizer, format="chat")


# ---- options


def test_a_vocabulary_that_does_not_fit(good, tokenizer):
    with pytest.raises(
        ValueError, match=r"vocabulary does not fit the model: it has ids up to .*, the model's vocab_size"
    ):
        open_small(good, tokenizer=tokenizer, vocab_size=max(tokenizer.get_vocab().values()))
    open_small(good, tokenizer=tokenizer, vocab_size=max(tokenizer.get_vocab().values()) + 1)


def test_a_slow_tokenizer(good):
    class Slow(PythonBackend):
        vocab_size = 3

        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(ValueError, match=r"Slow is not a fast tokenizer; one with a tokenizer\.json is needed"):
        open_small(good, tokenizer=Slow())


@pytest.mark.parametrize("seq_len", [1, 0, -5])
def test_rows_that_are_too_short(good, tokenizer, seq_len):
    with pytest.raises(ValueError, match=f"seq_len must be at least 2, .* got {seq_len}"):
        open_small(good, tokenizer=tokenizer, seq_len=seq_len)


def test_an_unknown_format(good, tokenizer):
    with pytest.raises(ValueError, match="format must be one of text, chat, completion, got 'csv'"):
        open_small(good, tokenizer=tokenizer, format="csv")
    with pytest.raises(
        ValueError, match="line 1: the format completion needs the field prompt and completion; the fields"
    ):
        open_small(good, tokenizer=tokenizer, format="completion")


def test_targets_that_do_not_do(tmp_path, good, tokenizer):
    target = tmp_path / "a.array_record"
    with pytest.raises(ValueError, match=r"b\.bin must end in \.array_record"):
        tokenize([str(good)], tokenizer, tmp_path / "b.bin", vocab_size=VOCAB_SIZE)
    with pytest.raises(ValueError, match=r"good\.jsonl has a weight, which a file of token ids cannot hold"):
        tokenize([f"{good}=1"], tokenizer, target, vocab_size=VOCAB_SIZE)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"text": "a"}) + "\nno JSON\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2 is not JSON"):
        tokenize([str(good), str(bad)], tokenizer, target, vocab_size=VOCAB_SIZE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "good.jsonl"]
    tokenize([str(good)], tokenizer, target, vocab_size=VOCAB_SIZE)
    with pytest.raises(ValueError, match=r"a\.array_record exists; give a new file"):
        tokenize([str(good)], tokenizer, target, vocab_size=VOCAB_SIZE)
