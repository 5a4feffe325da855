"""How much sooner generation starts from a saved cache of a long prefix than by reading it. Both are compiled."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from bench.sizes import SMALL, TINY
from zamba2_jax import Zamba2Cache, Zamba2Config, Zamba2ForCausalLM

_SHAPES = {"small": SMALL, "tiny": TINY}
REPEATS = 3


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench prefix", description=__doc__)
    parser.add_argument("--size", choices=_SHAPES, default="small", help="shape of the model (default: small)")
    parser.add_argument("--tokens", type=int, default=4096, help="of the prefix (default: 4096)")
    parser.add_argument("--new", type=int, default=16, help="tokens of the text that follows it (default: 16)")
    options = parser.parse_args(arguments)
    figures = measure(options.size, options.tokens, options.new)
    print(
        f"{options.size} model, {jax.devices()[0].device_kind}, float32; prefix of {options.tokens} tokens, "
        f"{options.new} more; medians of {REPEATS}"
    )
    print(f"first token, prefix read            {figures['scratch']:8.3f} s")
    print(
        f"first token, prefix's cache at hand {figures['memory']:8.3f} s  {figures['memory_ratio']:6.1f} times sooner"
    )
    print(f"first token, its file loaded first  {figures['file']:8.3f} s  {figures['file_ratio']:6.1f} times sooner")
    print(f"file: {figures['bytes'] / 1e6:.1f} MB")
    return 0


def measure(size: str, tokens: int, new: int) -> dict[str, float]:
    """Seconds to a first token: `scratch`, `memory`, `file`; their ratios, and the file's `bytes`."""
    config = Zamba2Config(**_SHAPES[size] | {"max_position_embeddings": 2 * (tokens + new)})
    model = Zamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    text = np.random.default_rng(0).integers(3, config.vocab_size, (1, tokens + new))
    prefix = model.generate(text[:, :tokens], max_new_tokens=1, return_dict_in_generate=True).past_key_values
    # As large a cache as reading the whole text makes, so that no run copies one.
    prefix = prefix.resize(prefix.max_length)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "prefix.safetensors"
        prefix.save(path, model)

        def loaded() -> Zamba2Cache:
            return Zamba2Cache.load(path, model, max_length=prefix.max_length)

        def first_token(cache: Callable[[], Zamba2Cache | None]) -> np.ndarray:
            return model.generate(text, max_new_tokens=1, past_key_values=cache())

        runs = {"scratch": lambda: None, "memory": lambda: prefix, "file": loaded}
        expected = first_token(runs["scratch"])
        seconds = {}
        for name, cache in runs.items():
            if name != "scratch" and not np.array_equal(first_token(cache), expected):  # compiles, too
                raise ValueError(f"{name}: another token than from scratch.")
            times = []
            for _ in range(REPEATS):
                began = time.perf_counter()
                first_token(cache)
                times.append(time.perf_counter() - began)
            seconds[name] = statistics.median(times)
        ratios = {f"{name}_ratio": seconds["scratch"] / seconds[name] for name in ("memory", "file")}
        return {**seconds, **ratios, "bytes": path.stat().st_size}
