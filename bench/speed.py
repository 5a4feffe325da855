"""Prefill and decoding of a 100 M-parameter model, float32, against PyTorch on the same CPU: one process each, in
turn."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from zamba2_jax import Zamba2Config

# The 1.2B shape made smaller: one shared block used twice, attention adapters, RoPE, heads of 64.
SIZES = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "num_hidden_layers": 16,
    "mamba_d_state": 128,
    "n_mamba_heads": 24,
    "num_attention_heads": 12,
    "adapter_rank": 64,
    "use_mem_rope": True,
    "use_shared_attention_adapter": True,
    "layers_block_type": ["hybrid" if index in (5, 11) else "linear_attention" for index in range(16)],
}
PREFILL = (128, 512, 2048)
PROMPT, FEW, MANY = 128, 8, 72


def main() -> None:
    figures = {side: [_run(side)] for side in ("torch", "jax")}
    for side in figures:  # a second round, so that a busy moment does not decide
        figures[side].append(_run(side))
    best = {side: {case: min(run[case] for run in runs) for case in runs[0]} for side, runs in figures.items()}
    print(f"{'':18s}{'PyTorch':>14s}{'zamba2_jax':>14s}{'ratio':>8s}")
    for case, seconds in best["torch"].items():
        ours = best["jax"][case]
        print(f"{case:18s}{seconds * 1e3:11.1f} ms{ours * 1e3:11.1f} ms{seconds / ours:8.2f}")
    parameters = Zamba2Config.from_dict(SIZES).num_parameters()
    print(f"{parameters:,} parameters, float32, {os.cpu_count()} cores; wanted: each ratio at least 2")
    print("medians of 5; the better of two runs in turn; JAX without its compilation")


def _run(side: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.speed", side]
    on_cpu = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=on_cpu)
    return json.loads(done.stdout.splitlines()[-1])


def _median(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _measure(
    prefill: Callable[[np.ndarray], object], generate: Callable[[np.ndarray, int], object]
) -> dict[str, float]:
    def prompt(length: int) -> np.ndarray:
        return np.random.default_rng(length).integers(3, SIZES["vocab_size"], (1, length))

    figures = {f"prefill 1 x {length}": _median(lambda length=length: prefill(prompt(length))) for length in PREFILL}
    few, many = (_median(lambda count=count: generate(prompt(PROMPT), count)) for count in (FEW, MANY))
    return figures | {"decode, one step": (many - few) / (MANY - FEW)}


def _torch() -> dict[str, float]:
    import torch
    import transformers

    model = transformers.Zamba2ForCausalLM(transformers.Zamba2Config(**SIZES)).eval()

    def generate(ids: np.ndarray, count: int) -> object:
        ids = torch.from_numpy(ids)
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
        )

    with torch.no_grad():
        return _measure(lambda ids: model(torch.from_numpy(ids), use_cache=True, logits_to_keep=1), generate)


def _jax() -> dict[str, float]:
    import jax
    from flax import nnx

    from zamba2_jax import Zamba2ForCausalLM

    model = Zamba2ForCausalLM(Zamba2Config.from_dict(SIZES), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)

    @jax.jit
    def forward(state: nnx.State, ids: jax.Array) -> tuple[jax.Array, object]:
        outputs = nnx.merge(graphdef, state)(ids, use_cache=True, cache_length=ids.shape[1], logits_to_keep=1)
        return outputs.logits, outputs.past_key_values

    return _measure(
        lambda ids: jax.block_until_ready(forward(state, ids)),
        lambda ids, count: model.generate(ids, max_new_tokens=count, min_new_tokens=count),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("torch", "jax"))
    print(json.dumps({"torch": _torch, "jax": _jax}[parser.parse_args().side]()))
