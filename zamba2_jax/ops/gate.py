"""What of a Mamba2 mixer's products is not convolved, where it lies: beside what is, in the product that made both."""

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Behind:
    """The columns of a product that come after those of B and C.

    Attributes:
        columns: (b, l, w), all of them, of which only the last may be read through this object.
        shares_gradient: as in `Gate`, with B and C in the place of x.
    """

    columns: Float[Array, "b l w"]
    shares_gradient: bool = dataclasses.field(default=False, metadata={"static": True})

    def last(self, count: int) -> Float[Array, "b l count"]:
        return self.columns[..., self.columns.shape[2] - count :]
