"""A name for the results of the layers' wide matrix products, by which gradient checkpointing can choose to keep
them."""

import jax
from jax.ad_checkpoint import checkpoint_name

PROJECTION = "projection"


def projection(x: jax.Array) -> jax.Array:
    """`x` itself; the checkpointing policy "projections" keeps it for the backward pass."""
    return checkpoint_name(x, PROJECTION)
