"""The process that runs cases, one side's: requests come as JSON lines on stdin, answers go as JSON lines to stdout.

`python -m bench.worker jax` or `torch`. It imports neither side's library before it knows which it is, and the torch
side never imports JAX: each has the device and the processor's threads for itself.

Requests: {"do": "describe"}, {"do": "ceilings", ...}, {"do": "case", ...}, {"do": "checkpoint", ...}.
Answers: {"ok": ...} or {"error": "..."}.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

_LONGEST_ERROR = 600


def main() -> int:
    # Libraries print to stdout as they please; answers must not mix with that.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if sys.argv[1] == "jax":
        from bench import jax_side as side
    else:
        from bench import torch_peer as side
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": _do(side, request)}
        except Exception as error:  # a failed case is a result, too
            traceback.print_exc()
            answer = {"error": _text(error)}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def _do(side: Any, request: dict[str, Any]) -> Any:
    match request.pop("do"):
        case "describe":
            return side.describe()
        case "ceilings":
            return side.ceilings(**request)
        case "checkpoint":
            return side.write_checkpoint(**request)
        case "case":
            return side.run_case(**request)
        case other:
            raise ValueError(f"unknown request {other!r}.")


def _text(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _LONGEST_ERROR else text[: _LONGEST_ERROR - 2] + " …"


class HostMemory:
    """Peak resident memory of this process since the object was made, where the system can forget an earlier peak."""

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts anew from what is resident now
            self.exact = True
        except OSError:
            self.exact = False

    def peak_bytes(self) -> int:
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


if __name__ == "__main__":
    sys.exit(main())
