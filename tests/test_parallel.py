"""Runs `parallel_cases`, a class at a time, in processes of their own, which have eight devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("parallel_cases.py")


def run(cases, *options):
    flags = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, f"{CASES}::{cases}"]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    finished = subprocess.run(command, env=environment, cwd=CASES.parents[1], capture_output=True, text=True)
    print(finished.stdout)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "passed" in finished.stdout


@pytest.mark.parametrize(
    "cases", ["TestLossAndGradients", "TestPrograms", "TestLongSequences", "TestOps", "TestGenerate", "TestLora"]
)
def test_on_eight_devices(cases):
    run(cases, "-m", "not slow", "-sv")


@pytest.mark.slow
def test_32k_tokens():
    run("TestLongSequences", "-m", "slow", "-s")
