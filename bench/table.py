"""Tables of a result file: on the terminal, and in the README between two markers (`python -m bench table`)."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import results
from bench.processes import ROOT

README = ROOT / "README.md"
BEGIN = "<!-- bench table:{names} -->"
END = "<!-- end of bench table -->"
_BLOCK = re.compile(r"<!-- bench table:(?P<names>[^>]*?) -->\n(?P<body>.*?)" + re.escape(END), re.DOTALL)
NONE = "–"  # noqa: RUF001 (a dash in a cell)
NOTHING = "No result file is kept yet.\n"

_COLUMNS = (
    "case",
    "time",
    "alone",
    "tokens/s",
    "limit",
    "share",
    "PyTorch",
    "ratio",
    "memory",
    "PyTorch's",
    "first call",
)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench table", description="Writes the README's speed tables from result files."
    )
    parser.add_argument("result", nargs="+", type=Path)
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(arguments)
    write_readme(options.readme, options.result)
    return 0


def write_readme(readme: Path, paths: Sequence[Path]) -> None:
    """Replaces what stands between the markers.

    Raises:
        ValueError: no markers, or a result file that is none or lies outside the checkout.
    """
    text = readme.read_text(encoding="utf-8")
    if len(_BLOCK.findall(text)) != 1:
        raise ValueError(f"{readme} must hold {BEGIN.format(names='')} and {END} once each.")
    readme.write_text(_BLOCK.sub(lambda _: block(paths), text), encoding="utf-8")


def block(paths: Sequence[Path]) -> str:
    """The README's block for these files, markers included. It depends on nothing but the files."""
    names = [_relative(path) for path in paths]
    parts = [section(results.read(path), name) for path, name in zip(paths, names, strict=True)]
    begin = BEGIN.format(names="".join(f" {name}" for name in names))
    return f"{begin}\n" + ("\n".join(parts) or NOTHING) + END


def names_in(text: str) -> list[str]:
    """The result files that the README's block says it is made from."""
    return _BLOCK.search(text)["names"].split()


def block_in(text: str) -> str:
    """The README's block as it stands."""
    return _BLOCK.search(text)[0]


def section(run: dict[str, Any], name: str) -> str:
    """One file's part of the README: where and when, a table per size, plots."""
    if run["kind"] == "tpu":
        return _tpu_section(run, name)
    lines = [f"{heading(run)} From `{name}`: `{run['command']}`.", ""]
    if run["peer"] is not None:
        lines += [peer_line(run["peer"]), ""]
    for size in _sizes(run):
        titles = ["**" + size + "**", *_COLUMNS[1:]]
        lines += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
        lines += ["| " + " | ".join(row) + " |" for row in _rows(run, size)]
        lines.append("")
    for plot in run["plots"]:
        lines += [f"![{Path(plot).stem}]({Path(name).parent.as_posix()}/{plot})", ""]
    return "\n".join(lines) + "\n"


def _tpu_section(run: dict[str, Any], name: str) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
    lines = [
        f"Compiled for TPUs, not run: {run['date'][:10]}, {versions}. From `{name}`: `python -m bench tpu`.",
        "",
        "| model | chip | program | chips | compiled in | bytes per chip | Pallas kernels |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in run["rows"]:
        kernels = ", ".join(f"{kernel} ({count})" for kernel, count in row["kernels"].items()) or "none"
        cells = [
            row["size"],
            row["chip"],
            row["program"],
            str(row["chips"]),
            _seconds_or_nothing(row["seconds"]),
            NONE if row["bytes"] is None else f"{row['bytes'] / 1e9:.2f} of {row['hbm_bytes'] / 1e9:.0f} GB",
            kernels if row["status"] == "ok" else row["status"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""]) + "\n"


def heading(run: dict[str, Any]) -> str:
    """Where and when, and the ceilings that the limits come from."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    driver = f", driver {run['driver']}" if run["driver"] else ""
    rates = run["ceilings"]
    small = " Small shapes, as this is a CPU." if run["platform"] == "cpu" else ""
    return (
        f"{run['device']} ({run['platform']}, {run['processors']} processors{driver}), {run['date'][:10]}, commit "
        f"{run['commit']}, {versions}. Measured in the same run: copy "
        f"{_rate(rates['copy_bytes_per_second'], 'B/s')}, {rates['matmul_dtype']} matrix product "
        f"{_rate(rates['matmul_flops_per_second'], 'FLOP/s')}.{small}"
    )


def peer_line(peer: dict[str, Any]) -> str:
    """What the peer is made of."""
    if "error" in peer:
        return f"The peer did not start: {peer['error']}"
    versions = ", ".join(f"{name} {version}" for name, version in peer["versions"].items())
    found = [name for name, there in peer["found"].items() if there]
    missing = [name for name, there in peer["found"].items() if not there]
    lacking = f"; not found: {', '.join(missing)}" if missing else ""
    return f"PyTorch's side: {versions}; fast paths found: {', '.join(found) or 'none'}{lacking}."


def case_line(name: str, side: str, measured: dict[str, Any]) -> str:
    """One line while a run goes on."""
    if measured["status"] != "ok":
        return f"{name:45s} {side:5s} {measured['status']}: {measured.get('error') or measured.get('reason')}"
    return (
        f"{name:45s} {side:5s} {seconds(measured['seconds']):>9s} ±{measured['spread']:4.0%} "
        f"peak {_memory(measured):>9s}, first {_seconds_or_nothing(measured['first_call_seconds'])}"
    )


def text(run: dict[str, Any]) -> str:
    """The tables for a terminal."""
    parts = []
    for size in _sizes(run):
        rows = [(size, *_COLUMNS[1:]), *_rows(run, size)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            parts.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
        parts.append("")
    parts += [
        f"{case['name']} ({case['size']}), {side}: {case[side]['error']}"
        for case in run["cases"]
        for side in ("ours", "peer")
        if (case[side] or {}).get("status") == "error"
    ]
    return "\n".join(parts)


def seconds(value: float) -> str:
    """Three digits with the unit that suits."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 0.9995 or unit == "µs":
            return f"{_three_digits(value * factor)} {unit}"
    raise AssertionError(value)


def _rows(run: dict[str, Any], size: str) -> list[tuple[str, ...]]:
    """The size's cases but for those that neither side came to."""
    return [_row(case) for case in run["cases"] if case["size"] == size and not all(map(_skipped, _sides(case)))]


def _row(case: dict[str, Any]) -> tuple[str, ...]:
    ours, peer = case["ours"], case["peer"]
    good = ours is not None and ours["status"] == "ok"
    return (
        case["name"],
        _time(ours),
        _seconds_or_nothing(ours.get("alone_seconds")) if good else NONE,
        _count(ours["tokens_per_second"]) if good else NONE,
        seconds(case["limit"]["seconds"]) if case["limit"] else NONE,
        f"{ours['share_of_limit']:.0%}" if good and ours["share_of_limit"] is not None else NONE,
        _time(peer),
        NONE if case["ratio"] is None else f"{_three_digits(case['ratio'])} x",
        _memory(ours),
        _memory(peer),
        _seconds_or_nothing(ours["first_call_seconds"]) if good else NONE,
    )


def _sides(case: dict[str, Any]) -> tuple[dict[str, Any] | None, ...]:
    return case["ours"], case["peer"]


def _skipped(measured: dict[str, Any] | None) -> bool:
    return measured is None or measured["status"] == "skipped"


def _sizes(run: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(case["size"] for case in run["cases"]))


def _time(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return NONE
    words = {"error": "failed", "skipped": NONE}
    return words[measured["status"]] if measured["status"] in words else seconds(measured["seconds"])


def _memory(measured: dict[str, Any] | None) -> str:
    if measured is None or measured["status"] != "ok" or measured["peak_bytes"] is None:
        return NONE
    return ("≤ " if measured["peak_is_bound"] else "") + f"{_three_digits(measured['peak_bytes'] / 1e9)} GB"


def _seconds_or_nothing(value: float | None) -> str:
    return NONE if value is None else seconds(value)


def _count(value: float | None) -> str:
    return NONE if value is None else f"{float(f'{value:.3g}'):,.0f}"


def _rate(value: float, unit: str) -> str:
    factor, prefix = next(((f, p) for f, p in ((1e12, "T"), (1e9, "G")) if value >= f), (1e6, "M"))
    return f"{_three_digits(value / factor)} {prefix}{unit}"


def _three_digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    rounded = float(f"{value:.3g}")
    if rounded >= 100 or rounded == 0:
        return f"{rounded:.0f}"
    digits = 1 if rounded >= 10 else 2 if rounded >= 1 else 3
    return f"{rounded:.{digits}f}"


def _relative(path: Path) -> str:
    try:
        return path.resolve().relative_to(ROOT).as_posix()
    except ValueError:
        raise ValueError(f"{path} lies outside the checkout; the README can only name files of it.") from None
