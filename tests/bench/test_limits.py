"""Limits against figures worked out by hand, and the list of cases."""

import pytest

from bench.cases import GROUPS, Case, cases_of
from bench.limits import limit, work_of
from bench.sizes import SIZES, config_of

RATES = {
    "copy_bytes_per_second": 3.0e12,
    "matmul_flops_per_second": 792e12,
    "host_to_device_bytes_per_second": 50e9,
}


@pytest.mark.parametrize(
    ("kind", "batch", "length", "milliseconds", "bound"),
    [
        # 3.52 GB of weights and twice 79.7 MB of state; with keys and values of 100.7 MB per 1024 tokens.
        ("decode", 1, 128, (3.52 + 2 * 0.0797 + 0.0126) / 3.0, "memory"),
        ("decode", 8, 2048, (3.52 + 8 * (2 * 0.0797 + 0.2014)) / 3.0, "memory"),
        ("context", 1, 131072, (3.52 + 2 * 0.0797 + 12.89) / 3.0, "memory"),
        # 2 operations for each of 1.695e9 weights, the recurrence's 4 x 38 x 4096 x 128, and per layer of attention
        # 4 x 4096 for each of half the keys.
        ("prefill", 1, 32768, 32768 * (3.39 + 0.0797 + 6 * 4 * 4096 * 16384 / 1e9) / 792, "arithmetic"),
        ("train", 4, 4096, 3 * 16384 * (3.521 + 0.0797 + 6 * 4 * 4096 * 2048 / 1e9) / 792, "arithmetic"),
    ],
)
def test_the_published_shape(kind, batch, length, milliseconds, bound):
    found = limit(Case(kind, kind, "1.2b", batch, length), config_of("1.2b"), "bfloat16", RATES)
    assert found["seconds"] * 1e3 == pytest.approx(milliseconds, rel=0.01)
    assert found["bound"] == bound


def test_the_recurrence_and_the_convolution_alone():
    config = config_of("1.2b")
    tokens = 4 * 4096
    x, narrow, dt, state = tokens * 4096 * 2, tokens * 128 * 2, tokens * 64 * 4, 4 * 64 * 64 * 128 * 4
    forward = work_of(Case("ssd", "ssd", "1.2b", 4, 4096), config, "bfloat16")
    assert forward.bytes == 2 * x + 2 * narrow + dt + state
    assert forward.flops == 4 * tokens * 4096 * 128
    both = work_of(Case("ssd", "ssd", "1.2b", 4, 4096, backward=True), config, "bfloat16")
    assert both.bytes == forward.bytes + 3 * x + 4 * narrow + 2 * dt
    assert both.flops == 3 * forward.flops
    conv = work_of(Case("conv", "conv", "1.2b", 4, 4096, backward=True), config, "bfloat16")
    assert conv.bytes == 5 * tokens * (4096 + 256) * 2


def test_quantised_weights_leave_fewer_bytes():
    config = config_of("1.2b")
    plain, int8, int4 = (
        work_of(Case("decode", "decode", "1.2b", 1, 128, quantize=name), config, "bfloat16").bytes
        for name in (None, "int8", "int4")
    )
    applied = config.num_parameters_applied_per_token()
    # int8: a float32 scale for each row, which is of 128 numbers in adapters. int4: a bfloat16 one for each group, and
    # an int8 table of embeddings.
    assert 0.96 * applied < plain - int8 < 0.97 * applied
    assert 1.3 * applied < plain - int4 < 1.45 * applied


def test_what_has_another_limit_or_none():
    config = config_of("small")
    load = limit(Case("load", "load", "small", 1, 0), config, "float32", RATES)
    assert load["bound"] == "transfer"
    assert load["seconds"] == pytest.approx(config.num_parameters() * 4 / 50e9)
    assert limit(Case("first-token", "first-token", "small", 1, 128), config, "float32", RATES) is None
    remat, plain = (
        limit(Case("train", "train", "small", 1, 256, remat=policy), config, "float32", RATES)
        for policy in ("layer", None)
    )
    assert remat == plain
    with pytest.raises(ValueError, match="no work is known for the kind 'dance'"):
        work_of(Case("decode", "dance", "small", 1, 1), config, "float32")


@pytest.mark.parametrize("size", SIZES)
def test_names_are_unique_and_every_case_has_work(size):
    cases = cases_of(size, list(GROUPS))
    assert len({case.name for case in cases}) == len(cases)
    assert {case.group for case in cases} == set(GROUPS)
    for case in cases:
        found = limit(case, config_of(size), "bfloat16", RATES)
        assert (found is None) == (case.kind == "first-token")
        assert found is None or found["seconds"] > 0


def test_growth_can_be_read():
    for kind in ("ssd", "conv", "context"):
        lengths = {case.length for case in cases_of("1.2b", [kind])}
        assert all(2 * length in lengths for length in lengths - {max(lengths)})
    shapes = {(case.kind, case.batch, case.length) for case in cases_of("1.2b", ["decode", "prefill", "train"])}
    for case in cases_of("1.2b", ["growth"]):
        halves = {(case.kind, case.batch // 2, case.length), (case.kind, case.batch, case.length // 2)}
        assert halves & shapes, case


def test_unknown_groups_are_named():
    with pytest.raises(ValueError, match="unknown cases sing; there are ssd, conv"):
        cases_of("1.2b", ["decode", "sing"])
