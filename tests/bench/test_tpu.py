"""`bench tpu` without the TPU compiler: what is read from a compiled program, and which slice is chosen."""

import types

import pytest

from bench import results, tpu, tpu_compile

TEXT = """
  %copy.15 = f32[4,4]{1,0} copy(%custom-call)
  %custom-call.1 = f32[4,64]{1,0} custom-call(%a), custom_call_target="ConcatBitcast", backend_config={}
  %ssd_states.1 = f32[4,32]{1,0:T(8,128)} custom-call(%x.1), custom_call_target="tpu_custom_call", metadata={}
  %ssd_backward.12.3 = (f32[4]{0}, f32[8]{0}) custom-call(%x.1), custom_call_target="tpu_custom_call", metadata={}
  ROOT %ssd_backward = (f32[4]{0}, f32[8]{0}) custom-call(%x.1), custom_call_target="tpu_custom_call", metadata={}
"""


def test_kernels_are_named_and_counted():
    assert tpu_compile.kernels(TEXT) == {"ssd_backward": 2, "ssd_states": 1}
    assert tpu_compile.kernels("") == {}


def test_donated_bytes_count_once():
    memory = types.SimpleNamespace(
        argument_size_in_bytes=100,
        output_size_in_bytes=30,
        alias_size_in_bytes=25,
        temp_size_in_bytes=7,
        generated_code_size_in_bytes=1,
    )
    assert tpu_compile.program_bytes(memory) == 113


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


def test_the_compilers_word_on_memory_is_understood():
    found = tpu_compile._TOO_LARGE.search("RESOURCE_EXHAUSTED: XLA:TPU ... Used 17.21G of 15.75G hbm. Exceeded")
    assert (found[1], found[2]) == ("17.21", "G")
