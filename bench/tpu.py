"""`python -m bench tpu`: compiles decode, prefill and training step of the published shapes for TPU chips.

No TPU is needed, libtpu is (pip install libtpu), and one process at a time may use it. Each program is compiled in a
process of its own (`bench.tpu_compile`), for one chip or, where one cannot hold it, for the smallest slice that can,
parameters split over its chips by `zamba2_jax.sharding.RULES` ("fsdp"). The training step is loss and gradient,
rematerialised and with one body compiled for all equal layers, as the presets of `train` do, float32 parameters; no
optimiser, whose state would come on top.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import results
from bench.processes import ROOT
from bench.sizes import PUBLISHED
from zamba2_jax.tpu_slices import CHIPS, check_compiler, compiler_environment, parse_slice

PROGRAMS = {
    "decode": "one step, one row, 4096 cache slots, bfloat16",
    "decode-int8": "the same with int8 weights",
    "prefill": "one row of 2048 tokens into a cache, bfloat16",
    "train": "loss and gradient, 4096 tokens per chip, rematerialised, equal layers scanned",
}
SLICES = (1, 2, 4, 8, 16, 32)
# The chips of a host; fewer are a part of it.
_SMALLEST_SLICE = 4


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench tpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(PUBLISHED), help="one shape; default: all")
    parser.add_argument("--chip", choices=tuple(CHIPS), help="one kind of chip; default: all")
    parser.add_argument("--program", choices=tuple(PROGRAMS), help="one program; default: all")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for one compilation (%(default)s)")
    parser.add_argument("--output", type=Path, help="result file, rows replaced in it; default: bench/results/tpu.json")
    options = parser.parse_args(arguments)
    try:
        check_compiler()
    except ImportError as error:
        sys.exit(str(error))

    path = options.output or results.DIRECTORY / "tpu.json"
    run = open_run(path)
    print("\n".join(f"{name}: {text}" for name, text in PROGRAMS.items()), flush=True)
    print(line(None), flush=True)
    failed = 0
    for size in [options.size] if options.size else PUBLISHED:
        for chip in [options.chip] if options.chip else CHIPS:
            for program in [options.program] if options.program else PROGRAMS:
                row = compile_row(size, chip, program, options.timeout)
                failed += row["status"] != "ok"
                print(line(row), flush=True)
                replace_row(run, row)
                results.write(path, run)
    print(f"{path} written")
    return 1 if failed else 0


def compile_row(size: str, chip: str, program: str, timeout: float) -> dict[str, Any]:
    """Compiles one program for ever larger slices until one holds it.

    Returns:
        `results.TPU_FIELDS` but "commit". "status" is "ok", "does not fit" (in the largest slice) or "error"; "chips",
        "seconds" and "bytes" (per chip) are those of the last slice tried, "tried" all of them.
    """
    hbm = CHIPS[chip].hbm_bytes
    row: dict[str, Any] = {"size": size, "chip": chip, "program": program, "hbm_bytes": hbm, "tried": []}
    for chips in SLICES:
        outcome = _compile(size, chip, program, chips, timeout)
        if outcome["status"] == "ok" and outcome["bytes"] > hbm:
            outcome["status"] = "does not fit"
        row["tried"].append({name: outcome[name] for name in ("chips", "status", "bytes", "seconds")})
        row |= outcome
        if outcome["status"] != "does not fit":
            break
    return row


def _compile(size: str, chip: str, program: str, chips: int, timeout: float) -> dict[str, Any]:
    environment = os.environ | compiler_environment(chip)
    hbm = str(CHIPS[chip].hbm_bytes)
    # A slice of that size: libtpu ends the process over a program for four chips in a row of a larger one.
    topology = parse_slice(f"{chip}-{max(chips, _SMALLEST_SLICE) * CHIPS[chip].cores}").topology
    command = [sys.executable, "-m", "bench.tpu_compile", size, topology, program, str(chips), hbm]
    outcome = {"chips": chips, "status": "error", "seconds": None, "bytes": None, "kernels": {}, "error": None}
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return outcome | {"seconds": time.monotonic() - start, "error": f"not compiled after {timeout:.0f} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return outcome | {"error": f"code {done.returncode}: {' '.join(done.stderr[-600:].split())}"}
    return outcome | json.loads(lines[-1])


def open_run(path: Path) -> dict[str, Any]:
    """The record to add rows to: the file's, or a new one.

    Raises:
        ValueError: the file holds something else.
    """
    import jax

    versions = {"jax": jax.__version__, "libtpu": _libtpu_version()}
    rows = []
    if path.exists():
        run = json.loads(path.read_text(encoding="utf-8"))
        if run.get("kind") != "tpu" or run.get("schema") != results.SCHEMA:
            raise ValueError(f"{path} is no result of `bench tpu`; give another --output.")
        rows = run["rows"]
    device = {"platform": "tpu", "device": "none: compiled only", "memory_bytes": None, "versions": versions}
    return results.environment(device) | {"kind": "tpu", "rows": rows}


def replace_row(run: dict[str, Any], row: dict[str, Any]) -> None:
    """Puts a row where one of the same size, chip and program stood, or at the end."""
    key = ("size", "chip", "program")
    row = row | {"commit": run["commit"]}
    run["rows"] = [old for old in run["rows"] if any(old[name] != row[name] for name in key)] + [row]


def line(row: dict[str, Any] | None) -> str:
    """A row of the printed table; None for its head."""
    if row is None:
        head = f"{'size':5s} {'chip':4s} {'program':12s} {'chips':>5s} {'compiled':>9s} {'per chip':>9s} {'of HBM':>7s}"
        return head + "  kernels"
    seconds = "–" if row["seconds"] is None else f"{row['seconds']:.1f} s"  # noqa: RUF001
    memory = "–" if row["bytes"] is None else f"{row['bytes'] / 1e9:.2f} GB"  # noqa: RUF001
    kernels = ", ".join(f"{count} {name}" for name, count in row["kernels"].items()) or "none"
    end = kernels if row["status"] == "ok" else f"{row['status']}: {row['error'] or ''}"[:300]
    return (
        f"{row['size']:5s} {row['chip']:4s} {row['program']:12s} {row['chips']:5d} {seconds:>9s} {memory:>9s} "
        f"{row['hbm_bytes'] / 1e9:4.0f} GB  {end}"
    )


def _libtpu_version() -> str:
    from importlib import metadata

    return metadata.version("libtpu")
