"""PyTorch's Zamba2 as the judge: small random models of every kind, as a torch module and as ours with the same
weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.torch
import torch
import transformers
from flax import nnx

import zamba2_jax

# The published shapes, scaled down: the same pattern of layers, blocks, groups, adapters and RoPE; and unusual ones.
BASE = {
    "vocab_size": 131,
    "hidden_size": 32,
    "num_hidden_layers": 7,
    "mamba_d_state": 16,
    "n_mamba_heads": 8,
    "num_attention_heads": 4,
    "adapter_rank": 5,
    "chunk_size": 16,
    "max_position_embeddings": 512,
}


def layer_types(count: int, hybrid: tuple[int, ...]) -> list[str]:
    return ["hybrid" if index in hybrid else "linear_attention" for index in range(count)]


SHAPES: dict[str, dict[str, Any]] = {
    "1.2B": BASE
    | {
        "num_mem_blocks": 1,
        "use_mem_rope": True,
        "use_shared_attention_adapter": True,
        "layers_block_type": layer_types(7, (2, 5)),
    },
    "2.7B": BASE | {"num_mem_blocks": 2, "layers_block_type": layer_types(7, (1, 3, 5))},
    "7B": BASE
    | {
        "num_mem_blocks": 2,
        "use_mem_rope": True,
        "mamba_ngroups": 2,
        "layers_block_type": layer_types(7, (1, 3, 4, 6)),
    },
    "unusual": BASE
    | {
        "vocab_size": 97,
        "hidden_size": 30,
        "num_hidden_layers": 6,
        "mamba_d_state": 7,
        "mamba_d_conv": 3,
        "mamba_expand": 3,
        "mamba_ngroups": 3,
        "n_mamba_heads": 9,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_mem_blocks": 3,
        "intermediate_size": 37,
        "add_bias_linear": True,
        "hidden_act": "silu",
        "use_mem_rope": True,
        "rope_theta": 500.0,
        "chunk_size": 13,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-3,
        "layers_block_type": layer_types(6, (0, 1, 2, 3, 5)),
    },
    "no-hybrid": BASE | {"num_hidden_layers": 2, "layers_block_type": layer_types(2, ())},
}


def torch_config(shape: str, **changes: Any) -> transformers.Zamba2Config:
    options = SHAPES[shape] | changes
    theta = options.pop("rope_theta", 10000.0)
    options["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    return transformers.Zamba2Config(**options, attn_implementation="eager")


def torch_model(config: transformers.Zamba2Config, kind: str = "Zamba2ForCausalLM", seed: int = 0) -> torch.nn.Module:
    """A random model in which every parameter matters: none is zero, one, or equal in all heads."""
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "layernorm.weight", ".D")):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("A_log"):
                parameter.uniform_(-1.0, 2.0)
            elif name.endswith("dt_bias"):
                parameter.uniform_(-4.0, 0.5)
            elif "conv1d" in name or name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
            elif "embed_tokens" in name:
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=1.0 / parameter.shape[-1] ** 0.5)
    _share_blocks(model)
    without_dt_clamp(model)
    return model


def _share_blocks(model: torch.nn.Module) -> None:
    """Gives every copy of a shared block the same weights. transformers ties them only together with the embeddings':
    with tie_word_embeddings=False it builds a block for every hybrid layer, which is not Zamba2."""
    for first, copy in _block_copies(model):
        copy.load_state_dict(first.state_dict())


def _block_copies(model: torch.nn.Module) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    base = getattr(model, "model", model)
    blocks = [base.layers[index].shared_transformer for index in model.config.hybrid_layer_ids]
    count = model.config.num_mem_blocks
    return [(blocks[j % count], blocks[j]) for j in range(count, len(blocks))]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradients that backward() left, by Hugging Face name, those of a shared block's copies summed under its first
    name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    for first, copy in _block_copies(model):
        for owner, other in zip(first.parameters(), copy.parameters(), strict=True):
            if other is not owner:
                extra = found.pop(names[id(other)])
                name = names[id(owner)]
                # An adapter is used by one layer only, so one copy of it has a gradient and the others none.
                found[name] = (
                    sum(grad for grad in (found[name], extra) if grad is not None) if extra is not None else found[name]
                )
    return found


def without_dt_clamp(model: torch.nn.Module) -> None:
    """Lifts the lower bound that transformers 5 puts on dt in prefill, but not in decoding; the models were trained
    without."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, math.inf)


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same weights as a torch model and as one of ours, and the directory that holds them."""

    torch: torch.nn.Module
    jax: Any
    path: Path


_pairs: dict[tuple, Pair] = {}


def pair(directory: Path, shape: str, kind: str = "Zamba2ForCausalLM", **changes: Any) -> Pair:
    key = (shape, kind, tuple(sorted((name, repr(value)) for name, value in changes.items())))
    if key not in _pairs:
        model = torch_model(torch_config(shape, **changes), kind)
        path = directory / f"model-{len(_pairs)}"
        save(model, path)
        _pairs[key] = Pair(model, getattr(zamba2_jax, kind).from_pretrained(path, dtype=jnp.float32), path)
    return _pairs[key]


def save(model: torch.nn.Module, path: Path) -> None:
    if model.config.tie_word_embeddings:
        model.save_pretrained(path)
        return
    # Blocks repeated under every layer, so that transformers, which does not tie them here, finds them all when it
    # loads.
    model.config.save_pretrained(path)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def load_tensors(source: Pair, tensors: dict[str, torch.Tensor], path: Path) -> Any:
    """A model of ours whose parameters are `tensors`, given under Hugging Face's names: gradients in our layout,
    say."""
    source.torch.config.save_pretrained(path)
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")
    return type(source.jax).from_pretrained(path, dtype=jnp.float32)


def tokens(vocab_size: int, batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Random ids without 0, the padding id."""
    return np.random.default_rng(seed).integers(1, vocab_size, (batch, length))


def relative_error(actual: Any, expected: Any) -> float:
    """Largest absolute difference over the largest absolute value; NaN anywhere is infinite."""
    actual = np.asarray(actual, np.float64)
    expected = (
        expected.detach().to(torch.float64).numpy()
        if isinstance(expected, torch.Tensor)
        else np.asarray(expected, np.float64)
    )
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return float("inf")
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30))


def to_torch(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def jit_call(model: Any, **static: Any):
    """`model(...)` compiled once: the arguments given here are constants, those given at the call are traced."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def call(state, inputs):
        return nnx.merge(graphdef, state)(**inputs, **static)

    return lambda **inputs: call(state, inputs)


def cache_error(models: Pair, length: int) -> float:
    """The largest relative error among the states, windows, keys and values after `length` tokens."""
    ids = tokens(models.jax.config.vocab_size, 2, length)
    with torch.no_grad():
        theirs = models.torch(to_torch(ids), use_cache=True).past_key_values
    ours = jit_call(models.jax, use_cache=True, cache_length=length)(input_ids=ids).past_key_values
    errors = []
    for state, layer in zip(ours.mamba, theirs.layers, strict=True):
        bc = np.asarray(state.conv_bc).reshape(*state.conv_bc.shape[:2], -1)
        window = np.concatenate([state.conv_x, bc], axis=-1).swapaxes(1, 2)
        errors.append(relative_error(window, _only(layer.conv_states)[..., -window.shape[-1] :]))
        errors.append(relative_error(state.ssm, _only(layer.recurrent_states)))
    for index, entry in zip(models.jax.config.hybrid_layer_ids, ours.attention, strict=True):
        errors.append(relative_error(np.swapaxes(entry.key, 1, 2), theirs.layers[index].keys))
        errors.append(relative_error(np.swapaxes(entry.value, 1, 2), theirs.layers[index].values))
    return max(errors)


def _only(states: Any) -> torch.Tensor:
    """transformers keeps one state per layer, in some releases inside a list or a dict."""
    return states if isinstance(states, torch.Tensor) else states[0]
