"""The record of one run: what is in a result file, written after every case, read by tables and plots."""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.processes import ROOT

SCHEMA = 1
DIRECTORY = ROOT / "bench" / "results"

# Every field of a result file and of a case in it. A measurement is {"status": "ok", ...}, {"status": "error",
# "error": text} or {"status": "skipped", "reason": text}.
RUN_FIELDS = {
    "schema",
    "kind",  # "speed" or "tpu"
    "date",
    "command",
    "commit",
    "device",
    "platform",
    "driver",
    "memory_bytes",
    "processors",
    "versions",
    "peer",  # None, or its versions, `found` and `fast_path`
    "ceilings",
    "order",
    "seconds",
    "cases",
    "plots",
}
CASE_FIELDS = {
    "name",
    "group",
    "kind",
    "size",
    "batch",
    "length",
    "dtype",
    "quantize",
    "limit",
    "ours",
    "peer",
    "ratio",
}
MEASURED_FIELDS = {
    "status",
    "seconds",
    "seconds_min",
    "spread",
    "samples",
    "first_call_seconds",
    "alone_seconds",  # of a run that is waited for; None where not measured, absent from files before it was
    "tokens_per_second",
    "share_of_limit",
    "peak_bytes",
    "peak_is_bound",
}
TPU_FIELDS = {
    "size",
    "chip",
    "program",
    "chips",  # of the slice; what follows is of the last of those tried
    "status",  # "ok", "does not fit" or "error"
    "seconds",
    "bytes",  # per chip
    "hbm_bytes",
    "kernels",  # names and counts
    "error",
    "tried",
    "commit",
}


def environment(device: dict[str, Any]) -> dict[str, Any]:
    """What a reader must know to repeat the run; `device` as a side's `describe` gives it."""
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "commit": commit(),
        "device": _processor() if device["platform"] == "cpu" else device["device"],
        "platform": device["platform"],
        "driver": _driver() if device["platform"] == "gpu" else None,
        "memory_bytes": device["memory_bytes"],
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {"python": sys.version.split()[0], **device["versions"]},
    }


def default_path(run: dict[str, Any], directory: Path = DIRECTORY) -> Path:
    """`<device>-<date>.json`, or with a number where there is such a file."""
    device = re.sub(r"[^a-z0-9]+", "-", run["device"].lower()).strip("-")
    stem = f"{device}-{run['date'][:10]}"
    path, number = directory / f"{stem}.json", 2
    while path.exists():
        path, number = directory / f"{stem}-{number}.json", number + 1
    return path


def write(path: Path, run: dict[str, Any]) -> None:
    """Writes a result file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def read(path: str | Path) -> dict[str, Any]:
    """Reads a result file and checks it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not one of this schema; what is wrong is named.
    """
    run = json.loads(Path(path).read_text(encoding="utf-8"))
    check(run, str(path))
    return run


def check(run: dict[str, Any], name: str) -> None:
    """Raises ValueError, naming file and field, where `run` is not what this module describes."""
    if run.get("schema") != SCHEMA:
        raise ValueError(f"{name} has schema {run.get('schema')!r}; this program reads {SCHEMA}.")
    if run.get("kind") == "tpu":
        for row in run["rows"]:
            _check_fields(f"{name}, a row", row, TPU_FIELDS)
        return
    _check_fields(name, run, RUN_FIELDS)
    for case in run["cases"]:
        _check_fields(f"{name}, case {case.get('name')!r}", case, CASE_FIELDS)
        for side in ("ours", "peer"):
            measured = case[side]
            if measured is None:
                continue
            where = f"{name}, case {case['name']!r}, {side}"
            match measured.get("status"):
                case "ok":
                    _check_fields(where, {"alone_seconds": None} | measured, MEASURED_FIELDS)
                case "error":
                    _check_fields(where, measured, {"status", "error"})
                case "skipped":
                    _check_fields(where, measured, {"status", "reason"})
                case other:
                    raise ValueError(f"{where} has status {other!r}; it must be ok, error or skipped.")


def ratio(ours: dict[str, Any] | None, peer: dict[str, Any] | None) -> float | None:
    """How many times the peer's time ours fits into; None where either was not measured."""
    if ours is None or peer is None or ours["status"] != "ok" or peer["status"] != "ok":
        return None
    return peer["seconds"] / ours["seconds"]


def command_line() -> str:
    """This process's command, as typed in the checkout."""
    return shlex.join(["python", "-m", "bench", *sys.argv[1:]])


def commit() -> str | None:
    """The checkout's commit, with "+changes" where the library or the bench differ from it; None outside git."""
    try:
        head = _output("git", "rev-parse", "--short=12", "HEAD")
        changed = _output("git", "status", "--porcelain", "--", "zamba2_jax", "bench")
    except (OSError, subprocess.CalledProcessError):
        return None
    # Results are what this program writes.
    lines = [line for line in changed.splitlines() if "bench/results" not in line]
    return head + ("+changes" if lines else "")


def _check_fields(where: str, values: dict[str, Any], wanted: set[str]) -> None:
    if values.keys() != wanted:
        missing, unknown = sorted(wanted - values.keys()), sorted(values.keys() - wanted)
        raise ValueError(f"{where}: missing {missing}, unknown {unknown}.")


def _driver() -> str | None:
    try:
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "cpu"


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
