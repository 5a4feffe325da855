"""Names of TPU slices; what is said without libtpu."""

import importlib.util

import pytest

from zamba2_jax import tpu_slices
from zamba2_jax.tpu_slices import Slice, parse_slice


@pytest.mark.parametrize(
    ("name", "topology", "chip", "size"),
    [
        ("v5e:16x16", "v5e:16x16", "v5e", 256),
        ("v5litepod-16", "v5e:4x4", "v5e", 16),
        ("v5e-64", "v5e:8x8", "v5e", 64),
        ("v5p-128", "v5p:4x4x4", "v5p", 64),  # 128 cores
        ("v5p:2x2x1", "v5p:2x2x1", "v5p", 4),
        ("v6e-8", "v6e:2x4", "v6e", 8),
    ],
)
def test_names(name, topology, chip, size):
    assert parse_slice(name) == Slice(topology, chip, size)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "no topology 'v9:2x2'; give one of v5e, v5p, v6e and its shape"),
        ("v5e", "no topology 'v5e'"),
        ("v5e:4x", "no topology 'v5e:4x'"),
        ("v5e:4x0", "no topology"),
        ("v5e:4x4x4", "has 3 axes; those of v5e have 2: 4x4"),
        ("v5p:4x4", "has 2 axes; those of v5p have 3: 2x2x4"),
        ("v5e:3x3", "a host has 2x2 chips"),
        ("v5p-100", "there is no slice v5p-100; there are v5p-8"),
        ("v5e-5", "there is no slice v5e-5; there are v5e-4, v5e-8"),
    ],
)
def test_what_is_no_slice(name, message):
    with pytest.raises(ValueError, match=message):
        parse_slice(name)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"libtpu, is not installed here.*pip install libtpu"):
        tpu_slices.check_compiler()


def test_another_process_has_the_compiler(monkeypatch):
    from jax.experimental import topologies

    def refuse(**_):
        raise RuntimeError("ABORTED: Internal error when accessing libtpu multi-process lockfile.")

    monkeypatch.setattr(tpu_slices, "check_compiler", lambda: None)
    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(tpu_slices.CompilerBusyError, match=r"another process uses libtpu.*wait for it.*lockfile"):
        tpu_slices.devices("v5e:2x2")
