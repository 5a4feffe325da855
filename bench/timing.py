"""How a time is taken, on either side alike."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

REPEATS = 5
# A sample is of at least this many seconds: launches are queued one after another, so that a device never waits for
# Python, as it would if each were waited for. The first launch of a prompt takes 2 ms to reach a GPU, which are to be
# lost in a sample; `Samples.alone` has them.
_SAMPLE_SECONDS = 0.1
_MOST_QUEUED = 200


@dataclasses.dataclass(frozen=True)
class Samples:
    """Seconds of one run, several times.

    Attributes:
        seconds: as one of many, where runs are queued.
        first_call_seconds: of the first run, which compiles.
        alone: of runs that were waited for each, as a caller does who needs the result; empty where not measured.
    """

    seconds: tuple[float, ...]
    first_call_seconds: float | None = None
    alone: tuple[float, ...] = ()

    def per(self, count: int) -> Samples:
        """Of one of `count` equal steps that a run consists of."""
        return Samples(
            tuple(seconds / count for seconds in self.seconds),
            self.first_call_seconds,
            tuple(seconds / count for seconds in self.alone),
        )

    def summary(self) -> dict[str, Any]:
        """Median, least, and (greatest - least) / median; the median alone."""
        middle = statistics.median(self.seconds)
        return {
            "seconds": middle,
            "seconds_min": min(self.seconds),
            "spread": (max(self.seconds) - min(self.seconds)) / middle,
            "samples": len(self.seconds),
            "first_call_seconds": self.first_call_seconds,
            "alone_seconds": statistics.median(self.alone) if self.alone else None,
        }


def time_runs(run: Callable[[], Any], wait: Callable[[Any], object], repeats: int = REPEATS) -> Samples:
    """Times `run`; `wait` blocks until what a run returned is there.

    The first run is kept apart, the second is thrown away. A sample is of as many runs as make it long enough, waited
    for once; where one does, it was alone.
    """
    first = _seconds(run, wait, 1)
    estimate = _seconds(run, wait, 1)
    queued = max(1, min(_MOST_QUEUED, math.ceil(_SAMPLE_SECONDS / estimate)))
    samples = tuple(_seconds(run, wait, queued) / queued for _ in range(repeats))
    alone = samples if queued == 1 else tuple(_seconds(run, wait, 1) for _ in range(repeats))
    return Samples(samples, first, alone)


def time_steps(run: Callable[[int], object], few: int, more: int, repeats: int = REPEATS) -> Samples:
    """Times one of the steps that `run(n)` takes n of, as (t(few + more) - t(few)) / more: what comes before the first
    step drops out. `run` returns when all is done.

    Raises:
        ValueError: the longer run was no longer than the shorter: the machine is too busy to tell.
    """
    start = time.perf_counter()
    run(few)
    first = time.perf_counter() - start
    run(few + more)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(few)
        middle = time.perf_counter()
        run(few + more)
        seconds.append(((time.perf_counter() - middle) - (middle - start)) / more)
    if statistics.median(seconds) <= 0:
        raise ValueError(f"{more} more steps took no more time: the machine is too busy to measure on.")
    return Samples(tuple(seconds), first)


def _seconds(run: Callable[[], Any], wait: Callable[[Any], object], queued: int) -> float:
    start = time.perf_counter()
    for _ in range(queued):
        result = None  # let go before the next run, whose memory it would add to
        result = run()
    wait(result)
    return time.perf_counter() - start
