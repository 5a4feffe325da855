"""The models that are trained: their shapes without arrays, and their first arrays on a mesh."""

from __future__ import annotations

import types
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from train.options import LoraOptions, RunOptions
from zamba2_jax import Zamba2Config
from zamba2_jax.checkpoint import open_parameters
from zamba2_jax.checkpoint.files import read_json
from zamba2_jax.models import PretrainedModel
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
    """A model without arrays, set to compute as `options` say."""
    key = jax.random.key(0)
    # The shapes do not depend on keys, and an nnx.Rngs that is traced costs milliseconds for each.
    rngs = types.SimpleNamespace(params=lambda: key)
    model = nnx.eval_shape(
        lambda: model_class(config, dtype=jnp.dtype(options.dtype), param_dtype=jnp.dtype(param_dtype), rngs=rngs)
    )
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


def base_dtype(options: LoraOptions | RunOptions) -> str:
    """In which the parameters of a checkpoint are kept: float32 to be trained, else as they compute."""
    return options.dtype if getattr(options, "lora_rank", 0) else "float32"
