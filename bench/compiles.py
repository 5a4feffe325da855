"""How many programs `generate` compiles for 20 prompts of 1 to 15000 tokens: two for each of three classes of texts."""

from __future__ import annotations

import time

import jax.monitoring
import numpy as np
from flax import nnx

from zamba2_jax import Zamba2Config, Zamba2ForCausalLM

COMPILED = "/jax/core/compile/backend_compile_duration"
LENGTHS = tuple(round(15_000 ** (step / 19)) for step in range(20))
BOUND = 6


def main() -> None:
    config = Zamba2Config(
        vocab_size=256,
        hidden_size=32,
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "mamba"],
        n_mamba_heads=4,
        mamba_d_state=16,
        num_attention_heads=4,
        adapter_rank=4,
        max_position_embeddings=16384,
    )
    model = Zamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    compiled: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(seconds) if event == COMPILED else None
    )
    start = time.perf_counter()
    for length in LENGTHS:
        prompt = np.random.default_rng(length).integers(3, config.vocab_size, (1, length))
        model.generate(prompt, max_new_tokens=20)
    print(
        f"{len(compiled)} programs (bound: {BOUND}) for {len(LENGTHS)} prompts of {min(LENGTHS)} to {max(LENGTHS)} "
        f"tokens ({sum(compiled):.1f} s of {time.perf_counter() - start:.1f} s)"
    )
