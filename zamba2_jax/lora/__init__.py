"""LoRA: train a few low-rank products instead of the model, and exchange them with PEFT.

>>> from zamba2_jax import LoraConfig, add_lora, load_lora, merge_lora, save_lora
>>> print(add_lora(model, LoraConfig(r=8, target_modules=["in_proj", "q_proj"]), rngs=nnx.Rngs(0)))
>>> ...  # train what `nnx.state(model, trainable(model))` holds
>>> save_lora(model, "adapter")  # peft.PeftModel.from_pretrained(torch_model, "adapter") loads it
>>> merge_lora(model)
>>> model.save_pretrained("merged")
"""

from zamba2_jax.lora.adding import add_lora, trainable
from zamba2_jax.lora.config import LoraConfig
from zamba2_jax.lora.coverage import Coverage, lora_coverage
from zamba2_jax.lora.files import load_lora, save_lora
from zamba2_jax.lora.merging import merge_lora

__all__ = ["Coverage", "LoraConfig", "add_lora", "load_lora", "lora_coverage", "merge_lora", "save_lora", "trainable"]
