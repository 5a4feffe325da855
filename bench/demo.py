"""`make demo`, in two parts: a model writes, and then PyTorch judges it.

`complete` continues a few texts; it needs no PyTorch, so that a newcomer reads something before that is installed.
`check` inspects the checkpoint, converts it, compares it with PyTorch's, and has both continue the same texts.

Without --model it is the small model that comes with the package; with it (a hub id or a directory) another one, in
float32: allow twice its size in memory, 10 GB for the 1.2B.
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
import transformers

import convert.cli
from zamba2_jax import Zamba2ForCausalLM
from zamba2_jax.checkpoint.files import find_checkpoint
from zamba2_jax.hub import DEMO

OUTPUT = Path("demo-output")
# Of the shipped model, which has read nothing but the source of Python's standard library.
PROMPTS = (
    "import os\nimport sys\n\n\ndef main():",
    "class TestList(unittest.TestCase):\n\n    def setUp(self):",
    'def read_lines(path):\n    """Return the lines of a file.',
)
PROSE = ("What factors contributed to the fall of the Roman Empire?",)
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "seed": 0}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", choices=("complete", "check"))
    parser.add_argument("--model", default=DEMO, help="hub id or directory (default: the model in the package)")
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()  # it would advise to install CUDA kernels
    transformers.logging.disable_progress_bar()
    try:
        source = Path(find_checkpoint(options.model))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if OUTPUT.resolve() in (source.resolve(), *source.resolve().parents):
        sys.exit(f"error: {source} lies in {OUTPUT}, which the demo makes anew; move it elsewhere first.")
    prompts = PROMPTS if options.model == DEMO else PROSE
    part = {"complete": complete, "check": check}[options.part]
    return part(options.model, source, prompts, options.new_tokens)


def complete(name: str, source: Path, prompts: tuple[str, ...], new_tokens: int) -> int:
    """Streams a continuation of every prompt, sampled with a fixed seed."""
    start = time.perf_counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = Zamba2ForCausalLM.from_pretrained(source, dtype=jnp.float32)
    heading(f"{name}: {model.config.num_parameters():,} parameters, loaded in {time.perf_counter() - start:.1f} s")
    for prompt in prompts:
        print(f"\n-- prompt\n{prompt}\n-- continued", flush=True)
        inputs = tokenizer(prompt, return_tensors="np")
        streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        start = time.perf_counter()
        model.generate(**inputs, max_new_tokens=new_tokens, streamer=streamer, **SAMPLING)
        print(f"-- {time.perf_counter() - start:.1f} s" + (", compilation included" if prompt == prompts[0] else ""))
    return 0


def check(name: str, source: Path, prompts: tuple[str, ...], new_tokens: int) -> int:
    """Inspects, converts, verifies, and compares greedy continuations; 1 where they differ."""
    if OUTPUT.exists():
        shutil.rmtree(OUTPUT)
    OUTPUT.mkdir()
    heading("What is in the checkpoint", f"python -m convert inspect {name}")
    print_ends(run_convert("inspect", str(source)))

    converted = OUTPUT / "jax"
    heading("Convert it", f"python -m convert from-hf {name} {converted}")
    print(run_convert("from-hf", str(source), str(converted), "--no-progress"), end="")

    heading("Check it against PyTorch", f"python -m convert verify {name} {converted}")
    print(run_convert("verify", str(source), str(converted), "--no-progress"), end="")

    heading("Continue the prompts with both, greedily, float32, PyTorch's time-step clamp lifted")
    agree = generate_with_both(source, converted, prompts, new_tokens)

    heading("What to type next")
    print(f".venv/bin/python -m zamba2_jax generate --model {name} --prompt 'import '  # or: info --model {name}")
    if name == DEMO:
        print("make demo MODEL=Zyphra/Zamba2-1.2B   # the same with real weights: 2.4 GB to fetch, 10 GB of memory")
    print("make test                            # the suite")
    return 0 if agree else 1


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


def generate_with_both(source: Path, converted: Path, prompts: tuple[str, ...], new_tokens: int) -> bool:
    import torch

    from bench.oracle import without_dt_clamp

    tokenizer = transformers.AutoTokenizer.from_pretrained(source, padding_side="left")
    inputs = tokenizer(list(prompts), return_tensors="np", padding=True)
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    theirs = transformers.Zamba2ForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    without_dt_clamp(theirs)
    of_torch = {key: torch.from_numpy(value) for key, value in inputs.items() if key != "token_type_ids"}
    with torch.no_grad():
        expected, torch_first, torch_again = timed(lambda: theirs.generate(**of_torch, **length).numpy())
    del theirs
    ours = Zamba2ForCausalLM.from_pretrained(converted, dtype=jnp.float32)
    of_jax = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    actual, jax_first, jax_again = timed(lambda: np.asarray(ours.generate(**of_jax, **length)))

    for side, first, again in (("PyTorch", torch_first, torch_again), ("JAX", jax_first, jax_again)):
        speed = expected.shape[0] * new_tokens / again
        print(f"{side:8s} first call {first:6.2f} s, second {again:6.2f} s ({speed:6.1f} tokens/s)")
    agree = np.array_equal(expected, actual)
    print(f"{len(prompts)} x {new_tokens} new tokens {'agree' if agree else 'DIFFER'}. (JAX's first call compiles.)")
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
    print(f"\n== {title}" + (f"\n$ {command}" if command else ""), flush=True)


if __name__ == "__main__":
    sys.exit(main())
