"""Settings for the whole suite: the CPU, no network, and PyTorch held to one thread so that two workers do not fight
over two cores."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The suite compiles hundreds of tiny programs and runs each for a millisecond: LLVM's optimiser costs more than it
# gives back.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def oracle_dir(tmp_path_factory):
    """Where `bench.oracle` keeps the checkpoints it writes."""
    return tmp_path_factory.mktemp("oracle")
