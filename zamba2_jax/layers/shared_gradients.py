"""The order in which the gradients of a shared block's uses are added up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


def for_this_use(block: nnx.Module) -> tuple[nnx.Module, nnx.Module]:
    """`block` for its next use, and for those after it, the same arrays.

    A weight's gradient is a sum over its uses, of which the backward pass makes the first one's last. XLA's compiler
    for GPUs makes one of two products that are added where the sum is, onto the other: the first term. JAX adds what
    comes to what is there, so that this is the product which could have been made long before; all that it reads is
    kept until then, the wide gradients of a whole use. Here what comes is the first term. Of a step of the 1.2B with
    4 x 4096 tokens, rematerialised, that is 0.7 GB of 11.
    """
    graphdef, params = nnx.split(block)
    leaves, treedef = jax.tree.flatten(params)
    pairs = [_fork(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else (leaf, leaf) for leaf in leaves]
    return tuple(nnx.merge(graphdef, treedef.unflatten(side)) for side in zip(*pairs, strict=True))


@jax.custom_vjp
def _fork(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    return weight, weight


def _fork_forward(weight: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
    return (weight, weight), None


def _fork_backward(_: None, slopes: tuple[jax.Array, jax.Array]) -> tuple[jax.Array]:
    of_this, of_later = slopes
    return (of_this + of_later,)


_fork.defvjp(_fork_forward, _fork_backward)
