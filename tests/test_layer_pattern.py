"""What repeats in a list of layers."""

import pytest

from zamba2_jax import Zamba2Config
from zamba2_jax.layer_pattern import Stage, repetitions, stages


def pattern(config):
    """Per repetition: how many times, and the (plain layers, shared block) of its stages."""
    uses = {layer: use for use, layer in enumerate(config.hybrid_layer_ids)}
    found = stages(config.layers_block_type, uses)
    kinds = [(s.plain, None if s.use is None else s.use % config.num_shared_blocks) for s in found]
    return [(count, kinds[first : first + period]) for first, period, count in repetitions(kinds)]


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("zamba2_1_2b", [(6, [(5, 0)]), (1, [(2, None)])]),
        (
            "zamba2_2_7b",
            [(1, [(6, 0)]), (3, [(5, 1), (5, 0)]), (1, [(4, 1)]), (1, [(3, 0)]), (1, [(2, None)])],
        ),
        (
            "zamba2_7b",
            [(1, [(6, 0)]), (1, [(4, 1)]), (5, [(5, 0), (5, 1)]), (1, [(5, 0)]), (1, [(3, None)])],
        ),
    ],
)
def test_published_shapes(preset, expected):
    assert pattern(getattr(Zamba2Config, preset)()) == expected


def test_layers_that_differ_are_cut_apart():
    assert stages(["a", "a", "b", "a", "h", "a"], {4: 0}) == [
        Stage(0, 2, None),
        Stage(2, 1, None),
        Stage(3, 1, 0),
        Stage(5, 1, None),
    ]
    # A hybrid layer of another kind ends its stage like any other.
    assert stages(["a", "a", "b"], {2: 0}) == [Stage(0, 2, 0)]
    assert stages(["a", "a"], {0: 0, 1: 1}) == [Stage(0, 0, 0), Stage(1, 0, 1)]


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("", []),
        ("a", [(0, 1, 1)]),
        ("aaaa", [(0, 1, 4)]),
        ("abab", [(0, 2, 2)]),
        ("xababab", [(0, 1, 1), (1, 2, 3)]),
        ("aabaab", [(0, 3, 2)]),
        ("abcb", [(0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 1, 1)]),
    ],
)
def test_repetitions(items, expected):
    assert repetitions(items) == expected
