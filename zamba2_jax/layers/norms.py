"""RMSNorm and the gated, grouped RMSNorm of Mamba2. Arithmetic in float32 whatever the model's dtype."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from zamba2_jax.layers.linear import param
from zamba2_jax.ops.gate import Gate
from zamba2_jax.ops.gated_norm import gated_rms_norm


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

    def __call__(
        self, y: Float[Array, "b l inner"], gate: Float[Array, "b l inner"] | Gate
    ) -> Float[Array, "b l inner"]:
        return gated_rms_norm(y.astype(self.dtype), gate, self.scale[...], groups=self.groups, eps=self.eps)
