"""The models that are timed, as shapes and with random weights."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zamba2_jax import Zamba2Config, Zamba2ForCausalLM, quantization


def abstract_model(config: Zamba2Config, dtype: str, quantize: str | None = None) -> Zamba2ForCausalLM:
    """A model without weights: its shapes and dtypes."""
    key = jax.random.key(0)
    rngs = types.SimpleNamespace(params=lambda: key)  # the shapes do not depend on it; an nnx.Rngs traces slowly

    def build() -> Zamba2ForCausalLM:
        model = Zamba2ForCausalLM(config, dtype=dtype, rngs=rngs)
        return model if quantize is None else quantization.quantize(model, quantize)

    return nnx.eval_shape(build)


def random_model(config: Zamba2Config, dtype: str, quantize: str | None = None) -> Zamba2ForCausalLM:
    """A model whose weights, integers too, are drawn on the device, one small program per shape: drawing them all in
    one program would take minutes to compile, and the constructor would hold float32 copies, or the weights that were
    quantised."""
    graph, state = nnx.split(abstract_model(config, dtype, quantize))
    leaves = dict(nnx.to_flat_state(state))
    for index, (path, leaf) in enumerate(leaves.items()):
        name = "scale of values" if (*path[:-1], "values") in leaves and path[-1] == "scale" else path[-1]
        leaf.set_value(_draw(np.uint32(index), name, tuple(leaf.shape), jnp.dtype(leaf.dtype)))
    return nnx.merge(graph, nnx.from_flat_state(leaves.items()))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(seed: jax.Array, name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.integer):
        return jax.lax.bitcast_convert_type(jax.random.bits(jax.random.key(seed), shape, jnp.uint8), dtype)
    match name:
        case "scale of values":  # uniform int8 have a standard deviation of 74, int4 (bfloat16 scales) of 4.6
            return jnp.full(shape, 0.02 / (74 if dtype == jnp.float32 else 4.6), dtype)
        case "A_log":
            return jnp.log(jnp.arange(1, shape[0] + 1, dtype=dtype))
        case "dt_bias":
            return jnp.full(shape, -4.0, dtype)  # steps of about 0.02, as in trained models
        case "D" | "scale":
            return jnp.ones(shape, dtype)
    return (0.02 * jax.random.normal(jax.random.key(seed), shape, jnp.float32)).astype(dtype)
