"""Checkpoints: Hugging Face files and our Orbax directories, loaded, saved and converted one tensor at a time."""

from zamba2_jax.checkpoint.load import load_pretrained, open_parameters
from zamba2_jax.checkpoint.orbax import save_orbax, write_orbax
from zamba2_jax.checkpoint.save import save_pretrained, write_hugging_face

__all__ = ["load_pretrained", "open_parameters", "save_orbax", "save_pretrained", "write_hugging_face", "write_orbax"]
