"""TentativeCache: a cache with more tokens of which it is yet to be decided how many count.

Keys and values are taken back by forgetting them; a recurrent state that has passed a token is not. So a tentative call
leaves of every Mamba2 layer the state from before it and what its tokens would do to that state: small beside the
weights, which need not be read again to say what the state is after any number of them.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from zamba2_jax.cache import KeyValue, MambaState, Zamba2Cache, constrain_cache
from zamba2_jax.ops.ssd import advance_state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MambaSteps:
    """l tokens of one Mamba2 layer, and its state before them.

    Attributes:
        before: the state.
        conv_x: (b, l, E), the inputs of the x convolution. conv_bc: (b, l, 2, G*N), the same for B and C.
        x, B: (b, l, h, p) and (b, l, g, n), after their convolutions.
        dt: (b, l, h) float32, time steps. A: (h,) float32.
    """

    before: MambaState
    conv_x: Float[Array, "b l inner"]
    conv_bc: Float[Array, "b l 2 groups_state"]
    x: Float[Array, "b l h p"]
    B: Float[Array, "b l g n"]
    dt: Float[Array, "b l h"]
    A: Float[Array, " h"]

    def keep(self, count: Int[Array, " b"]) -> MambaState:
        """The state after each row's first `count` tokens."""
        kept = jnp.arange(self.dt.shape[1]) < count[:, None]
        ssm = advance_state(self.before.ssm, self.x, jnp.where(kept[..., None], self.dt, 0.0), self.A, self.B)
        return MambaState(
            conv_x=_window(self.before.conv_x, self.conv_x, count),
            conv_bc=_window(self.before.conv_bc, self.conv_bc, count),
            ssm=ssm.astype(self.before.ssm.dtype),
        )


def _window(before: jax.Array, inputs: jax.Array, count: jax.Array) -> jax.Array:
    """(b, k-1, ...channels): the inputs that end with each row's token `count` - 1."""
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=before.shape[1])
    return jax.vmap(cut)(jnp.concatenate([before, inputs.astype(before.dtype)], axis=1), count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TentativeCache:
    """What a call with `tentative=True` returns in place of a cache. Its l tokens are in slots `length` to `length` + l
    - 1, each seen by the later ones; `keep` says how many of them were meant.

    Attributes:
        mamba: one `MambaSteps` per layer.
        attention: one `KeyValue` per hybrid layer, the l tokens in it.
        slot_mask, length, next_position: those of the cache from before the call.
        positions: (b, l), of the l tokens.
    """

    mamba: tuple[MambaSteps, ...]
    attention: tuple[KeyValue, ...]
    slot_mask: Bool[Array, "b slots"]
    length: Int32[Array, ""]
    next_position: Int32[Array, " b"]
    positions: Int32[Array, "b l"]

    def keep(self, count: Int[Array, " b"]) -> Zamba2Cache:
        """The cache after each row's first `count` tokens of the call, 0 to l, as if no others had been there.

        States are equal to those of a call of so many tokens up to rounding. Rows share slots: the longest of them
        takes as many as it keeps, and those that others do not need stay empty.

        Raises:
            ValueError: counts of another shape, that are no integers, or (where they are concrete, which they are not
                under jit) outside 0 to l.
        """
        rows, columns = self.positions.shape
        count = jnp.asarray(count)
        if count.shape != (rows,) or not jnp.issubdtype(count.dtype, jnp.integer):
            raise ValueError(f"count must be {rows} integers, one per row, got {count.dtype} of shape {count.shape}.")
        if not isinstance(count, jax.core.Tracer) and ((count < 0) | (count > columns)).any():
            raise ValueError(f"count must be from 0 to {columns}, the tokens of the call, got {count.tolist()}.")
        count = count.astype(jnp.int32)
        kept = jnp.arange(columns) < count[:, None]
        last = jnp.take_along_axis(self.positions, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        cache = Zamba2Cache(
            mamba=tuple(steps.keep(count) for steps in self.mamba),
            attention=self.attention,
            slot_mask=jax.lax.dynamic_update_slice(self.slot_mask, kept, (0, self.length)),
            length=self.length + count.max(),
            next_position=jnp.where(count > 0, last + 1, self.next_position),
        )
        return constrain_cache(cache)
