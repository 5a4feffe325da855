"""The PyTorch peer's side of every case: transformers' Zamba2, with the kernels of mamba-ssm and causal-conv1d where
they can be imported. It runs in a process of its own, without JAX."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from transformers.models.zamba2 import modeling_zamba2

from bench.cases import Case
from bench.sizes import scale_of
from bench.timing import Samples, time_runs, time_steps
from bench.worker import HostMemory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FEW = 8
_STEPS = 8
_NUMBERS_IN_PAGE = 1024

transformers.logging.set_verbosity_error()

# What transformers looks for, by the package it comes from.
_KERNELS = {
    "mamba_chunk_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
    "selective_state_update": "mamba_ssm.ops.triton.selective_state_update",
    "mamba_split_conv1d_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
    "causal_conv1d_fn": "causal_conv1d",
    "causal_conv1d_update": "causal_conv1d",
}


def describe() -> dict[str, Any]:
    """Versions, and which of the fast paths transformers finds; `fast_path`: all of them, on a GPU."""
    found = {name: _kernel(name) is not None for name in _KERNELS}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    for package in ("mamba_ssm", "causal_conv1d", "triton"):
        if importlib.util.find_spec(package) is not None:
            versions[package] = getattr(importlib.import_module(package), "__version__", "unknown")
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "versions": versions,
        "found": found,
        "fast_path": DEVICE.type == "cuda" and all(found.values()),
    }


def run_case(
    case: dict[str, Any], new_tokens: int, config: dict[str, Any], checkpoint: str | None = None
) -> dict[str, Any]:
    """Runs one case; returns and raises as `jax_side.run_case`. `config`: `sizes.torch_config` of the case's size."""
    case = Case(**case)
    _CONFIGS[case.size] = config
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    host = HostMemory()
    try:
        summary = _RUN[case.kind](case, new_tokens, checkpoint).summary()
        if DEVICE.type == "cuda":
            return summary | {"peak_bytes": torch.cuda.max_memory_allocated(), "peak_is_bound": False}
        return summary | {"peak_bytes": host.peak_bytes(), "peak_is_bound": not host.exact}
    finally:
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()  # the other side's turn comes next


def _kernel(name: str) -> Callable[..., Any] | None:
    """A kernel as transformers would find it, or None."""
    if DEVICE.type != "cuda":
        return None
    try:
        return getattr(importlib.import_module(_KERNELS[name]), name, None)
    except ImportError:
        return None


def _wait(_: object) -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


_CONFIGS: dict[str, dict[str, Any]] = {}
_MODELS: dict[str, Any] = {}


def _config(size: str) -> Any:
    return transformers.Zamba2Config(**_CONFIGS[size], attn_implementation="sdpa")


def _model(size: str) -> Any:
    """A model with random weights, as the constructor draws them, in the size's dtype."""
    if size not in _MODELS:
        _MODELS.clear()
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, scale_of(size).dtype))
        try:
            with DEVICE:
                _MODELS[size] = transformers.Zamba2ForCausalLM(_config(size))
        finally:
            torch.set_default_dtype(default)
    return _MODELS[size].eval()


def _ids(case: Case, vocab_size: int) -> torch.Tensor:
    ids = np.random.default_rng(case.length).integers(3, vocab_size, (case.batch, case.length))
    return torch.from_numpy(ids).to(DEVICE)


def _generate(model: Any, ids: torch.Tensor, count: int) -> None:
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    _wait(None)


def _decode(case: Case, new_tokens: int, _: str | None) -> Samples:
    if case.quantize is not None:
        raise NotImplementedError("transformers has no quantised Zamba2 without further packages.")
    model = _model(case.size)
    ids = _ids(case, model.config.vocab_size)
    with torch.no_grad():
        return time_steps(lambda count: _generate(model, ids, count), FEW, new_tokens)


def _prefill(case: Case, _: int, __: str | None) -> Samples:
    model = _model(case.size)
    ids = _ids(case, model.config.vocab_size)
    with torch.no_grad():
        return time_runs(lambda: model(ids, use_cache=True, logits_to_keep=1), _wait)


def _train(case: Case, _: int, __: str | None) -> Samples:
    model = _model(case.size).train()
    ids = _ids(case, model.config.vocab_size)
    if case.remat == "layer":
        model.gradient_checkpointing_enable()
    else:
        model.gradient_checkpointing_disable()

    def step() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    try:
        return time_runs(step, _wait)
    finally:
        model.zero_grad(set_to_none=True)


def _context(case: Case, _: int, __: str | None) -> Samples:
    """Single calls with a cache that one prefill has filled: less work around each step than `generate` does."""
    model = _model(case.size)
    with torch.no_grad():
        outputs = model(_ids(case, model.config.vocab_size), use_cache=True, logits_to_keep=1)

        def steps() -> None:
            nonlocal outputs
            for _ in range(_STEPS):
                token = outputs.logits[:, -1:].argmax(-1)
                outputs = model(token, past_key_values=outputs.past_key_values, use_cache=True)

        return time_runs(steps, _wait).per(_STEPS)


def _ssd(case: Case, _: int, __: str | None) -> Samples:
    config, dtype = _config(case.size), _dtype(case)
    heads, groups, states = config.n_mamba_heads, config.mamba_ngroups, config.mamba_d_state
    wide = (case.batch, case.length, heads, config.mamba_expand * config.hidden_size // heads)
    narrow = (case.batch, case.length, groups, states)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(shape: tuple[int, ...], dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype)

    arguments = [
        normal(wide),
        F.softplus(normal(wide[:3], torch.float32) - 4.0),
        -torch.arange(1.0, heads + 1.0, device=DEVICE),
        normal(narrow),
        normal(narrow),
        torch.ones(heads, device=DEVICE),
    ]
    scan = _kernel("mamba_chunk_scan_combined") or modeling_zamba2.mamba2_chunk_scan

    def forward(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor):
        return scan(x, dt, A, B, C, config.chunk_size, D=D, return_final_states=True)[0]

    return _time_op(forward, arguments, normal(wide), case.backward)


def _conv(case: Case, _: int, __: str | None) -> Samples:
    config, dtype = _config(case.size), _dtype(case)
    channels = config.mamba_expand * config.hidden_size + 2 * config.mamba_ngroups * config.mamba_d_state
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype)

    # Channels last in memory, (b, channels, l) to look at: as a mixer hands them over, and what the kernel likes best.
    arguments = [normal(case.batch, case.length, channels), normal(channels, config.mamba_d_conv), normal(channels)]
    conv = _kernel("causal_conv1d_fn") or modeling_zamba2.causal_conv1d_fn

    def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return conv(x.transpose(1, 2), weight, bias, activation="silu")

    cotangent = normal(case.batch, case.length, channels).transpose(1, 2)
    return _time_op(forward, arguments, cotangent, case.backward)


def _dtype(case: Case) -> torch.dtype:
    return getattr(torch, scale_of(case.size).dtype)


def _time_op(
    op: Callable[..., torch.Tensor], arguments: list[torch.Tensor], cotangent: torch.Tensor, backward: bool
) -> Samples:
    """Times an op alone, or with the gradients of all its arguments."""
    if not backward:
        with torch.no_grad():
            return time_runs(lambda: op(*arguments), _wait)
    arguments = [argument.requires_grad_() for argument in arguments]
    return time_runs(lambda: torch.autograd.grad(op(*arguments), arguments, cotangent), _wait)


def _first_token(case: Case, _: int, __: str | None) -> Samples:
    model = _model(case.size)
    ids = _ids(case, model.config.vocab_size)
    _wait(None)
    start = time.perf_counter()
    with torch.no_grad():
        _generate(model, ids, 1)
    return Samples((time.perf_counter() - start,))


def _load(case: Case, _: int, checkpoint: str | None) -> Samples:
    def load() -> Any:
        return transformers.Zamba2ForCausalLM.from_pretrained(
            checkpoint, dtype=_dtype(case), **({"device_map": DEVICE} if DEVICE.type == "cuda" else {})
        )

    def wait(model: Any) -> None:
        _wait(model)
        if DEVICE.type == "cpu":  # the file is only mapped so far: a number of every page, so that it is read
            for parameter in model.parameters():
                parameter.detach().flatten()[::_NUMBERS_IN_PAGE].sum()

    return time_runs(load, wait)


_RUN: dict[str, Callable[[Case, int, str | None], Samples]] = {
    "decode": _decode,
    "prefill": _prefill,
    "train": _train,
    "context": _context,
    "ssd": _ssd,
    "conv": _conv,
    "first-token": _first_token,
    "load": _load,
}
