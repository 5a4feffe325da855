"""Result files: what is in them, the tables and plots made from them, and the README's table."""

import json

import pytest

from bench import plots, results, table
from tests.bench.conftest import MEASURED


def test_a_file_comes_back_as_it_was_written(run, tmp_path):
    path = tmp_path / "new" / "result.json"
    results.write(path, run)
    assert results.read(path) == run
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.update(schema=0), "schema 0; this program reads 1"),
        (lambda run: run.pop("commit"), r"missing \['commit'\], unknown \[\]"),
        (lambda run: run["cases"][0].update(extra=1), r"case 'SSD 4 x 1024': missing \[\], unknown \['extra'\]"),
        (lambda run: run["cases"][0]["ours"].pop("seconds"), r"'SSD 4 x 1024', ours: missing \['seconds'\]"),
        (lambda run: run["cases"][0]["peer"].update(status="fine"), "peer has status 'fine'"),
        (lambda run: run["cases"][0].update(peer={"status": "error"}), r"peer: missing \['error'\]"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(run, tmp_path, change, message):
    change(run)
    (tmp_path / "result.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=message):
        results.read(tmp_path / "result.json")


def test_ratios():
    slow = MEASURED | {"seconds": 0.012}
    assert results.ratio(MEASURED, slow) == pytest.approx(3.0)
    assert results.ratio(None, slow) is None
    assert results.ratio(MEASURED, {"status": "error", "error": "no"}) is None
    assert results.ratio({"status": "skipped", "reason": "no"}, slow) is None


def test_a_file_never_replaces_another(run, tmp_path):
    first = results.default_path(run, tmp_path)
    assert first.name == "some-gpu-2026-01-02.json"
    results.write(first, run)
    second = results.default_path(run, tmp_path)
    assert second.name == "some-gpu-2026-01-02-2.json"


def test_environment_says_where_and_when():
    device = {"platform": "cpu", "device": "cpu", "memory_bytes": None, "versions": {"jax": "1"}}
    record = results.environment(device)
    assert record.keys() <= results.RUN_FIELDS
    assert record["driver"] is None
    assert record["versions"]["jax"] == "1"
    assert record["command"].startswith("python -m bench")
    assert record["device"]


@pytest.mark.parametrize(
    ("value", "words"),
    [(84.8e-3, "84.8 ms"), (1.1712e-3, "1.17 ms"), (0.9999e-3, "1.00 ms"), (2e-7, "0.200 µs"), (540.2, "540 s")],
)
def test_three_digits_with_a_unit(value, words):
    assert table.seconds(value) == words


def test_a_section_of_the_readme(run):
    lines = table.section(run, "bench/results/example.json").splitlines()
    assert lines[0] == (
        "Some GPU (gpu, 16 processors, driver 1.2.3), 2026-01-02, commit 0123456789ab, python 3.12.3, jax 0.11.2. "
        "Measured in the same run: copy 2.98 TB/s, bfloat16 matrix product 792 TFLOP/s. "
        "From `bench/results/example.json`: `python -m bench --peer`."
    )
    assert "fast paths found: mamba_chunk_scan_combined; not found: causal_conv1d_fn." in lines[2]
    start = lines.index(next(line for line in lines if line.startswith("| **1.2b**")))
    assert lines[start + 1].count("---|") == lines[start].count("|") - 1
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    by_name = {row[0]: row[1:] for row in rows}
    dash = table.NONE
    assert by_name["SSD 4 x 1024"] == [
        "1.02 ms", "5.00 ms", "2,050,000", "2.00 ms", "50%", "3.07 ms", "3.00 x", "3.21 GB", "3.21 GB", "12.0 s",
    ]  # fmt: skip
    older = {**run["cases"][0]["ours"]}
    del older["alone_seconds"]
    results.check(run | {"cases": [run["cases"][0] | {"ours": older}]}, "a file without")
    assert by_name["decode at 2048"][5:8] == [dash, dash, "≤ 3.21 GB"]
    assert by_name["prefill 8 x 2048"][5:9] == ["failed", dash, "3.21 GB", dash]
    assert by_name["decode 1 x 128, int8"][5:7] == [dash, dash]
    assert "| **7b** |" in "\n".join(lines)
    assert lines[-2] == "![example-peer](bench/results/example-peer.png)"


def test_a_section_of_compiled_programs(tmp_path):
    row = {
        "size": "7b",
        "chip": "v5e",
        "program": "train",
        "chips": 8,
        "status": "ok",
        "seconds": 61.23,
        "bytes": 12.345e9,
        "hbm_bytes": 16e9,
        "kernels": {"ssd_backward": 2, "ssd_forward": 1},
        "error": None,
        "tried": [],
        "commit": "0123456789ab",
    }
    too_large = row | {"program": "decode", "status": "does not fit", "bytes": 2e10, "seconds": None, "kernels": {}}
    run = {"schema": 1, "kind": "tpu", "date": "2026-01-02T03:04:05+00:00", "versions": {"libtpu": "0.1"}}
    path = tmp_path / "tpu.json"
    results.write(path, run | {"rows": [row, too_large]})
    lines = table.section(results.read(path), "bench/results/tpu.json").splitlines()
    assert lines[0].startswith("Compiled for TPUs, not run: 2026-01-02, libtpu 0.1.")
    assert lines[4] == "| 7b | v5e | train | 8 | 61.2 s | 12.35 of 16 GB | ssd_backward (2), ssd_forward (1) |"
    assert lines[5] == f"| 7b | v5e | decode | 8 | {table.NONE} | 20.00 of 16 GB | does not fit |"

    results.write(path, run | {"rows": [{"size": "7b"}]})
    with pytest.raises(ValueError, match=r"a row: missing \['bytes', 'chip'"):
        results.read(path)


def test_cases_that_a_run_did_not_come_to_are_left_out(run):
    skipped = {"status": "skipped", "reason": "the run's deadline had passed"}
    run["cases"][0].update(ours=skipped, peer=skipped, ratio=None)
    assert "SSD 4 x 1024" not in table.section(run, "bench/results/example.json")
    assert "decode at 2048" in table.section(run, "bench/results/example.json")


def test_a_terminal_sees_errors_in_full(run):
    text = table.text(run)
    assert "prefill 8 x 2048 (1.2b), peer: out of memory" in text
    assert "int8" in text


def test_the_readme_is_rewritten_between_its_markers(run, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ROOT", tmp_path)
    readme, path = tmp_path / "README.md", tmp_path / "bench" / "results" / "a.json"
    results.write(path, run)
    readme.write_text(f"before\n{table.BEGIN.format(names='')}\nold\n{table.END}\nafter\n")
    for _ in range(2):  # writing again changes nothing
        assert table.main(["--readme", str(readme), str(path)]) == 0
        text = readme.read_text()
        assert text.startswith("before\n<!-- bench table: bench/results/a.json -->\nSome GPU")
        assert text.endswith(f"{table.END}\nafter\n")
        assert "old" not in text
        assert table.names_in(text) == ["bench/results/a.json"]
        assert table.block_in(text) == table.block([path])

    readme.write_text("no markers")
    with pytest.raises(ValueError, match="must hold"):
        table.write_readme(readme, [path])
    monkeypatch.setattr(table, "ROOT", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="lies outside the checkout"):
        table.block([path])


def test_the_readme_shows_every_committed_result_as_it_is():
    """`python -m bench table bench/results/*.json` makes it so."""
    text = table.README.read_text(encoding="utf-8")
    names = table.names_in(text)
    kept = list(results.DIRECTORY.glob("*.json"))
    assert sorted(names) == sorted(path.relative_to(results.ROOT).as_posix() for path in kept)
    assert table.block_in(text) == table.block([results.ROOT / name for name in names])
    for path in kept:
        for plot in results.read(path).get("plots", []):
            assert (path.parent / plot).is_file()


def test_plots(run, tmp_path):
    path = tmp_path / "example.json"
    names = plots.draw(run, path)
    assert names == ["example-context.png", "example-ssd.png", "example-conv.png", "example-peer.png"]
    for name in names:
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000
    run["cases"] = [case for case in run["cases"] if case["kind"] == "prefill"]
    assert plots.draw(run, tmp_path / "less.json") == []  # one case without a peer: nothing to draw
