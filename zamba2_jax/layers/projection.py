"""What the layers' matrix products share: a name for their results, and a way to keep them apart."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from zamba2_jax.ops._platform import platform

PROJECTION = "projection"


def projection(x: jax.Array) -> jax.Array:
    """`x` itself; the checkpointing policy "projections" keeps it for the backward pass."""
    return checkpoint_name(x, PROJECTION)


def apart(x: jax.Array) -> jax.Array:
    """`x` itself, by an identity that compilers look through later: the input of a wide product over many tokens.

    XLA's compiler for GPUs merges products of one input into one, and to that end copies their weights side by side and
    cuts its result apart again. Two calls on the same array give the same identity; one on the result of another gives
    another.
    """
    return together(x)


def together(arrays: Any) -> Any:
    """`arrays`, a tree, none of which is to be had before the others, by the same identity.

    For what a layer leaves in the cache. XLA's compiler for GPUs gathers such small operations of all layers in one at
    the end of the program, and what they read, of every layer, is kept until then: 20 GB of a prompt of 32,768 tokens.
    """
    return jax.lax.optimization_barrier(arrays) if platform() == "gpu" else arrays
