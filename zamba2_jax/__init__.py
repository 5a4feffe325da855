"""Zamba2 in JAX: load Hugging Face checkpoints, generate, and hand the weights back to PyTorch.

>>> from zamba2_jax import Zamba2ForCausalLM
>>> model = Zamba2ForCausalLM.from_pretrained("Zyphra/Zamba2-1.2B", dtype="bfloat16")  # or "demo", which is shipped
>>> tokens = model.generate(**tokenizer("Hello", return_tensors="np"), max_new_tokens=20)
"""

from zamba2_jax.cache import Zamba2Cache
from zamba2_jax.config import Zamba2Config
from zamba2_jax.hub import demo_path
from zamba2_jax.lora import LoraConfig, add_lora, load_lora, merge_lora, save_lora
from zamba2_jax.models import Zamba2ForCausalLM, Zamba2ForSequenceClassification, Zamba2Model
from zamba2_jax.outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutputWithPast
from zamba2_jax.quantization import quantize

__version__ = "0.1.0"

__all__ = [
    "BaseModelOutputWithPast",
    "CausalLMOutputWithPast",
    "LoraConfig",
    "SequenceClassifierOutputWithPast",
    "Zamba2Cache",
    "Zamba2Config",
    "Zamba2ForCausalLM",
    "Zamba2ForSequenceClassification",
    "Zamba2Model",
    "add_lora",
    "demo_path",
    "load_lora",
    "merge_lora",
    "quantize",
    "save_lora",
]
