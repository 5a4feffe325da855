"""PEFT on transformers' Zamba2 as the judge of LoRAs: the random models of `bench.oracle`, with adapters."""

import copy
import zlib

import jax
import peft
import torch
from flax import nnx

from bench.oracle import layer_types, pair, to_torch, tokens

KINDS = {"Zamba2ForCausalLM": "CAUSAL_LM", "Zamba2ForSequenceClassification": "SEQ_CLS"}


def two_blocks(directory):
    """Two shared blocks with two uses each, and little else."""
    return pair(directory, "7B", num_hidden_layers=5, layers_block_type=layer_types(5, (1, 2, 3, 4)))


def ids(models, length=21):
    return tokens(models.jax.config.vocab_size, 2, length)


def own_model(models):
    """A model of ours to put LoRAs into and to merge them: the pair's is shared by all tests, and nnx.merge would share
    its variables."""
    return nnx.clone(models.jax)


def torch_adapter(models, **config):
    """transformers' model with PEFT's LoRAs of random weights."""
    kind = KINDS[type(models.jax).__name__]
    model = peft.get_peft_model(copy.deepcopy(models.torch), peft.LoraConfig(task_type=kind, **config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                size = 0.3 if "lora_B" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model


def randomize(model, seed=2):
    """Gives the LoRAs of a model of ours random weights, B included."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(".".join(map(str, path)).encode()))
        size = 0.3 if "up" in path else variable.shape[0] ** -0.5
        draws = size * jax.random.normal(key, variable.shape)
        variable.set_value(jax.device_put(draws, variable.get_value().sharding))
    return model


def torch_logits(model, input_ids):
    with torch.no_grad():
        return model(to_torch(input_ids)).logits


def adapted_modules(model):
    """transformers' names of the modules that have a LoRA in PEFT's model."""
    names = (name for name, _ in model.named_parameters() if ".lora_A." in name)
    return {name.removeprefix("base_model.model.").split(".lora_A.")[0] for name in names}


def is_live(name, config):
    """Whether a module is ever run: a slot of adapters is by one layer only, but PEFT finds it in all of its block."""
    if "_adapter_list." not in name:
        return True
    layer, slot = int(name.split("layers.")[1].split(".")[0]), int(name.split("_adapter_list.")[1].split(".")[0])
    return config.hybrid_layer_ids[slot] == layer
