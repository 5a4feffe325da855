"""The Flax NNX modules that `zamba2_jax.models` wires together."""
