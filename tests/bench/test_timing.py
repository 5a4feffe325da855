"""Times on a clock that the test turns."""

import pytest

from bench import timing


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_a_step_is_the_difference_of_two_runs(clock):
    calls = []

    def run(steps):
        clock.now += (10.0 if not calls else 0.5) + 0.25 * steps  # the first call compiles
        calls.append(steps)

    samples = timing.time_steps(run, few=8, more=16)
    assert samples.seconds == (0.25,) * timing.REPEATS
    assert samples.first_call_seconds == 12.0
    assert set(calls) == {8, 24}


def test_steps_that_cost_nothing_are_refused(clock):
    def run(steps):
        clock.now += 1.0

    with pytest.raises(ValueError, match="16 more steps took no more time"):
        timing.time_steps(run, few=8, more=16)


def test_short_runs_are_queued_and_waited_for_once(clock):
    waits = []

    def run():
        clock.now += 2**-9 if waits else 3.0
        return "result"

    def wait(result):
        assert result == "result"
        clock.now += 2**-9
        waits.append(clock.now)

    samples = timing.time_runs(run, wait)
    # The second run took 1/256 s: 26 make a sample of 0.1 s or more, with one wait in it.
    assert samples.seconds == pytest.approx((27 / 26 * 2**-9,) * timing.REPEATS)
    assert samples.alone == (2 * 2**-9,) * timing.REPEATS
    assert samples.per(2).alone == (2**-9,) * timing.REPEATS
    assert samples.first_call_seconds == 3.0 + 2**-9
    assert len(waits) == 2 + 2 * timing.REPEATS


def test_a_summary_is_median_least_and_spread():
    summary = timing.Samples((4.0, 1.0, 2.0), first_call_seconds=9.0).summary()
    assert summary == {
        "seconds": 2.0,
        "seconds_min": 1.0,
        "spread": 1.5,
        "samples": 3,
        "first_call_seconds": 9.0,
        "alone_seconds": None,
    }
    assert timing.Samples((4.0,), alone=(5.0, 6.0, 9.0)).summary()["alone_seconds"] == 6.0
