"""Linear and Embed over int8 or int4 weights, which are not trained: the modules that `zamba2_jax.quantize` puts in
their place."""

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from zamba2_jax.layers.linear import Embed, Linear, look_up
from zamba2_jax.ops.quantized import (
    dequantize_int4,
    dequantize_int8,
    quantize_int4,
    quantize_int8,
    scale_axes,
    take_int8,
)
from zamba2_jax.ops.quantized_products import dot_int4, dot_int8


class QuantizedWeight(nnx.Variable):
    """Integers of a quantised matrix, or their scale. No `nnx.Param`: optimisers and `nnx.grad` pass it over."""


class QuantizedLinear(nnx.Module):
    """y = x W (+ bias), W of shape (in, *out) as integers: `zamba2_jax.layers.linear.Linear` whose W is a constant.

    Attributes:
        values: int8 (in, *out), or uint8 (in / 2, *out) with two int4 to a byte.
        scale: float32 (*out) for int8; bfloat16 (in / group, *out) for int4.
        bias: (*out) parameter, or None.
    """

    def __init__(self, linear: Linear, *, bits: int):
        self.dtype = linear.dtype
        self.bits = bits
        self.bias = linear.bias
        self.values, self.scale = _variables(linear.kernel, bits, axis=0)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., in) -> (..., *out), in the compute dtype."""
        x, axes = x.astype(self.dtype), self.values.get_metadata("out_sharding")
        if self.bits == 8:
            y = dot_int8(x, self.values[...], self.scale[...], axis=0, axes=axes)
        else:
            y = dot_int4(x, self.values[...], self.scale[...], axes=axes)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)

    def matrix(self) -> jax.Array:
        """W as an array (in, *out) in the compute dtype, which takes the memory that quantisation saved."""
        values, scale = self.values[...], self.scale[...]
        dense = dequantize_int8(values, scale, axis=0) if self.bits == 8 else dequantize_int4(values, scale)
        return dense.astype(self.dtype)


class QuantizedEmbed(nnx.Module):
    """Token embedding of int8 rows, and the head tied to it: `zamba2_jax.layers.linear.Embed` as a constant.

    Attributes:
        values: int8 (v, d).
        scale: float32 (v,).
    """

    def __init__(self, embed: Embed):
        self.dtype = embed.dtype
        self.values, self.scale = _variables(embed.embedding, bits=8, axis=1)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids (b, l) -> (b, l, d)."""
        return look_up(lambda ids: take_int8(self.values[...], self.scale[...], ids).astype(self.dtype), ids)

    def attend(self, x: jax.Array) -> jax.Array:
        """x (..., d) -> (..., v): scores against every embedding."""
        axes = self.values.get_metadata("out_sharding")
        return dot_int8(x.astype(self.dtype), self.values[...], self.scale[...], axis=1, axes=axes)

    def matrix(self) -> jax.Array:
        """The embeddings as an array (v, d) in the compute dtype, which takes the memory that quantisation saved."""
        return dequantize_int8(self.values[...], self.scale[...], axis=1).astype(self.dtype)


def quantize_weight(weight: jax.Array, bits: int, *, axis: int) -> tuple[jax.Array, jax.Array]:
    """Values and scale of a weight that products sum over `axis` of, split over devices as the weight is."""
    values, scale = quantize_int8(weight, axis=axis) if bits == 8 else quantize_int4(weight)
    sharding = None if isinstance(weight, jax.core.Tracer) else weight.sharding
    if isinstance(sharding, NamedSharding):
        spec = (*sharding.spec, *[None] * (weight.ndim - len(sharding.spec)))
        values = jax.device_put(values, sharding)
        scale = jax.device_put(scale, NamedSharding(sharding.mesh, PartitionSpec(*scale_axes(spec, bits, axis))))
    return values, scale


def _variables(weight: nnx.Param, bits: int, *, axis: int) -> tuple[QuantizedWeight, QuantizedWeight]:
    axes = weight.get_metadata("out_sharding")
    arrays = quantize_weight(weight[...], bits, axis=axis)
    return tuple(
        QuantizedWeight(array, out_sharding=names, eager_sharding=False)
        for array, names in zip(arrays, (axes, scale_axes(axes, bits, axis)), strict=True)
    )
