"""The least time that a case could take: the bytes it must move over the bandwidth, or the operations it must do over
the arithmetic rate, whichever is longer. Both rates are measured in the same run (`ceilings` of either side)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from bench.cases import Case
from bench.models import abstract_model
from zamba2_jax import Zamba2Config
from zamba2_jax.quantization import weight_itemsize

_FLOAT32 = 4
_ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": _FLOAT32}


@dataclasses.dataclass(frozen=True)
class Work:
    """Device memory traffic in bytes (each input read once, each output written once) and operations, of matrix
    products and the recurrence only (a multiplication and an addition are two)."""

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, factor: float) -> Work:
        return Work(factor * self.bytes, factor * self.flops)


def limit(case: Case, config: Zamba2Config, dtype: str, rates: Mapping[str, float]) -> dict[str, Any] | None:
    """The limit of a case, or None where none is known (a first token is mostly compilation).

    Args:
        rates: "copy_bytes_per_second", "matmul_flops_per_second", "host_to_device_bytes_per_second".

    Returns:
        "seconds", "bytes", "flops" and "bound": "memory", "arithmetic" or "transfer".
    """
    if case.kind == "first-token":
        return None
    work = work_of(case, config, dtype)
    if case.kind == "load":
        return _limit(work, {"transfer": work.bytes / rates["host_to_device_bytes_per_second"]})
    memory = work.bytes / rates["copy_bytes_per_second"]
    return _limit(work, {"memory": memory, "arithmetic": work.flops / rates["matmul_flops_per_second"]})


def work_of(case: Case, config: Zamba2Config, dtype: str) -> Work:
    """What one run of a case must move and compute, with numbers of `dtype`."""
    tokens, size = case.batch * case.length, _ITEMSIZES[dtype]
    match case.kind:
        case "ssd":
            return _ssd(config, tokens, case.batch, size, case.backward)
        case "conv":
            channels = config.mamba_intermediate_size + 2 * config.mamba_ngroups * config.mamba_d_state
            # Forward: in and out. Backward: the input again, the result's gradient, the input's gradient.
            return Work(tokens * channels * size * (5 if case.backward else 2))
        case "decode" | "context":
            return _step(config, case.batch, case.length, dtype, case.quantize)
        case "prefill":
            return _forward(config, case.batch, case.length, size, heads=case.batch)
        case "train":
            # Recomputation is no part of the work: the rematerialised case has the limit of the plain one.
            return _forward(config, case.batch, case.length, size, heads=tokens) * 3
        case "load":
            return Work(config.num_parameters() * size)
    raise ValueError(f"no work is known for the kind {case.kind!r}.")


def _limit(work: Work, seconds: dict[str, float]) -> dict[str, Any]:
    bound = max(seconds, key=seconds.__getitem__)
    return {"seconds": seconds[bound], "bytes": work.bytes, "flops": work.flops, "bound": bound}


def _ssd(config: Zamba2Config, tokens: int, batch: int, size: int, backward: bool) -> Work:
    """x and y, B and C, dt; the final state. Operations as of the recurrence, whose count no chunking goes below:
    state += x B^T and y = state C."""
    wide = tokens * config.mamba_intermediate_size * size
    narrow = 2 * tokens * config.mamba_ngroups * config.mamba_d_state * size
    steps = tokens * config.n_mamba_heads * _FLOAT32
    flops = 4 * tokens * config.mamba_intermediate_size * config.mamba_d_state
    forward = Work(2 * wide + narrow + steps + _ssm_state(config, batch), flops)
    if not backward:
        return forward
    # x, dy and dx; B, C and their gradients; dt and its own.
    return forward + Work(3 * wide + 2 * narrow + 2 * steps, 2 * flops)


def _step(config: Zamba2Config, batch: int, context: int, dtype: str, quantize: str | None) -> Work:
    """Every weight once per use, the states read and written, the filled slots of keys and values read."""
    size = _ITEMSIZES[dtype]
    weight_size = size if quantize is None else _quantized_itemsize(config, dtype, quantize)
    return Work(
        config.bytes_per_decode_step(batch, context, weight_itemsize=weight_size, cache_itemsize=size),
        config.flops_per_decode_step(batch, context),
    )


@functools.cache
def _quantized_itemsize(config: Zamba2Config, dtype: str, quantize: str) -> float:
    """Bytes of a weight on average: integers, their scales, and what is not quantised."""
    return weight_itemsize(abstract_model(config, dtype, quantize))


def _forward(config: Zamba2Config, batch: int, length: int, size: int, heads: int) -> Work:
    """One pass over b rows of l tokens, scores for `heads` of them; attention is causal, the recurrence counted as one
    (chunks of 1). Activations between layers are left out: what must go through memory depends on what is fused."""
    tokens = batch * length
    head = 2 * config.vocab_size * config.hidden_size
    return Work(
        config.num_parameters_applied_per_token() * size + config.cache_bytes(batch, length, cache_itemsize=size),
        config.flops_per_token(length, chunk_size=1) * tokens - head * (tokens - heads),
    )


def _ssm_state(config: Zamba2Config, batch: int) -> int:
    """Bytes of one layer's state, float32."""
    return batch * config.mamba_intermediate_size * config.mamba_d_state * _FLOAT32
