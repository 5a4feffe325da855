"""Processes that run cases (`bench.worker`), seen from the one that asks them."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_LAST_CHARACTERS = 600


class CaseError(Exception):
    """A case that raised, took too long, or took its process with it; the text says which."""


class Worker:
    """One side's process. `ask` starts it when there is none, also after one was killed or died.

    Args:
        side: "jax" or "torch".
        environment: what it gets beside this process's own; None as a value takes a variable away.
    """

    def __init__(self, side: str, environment: Mapping[str, str | None]):
        self._command = [sys.executable, "-m", "bench.worker", side]
        self._environment = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
        self._process: subprocess.Popen[str] | None = None
        self._log: Any = None

    def ask(self, request: dict[str, Any], timeout: float) -> Any:
        """Sends a request and waits for its answer.

        Raises:
            CaseError: the request raised there, the process ended, or `timeout` seconds passed; it is killed then.
        """
        if self._process is None:
            self._start()
        process = self._process
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise CaseError(self._died()) from None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(max(timeout, 0.0)):
                self.stop()
                raise CaseError(f"no result after {timeout:.0f} s; the process was ended.")
        line = process.stdout.readline()
        if not line:
            raise CaseError(self._died())
        answer = json.loads(line)
        if "error" in answer:
            raise CaseError(answer["error"])
        return answer["ok"]

    def stop(self) -> None:
        """Ends the process and what it has started, if it runs."""
        if self._process is None:
            return
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # its session is its own
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):  # closing a pipe flushes it, and the other end may be gone
                stream.close()
        self._process = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (stop closes it)
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env=self._environment,
            start_new_session=True,
        )

    def _died(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        end = " ".join(self._log.read()[-_LAST_CHARACTERS:].split())
        self.stop()
        return f"the process ended with code {code}: {end}"
