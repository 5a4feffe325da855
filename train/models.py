"""The models that are trained: their shapes without arrays, and their first arrays on a mesh."""

from __future__ import annotations

import hashlib
import json
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from train.options import LoraOptions, RunOptions
from zamba2_jax import LoraConfig, Zamba2Config, add_lora, lora, quantize, save_lora
from zamba2_jax.checkpoint import open_parameters
from zamba2_jax.checkpoint.files import ADAPTER, find_checkpoint, read_json, settings_directory
from zamba2_jax.pretrained import PretrainedModel
from zamba2_jax.sharding import param_shardings

SHAPES = {
    "1.2b": Zamba2Config.zamba2_1_2b,
    "2.7b": Zamba2Config.zamba2_2_7b,
    "7b": Zamba2Config.zamba2_7b,
}


def config_of_shape(name: str) -> Zamba2Config:
    """The config that `--model` of pretrain and plan names.

    Raises:
        ValueError, FileNotFoundError: it names none, or a config that makes no sense.
    """
    if name in SHAPES:
        return SHAPES[name]()
    path = Path(name)
    if path.is_file():
        return Zamba2Config.from_dict(read_json(path))
    if path.is_dir():
        return Zamba2Config.from_pretrained(path)
    raise FileNotFoundError(
        f"--model {name} is neither one of the published shapes ({', '.join(SHAPES)}) nor a config.json, nor a "
        "directory that holds one; to train a checkpoint further there is finetune."
    )


def config_of_checkpoint(name: str, architecture: str) -> Zamba2Config:
    """The config of a checkpoint, all of whose tensors are there and have the right shapes.

    Raises:
        ValueError, OSError: they are not.
    """
    return open_parameters(name, architecture).config


def with_dropout(config: Zamba2Config, options: RunOptions) -> Zamba2Config:
    """`config` with the attention dropout that was asked for."""
    if options.attention_dropout is None:
        return config
    return config.replace(attention_dropout=options.attention_dropout)


def abstract_model(
    model_class: type[PretrainedModel],
    config: Zamba2Config,
    options: RunOptions,
    *,
    param_dtype: str = "float32",
) -> PretrainedModel:
    """A model without arrays, set to compute as `options` say.

    Raises:
        ValueError: widths that do not suit the integers asked for.
    """
    key = jax.random.key(0)
    # The shapes do not depend on keys, and an nnx.Rngs that is traced costs milliseconds for each.
    rngs = types.SimpleNamespace(params=lambda: key)

    def make() -> PretrainedModel:
        dtypes = {"dtype": jnp.dtype(options.dtype), "param_dtype": jnp.dtype(param_dtype)}
        model = model_class(config, **dtypes, rngs=rngs)
        kind = quantization(options)
        return model if kind is None else quantize(model, kind)

    model = nnx.eval_shape(make)
    model.gradient_checkpointing_enable(options.gradient_checkpointing)
    if options.scan_layers:
        model.scan_layers_enable()
    return model


def random_model(abstract: PretrainedModel, seed: int, mesh: Mesh) -> PretrainedModel:
    """`abstract` with random parameters, each made where it belongs; the same numbers on every mesh."""
    graph, state = nnx.split(abstract)

    def init(key: jax.Array) -> nnx.State:
        drawn = iter(range(1 << 30))
        rngs = types.SimpleNamespace(params=lambda: jax.random.fold_in(key, next(drawn)))
        model = type(abstract)(abstract.config, dtype=abstract.dtype, param_dtype=abstract.param_dtype, rngs=rngs)
        return nnx.split(model)[1]

    return nnx.merge(graph, jax.jit(init, out_shardings=param_shardings(state, mesh))(jax.random.key(seed)))


def adapts(options: RunOptions) -> bool:
    """Whether a LoRA is trained and the model itself frozen."""
    return getattr(options, "lora_rank", 0) > 0


def quantization(options: RunOptions) -> str | None:
    """What the matrices of the frozen model are stored as: "int8", "int4", or None for numbers as the others."""
    return getattr(options, "quantize", None)


def base_dtype(options: RunOptions) -> str:
    """In which the parameters of a checkpoint are kept: float32 to be trained, else as they compute."""
    return options.dtype if adapts(options) else "float32"


def adapted(model: PretrainedModel, options: LoraOptions) -> PretrainedModel:
    """`model` with the LoRAs that were asked for."""
    config = lora_config(options)
    if isinstance(jax.tree.leaves(nnx.state(model))[0], jax.ShapeDtypeStruct):

        def add(model: PretrainedModel) -> PretrainedModel:
            add_lora(model, config, rngs=nnx.Rngs(0))
            return model

        return nnx.eval_shape(add, model)
    add_lora(model, config, rngs=nnx.Rngs(options.seed))
    return model


def lora_config(options: LoraOptions) -> LoraConfig:
    """The LoRAs that were asked for."""
    alpha = 2.0 * options.lora_rank if options.lora_alpha is None else options.lora_alpha
    targets = {"target_modules": options.lora_targets} if options.lora_targets else {}
    return LoraConfig(
        r=options.lora_rank,
        lora_alpha=alpha,
        lora_dropout=options.lora_dropout,
        shared=options.lora_shared,
        **targets,
    )


def trainable(model: PretrainedModel, options: RunOptions) -> nnx.filterlib.Filter:
    """What of `model` is trained."""
    if not adapts(options):
        return nnx.Param
    return lora.trainable(model)


def has_dropout(config: Zamba2Config, options: RunOptions) -> bool:
    """Whether the forward pass draws anything at random in training."""
    return config.attention_dropout > 0 or getattr(options, "lora_dropout", 0) > 0


def load(model_class: type[PretrainedModel], options: RunOptions, mesh: Mesh) -> PretrainedModel:
    """The checkpoint `options.model` on the devices, with LoRAs if they were asked for."""
    stored = {"param_dtype": base_dtype(options), "quantize": quantization(options)}
    model = model_class.from_pretrained(options.model, dtype=options.dtype, mesh=mesh, **stored)
    return adapted(model, options) if adapts(options) else model


def load_tokenizer(name: str | None, model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `--tokenizer`, or the model's.

    Raises:
        ValueError: there is none.
    """
    source = name
    if source is None:
        if model in SHAPES:
            raise ValueError(f"--model {model} has no tokenizer of its own; give --tokenizer, a directory or hub id.")
        path = Path(model)
        source = str(path.parent if path.is_file() else settings_directory(find_checkpoint(model)))
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"there is no tokenizer in {source} ({str(error).splitlines()[0]}); give "
            f"{'another ' if name else ''}--tokenizer, a directory or hub id."
        ) from error


def fingerprint(content: Any) -> str:
    """Of what can be written as JSON."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def save_adapter(model: PretrainedModel, directory: Path, base: str) -> None:
    """The LoRAs alone, in PEFT's files. Every process of a job calls it; the first one writes."""
    save_lora(model, directory / ADAPTER, base_model_name_or_path=base)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, config: Zamba2Config, prompts: tuple[str, ...]
) -> list[list[int]]:
    """Token ids of prompts; of an empty one the token that begins a text.

    Raises:
        ValueError: an empty prompt, and there is no such token.
    """
    encoded = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        if not ids:
            begin = next((id for id in (tokenizer.bos_token_id, config.bos_token_id) if id is not None), None)
            if begin is None:
                raise ValueError("--sample-prompts holds an empty one, and the tokenizer has no token to begin with.")
            ids = [begin]
        encoded.append(ids)
    return encoded
