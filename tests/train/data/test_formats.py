"""Every kind of file gives the same documents, and rows give them back whole."""

import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.train.data.conftest import VOCAB_SIZE, make_tokenizer
from train.data import open_data, tokenize
from train.data.__main__ import main as tokenize_command

TEXTS = [
    "the quick brown fox",
    "jumps",
    "over the lazy dog, and " * 9,
    "ünïcode: 雪, 🦊 and \x00",
    "assistant " * 40,
    "the end\n",
]


@pytest.fixture(scope="module", autouse=True)
def files(tmp_path_factory, tokenizer):
    """The same documents in every form, by name."""
    folder = tmp_path_factory.mktemp("forms")
    (folder / "texts").mkdir()
    for index, text in enumerate(TEXTS):
        (folder / "texts" / f"{index}.txt").write_bytes(text.encode())
    lines = [json.dumps({"id": index, "text": text}) for index, text in enumerate(TEXTS)]
    (folder / "all.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    (folder / "parts").mkdir()
    for part in (0, 1):
        table = pyarrow.table({"text": TEXTS[part * 3 : part * 3 + 3], "other": [1, 2, 3]})
        pyarrow.parquet.write_table(table, folder / "parts" / f"{part}.parquet")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
    tokenize([str(folder / "all.jsonl")], tokenizer, folder / "all.array_record", vocab_size=VOCAB_SIZE)
    return {
        "text": folder / "texts",
        "glob": folder / "texts" / "*.txt",
        "jsonl": folder / "all.jsonl",
        "parquet": folder / "parts",
        "dataset": folder / "saved",
        "array_record": folder / "all.array_record",
    }


def open_small(path, tokenizer, tmp_path, seq_len=48, **options):
    return open_data([str(path)], tokenizer, seq_len=seq_len, vocab_size=VOCAB_SIZE, cache_dir=tmp_path, **options)


def expected_ids(tokenizer):
    return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]


def segments_of(batch):
    """The token ids of every segment of a batch."""
    found = []
    for ids, segments in zip(batch["input_ids"], batch["segment_ids"], strict=True):
        found += [ids[segments == segment].tolist() for segment in range(1, segments.max(initial=0) + 1)]
    return found


@pytest.mark.parametrize("kind", ["text", "glob", "jsonl", "parquet", "dataset", "array_record"])
def test_rows_hold_every_document_exactly(kind, files, tokenizer, tmp_path):
    data = open_small(files[kind], tokenizer, tmp_path)
    segments = [segment for batch in data.evaluation_batches(4) for segment in segments_of(batch)]
    pieces = [ids[start : start + 48] for ids in expected_ids(tokenizer) for start in range(0, len(ids), 48)]
    assert sorted(segments) == sorted(pieces)
    assert data.statistics.documents == len(TEXTS)
    assert data.statistics.tokens == sum(map(len, pieces))


def test_a_document_begins_as_the_tokenizer_does_and_ends_with_the_end_token(files, tokenizer, tmp_path):
    batch = next(open_small(files["jsonl"], tokenizer, tmp_path, pack=False, seq_len=512).evaluation_batches(6))
    for text, ids, segments in zip(TEXTS, batch["input_ids"], batch["segment_ids"], strict=True):
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[segments == 1]) == f"<s>{text}</s>"
    bare = make_tokenizer(begin=False, end=False)
    batch = next(open_small(files["jsonl"], bare, tmp_path, pack=False, seq_len=512).evaluation_batches(6))
    assert bare.decode(batch["input_ids"][0][batch["segment_ids"][0] == 1]) == TEXTS[0]


def test_a_tokenizer_that_truncates_and_pads_does_not_here(files, tokenizer, tmp_path):
    strict = make_tokenizer()
    strict.backend_tokenizer.enable_truncation(3)
    strict.backend_tokenizer.enable_padding(length=7)
    strict.model_max_length = 5
    data = open_small(files["jsonl"], strict, tmp_path)
    assert data.statistics.tokens == sum(map(len, expected_ids(tokenizer)))


def test_labels_are_the_ids_where_something_stands_before_them(files, tokenizer, tmp_path):
    data = open_small(files["jsonl"], tokenizer, tmp_path)
    for batch in data.evaluation_batches(2):
        ids, labels, segments = batch["input_ids"], batch["labels"], batch["segment_ids"]
        first = np.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        np.testing.assert_array_equal(labels, np.where(first | (segments == 0), -100, ids))
        assert (ids[segments == 0] == tokenizer.pad_token_id).all()
        assert all(array.dtype == np.int32 and array.shape == (2, 48) for array in batch.values())
        # Segments count up from 1, and padding is at the end alone.
        for row in segments:
            used = row[row > 0]
            assert (np.diff(used) >= 0).all()
            assert (row[: len(used)] == used).all()
            assert set(used) == set(range(1, used.max(initial=0) + 1))


def test_another_field_can_hold_the_text(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "the fox", "text": 3}\n')
    assert open_small(path, tokenizer, tmp_path / "cache", text_field="body").statistics.documents == 1


def test_empty_texts_are_left_out(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": "fox"}\n{"text": ""}\n')
    assert open_small(path, tokenizer, tmp_path / "cache").statistics.documents == 1


def test_a_directory_leaves_hidden_and_foreign_files_alone(tokenizer, tmp_path):
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "a.jsonl").write_text('{"text": "fox"}\n')
    (folder / ".hidden.jsonl").write_text("no JSON")
    (folder / "picture.png").write_text("no JSON")
    assert open_small(folder, tokenizer, tmp_path / "cache").statistics.documents == 1


def test_a_path_may_hold_an_equals_sign(tokenizer, tmp_path):
    folder = tmp_path / "date=2024"
    folder.mkdir()
    (folder / "a.txt").write_text("fox")
    assert open_small(folder, tokenizer, tmp_path / "cache").statistics.documents == 1


def test_sources_of_several_kinds_go_together(files, tokenizer, tmp_path):
    paths = [str(files[kind]) for kind in ("text", "jsonl", "parquet", "dataset", "array_record")]
    data = open_data(paths, tokenizer, seq_len=48, vocab_size=VOCAB_SIZE, cache_dir=tmp_path)
    assert data.statistics.documents == 5 * len(TEXTS)


def test_masks_survive_a_file_of_token_ids(tokenizer, tmp_path):
    """Token ids written by `tokenize` give the batches that the text gives."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": "the fox ", "completion": text}) + "\n" for text in TEXTS))
    tokens = tmp_path / "pairs.array_record"
    assert tokenize([str(path)], tokenizer, tokens, vocab_size=VOCAB_SIZE) == len(TEXTS)
    first, second = (next(open_small(file, tokenizer, tmp_path / "cache").batches(8)) for file in (path, tokens))
    assert (first["labels"] == -100).any()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_the_command_writes_what_the_function_writes(files, tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    output = tmp_path / "all.array_record"
    command = ["--data", str(files["jsonl"]), "--tokenizer", str(tmp_path / "tokenizer"), "--output", str(output)]
    assert tokenize_command(command) == 0
    assert f"wrote {len(TEXTS)} documents to {output}" in capsys.readouterr().out
    assert (
        open_small(output, tokenizer, tmp_path).fingerprint
        == open_small(files["array_record"], tokenizer, tmp_path).fingerprint
    )
