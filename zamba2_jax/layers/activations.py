"""The values of `hidden_act`: transformers' names (its `activations.py`, `ACT2CLS`) and what they compute."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zamba2_jax.ops.gated_gelu import gated_gelu, split_gate_up

Activation = Callable[[jax.Array], jax.Array]


def _exact_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _tanh_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _clipped_gelu(x: jax.Array) -> jax.Array:
    return jnp.clip(_exact_gelu(x), -10.0, 10.0)


def _laplace(x: jax.Array) -> jax.Array:
    # The Laplace attention function of MEGA (arXiv 2209.10655, eq. 16) with its constants mu = sqrt(1/2), sigma =
    # sqrt(1/(4 pi)), rounded as transformers rounds them.
    return 0.5 * (1.0 + jax.lax.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _squared_relu(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


def _sqrt_softplus(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jax.nn.softplus(x))


def _identity(x: jax.Array) -> jax.Array:
    return x


ACTIVATIONS: dict[str, Activation] = {
    "gelu": _exact_gelu,
    "gelu_10": _clipped_gelu,
    "gelu_accurate": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_python": _exact_gelu,
    "gelu_python_tanh": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "hardswish": jax.nn.hard_swish,
    "laplace": _laplace,
    "leaky_relu": jax.nn.leaky_relu,
    "linear": _identity,
    "mish": jax.nn.mish,
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "relu2": _squared_relu,
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sqrtsoftplus": _sqrt_softplus,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}

# Those that are x Φ(x) to the last bit that float32 has.
_EXACT_GELUS = ("gelu", "gelu_python")


def gated(activation: str, gate_up: Float[Array, "b l 2 f"]) -> Float[Array, "b l f"]:
    """act(gate) · up, in float32 and rounded once.

    The backward pass is left gate_up alone: it reads that anyway, and makes the activation again for less than reading
    it would take.
    """
    if activation in _EXACT_GELUS:
        return gated_gelu(gate_up)

    def multiply(gate_up: jax.Array) -> jax.Array:
        gate, up = split_gate_up(gate_up)
        return (ACTIVATIONS[activation](gate) * up).astype(gate_up.dtype)

    return jax.checkpoint(multiply)(gate_up)
