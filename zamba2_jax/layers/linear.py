"""Parameters, and the layers that only multiply by one: Linear, Embed, Adapter."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from zamba2_jax.layers.lora import Loras, with_lora
from zamba2_jax.ops.stored import product
from zamba2_jax.sharding import constrain, constrain_gathered

Axes = tuple[str | None, ...]


def param(value: jax.Array, axes: Axes) -> nnx.Param:
    """A parameter with a logical axis name (or None) per dimension; `zamba2_jax.sharding` maps the names to a mesh."""
    if value.ndim != len(axes):
        raise ValueError(f"axes {axes} do not name the dimensions of an array of shape {value.shape}.")
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: DTypeLike) -> jax.Array:
    """Normal draws of standard deviation `std`, drawn in float32 whatever `dtype` is."""
    return (std * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)


class Linear(nnx.Module):
    """y = x W (+ bias), W of shape (in, *out).

    `out` may have two axes: (2, width) holds two matrices side by side, computed as one product, of which each still
    splits evenly over devices along `width`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | tuple[int, ...],
        *,
        axes: Axes,
        std: float,
        use_bias: bool = False,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        out_shape = (out_features,) if isinstance(out_features, int) else out_features
        self.dtype = dtype
        self.kernel = param(normal(rngs, (in_features, *out_shape), std, param_dtype), axes)
        self.bias = param(jnp.zeros(out_shape, param_dtype), axes[1:]) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., in) -> (..., *out), in the compute dtype."""
        y = product(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.axes)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)

    @property
    def stored(self) -> nnx.Variable:
        """The numbers of W, as they are kept."""
        return self.kernel

    @property
    def shape(self) -> tuple[int, ...]:
        """(in, *out)."""
        return self.kernel.shape

    @property
    def axes(self) -> Axes:
        """The logical names of W's dimensions."""
        return self.kernel.get_metadata("out_sharding")

    def matrix(self) -> jax.Array:
        """W, (in, *out), for a computation that does more than multiply by it."""
        return self.kernel[...]


def side_by_side(x: jax.Array, *layers: Linear) -> jax.Array:
    """x (..., in) -> (..., columns): what each layer makes of it, flat, one behind the other, by one product."""

    def flat(array: jax.Array, axes: int) -> jax.Array:
        return array.reshape(*array.shape[:axes], -1)

    dtype = layers[0].dtype
    kernels = [flat(layer.kernel[...].astype(dtype), 1) for layer in layers]
    y = product(x.astype(dtype), jnp.concatenate(kernels, axis=1), (None, None))
    if all(layer.bias is None for layer in layers):
        return y
    biases = [
        jnp.zeros(kernel.shape[1], dtype) if layer.bias is None else flat(layer.bias[...].astype(dtype), 0)
        for layer, kernel in zip(layers, kernels, strict=True)
    ]
    return y + jnp.concatenate(biases)


def look_up(take: Callable[[jax.Array], jax.Array], ids: jax.Array) -> jax.Array:
    """`take(ids)`, (b, l) to (b, l, d), in an embedding that devices store in parts.

    Every device looks up its own columns, for the rows and tokens of all devices that share them. Then columns are
    exchanged for tokens and for rows, one mesh axis at a time: two at once, the partitioner gathers everything.
    """
    vectors = constrain(take(constrain(ids, "lookup_batch", None)), "lookup_batch", None, "embed")
    vectors = constrain(vectors, "lookup_batch", "length", "lookup_width")
    return constrain(vectors, "batch", "length", None)


class Embed(nnx.Module):
    """Token embedding. The row of `padding_id` is read but, as in PyTorch, gets no gradient from the look-up."""

    def __init__(
        self,
        vocab_size: int,
        features: int,
        *,
        padding_id: int | None,
        std: float,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.padding_id = padding_id
        self.embedding = param(normal(rngs, (vocab_size, features), std, param_dtype), ("vocab", "embed"))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids (b, l) -> (b, l, d)."""
        vectors = look_up(lambda ids: jnp.take(self.embedding[...], ids, axis=0).astype(self.dtype), ids)
        if self.padding_id is None:
            return vectors
        return jnp.where((ids == self.padding_id)[..., None], jax.lax.stop_gradient(vectors), vectors)

    def attend(self, x: jax.Array) -> jax.Array:
        """x (..., d) -> (..., v): scores against every embedding, the head of a model with tied embeddings."""
        embedding = constrain_gathered(self.embedding[...].astype(self.dtype), "vocab", "embed")
        return jax.lax.dot_general(x, embedding, (((x.ndim - 1,), (1,)), ((), ())))

    def matrix(self) -> jax.Array:
        """The embeddings, (v, d), for a computation that does more than multiply by them."""
        return self.embedding[...]


class Adapter(nnx.Module):
    """A low-rank product x W_down W_up that one use of a shared block adds to one of the block's projections."""

    def __init__(
        self,
        in_features: int,
        rank: int,
        out_features: int | tuple[int, ...],
        *,
        in_axis: str,
        out_axes: Axes,
        std: float,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        options = {"std": std, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.down = Linear(in_features, rank, axes=(in_axis, "adapter_rank"), **options)
        # The rank has no axis to store parts along, and out_features the one of the heads or widths: both at once.
        stored = tuple(None if axis is None else f"{axis}_of_adapter" for axis in out_axes)
        self.up = Linear(rank, out_features, axes=("adapter_rank", *stored), **options)
        self.lora: Loras = None

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        low = with_lora(self.down(x), "down", x, dropout_key, self.lora)
        return with_lora(self.up(low), "up", low, dropout_key, self.lora)


class DepthwiseConv(nnx.Module):
    """Parameters of a causal depthwise convolution: kernel (k, *channels), bias (*channels). `ops.conv` computes it.

    Drawn uniformly from ±k^-1/2, kernel and bias, as the Mamba2 reference does by PyTorch's default for convolutions.
    """

    def __init__(
        self,
        width: int,
        channels: tuple[int, ...],
        *,
        axes: Axes,
        use_bias: bool,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        bound = 1.0 / math.sqrt(width)

        def uniform(shape: tuple[int, ...]) -> jax.Array:
            return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound).astype(param_dtype)

        self.kernel = param(uniform((width, *channels)), ("conv", *axes))
        self.bias = param(uniform(channels), axes) if use_bias else None
