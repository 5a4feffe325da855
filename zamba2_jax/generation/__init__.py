"""Text generation: `generate`, wired as `Zamba2ForCausalLM.generate`."""

from zamba2_jax.generation.api import GenerateBeamOutput, GenerateOutput, generate

__all__ = ["GenerateBeamOutput", "GenerateOutput", "generate"]
