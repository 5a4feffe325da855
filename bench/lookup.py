"""What prompt-lookup decoding saves: the cost of one call that reads several tokens, in plain steps, and, of the demo
model, how many tokens such calls add to Python modules that it continues."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import inspect
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.sizes import PUBLISHED, SMALL, TINY
from zamba2_jax import Zamba2Config, Zamba2ForCausalLM, demo_path
from zamba2_jax.cache import Zamba2Cache
from zamba2_jax.generation import programs

SIZES = ("demo", "small", "tiny", *PUBLISHED)
REPEATS = 3
GUESSES = (3, 5, 10, 20)
CALLS = 10
# Of which the demo model reads some tokens, and writes what comes next.
MODULES = ("textwrap", "argparse", "json.decoder", "dataclasses", "zipfile", "csv", "logging.handlers", "shelve")
PROMPT = slice(500, 900)
NEW = 128


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench lookup", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="demo", help="of the model (default: demo)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--slots", type=int, default=1152, help="of the cache, for the cost of a call (default: 1152)")
    options = parser.parse_args(arguments)
    model = make(options.size, jnp.dtype(options.dtype))
    print(f"{options.size}, {options.dtype}, {jax.devices()[0].device_kind}; medians of {REPEATS}")
    seconds = call_seconds(model, options.slots)
    for guesses, of_call in seconds.items():
        print(
            f"call of {guesses + 1:3d} tokens  {of_call * 1e3:8.2f} ms  {of_call / seconds[0]:5.2f} plain steps"
            if guesses
            else f"plain step         {of_call * 1e3:8.2f} ms"
        )
    if options.size == "demo":
        for guesses, found in continue_modules(model).items():
            print(
                f"{guesses:3d} guesses: {found.tokens_per_call:5.2f} tokens a call, {found.least:.1f} to "
                f"{found.most:.1f} by module; {found.seconds * 1e3:6.2f} ms a token instead of "
                f"{found.plain_seconds * 1e3:.2f}, {found.plain_seconds / found.seconds:5.2f} x"
            )
    return 0


def make(size: str, dtype: jnp.dtype) -> Zamba2ForCausalLM:
    if size == "demo":
        return Zamba2ForCausalLM.from_pretrained("demo", dtype=dtype)
    shapes = {"small": SMALL, "tiny": TINY}
    config = Zamba2Config(**shapes[size]) if size in shapes else getattr(Zamba2Config, PUBLISHED[size])()
    return Zamba2ForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(0))


def call_seconds(model: Zamba2ForCausalLM, slots: int, guesses: Iterable[int] = GUESSES) -> dict[int, float]:
    """Seconds of a call that reads a token and so many guesses, of which all are wrong; at 0, those of a plain step."""
    structure, weights = programs.take_apart(model)

    def run(several: int) -> None:
        cache, token = model.init_cache(1, slots), np.full((1, several + 1), 5, np.int32)
        jax.block_until_ready(_calls(structure, weights, cache, token, np.int32(CALLS)))

    times = _interleaved({several: functools.partial(run, several) for several in (0, *guesses)})
    return {several: seconds / CALLS for several, seconds in times.items()}


@functools.partial(jax.jit, static_argnames=("structure",), donate_argnames=("cache",))
def _calls(
    structure: programs.Structure, weights: list[jax.Array], cache: Zamba2Cache, ids: jax.Array, count: jax.Array
) -> tuple[Zamba2Cache, jax.Array]:
    """`count` calls, each of which reads what the one before it chose, and keeps its first token."""
    model = structure.model(weights)

    def call(_: int, carry: tuple[Zamba2Cache, jax.Array]) -> tuple[Zamba2Cache, jax.Array]:
        cache, ids = carry
        tentative = ids.shape[1] > 1
        output = model(ids, past_key_values=cache, tentative=tentative)
        cache, ids = output.past_key_values, jnp.argmax(output.logits, axis=-1).astype(jnp.int32)
        # A number that the compiler cannot know: one.
        return (cache.keep(1 + jnp.minimum(ids[:, 0], 0)) if tentative else cache), ids

    return jax.lax.fori_loop(0, count, call, (cache, ids))


@dataclasses.dataclass(frozen=True)
class Found:
    """tokens_per_call of all modules, of the worst (`least`) and of the best; seconds a token, looked up and plain."""

    tokens_per_call: float
    least: float
    most: float
    seconds: float
    plain_seconds: float


def continue_modules(model: Zamba2ForCausalLM, guesses: Iterable[int] = GUESSES[1:]) -> dict[int, Found]:
    """Greedy continuations by so many guesses. What takes place before the first new token is taken off both times.

    Raises:
        ValueError: other tokens than those of plain decoding.
    """
    prompts = module_prompts()
    generate = functools.partial(model.generate, eos_token_id=None, return_dict_in_generate=True)
    plain = [generate(prompt, max_new_tokens=NEW).sequences for prompt in prompts]

    def run(several: int | None, new: int) -> None:
        for prompt in prompts:
            generate(prompt, max_new_tokens=new, prompt_lookup_num_tokens=several)

    runs = {(several, new): functools.partial(run, several, new) for several in (None, *guesses) for new in (1, NEW)}
    times = _interleaved(runs)
    added = len(prompts) * (NEW - 1)
    seconds = {several: (times[several, NEW] - times[several, 1]) / added for several in (None, *guesses)}

    found = {}
    for several in guesses:
        outputs = [generate(prompt, max_new_tokens=NEW, prompt_lookup_num_tokens=several) for prompt in prompts]
        for module, output, expected in zip(MODULES, outputs, plain, strict=True):
            if not np.array_equal(output.sequences, expected):
                raise ValueError(f"{several} guesses: other tokens after {module} than those of plain decoding.")
        calls = [output.model_calls for output in outputs]
        rates = [(NEW - 1) / count for count in calls]
        found[several] = Found(added / sum(calls), min(rates), max(rates), seconds[several], seconds[None])
    return found


def module_prompts() -> list[np.ndarray]:
    """Tokens from the source of each of `MODULES`, of the Python that runs this."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_path(), model_max_length=10**9)
    sources = [inspect.getsource(importlib.import_module(name)) for name in MODULES]
    return [np.asarray(tokenizer(source)["input_ids"])[None, PROMPT] for source in sources]


def _interleaved(runs: dict[Any, Callable[[], None]]) -> dict[Any, float]:
    """Median seconds of each, taken in turn, so that what else the machine does falls on all alike."""
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for repeat in range(REPEATS + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if repeat:  # the first compiles
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in times.items()}
