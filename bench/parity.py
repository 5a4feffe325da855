"""How far the models are from PyTorch's: the largest difference over the largest value, by kind of model and quantity,
in float32."""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from bench.oracle import (
    SHAPES,
    Pair,
    cache_error,
    gradients,
    jit_call,
    load_tensors,
    pair,
    relative_error,
    to_torch,
    tokens,
    without_dt_clamp,
)

LENGTHS = (1, 2, 17, 101, 300)


def main() -> None:
    columns = ("logits", "hidden states", "attentions", "caches", "loss", "gradients", "bfloat16")
    print(f"{'model':10s}" + "".join(f"{column:>14s}" for column in columns))
    with tempfile.TemporaryDirectory() as directory:
        for shape in SHAPES:
            models = pair(Path(directory), shape)
            figures = _forward(models)
            figures["gradients"] = _gradients(models, Path(directory) / f"{shape}-gradients")
            row = "".join(f"{figures.get(column, float('nan')):14.1e}" for column in columns[:-1])
            print(f"{shape:10s}{row}{_bfloat16(models):14.2f}", flush=True)
    print(
        f"lengths {LENGTHS}, two rows; gradients at length 37: the worst parameter. bfloat16: root mean "
        "square error of the logits against the float32 ones, over that of PyTorch's bfloat16 model."
    )


def _forward(models: Pair) -> dict[str, float]:
    worst: dict[str, float] = {}

    def note(name: str, ours: object, theirs: object) -> None:
        worst[name] = max(worst.get(name, 0.0), relative_error(ours, theirs))

    call = jit_call(models.jax, output_hidden_states=True, output_attentions=True)
    for length in LENGTHS:
        ids = tokens(models.jax.config.vocab_size, 2, length)
        with torch.no_grad():
            theirs = models.torch(
                to_torch(ids), labels=to_torch(ids), output_hidden_states=True, output_attentions=True, use_cache=False
            )
        ours = call(input_ids=ids, labels=ids)
        note("logits", ours.logits, theirs.logits)
        for one, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            note("hidden states", one, other)
        for one, other in zip(ours.attentions, theirs.attentions, strict=True):
            note("attentions", one, other)
        if length > 1:
            note("loss", ours.loss, theirs.loss)
    if models.jax.config.num_hybrid_layers:  # transformers' cache needs an attention layer
        worst["caches"] = cache_error(models, 19)
    return worst


def _gradients(models: Pair, path: Path) -> float:
    ids = tokens(models.jax.config.vocab_size, 2, 37)
    models.torch.zero_grad(set_to_none=True)
    models.torch(to_torch(ids), labels=to_torch(ids), use_cache=False).loss.backward()
    reference = dict(nnx.to_flat_state(nnx.state(load_tensors(models, gradients(models.torch), path), nnx.Param)))
    graphdef, params = nnx.split(models.jax)
    ours = jax.jit(jax.grad(lambda params: nnx.merge(graphdef, params)(input_ids=ids, labels=ids).loss))(params)
    return max(relative_error(leaf.get_value(), reference[path].get_value()) for path, leaf in nnx.to_flat_state(ours))


def _bfloat16(models: Pair) -> float:
    ids = tokens(models.jax.config.vocab_size, 2, 101)
    exact = np.asarray(jit_call(models.jax)(input_ids=ids).logits)
    ours = jit_call(type(models.jax).from_pretrained(models.path, dtype=jnp.bfloat16))(input_ids=ids).logits
    half = type(models.torch).from_pretrained(models.path, dtype=torch.bfloat16, attn_implementation="eager").eval()
    without_dt_clamp(half)
    with torch.no_grad():
        theirs = half(to_torch(ids), use_cache=False).logits.float().numpy()
    return float(np.std(np.asarray(ours, np.float32) - exact) / np.std(theirs - exact))
