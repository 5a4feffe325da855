"""`python -m bench`: times every case on this machine's device, beside PyTorch with --peer, and writes JSON and plots.

Each side runs in processes of its own, and only one side works at a time. Ours gets a new process for each group of
cases, since JAX's peak of device memory cannot be reset; a first token, a load and a training step get one to
themselves. Which side goes first alternates from group to group.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import results, table
from bench.cases import GROUPS, Case, cases_of
from bench.limits import limit
from bench.processes import CaseError, Worker
from bench.sizes import PUBLISHED, SIZES, config_of, scale_of, torch_config

_SETUP_SECONDS = 300.0
_SIDES = ("ours", "peer")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__ + "\n\ncases:\n" + "\n".join(f"  {name:12s} {text}" for name, text in GROUPS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", help="1.2b, 2.7b, 7b, or several with commas; on a CPU: small. Default: 1.2b, small")
    parser.add_argument("--cases", help="groups of cases, with commas, run in this order. Default: all")
    parser.add_argument("--match", default="", help="regular expression: only cases of those groups whose name has it")
    parser.add_argument("--peer", action="store_true", help="run PyTorch's Zamba2 too, and print ratios")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one case on one side (%(default)s)")
    parser.add_argument(
        "--deadline", type=float, help="seconds after which no case is started and a running one is ended"
    )
    parser.add_argument("--output", type=Path, help="result file; default: bench/results/<device>-<date>.json")
    parser.add_argument("--commit", help="what to record as the commit, where the checkout has no git")
    parser.add_argument("--no-plots", action="store_true")
    return parser


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    start = time.monotonic()
    groups = options.cases.split(",") if options.cases else list(GROUPS)
    sizes = options.size.split(",") if options.size else []
    for size in sizes:
        if size not in SIZES:
            parser().error(f"--size must be among {', '.join(SIZES)}, got {size!r}")
    if options.quick and sizes:
        parser().error("--quick has a model of its own; leave --size out")
    try:
        cases_of("tiny", groups)
        match = re.compile(options.match)
    except (ValueError, re.error) as error:
        parser().error(str(error))

    with Worker("jax", _environment("ours", {})) as worker:
        device = worker.ask({"do": "describe"}, _SETUP_SECONDS)
        on_cpu = device["platform"] == "cpu"
        if options.quick:
            sizes = ["tiny"]
        elif not sizes:
            sizes = ["small" if on_cpu else "1.2b"]
        if on_cpu and set(sizes) & set(PUBLISHED):
            parser().error("the published sizes take hours on a CPU; leave --size out for a model made smaller")
        if on_cpu:
            print("This is a CPU: small shapes, float32. Figures of a GPU or TPU need one.", flush=True)
        rates = worker.ask({"do": "ceilings", "size": sizes[0]}, _SETUP_SECONDS)
    run = results.environment(device) | {
        "kind": "speed",
        "peer": None,
        "ceilings": rates,
        "order": "groups of cases in turn; in each, first ours and then the peer, in the next the other way round",
        "seconds": 0.0,
        "cases": [],
        "plots": [],
    }
    if options.commit:
        run["commit"] = options.commit
    path = options.output or results.default_path(run)
    print(table.heading(run), flush=True)
    plan = [[case for case in cases_of(size, [group]) if match.search(case.name)] for size in sizes for group in groups]
    failed = Run(run, path, options.timeout, options.deadline, options.peer, start).all(plan)
    print("\n" + table.text(run))
    if not options.no_plots:
        _plot(run, path)
    print(f"{path} written after {run['seconds']:.0f} s; {failed} of {len(run['cases'])} cases failed")
    return 1 if failed else 0


class Run:
    """One run over all groups; `record` is what is written, after every case."""

    def __init__(
        self, record: dict[str, Any], path: Path, timeout: float, deadline: float | None, peer: bool, start: float
    ):
        self.record, self.path, self.timeout, self.start = record, path, timeout, start
        self.deadline = float("inf") if deadline is None else start + deadline
        self.sides = _SIDES if peer else _SIDES[:1]

    def all(self, plan: Sequence[Sequence[Case]]) -> int:
        """Runs groups of cases; returns how many cases failed on a side."""
        with contextlib.ExitStack() as stack:
            peer = stack.enter_context(Worker("torch", self.environment("peer", {})))
            # In a quick run the peaks of memory are no concern, and starting processes would take most of the time.
            shared = None
            if all(case.size == "tiny" for group in plan for case in group):
                shared = stack.enter_context(Worker("jax", self.environment("ours", {})))
            if "peer" in self.sides:
                try:
                    self.record["peer"] = peer.ask({"do": "describe"}, _SETUP_SECONDS)
                    print(table.peer_line(self.record["peer"]), flush=True)
                except CaseError as failure:
                    self.record["peer"] = {"error": str(failure)}
                    print(f"the peer does not start: {failure}", flush=True)
                    self.sides = _SIDES[:1]
            for turn, cases in enumerate(filter(None, plan)):
                self.group(cases, turn, peer, shared)
        unable = "error" in (self.record["peer"] or {})
        self.write()
        return unable + sum(
            any((case[side] or {}).get("status") == "error" for side in _SIDES) for case in self.record["cases"]
        )

    def group(self, cases: Sequence[Case], turn: int, peer: Worker, shared: Worker | None = None) -> None:
        """One group of one size, the two sides one after the other; ours in a process of its own, or in `shared`."""
        records = [self.start_record(case) for case in cases]
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = self.checkpoint(cases, Path(directory))
            for side in self.sides if turn % 2 == 0 else self.sides[::-1]:
                with contextlib.ExitStack() as stack:
                    ours = shared or stack.enter_context(Worker("jax", self.environment("ours", {})))
                    caches = Path(directory) / f"{side}-cache"
                    for case, record in zip(cases, records, strict=True):
                        with self.worker(case, side, ours, peer, caches) as worker:
                            record[side] = self.measure(case, side, worker, checkpoint, record["limit"])
                        record["ratio"] = results.ratio(record["ours"], record["peer"])
                        print(table.case_line(case.name, side, record[side]), flush=True)
                        self.write()

    @contextlib.contextmanager
    def worker(self, case: Case, side: str, ours: Worker, peer: Worker, caches: Path) -> Iterator[Worker]:
        """The group's process, or where a case needs one that has run nothing, that."""
        if not (case.ours_alone if side == "ours" else case.alone):
            yield ours if side == "ours" else peer
            return
        variables = {}
        if case.alone:  # the first of two processes finds the caches empty and fills them for the second
            variables = {
                "JAX_COMPILATION_CACHE_DIR": str(caches),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                "TRITON_CACHE_DIR": str(caches),
            }
        with Worker("jax" if side == "ours" else "torch", self.environment(side, variables)) as worker:
            yield worker

    def measure(
        self, case: Case, side: str, worker: Worker, checkpoint: dict[str, Any], limit: dict[str, Any] | None
    ) -> dict[str, Any]:
        left = self.deadline - time.monotonic()
        if left <= 0:
            return {"status": "skipped", "reason": "the run's deadline had passed"}
        if side == "peer" and case.quantize is not None:
            return {"status": "skipped", "reason": "transformers has no such weights without further packages"}
        if side == "peer" and case.remat in ("attention", "projections"):
            return {"status": "skipped", "reason": "transformers has no such policy"}
        if "error" in checkpoint:
            return {"status": "error", "error": f"no checkpoint to load: {checkpoint['error']}"}
        request = {"do": "case", "case": dataclasses.asdict(case), **checkpoint}
        request["new_tokens"] = scale_of(case.size).new_tokens[_SIDES.index(side)]
        if side == "peer":
            request["config"] = torch_config(case.size)
        try:
            measured = worker.ask(request, min(self.timeout, left))
        except CaseError as failure:
            if time.monotonic() >= self.deadline:  # it may have been about to succeed
                return {"status": "skipped", "reason": "the run's deadline ended it"}
            return {"status": "error", "error": str(failure)}
        seconds = measured["seconds"]
        return {
            "status": "ok",
            **measured,
            "tokens_per_second": case.tokens / seconds if case.tokens else None,
            "share_of_limit": None if limit is None else limit["seconds"] / seconds,
        }

    def start_record(self, case: Case) -> dict[str, Any]:
        dtype = scale_of(case.size).dtype
        fields = ("name", "group", "kind", "size", "batch", "length", "quantize")
        record = {name: getattr(case, name) for name in fields} | {
            "dtype": dtype,
            "limit": limit(case, config_of(case.size), dtype, self.record["ceilings"]),
            "ours": None,
            "peer": None,
            "ratio": None,
        }
        self.record["cases"].append(record)
        return record

    def checkpoint(self, cases: Sequence[Case], directory: Path) -> dict[str, Any]:
        """Writes a checkpoint where a case of the group loads one: the same files for both sides."""
        if not any(case.kind == "load" for case in cases) or time.monotonic() > self.deadline:
            return {}
        path = str(directory / "checkpoint")
        try:
            with Worker("jax", self.environment("ours", {})) as worker:
                worker.ask({"do": "checkpoint", "size": cases[0].size, "path": path}, self.timeout)
        except CaseError as failure:
            return {"error": str(failure)}
        return {"checkpoint": path}

    def environment(self, side: str, variables: dict[str, str | None]) -> dict[str, str | None]:
        return _environment(side, variables, on_cpu=self.record["platform"] == "cpu")

    def write(self) -> None:
        self.record["seconds"] = time.monotonic() - self.start
        results.write(self.path, self.record)


def _environment(side: str, variables: dict[str, str | None], on_cpu: bool = False) -> dict[str, str | None]:
    if side == "ours":
        # Memory is taken as it is needed, so that both sides fit and peaks mean something; no cache of programs, so
        # that a first call compiles.
        return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_COMPILATION_CACHE_DIR": None} | variables
    return ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}) | variables


def _plot(run: dict[str, Any], path: Path) -> None:
    try:
        from bench import plots
    except ModuleNotFoundError as error:
        print(f"no plots: {error}; .venv/bin/python -m pip install '.[bench]', then python -m bench plot {path}")
        return
    run["plots"] = plots.draw(run, path)
    results.write(path, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
