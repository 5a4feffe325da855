"""Plots of a result file, as PNG files beside it (`python -m bench plot` draws them again)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from bench import results
from bench.sizes import SIZES

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_COLORS = {"ours": "tab:blue", "peer": "tab:orange", "limit": "tab:gray"}
_MARKERS = dict(zip(SIZES, "osD^v", strict=True))  # sides by colour, sizes by marker
_LABELS = {"ours": "zamba2_jax", "peer": "PyTorch", "limit": "limit"}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench plot", description=__doc__)
    parser.add_argument("result", nargs="+", type=Path)
    for path in parser.parse_args(arguments).result:
        run = results.read(path)
        run["plots"] = draw(run, path)
        results.write(path, run)
        print("\n".join(str(path.parent / name) for name in run["plots"]))
    return 0


def draw(run: dict[str, Any], path: Path) -> list[str]:
    """Draws what the run has the cases for; returns the names of the files, which lie beside `path`."""
    return [name for plot in (_context, _length, _peer) for name in plot(run, path)]


def _context(run: dict[str, Any], path: Path) -> list[str]:
    """One step of decoding against the tokens in the cache."""
    cases = _cases(run, "context")
    if len(cases) < 2:
        return []

    def plot(axes: Axes) -> None:
        for size in _sizes(cases):
            of_size = [case for case in cases if case["size"] == size]
            _lines(axes, of_size, f" {size}" if len(_sizes(cases)) > 1 else "", marker=_MARKERS[size])
        axes.set(xlabel="tokens in the cache", ylabel="ms per step", title=f"Decoding, one row, {run['device']}")

    return [_figure(path, "context", plot)]


def _length(run: dict[str, Any], path: Path) -> list[str]:
    """SSD and convolution against length, with and without backward."""
    names = []
    for kind, title in (("ssd", "SSD"), ("conv", "Convolution")):
        cases = _cases(run, kind)
        if len(cases) < 2:
            continue

        def plot(axes: Axes, cases: list[dict[str, Any]] = cases, title: str = title) -> None:
            for size in _sizes(cases):
                for backward, style in ((False, "-"), (True, "--")):
                    chosen = [
                        case for case in cases if case["size"] == size and ("backward" in case["name"]) == backward
                    ]
                    note = (f" {size}" if len(_sizes(cases)) > 1 else "") + (", with gradient" if backward else "")
                    _lines(axes, chosen, note, style, _MARKERS[size])
            batch = cases[0]["batch"]
            axes.set(xlabel="length", ylabel="ms", title=f"{title} alone, {batch} rows, {run['device']}")

        names.append(_figure(path, kind, plot))
    return names


def _peer(run: dict[str, Any], path: Path) -> list[str]:
    """How many times faster than the peer, case by case."""
    cases = [case for case in run["cases"] if case["ratio"] is not None]
    if not cases:
        return []
    several = len(_sizes(cases)) > 1
    labels = [case["name"] + (f", {case['size']}" if several else "") for case in cases]

    def plot(axes: Axes) -> None:
        ratios = [case["ratio"] for case in cases]
        bars = axes.barh(labels, [ratio - 1.0 for ratio in ratios], left=1.0, color=_COLORS["ours"])
        axes.bar_label(bars, [f"{ratio:.3g}" for ratio in ratios], padding=3)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.margins(x=0.2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="times faster than PyTorch", title=run["device"])

    return [_figure(path, "peer", plot, height=1.5 + 0.28 * len(cases))]


def _lines(axes: Axes, cases: list[dict[str, Any]], note: str, style: str = "-", marker: str = "o") -> None:
    """Time against length on two logarithmic axes, a line per side and one for the limit."""
    for side in ("ours", "peer"):
        points = [(case["length"], case[side]["seconds"] * 1e3) for case in cases if _good(case[side])]
        if points:
            axes.plot(*zip(*points, strict=True), style, marker=marker, color=_COLORS[side], label=_LABELS[side] + note)
    points = [(case["length"], case["limit"]["seconds"] * 1e3) for case in cases if case["limit"]]
    if points:
        axes.plot(*zip(*points, strict=True), style, color=_COLORS["limit"], label=_LABELS["limit"] + note)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _figure(path: Path, kind: str, plot: Callable[[Axes], None], height: float = 4.2) -> str:
    figure, axes = plt.subplots(figsize=(8.5, height), layout="constrained")
    try:
        plot(axes)
        target = path.with_name(f"{path.stem}-{kind}.png")
        # No date or version in the file: the same result draws the same bytes.
        figure.savefig(target, dpi=110, metadata={"Software": None})
    finally:
        plt.close(figure)
    return target.name


def _cases(run: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [case for case in run["cases"] if case["kind"] == kind and any(_good(case[s]) for s in ("ours", "peer"))]


def _good(measured: dict[str, Any] | None) -> bool:
    return measured is not None and measured["status"] == "ok"


def _sizes(cases: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(case["size"] for case in cases))
