"""Rotary position embedding, the rotate-half kind over the whole head dim (arXiv 2104.09864)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zamba2_jax.sharding import constrain


def rotation(
    positions: Int[Array, "b l"], head_dim: int, base: float
) -> tuple[Float[Array, "b l half"], Float[Array, "b l half"]]:
    """Cosines and sines of position · base^(-2i/head_dim) for i < head_dim/2, in float32."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = constrain(positions[..., None].astype(jnp.float32) * (1.0 / base**exponents), "batch", "length", None)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "b l heads head_dim"], cos: Float[Array, "b l half"], sin: Float[Array, "b l half"]
) -> Float[Array, "b l heads head_dim"]:
    """Turns each pair (x[i], x[i + head_dim/2]) by its angle; computed in float32, returned in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
