"""The gate of a Mamba2 mixer where it lies: beside the recurrence's input, in the product that made both."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Float

# The places of the gate and of the recurrence's input in the product that makes both.
Z, X = 0, 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gate:
    """z of zx: a kernel reads it in place, where it would be given a copy of a slice.

    Attributes:
        zx: (b, l, 2, e), of which z alone may be read through this object.
        shares_gradient: whether who made this object, `conv.mixer_convs`, takes the gradient of zx that comes back
            through it and writes x's into it. Then x's place may be left unwritten on the way, and neither is copied.
    """

    zx: Float[Array, "b l 2 e"]
    shares_gradient: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def z(self) -> Float[Array, "b l e"]:
        return self.zx[:, :, Z]
