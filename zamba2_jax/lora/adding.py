"""Puts LoRAs into a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from zamba2_jax.layers.lora import Lora
from zamba2_jax.lora.config import LoraConfig
from zamba2_jax.lora.coverage import Coverage, lora_coverage
from zamba2_jax.lora.sites import Site, at, check_model, chosen
from zamba2_jax.sharding import partition_spec


def add_lora(
    model: nnx.Module, config: LoraConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32
) -> Coverage:
    """Adds LoRAs to a model, in place. Its outputs stay what they were until B is trained.

    The new parameters are `nnx.LoRAParam`s beside the model's own, which keep their names; `trainable` selects them.
    They are split over the devices of a model that is, and work under `nnx.eval_shape` and `jax.jit`. Decoding on a
    GPU takes the layers' plain form until they are merged (`merge_lora`). They can be trained beside quantised weights
    (`quantize`), but not merged into these.

    Args:
        model: one of the three models, without LoRAs.
        config: which modules, and what kind of LoRA.
        rngs: for A.
        param_dtype: of the new parameters; computation is in the model's dtype.

    Returns:
        What has a LoRA now, per kind of module: print it.

    Raises:
        ValueError: names that fit nothing, listing what there is; a model that has LoRAs.
    """
    check_addable(model)
    param_dtype = check_dtype(param_dtype)
    places = chosen(model, config)
    for site in places:
        rank = config.rank(site.names)
        down, up = shapes(model, site, rank)
        arrays = [_draw(rngs, down, down[0], config.init_lora_weights, param_dtype)]
        for shape in up:
            if config.init_lora_weights is False:
                arrays.append(_draw(rngs, shape, rank, True, param_dtype))
            else:
                arrays.append(jnp.zeros(shape, param_dtype))
        attach(model, site, config, arrays[0], arrays[1:])
    model.lora_config = config
    return lora_coverage(model)


def trainable(model: nnx.Module) -> nnx.filterlib.Filter:
    """An NNX filter for what is trained beside a frozen model: its LoRAs, and the head of a classifier, which is new.

    >>> graphdef, adapter, frozen = nnx.split(model, trainable(model), ...)

    Raises:
        ValueError: the model has no LoRAs.
    """
    check_model(model)
    if model.lora_config is None:
        raise ValueError("the model has no LoRAs; add_lora adds them.")
    return nnx.Any(nnx.LoRAParam, nnx.PathContains("score")) if hasattr(model, "score") else nnx.LoRAParam


def check_addable(model: nnx.Module) -> None:
    check_model(model)
    if model.lora_config is not None:
        raise ValueError("the model has LoRAs already; merge_lora merges them into its weights.")


def check_dtype(param_dtype: DTypeLike) -> jnp.dtype:
    param_dtype = jnp.dtype(param_dtype)
    if not jnp.issubdtype(param_dtype, jnp.floating):
        raise ValueError(f"param_dtype must be a floating dtype such as float32 or bfloat16, got {param_dtype}.")
    return param_dtype


def shapes(model: nnx.Module, site: Site, rank: int) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The shapes of A, (in, r), and of B, (r, *out) for each projection."""
    kernels = [at(model, path).shape for path in site.projections]
    return (kernels[0][0], rank), [(rank, *kernel[1:]) for kernel in kernels]


def attach(
    model: nnx.Module,
    site: Site,
    config: LoraConfig,
    down: jax.Array | np.ndarray,
    up: Sequence[jax.Array | np.ndarray],
) -> None:
    """Puts a LoRA of these arrays in its place, on the devices of the projection's weight."""
    projections = [at(model, path) for path in site.projections]
    axes = [projection.axes for projection in projections]
    down_axes, up_axes = (axes[0][0], "adapter_rank"), [("adapter_rank", *names[1:]) for names in axes]
    like = projections[0].stored.get_value()
    lora = Lora(
        _placed(down, down_axes, like),
        [_placed(array, names, like) for array, names in zip(up, up_axes, strict=True)],
        down_axes=down_axes,
        up_axes=up_axes,
        name=site.kind,
        scale=config.scale(site.names, down.shape[1]),
        dropout=float(config.lora_dropout),
        dtype=projections[0].dtype,
    )
    holder = at(model, site.holder)
    if holder.lora is None:
        holder.lora = nnx.data(nnx.Dict())  # None was no data to NNX
    holder.lora[site.name] = lora


def _draw(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, kind: bool | str, dtype: jnp.dtype) -> jax.Array:
    if kind == "gaussian":
        return (jax.random.normal(rngs.params(), shape, jnp.float32) / shape[1]).astype(dtype)
    bound = fan_in**-0.5
    return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound).astype(dtype)


def _placed(array: jax.Array | np.ndarray, axes: tuple[str | None, ...], like: Any) -> jax.Array:
    """The array where `like`, a weight of the same model, is: on its device, or split over its mesh by `axes`."""
    if isinstance(array, jax.core.Tracer) or isinstance(like, jax.core.Tracer) or not isinstance(like, jax.Array):
        return jnp.asarray(array)
    sharding = like.sharding
    if not isinstance(sharding, NamedSharding):
        return jax.device_put(array, sharding)
    sharding = NamedSharding(sharding.mesh, partition_spec(axes, sharding.mesh))
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
