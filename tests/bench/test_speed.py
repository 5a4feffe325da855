"""The whole program on a tiny model, and what happens when a case fails, hangs or takes its process with it."""

import sys

import numpy as np
import pytest

from bench import results, speed, torch_peer
from bench.__main__ import main
from bench.cases import Case, cases_of
from bench.processes import CaseError, Worker
from bench.sizes import torch_config


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # PyTorch's threads spin where other tests want to work


def test_a_quick_run_with_the_peer(tmp_path, capsys):
    path = tmp_path / "quick.json"
    assert main(["--quick", "--peer", "--cases", "conv,context", "--timeout", "120", "--output", str(path)]) == 0
    run = results.read(path)
    assert run["platform"] == "cpu"
    assert run["peer"]["fast_path"] is False
    assert [case["name"] for case in run["cases"]] == [case.name for case in cases_of("tiny", ["conv", "context"])]
    for case in run["cases"]:
        for side in ("ours", "peer"):
            measured = case[side]
            assert measured["status"] == "ok"
            assert measured["samples"] >= 5
            assert measured["peak_bytes"] > 1e7
            assert measured["share_of_limit"] == pytest.approx(case["limit"]["seconds"] / measured["seconds"])
        assert case["ratio"] == pytest.approx(case["peer"]["seconds"] / case["ours"]["seconds"])
    assert run["plots"] == ["quick-context.png", "quick-conv.png", "quick-peer.png"]
    assert all((tmp_path / name).is_file() for name in run["plots"])
    printed = capsys.readouterr().out
    assert "This is a CPU: small shapes" in printed
    assert "decode at 128" in printed


def test_a_failed_case_is_recorded_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    bad, good = Case("decode", "ssd", "tiny", 1, 0), Case("decode", "decode", "tiny", 1, 16)
    monkeypatch.setattr(speed, "cases_of", lambda size, groups: [bad, good])
    path = tmp_path / "failed.json"
    assert main(["--quick", "--cases", "decode", "--no-plots", "--output", str(path)]) == 1
    failed, after = results.read(path)["cases"]
    assert failed["ours"]["status"] == "error"
    assert "a sequence of length 0" in failed["ours"]["error"]
    assert failed["ratio"] is None
    assert after["ours"]["status"] == "ok"
    assert "1 of 2 cases failed" in capsys.readouterr().out


def test_after_the_deadline_nothing_is_started(run):
    record = run | {"cases": [], "platform": "cpu"}
    late = speed.Run(record, path=None, timeout=1.0, deadline=1.0, peer=False, start=-1e9)
    case = Case("conv", "conv", "tiny", 1, 64)
    measured = late.measure(case, "ours", worker=None, checkpoint={}, limit=None)
    assert measured == {"status": "skipped", "reason": "the run's deadline had passed"}


def test_a_process_that_ends_or_hangs_is_an_error_and_the_next_one_works():
    answer = "import sys\nfor line in sys.stdin: print('{\"ok\": 7}', flush=True)"
    with Worker("jax", {}) as worker:
        worker._command = [sys.executable, "-c", "import sys; sys.exit('out of luck')"]
        with pytest.raises(CaseError, match="the process ended with code 1: out of luck"):
            worker.ask({"do": "describe"}, 30.0)
        worker._command = [sys.executable, "-c", "import time; time.sleep(60)"]
        with pytest.raises(CaseError, match="no result after 0 s; the process was ended"):
            worker.ask({"do": "describe"}, 0.2)
        worker._command = [sys.executable, "-c", answer]
        assert worker.ask({"do": "describe"}, 30.0) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "13b"], "--size must be among 1.2b"),
        (["--quick", "--size", "small"], "--quick has a model of its own"),
        (["--cases", "decode,sing"], "unknown cases sing"),
        (["--match", "("], "missing ), unterminated subpattern"),
    ],
)
def test_bad_arguments_are_refused_before_any_process_starts(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_unknown_commands_are_named():
    with pytest.raises(SystemExit, match="unknown command 'sing'; there are table"):
        main(["sing"])


@pytest.mark.parametrize("kind", ["ssd", "train"])
def test_the_peers_other_cases_run(kind):
    case = {"group": kind, "kind": kind, "size": "tiny", "batch": 1, "length": 32, "backward": True, "remat": "layer"}
    measured = torch_peer.run_case(case, new_tokens=4, config=torch_config("tiny"))
    assert measured["seconds"] > 0


def test_both_sides_time_the_same_recurrence(monkeypatch):
    """The peer's and our function, called as the cases call them, on the same numbers."""
    import jax
    import torch

    from bench import jax_side

    called = {}

    def keep(side):
        def time_op(op, arguments, cotangent, backward):
            called[side] = op, arguments
            return torch_peer.Samples((1.0,))

        return time_op

    monkeypatch.setattr(torch_peer, "_time_op", keep("peer"))
    monkeypatch.setattr(jax_side, "_time_op", keep("ours"))
    for kind in ("ssd", "conv"):
        case = {"group": kind, "kind": kind, "size": "tiny", "batch": 1, "length": 40}
        jax_side.run_case(case, new_tokens=0)
        torch_peer.run_case(case, new_tokens=0, config=torch_config("tiny"))
        ours, arguments = called["ours"]
        peer, peers_arguments = called["peer"]
        numbers = [np.array(argument) for argument in arguments]
        y = np.asarray(jax.jit(ours)(*arguments)[0])
        if kind == "conv":  # the peer's weights are (channels, k), its result (b, channels, l)
            numbers[1] = numbers[1].T
        for number, argument in zip(numbers, peers_arguments, strict=True):
            assert number.shape == tuple(argument.shape)
        theirs = peer(*(torch.from_numpy(number.copy()) for number in numbers)).numpy()
        theirs = theirs.swapaxes(1, 2) if kind == "conv" else theirs
        np.testing.assert_allclose(y, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
