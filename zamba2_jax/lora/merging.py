"""Takes LoRAs out of a model by adding them to its weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from zamba2_jax.layers.linear import Adapter, Linear
from zamba2_jax.layers.lora import Lora
from zamba2_jax.lora.sites import Site, at, check_model, sites
from zamba2_jax.quantization import quantization

# A shared block's projections beside which each use has an adapter of its own, and that adapter's name.
_ADAPTERS = {
    "gate_up_proj": "gate_up_adapter",
    "q_proj": "q_adapter",
    "k_proj": "k_adapter",
    "v_proj": "v_adapter",
}


def merge_lora(model: nnx.Module, *, raise_adapter_rank: bool = False) -> None:
    """Adds every LoRA to the weight of its projection, in place: W + scale · A B. The model has no LoRAs afterwards,
    gives the same outputs within the rounding of its weights, and is saved by `save_pretrained` for transformers.

    A LoRA of one use of a shared block (`shared="use"`) cannot be added to the block's one weight, unless no other use
    runs that block. But for `gate_up_proj`, and for `q_proj`, `k_proj` and `v_proj` of a model with attention adapters,
    it can become a part of Zamba2's own adapters, which each use has: an adapter of rank R and a LoRA of rank r side
    by side are one adapter of rank R + r. All adapters of a model have the same rank, so the others are widened with
    zeros.

    Args:
        model: one of the three models, with LoRAs.
        raise_adapter_rank: allow this: `config.adapter_rank` grows by the largest rank of such a LoRA.

    Raises:
        ValueError: before anything is changed: no LoRAs; LoRAs that cannot be merged, all named; quantised weights.
    """
    check_model(model)
    if model.lora_config is None:
        raise ValueError("the model has no LoRAs to merge.")
    quantized = quantization(model)
    if quantized is not None:
        raise ValueError(
            f"the model is quantized to {quantized}: a LoRA added to its weights would be rounded with them. Save the "
            "LoRA (save_lora), load the model without quantize=, load_lora and merge there, and quantize the result."
        )
    found = [(site, site.find(model)) for site in sites(model, model.lora_config.shared)]
    found = [(site, lora) for site, lora in found if lora is not None]
    into_weights = [(site, lora) for site, lora in found if not _is_of_one_use_among_several(model, site)]
    into_adapters = [(site, lora) for site, lora in found if _is_of_one_use_among_several(model, site)]
    _check(model, [site for site, _ in into_adapters], raise_adapter_rank)

    for site, lora in into_weights:
        for path, delta in zip(site.projections, lora.deltas(), strict=True):
            kernel = at(model, path).kernel
            _set(kernel, (kernel[...].astype(jnp.float32) + delta).astype(kernel.dtype))
    if into_adapters:
        _widen_adapters(model, into_adapters)
    for site, _ in found:
        at(model, site.holder).lora = nnx.static(None)
    model.lora_config = None


def _is_of_one_use_among_several(model: nnx.Module, site: Site) -> bool:
    if "shared_block_uses" not in site.holder or "shared_blocks" not in site.projections[0]:
        return False
    block = site.projections[0][site.projections[0].index("shared_blocks") + 1]
    blocks = model.config.num_shared_blocks
    return sum(use % blocks == block for use in range(model.config.num_hybrid_layers)) > 1


def _check(model: nnx.Module, of_uses: list[Site], raise_adapter_rank: bool) -> None:
    have_adapter = {"gate_up_proj"} | (set(_ADAPTERS) if model.config.use_shared_attention_adapter else set())
    without = sorted({site.kind for site in of_uses} - have_adapter)
    if without:
        raise ValueError(
            f"the LoRAs of {', '.join(without)} belong to single uses of shared blocks "
            '(shared="use"), and the one weight of a block cannot be several; nor has this model adapters of its uses '
            'there that could take them up. Train with shared="block", or without these modules, to merge; or keep '
            "the model with its LoRAs, and save them by save_lora."
        )
    if of_uses and not raise_adapter_rank:
        kinds = sorted({site.kind for site in of_uses})
        raise ValueError(
            f"the LoRAs of {', '.join(kinds)} belong to single uses of shared blocks "
            '(shared="use"), and the one weight of a block cannot be several. raise_adapter_rank=True makes them a '
            f"part of the uses' own adapters, whose rank, config.adapter_rank={model.config.adapter_rank}, grows."
        )


def _widen_adapters(model: nnx.Module, loras: list[tuple[Site, Lora]]) -> None:
    """Appends each LoRA to its use's adapter, and zeros to all other adapters."""
    extra = max(lora.rank for _, lora in loras)
    by_adapter = {(*site.holder, _ADAPTERS[site.kind]): lora for site, lora in loras}
    adapters = [(path, module) for path, module in nnx.iter_modules(model) if isinstance(module, Adapter)]
    for path, adapter in adapters:
        lora = by_adapter.get(path)
        down = jnp.zeros((adapter.down.kernel.shape[0], 0)) if lora is None else lora.down[...]
        up = jnp.zeros((0, *adapter.up.kernel.shape[1:])) if lora is None else lora.scale * lora.up[0][...]
        _append(adapter.down, down, extra, axis=1)
        _append(adapter.up, up, extra, axis=0)
    config = model.config.replace(adapter_rank=model.config.adapter_rank + extra)
    for _, module in nnx.iter_modules(model):
        if hasattr(module, "config"):
            module.config = config


def _append(linear: Linear, values: jax.Array, extra: int, *, axis: int) -> None:
    padding = [(0, extra - size if index == axis else 0) for index, size in enumerate(values.shape)]
    kernel = linear.kernel
    _set(kernel, jnp.concatenate([kernel[...], jnp.pad(values, padding).astype(kernel.dtype)], axis=axis))


def _set(variable: nnx.Variable, value: jax.Array) -> None:
    """Gives a parameter a value, on the devices where it was."""
    old = variable.get_value()
    variable.set_value(value if isinstance(old, jax.core.Tracer) else jax.device_put(value, old.sharding))
