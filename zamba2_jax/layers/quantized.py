"""Linear and Embed over int8 or int4 weights, which are not trained: the modules that `zamba2_jax.quantize` puts in
their place."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from zamba2_jax.layers.linear import Axes, Embed, Linear, look_up
from zamba2_jax.ops.quantized import (
    dequantize_int4,
    dequantize_int8,
    quantize_int4,
    quantize_int8,
    stored_axes,
    take_int8,
)
from zamba2_jax.ops.quantized_products import dot_int4, dot_int8


class QuantizedWeight(nnx.Variable):
    """Integers of a quantised matrix, or their scale. No `nnx.Param`: optimisers and `nnx.grad` pass it over."""


class QuantizedLinear(nnx.Module):
    """y = x W (+ bias), W of shape (in, *out) as integers: `zamba2_jax.layers.linear.Linear` whose W is a constant.

    Attributes:
        values: int8 (*out, in), or uint8 (*out, in / 2) with two int4 to a byte.
        scale: float32 (*out) for int8; bfloat16 (*out, in / group) for int4.
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
        dot = dot_int8 if self.bits == 8 else dot_int4
        y = dot(x, self.values[...], self.scale[...], axes=axes)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)

    @property
    def stored(self) -> QuantizedWeight:
        """The numbers of W, as they are kept."""
        return self.values

    @property
    def shape(self) -> tuple[int, ...]:
        """(in, *out) of the matrix that the integers stand for."""
        *out, stored = self.values.shape
        return (stored * (8 // self.bits), *out)

    @property
    def group(self) -> int | None:
        """Inputs that share a scale, of int4; None for int8."""
        return None if self.bits == 8 else self.shape[0] // self.scale.shape[-1]

    @property
    def axes(self) -> Axes:
        """The logical names of that matrix's dimensions."""
        *out, summed = self.values.get_metadata("out_sharding")
        return (summed, *out)

    def matrix(self) -> jax.Array:
        """W as an array (in, *out) in the compute dtype, which takes the memory that quantisation saved."""
        values, scale = self.values[...], self.scale[...]
        dense = dequantize_int8(values, scale) if self.bits == 8 else dequantize_int4(values, scale)
        return jnp.moveaxis(dense, -1, 0).astype(self.dtype)


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
        return dot_int8(x.astype(self.dtype), self.values[...], self.scale[...], axes=axes)

    def matrix(self) -> jax.Array:
        """The embeddings as an array (v, d) in the compute dtype, which takes the memory that quantisation saved."""
        return dequantize_int8(self.values[...], self.scale[...]).astype(self.dtype)


def quantize_weight(weight: jax.Array, bits: int, *, axis: int) -> tuple[jax.Array, jax.Array]:
    """Values and scale of a weight that products sum over `axis` of, split over devices as the weight is."""
    arrays = (quantize_int8 if bits == 8 else quantize_int4)(weight, axis=axis)
    sharding = None if isinstance(weight, jax.core.Tracer) else weight.sharding
    if isinstance(sharding, NamedSharding):
        spec = (*sharding.spec, *[None] * (weight.ndim - len(sharding.spec)))
        specs = stored_axes(spec, bits, axis)
        places = [NamedSharding(sharding.mesh, PartitionSpec(*spec)) for spec in specs]
        arrays = tuple(jax.device_put(array, place) for array, place in zip(arrays, places, strict=True))
    return arrays


def _variables(weight: nnx.Param, bits: int, *, axis: int) -> tuple[QuantizedWeight, QuantizedWeight]:
    names = stored_axes(weight.get_metadata("out_sharding"), bits, axis)
    arrays = quantize_weight(weight[...], bits, axis=axis)
    return tuple(
        QuantizedWeight(array, out_sharding=axes, eager_sharding=False)
        for array, axes in zip(arrays, names, strict=True)
    )
