"""A result file's content, made by hand, of a machine that does not exist."""

import copy

import pytest

from bench.cases import Case

MEASURED = {
    "status": "ok",
    "seconds": 0.004,
    "seconds_min": 0.0039,
    "spread": 0.1,
    "samples": 5,
    "first_call_seconds": 12.0,
    "alone_seconds": 0.005,
    "tokens_per_second": 2_048_000.0,
    "share_of_limit": 0.5,
    "peak_bytes": 3_210_000_000,
    "peak_is_bound": False,
}


def case_record(case: Case, ours: dict | None, peer: dict | None, ratio: float | None) -> dict:
    fields = ("name", "group", "kind", "size", "batch", "length", "quantize")
    limit = {"seconds": 0.002, "bytes": 1e9, "flops": 1e12, "bound": "memory"}
    record = {name: getattr(case, name) for name in fields} | {"dtype": "bfloat16", "limit": limit}
    return record | {"ours": ours, "peer": peer, "ratio": ratio}


RUN = {
    "schema": 1,
    "kind": "speed",
    "date": "2026-01-02T03:04:05+00:00",
    "command": "python -m bench --peer",
    "commit": "0123456789ab",
    "device": "Some GPU",
    "platform": "gpu",
    "driver": "1.2.3",
    "memory_bytes": 80_000_000_000,
    "processors": 16,
    "versions": {"python": "3.12.3", "jax": "0.11.2"},
    "peer": {
        "device": "Some GPU",
        "versions": {"torch": "2.11.0"},
        "found": {"mamba_chunk_scan_combined": True, "causal_conv1d_fn": False},
        "fast_path": False,
    },
    "ceilings": {
        "copy_bytes_per_second": 2.98e12,
        "matmul_flops_per_second": 792e12,
        "matmul_dtype": "bfloat16",
        "host_to_device_bytes_per_second": 50e9,
    },
    "order": "in turn",
    "seconds": 100.0,
    "plots": ["example-peer.png"],
    "cases": [
        *(
            case_record(
                Case(kind, kind, "1.2b", 4, length, backward=backward),
                MEASURED | {"seconds": length * 1e-6},
                MEASURED | {"seconds": length * 3e-6},
                3.0,
            )
            for kind in ("ssd", "conv")
            for length in (1024, 2048)
            for backward in (False, True)
        ),
        *(
            case_record(Case("context", "context", "1.2b", 1, length), MEASURED | {"peak_is_bound": True}, None, None)
            for length in (1024, 2048)
        ),
        case_record(
            Case("prefill", "prefill", "1.2b", 8, 2048), MEASURED, {"status": "error", "error": "out of memory"}, None
        ),
        case_record(
            Case("int8", "decode", "7b", 1, 128, quantize="int8"),
            MEASURED,
            {"status": "skipped", "reason": "no such weights"},
            None,
        ),
    ],
}


@pytest.fixture
def run():
    return copy.deepcopy(RUN)
