"""RMSNorm and the gated, grouped RMSNorm of Mamba2. Arithmetic in float32 whatever the model's dtype."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from zamba2_jax.layers.linear import param
from zamba2_jax.ops.gate import Gate
from zamba2_jax.ops.gated_norm import gated_rms_norm
from zamba2_jax.ops.rms_norm import rms_norm


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last axis (arXiv 1910.07467)."""

    def __init__(self, features: int, *, eps: float, dtype: DTypeLike, param_dtype: DTypeLike, axis: str = "norm"):
        self.eps = eps
        self.dtype = dtype
        self.scale = param(jnp.ones((features,), param_dtype), (axis,))

    def __call__(self, x: Float[Array, "b l d"], beside: Float[Array, "b l rest"] | None = None) -> Array:
        """(b, l, features): of x, or of x with the features of `beside` behind its own."""
        return rms_norm(x, self.scale[...], eps=self.eps, dtype=self.dtype, beside=beside)

    def and_input(self, x: Float[Array, "b l d"]) -> tuple[Float[Array, "b l d"], Float[Array, "b l d"]]:
        """The norm of x, and x, for what goes on beside it: in the backward pass their gradients meet in one kernel."""
        return rms_norm(x, self.scale[...], eps=self.eps, dtype=self.dtype, hand_on=True)


class GatedRMSNorm(nnx.Module):
    """RMSNorm of y · silu(gate), each group of channels normalised by itself (Mamba2: arXiv 2405.21060, section 7).

    Groups, so that the norm needs no communication when heads are spread over devices.
    """

    def __init__(self, features: int, *, groups: int, dtype: DTypeLike, param_dtype: DTypeLike):
        self.groups = groups
        self.eps = 1e-5  # the reference's constant; rms_norm_eps does not govern this norm
        self.dtype = dtype
        self.scale = param(jnp.ones((features,), param_dtype), ("mamba_inner",))

    def __call__(
        self, y: Float[Array, "b l inner"], gate: Float[Array, "b l inner"] | Gate
    ) -> Float[Array, "b l inner"]:
        return gated_rms_norm(y.astype(self.dtype), gate, self.scale[...], groups=self.groups, eps=self.eps)
