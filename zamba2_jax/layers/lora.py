"""What a LoRA adds to a projection (arXiv 2106.09685). `zamba2_jax.lora` puts it where it is wanted, and takes it out
again.

A LoRA stands beside its projection and not in its place: the projection's weight keeps its name and its kind, so that
it may be quantised, and one LoRA can add to several projections that are one matrix in the reference (`in_proj`).
"""

import zlib
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from zamba2_jax.ops.stored import product

# One result of a projection, or the tuple of those that are one projection in the reference.
Results = TypeVar("Results", jax.Array, tuple[jax.Array, ...])


class Lora(nnx.Module):
    """scale · dropout(x) A B: a low-rank product, or several that have A in common.

    Args:
        down: A, (in, r).
        up: B, (r, *out), for each projection that it adds to.
        down_axes, up_axes: their logical axes.
        name: of the projection; LoRAs of another name have another dropout.
        scale: of the product.
        dropout: the probability that an element of x is left out of a call with a key.
        dtype: of computation.
    """

    def __init__(
        self,
        down: jax.Array,
        up: Sequence[jax.Array],
        *,
        down_axes: tuple[str | None, ...],
        up_axes: Sequence[tuple[str | None, ...]],
        name: str,
        scale: float,
        dropout: float,
        dtype: DTypeLike,
    ):
        self.dtype = dtype
        self.scale = scale
        self.dropout = dropout
        self.salt = zlib.crc32(name.encode())
        self.down = _param(down, down_axes)
        self.up = nnx.List([_param(value, axes) for value, axes in zip(up, up_axes, strict=True)])

    @property
    def rank(self) -> int:
        return self.down.shape[1]

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array | tuple[jax.Array, ...]:
        """x (..., in) -> (..., *out), or a tuple of them, in the compute dtype."""
        x = x.astype(self.dtype)
        if self.dropout > 0 and dropout_key is not None:
            keep = jax.random.bernoulli(jax.random.fold_in(dropout_key, self.salt), 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0).astype(self.dtype)
        low = self.scale * self._product(x, self.down)
        products = tuple(self._product(low, up) for up in self.up)
        return products if len(products) > 1 else products[0]

    def _product(self, x: jax.Array, matrix: nnx.LoRAParam) -> jax.Array:
        return product(x, matrix[...].astype(self.dtype), matrix.get_metadata("out_sharding"))

    def deltas(self) -> list[jax.Array]:
        """scale · A B, (in, *out) in float32, for each projection: what a merged weight has more."""
        down = self.scale * self.down[...].astype(jnp.float32)
        return [jnp.tensordot(down, up[...].astype(jnp.float32), 1, precision="highest") for up in self.up]


# A module's LoRAs by the names of its projections.
Loras = nnx.Dict | None


def with_lora(results: Results, name: str, x: jax.Array, dropout_key: jax.Array | None, *loras: Loras) -> Results:
    """`results` of projecting x, plus what the LoRAs called `name` add to it, if there are any."""
    for named in loras:
        if named is not None and name in named:
            results = jax.tree.map(jnp.add, results, named[name](x, dropout_key))
    return results


def _param(value: jax.Array, axes: tuple[str | None, ...]) -> nnx.LoRAParam:
    return nnx.LoRAParam(value, out_sharding=axes, eager_sharding=False)
