"""`make demo`: a PyTorch Zamba2 checkpoint is inspected, converted, checked against PyTorch and continued by both.

Without --model a small random checkpoint is written first, by transformers, so no network is needed. With --model (a
hub id or a directory) the
same happens with real weights, in float32: allow twice the model's size in memory, 10 GB for the 1.2B.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import transformers

import convert.cli
from bench.oracle import without_dt_clamp
from zamba2_jax import Zamba2Config, Zamba2ForCausalLM
from zamba2_jax.checkpoint.files import find_checkpoint

OUTPUT = Path("demo-output")
PROMPT = "What factors contributed to the fall of the Roman Empire?"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="hub id or directory; default: a small random model written by transformers")
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()

    transformers.logging.set_verbosity_error()  # it would advise to install CUDA kernels
    transformers.logging.disable_progress_bar()
    try:
        source = Path(find_checkpoint(options.model)) if options.model else None
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if source is not None and OUTPUT.resolve() in (source.resolve(), *source.resolve().parents):
        sys.exit(f"error: {source} lies in {OUTPUT}, which the demo makes anew; move it elsewhere first.")
    if OUTPUT.exists():
        shutil.rmtree(OUTPUT)
    OUTPUT.mkdir()
    if source is None:
        source = write_small_checkpoint(OUTPUT / "pytorch")

    heading("1. What is in the checkpoint", f"python -m convert inspect {source}")
    print_ends(run_convert("inspect", str(source)))

    converted = OUTPUT / "jax"
    heading("2. Convert it", f"python -m convert from-hf {source} {converted}")
    print(run_convert("from-hf", str(source), str(converted), "--no-progress"), end="")

    heading("3. Check it against PyTorch", f"python -m convert verify {source} {converted}")
    print(run_convert("verify", str(source), str(converted), "--no-progress"), end="")

    heading("4. Continue a prompt with both, greedily, float32")
    agree = generate_with_both(source, converted, options.new_tokens, has_text=options.model is not None)

    heading("What to type next")
    target = options.model or converted
    if options.model:
        print(f'.venv/bin/python -m zamba2_jax generate --model {target} --prompt "{PROMPT}"')
    else:
        print(
            "make demo MODEL=Zyphra/Zamba2-1.2B        # the same with real weights: 2.4 GB to fetch, 10 GB of memory"
        )
    print("make test                                 # the suite")
    print(f".venv/bin/python -m zamba2_jax info --model {target}")
    return 0 if agree else 1


def write_small_checkpoint(path: Path) -> Path:
    """A random model with all parts of the architecture: two shared blocks, both kinds of adapters, RoPE, two
    groups."""
    heading("0. Write a small random checkpoint with transformers")
    torch.manual_seed(0)
    config = transformers.Zamba2Config(
        vocab_size=1000,
        hidden_size=256,
        num_hidden_layers=12,
        layers_block_type=["hybrid" if index in (2, 5, 8, 10) else "linear_attention" for index in range(12)],
        mamba_d_state=64,
        mamba_ngroups=2,
        n_mamba_heads=8,
        num_attention_heads=8,
        num_mem_blocks=2,
        adapter_rank=16,
        use_mem_rope=True,
        use_shared_attention_adapter=True,
        # Larger than a trained model's start: scores then differ by far more than float32 can blur, as a trained
        # model's do.
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = transformers.Zamba2ForCausalLM(config)
    model.save_pretrained(path)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {path}")
    return path


def run_convert(*arguments: str) -> str:
    """Output of one convert command; a failure ends the demo with it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = convert.cli.main(arguments)
    if code:
        print(printed.getvalue())
        sys.exit(f"convert {arguments[0]} ended with code {code}")
    return printed.getvalue()


def print_ends(text: str, first: int = 6, last: int = 7) -> None:
    lines = text.rstrip().splitlines()
    if len(lines) > first + last:
        lines = [*lines[:first], f"… {len(lines) - first - last} more lines …", *lines[-last:]]
    print("\n".join(lines))


def generate_with_both(source: Path, converted: Path, new_tokens: int, has_text: bool) -> bool:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source) if has_text else None
    if tokenizer is not None:
        prompt = tokenizer(PROMPT, return_tensors="np")["input_ids"]
    else:
        prompt = np.random.default_rng(0).integers(3, Zamba2Config.from_pretrained(source).vocab_size, (1, 24))

    theirs = transformers.Zamba2ForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    without_dt_clamp(theirs)
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    torch_prompt = torch.from_numpy(prompt)
    mask = torch.ones_like(torch_prompt)
    with torch.no_grad():
        expected, torch_first, torch_again = timed(
            lambda: theirs.generate(torch_prompt, attention_mask=mask, **length).numpy()
        )
    del theirs

    ours = Zamba2ForCausalLM.from_pretrained(converted, dtype=jnp.float32)
    actual, jax_first, jax_again = timed(lambda: ours.generate(prompt, **length))

    for name, result, first, again in (
        ("PyTorch", expected, torch_first, torch_again),
        ("JAX", actual, jax_first, jax_again),
    ):
        text = (
            tokenizer.decode(result[0]) if tokenizer is not None else " ".join(map(str, result[0, prompt.shape[1] :]))
        )
        print(
            f"{name:8s} first call {first:6.2f} s, second {again:6.2f} s ({new_tokens / again:6.1f} tokens/s): {text}"
        )
    agree = np.array_equal(expected, actual)
    print(f"The {new_tokens} new tokens {'agree' if agree else 'DIFFER'}. (JAX's first call compiles.)")
    return agree


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, the seconds of a first call and of a second."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return result, *seconds


def heading(title: str, command: str | None = None) -> None:
    print(f"\n== {title}" + (f"\n$ {command}" if command else ""))


if __name__ == "__main__":
    sys.exit(main())
