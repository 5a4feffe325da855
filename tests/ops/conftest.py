"""Fixtures of the tests of the recurrence."""

import jax
import pytest

from zamba2_jax.ops._platform import platform
from zamba2_jax.ops.ssd.api import FUSED, IMPLEMENTATIONS


@pytest.fixture(params=IMPLEMENTATIONS)
def form(request):
    """The arguments of `ssd` that choose an implementation: a fused kernel runs for real where its device is, and is
    interpreted elsewhere."""
    name = request.param
    fused = {kernel: kind for kind, kernel in FUSED.items()}
    return {"implementation": name, "interpret": name in fused and platform() != fused[name]}


@pytest.fixture
def products_in_full():
    """GPUs and TPUs would round the operands of XLA's float32 products."""
    with jax.default_matmul_precision("default" if platform() == "cpu" else "highest"):
        yield
