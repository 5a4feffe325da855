"""`bench tpu` without the TPU compiler: which slice is chosen, and what is written."""

import pytest

from bench import results, tpu


def outcome(chips, status="ok", size=1e9, error=None):
    return {"chips": chips, "status": status, "seconds": 1.0, "bytes": size, "kernels": {}, "error": error}


def test_the_smallest_slice_that_holds_it_is_taken(monkeypatch):
    asked = []

    def compile_for(size, chip, program, chips, timeout):
        asked.append(chips)
        return outcome(chips, "does not fit", 58e9) if chips == 1 else outcome(chips, size=60e9 / chips)

    monkeypatch.setattr(tpu, "_compile", compile_for)
    row = tpu.compile_row("7b", "v5e", "train", 1.0)
    assert asked == [1, 2, 4]  # 60 GB over 2 and 4 chips: compiled, but more than 16 GB each only on 2
    assert (row["status"], row["chips"], row["bytes"]) == ("ok", 4, 15e9)
    assert [attempt["status"] for attempt in row["tried"]] == ["does not fit", "does not fit", "ok"]
    assert row.keys() == results.TPU_FIELDS - {"commit"}
    assert "15.00 GB   16 GB  none" in tpu.line(row)


def test_an_error_ends_the_search_and_is_shown(monkeypatch):
    monkeypatch.setattr(tpu, "_compile", lambda *_: outcome(1, "error", None, "Mosaic: no"))
    row = tpu.compile_row("1.2b", "v6e", "decode", 1.0)
    assert (row["status"], row["chips"]) == ("error", 1)
    assert tpu.line(row).endswith("error: Mosaic: no")


def test_what_fits_nowhere_says_so(monkeypatch):
    monkeypatch.setattr(tpu, "_compile", lambda size, chip, program, chips, timeout: outcome(chips, size=1e12))
    row = tpu.compile_row("7b", "v5p", "train", 1.0)
    assert (row["status"], row["chips"]) == ("does not fit", tpu.SLICES[-1])


def test_rows_are_replaced():
    run = {"commit": "new", "rows": [{"size": "7b", "chip": "v5e", "program": "train", "status": "error"}]}
    tpu.replace_row(run, {"size": "7b", "chip": "v5p", "program": "train", "status": "ok"})
    tpu.replace_row(run, {"size": "7b", "chip": "v5e", "program": "train", "status": "ok"})
    assert [(row["chip"], row["status"], row["commit"]) for row in run["rows"]] == [
        ("v5p", "ok", "new"),
        ("v5e", "ok", "new"),
    ]


def test_a_file_of_another_kind_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(tpu, "_libtpu_version", lambda: "0")
    path = tmp_path / "speed.json"
    path.write_text('{"kind": "speed", "schema": 1}')
    with pytest.raises(ValueError, match="no result of `bench tpu`"):
        tpu.open_run(path)
    assert tpu.open_run(tmp_path / "new.json")["rows"] == []
