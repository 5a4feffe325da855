"""RMSNorm and the gated, grouped RMSNorm of Mamba2. Arithmetic in float32 whatever the model's dtype."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from zamba2_jax.layers.linear import param


def _normalise(x: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last axis (arXiv 1910.07467)."""

    def __init__(self, features: int, *, eps: float, dtype: DTypeLike, param_dtype: DTypeLike, axis: str = "norm"):
        self.eps = eps
        self.dtype = dtype
        self.scale = param(jnp.ones((features,), param_dtype), (axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        normalised = _normalise(x.astype(jnp.float32), self.eps)
        # Rounded before the scale, as the checkpoints were trained.
        return normalised.astype(self.dtype) * self.scale[...].astype(self.dtype)


class GatedRMSNorm(nnx.Module):
    """RMSNorm of y · silu(gate), each group of channels normalised by itself (Mamba2: arXiv 2405.21060, section 7).

    Groups, so that the norm needs no communication when heads are spread over devices.
    """

    eps = 1e-5  # the reference's constant; rms_norm_eps does not govern this norm

    def __init__(self, features: int, *, groups: int, dtype: DTypeLike, param_dtype: DTypeLike):
        self.groups = groups
        self.dtype = dtype
        self.scale = param(jnp.ones((features,), param_dtype), ("mamba_inner",))

    def __call__(self, y: jax.Array, gate: jax.Array) -> jax.Array:
        """y, gate (..., E) -> (..., E)."""
        gated = y.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
        grouped = gated.reshape(*gated.shape[:-1], self.groups, -1)
        normalised = _normalise(grouped, self.eps).reshape(gated.shape)
        return normalised.astype(self.dtype) * self.scale[...].astype(self.dtype)
