"""What int8 and int4 weights cost in accuracy and gain in memory and speed.

    python -m bench.quantization                 # all of it, about 6 minutes on 2 cores
    python -m bench.quantization trained         # or: random, speed, load

`trained`: perplexity on text, on a small model trained here for a few minutes on what every machine has, the source of
Python's standard library, byte by byte. It stands in for the published weights, which no machine of ours reaches: it
shows that the arithmetic is right and how the formats compare, not what the published models lose.
`random`: logits of a random model of 100 M parameters, the 1.2B shape made smaller. Nothing in it is redundant, so
that errors are an upper end.
`speed`: one step of decoding with that model, in turns.
`load`: memory and time of loading the 1.2B shape (2.4 GB of random bits, written to the temporary directory).
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from bench import sizes
from bench.timing import time_steps
from zamba2_jax import Zamba2Config, Zamba2ForCausalLM, quantize
from zamba2_jax.ops.quantized import dequantize_int4, quantize_int4

TRAINED = Zamba2Config(
    vocab_size=256,
    hidden_size=256,
    num_hidden_layers=6,
    layers_block_type=["hybrid" if index in (2, 5) else "mamba" for index in range(6)],
    mamba_d_state=64,
    n_mamba_heads=8,
    num_attention_heads=8,
    num_mem_blocks=1,
    adapter_rank=16,
    use_mem_rope=True,
    use_shared_attention_adapter=True,
    chunk_size=64,
    max_position_embeddings=512,
    pad_token_id=None,
)
MEDIUM = Zamba2Config(**sizes.SMALL)
BATCH, LENGTH, HELD_OUT_WINDOWS = 8, 256, 48
PARTS = ("trained", "random", "speed", "load")

_LOAD = """
import json, resource, sys, time
import jax
from flax import nnx
from zamba2_jax import Zamba2ForCausalLM
began = time.perf_counter()
name = None if sys.argv[2] == "bfloat16" else sys.argv[2]
model = Zamba2ForCausalLM.from_pretrained(sys.argv[1], dtype="bfloat16", quantize=name)
leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
print(json.dumps({
    "seconds": time.perf_counter() - began,
    "weight_bytes": sum(leaf.nbytes for leaf in leaves),
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--seconds", type=float, default=150, help="of training for `trained` (default: 150)")
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; there are {', '.join(PARTS)}")
    programs = {
        "trained": functools.partial(trained, options.seconds),
        "random": random_model,
        "speed": speed,
        "load": load,
    }
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    figures = {}
    for part in options.parts or PARTS:
        print(f"\n== {part}", flush=True)
        figures[part] = programs[part]()
    print(json.dumps(figures))


def trained(seconds: float) -> dict[str, Any]:
    """Trains `TRAINED`, then reads held-out text with it in every format."""
    text, held_out = _library_source()
    print(f"{len(text):,} bytes to train on, {held_out.size:,} held out, of other files")
    model = _train(TRAINED, text, seconds)
    reference = _score(model, held_out)
    rows = {
        name: _compare(reference, _score(variant, held_out), held_out) | {"weight_bytes": nbytes(variant)}
        for name, variant in _variants(model)
    }
    print(f"{'':28s}{'perplexity':>11s}{'change':>9s}{'logits off':>12s}{'same best':>11s}{'weights':>11s}")
    for name, row in rows.items():
        print(
            f"{name:28s}{row['perplexity']:11.4f}{row['perplexity'] / rows['float32']['perplexity'] - 1:9.2%}"
            f"{row['logits_error']:12.2%}{row['same_best']:11.2%}{row['weight_bytes'] / 1e6:8.2f} MB"
        )
    print("perplexity per byte; a small stand-in trained here, not the published weights")
    return rows


def random_model() -> dict[str, Any]:
    """Logits of `MEDIUM` in every format."""
    model = Zamba2ForCausalLM(MEDIUM, rngs=nnx.Rngs(0))
    ids = np.random.default_rng(0).integers(3, MEDIUM.vocab_size, (2, 128))
    reference = _score(model, ids)
    rows = {}
    print(f"{'':28s}{'logits off':>12s}{'same best':>11s}{'weights':>11s}")
    for name, variant in _variants(model):
        rows[name] = row = _compare(reference, _score(variant, ids)) | {"weight_bytes": nbytes(variant)}
        print(f"{name:28s}{row['logits_error']:12.2%}{row['same_best']:11.2%}{row['weight_bytes'] / 1e6:8.1f} MB")
    return rows


def speed(new_tokens: int = 48) -> dict[str, Any]:
    """One step of decoding with `MEDIUM`, prompt of 32, one row; the formats in turns, twice."""
    models = {"float32": Zamba2ForCausalLM(MEDIUM, rngs=nnx.Rngs(0))}
    models["bfloat16"] = _cast(models["float32"])
    for name in ("int8", "int4"):
        models[name] = quantize(models["bfloat16"], name)
    prompt = np.random.default_rng(0).integers(3, MEDIUM.vocab_size, (1, 32))
    best: dict[str, float] = {}
    for _ in range(2):
        for name, model in models.items():

            def run(count: int, model: Zamba2ForCausalLM = model) -> object:
                return model.generate(prompt, max_new_tokens=count, min_new_tokens=count)

            seconds = time_steps(run, 4, new_tokens, repeats=3).summary()["seconds"]
            best[name] = min(seconds, best.get(name, seconds))
    rows = {name: {"seconds": best[name], "weight_bytes": nbytes(model)} for name, model in models.items()}
    for name, row in rows.items():
        print(
            f"{name:10s}{row['seconds'] * 1e3:8.1f} ms a step, {best['bfloat16'] / row['seconds']:5.2f} x bfloat16, "
            f"{best['float32'] / row['seconds']:5.2f} x float32, weights {row['weight_bytes'] / 1e6:.0f} MB"
        )
    print("int8 and int4: of a bfloat16 model")
    return rows


def load() -> dict[str, Any]:
    """Loads the 1.2B shape in every format, in processes of their own."""
    from bench.convert_memory import RandomParameters
    from zamba2_jax.checkpoint import write_hugging_face

    rows = {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        write_hugging_face(RandomParameters(Zamba2Config.zamba2_1_2b()), path)
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        print(f"checkpoint: {size / 1e9:.2f} GB of bfloat16")
        for name in ("bfloat16", "int8", "int4"):
            command = [sys.executable, "-c", _LOAD, str(path), name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows[name] = json.loads(done.stdout.splitlines()[-1]) | {"checkpoint_bytes": size}
            print(
                f"{name:10s}{rows[name]['seconds']:6.1f} s, weights {rows[name]['weight_bytes'] / 1e9:.2f} GB, "
                f"peak resident memory {rows[name]['peak_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
    return rows


def nbytes(model: nnx.Module) -> int:
    """Bytes of everything that a model stores."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


def _variants(model: Zamba2ForCausalLM) -> Iterator[tuple[str, Zamba2ForCausalLM]]:
    """A float32 model in every format, one at a time."""
    half = _cast(model)
    yield "float32", model
    yield "bfloat16", half
    yield "int8", quantize(half, "int8")
    yield "int4", quantize(half, "int4")
    yield "int8, computed in float32", quantize(model, "int8")
    yield "int4, computed in float32", quantize(model, "int4")
    yield "int4, embedding too", quantize(_with_int4_embedding(half), "int4")


def _cast(model: Zamba2ForCausalLM) -> Zamba2ForCausalLM:
    """The model in bfloat16; float32 stays where such a model keeps it."""
    result = nnx.eval_shape(lambda: Zamba2ForCausalLM(model.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, abstract = nnx.split(result)
    cast = jax.tree.map(lambda value, like: value.astype(like.dtype), nnx.state(model), abstract)
    return nnx.merge(graphdef, cast)


def _with_int4_embedding(model: Zamba2ForCausalLM) -> Zamba2ForCausalLM:
    """The model with its embedding, and the head tied to it, rounded to int4 in groups along each row."""
    result = nnx.clone(model)
    table = result.model.embed_tokens.embedding
    table.set_value(dequantize_int4(*quantize_int4(table[...])).astype(table.dtype))
    return result


def _score(model: Zamba2ForCausalLM, ids: np.ndarray) -> np.ndarray:
    """Logits (b, l, v) float32, a few rows at a time."""
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids).logits.astype(jnp.float32))
    rows = 2
    return np.concatenate([np.asarray(forward(state, ids[start : start + rows])) for start in range(0, len(ids), rows)])


def _compare(reference: np.ndarray, logits: np.ndarray, ids: np.ndarray | None = None) -> dict[str, float]:
    """How far logits are from a reference's: the norm of the difference, the likeliest token; with `ids`, their
    perplexity too."""
    figures = {
        "logits_error": float(np.linalg.norm(logits - reference) / np.linalg.norm(reference)),
        "same_best": float(np.mean(logits.argmax(-1) == reference.argmax(-1))),
    }
    if ids is not None:
        scores = logits[:, :-1] - np.log(np.exp(logits[:, :-1]).sum(-1, keepdims=True))
        chosen = np.take_along_axis(scores, ids[:, 1:, None], axis=-1)
        figures["perplexity"] = float(np.exp(-chosen.mean()))
    return figures


def _library_source() -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the standard library's modules: a run to train on, and windows of other files."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [np.frombuffer(file.read_bytes(), np.uint8) for file in files]
    train = np.concatenate([text for index, text in enumerate(texts) if index % 10])
    other = np.concatenate([text for index, text in enumerate(texts) if index % 10 == 0])
    starts = np.linspace(0, other.size - LENGTH, HELD_OUT_WINDOWS).astype(int)
    return train, np.stack([other[start : start + LENGTH] for start in starts]).astype(np.int32)


def _train(config: Zamba2Config, text: np.ndarray, seconds: float) -> Zamba2ForCausalLM:
    """AdamW on windows drawn at random, until time is up."""
    graphdef, state = nnx.split(Zamba2ForCausalLM(config, rngs=nnx.Rngs(0)))
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_constant_schedule(0.0, 2e-3, 30)))

    @jax.jit
    def step(state: nnx.State, moments: Any, ids: jax.Array) -> tuple[nnx.State, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(lambda state: nnx.merge(graphdef, state)(ids, labels=ids).loss)(state)
        updates, moments = optimiser.update(gradient, moments, state)
        return optax.apply_updates(state, updates), moments, loss

    moments = optimiser.init(state)
    random = np.random.default_rng(0)
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        starts = random.integers(0, text.size - LENGTH, BATCH)
        ids = np.stack([text[start : start + LENGTH] for start in starts]).astype(np.int32)
        state, moments, loss = step(state, moments, ids)
        loss.block_until_ready()
        steps += 1
    print(f"{config.num_parameters():,} parameters, {steps} steps of {BATCH} x {LENGTH} bytes, last loss {loss:.3f}")
    return nnx.merge(graphdef, state)


if __name__ == "__main__":
    main()
