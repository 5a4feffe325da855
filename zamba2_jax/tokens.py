"""TokenLayout: which columns of a call hold which tokens, worked out once and read by every layer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Where the real tokens of one call are.

    In each row the columns from the first real token to the last are its *run*. Masked columns outside the run are
        padding: absent, for
    state, time and positions alike, so that a padded row continues as the same row unpadded. Masked columns inside the
    run are hidden, but time passes over them, as in transformers.

    Attributes:
        token_mask: (b, l), True at real tokens; None when all are.
        run_start, run_end: (b,), the run is columns run_start to run_end - 1; equal where a row has no real token. None
            with token_mask.
        time_mask: (b, l), True inside the run. None with token_mask.
        segment_ids: (b, l), which document of a packed row a token belongs to; None when rows are not packed.
        positions: (b, l), for the rotary embedding.
        next_position: (b,), of the token after the run.
        tentative: whether it is decided after the call how many of its tokens count (`TentativeCache`): layers then
            leave what it takes to say how things stand after any number of them.
        recomputed: whether a backward pass makes the layer's forward pass anew (`layer_stack.Execution`): what that
            leaves to the backward pass then lives shortly, and may be large.
    """

    token_mask: Bool[Array, "b l"] | None
    run_start: Int32[Array, " b"] | None
    run_end: Int32[Array, " b"] | None
    time_mask: Bool[Array, "b l"] | None
    segment_ids: Int[Array, "b l"] | None
    positions: Int32[Array, "b l"]
    next_position: Int32[Array, " b"]
    tentative: bool = dataclasses.field(default=False, metadata={"static": True})
    recomputed: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def is_step(self) -> bool:
        """Whether there is one token per row, which counts."""
        return self.positions.shape[1] == 1 and not self.tentative

    @classmethod
    def make(
        cls,
        batch_size: int,
        length: int,
        *,
        token_mask: Bool[Array, "b l"] | None,
        segment_ids: Int[Array, "b l"] | None,
        position_ids: Int[Array, "b l"] | None,
        first_position: Int32[Array, " b"] | None,
        tentative: bool = False,
    ) -> TokenLayout:
        """Positions count from `first_position` (0 without one) at the run's start, or from 0 in each segment, unless
        given."""
        columns = jnp.arange(length, dtype=jnp.int32)[None]
        run_start = run_end = time_mask = None
        if token_mask is not None:
            some = token_mask.any(axis=1)
            run_start = jnp.argmax(token_mask, axis=1).astype(jnp.int32)
            run_end = jnp.where(some, length - jnp.argmax(token_mask[:, ::-1], axis=1), run_start).astype(jnp.int32)
            time_mask = (columns >= run_start[:, None]) & (columns < run_end[:, None])

        start = jnp.zeros((batch_size, 1), jnp.int32) if run_start is None else run_start[:, None]
        end = jnp.full((batch_size, 1), length, jnp.int32) if run_end is None else run_end[:, None]
        first = jnp.zeros((batch_size, 1), jnp.int32) if first_position is None else first_position[:, None]
        if position_ids is not None:
            positions = jnp.broadcast_to(position_ids, (batch_size, length)).astype(jnp.int32)
            last = jnp.take_along_axis(positions, jnp.maximum(end - 1, 0), axis=1)
            next_position = jnp.where(end > start, last + 1, first)
        elif segment_ids is not None:
            positions = columns - _segment_starts(segment_ids)
            next_position = positions[:, -1:] + 1
        else:
            # Padding before the run would count down below zero; nothing reads it, but a rotation of it should stay
            # ordinary.
            positions = first + jnp.maximum(columns - start, 0)
            next_position = first + end - start
        return cls(token_mask, run_start, run_end, time_mask, segment_ids, positions, next_position[:, 0], tentative)


def _segment_starts(segment_ids: Int[Array, "b l"]) -> Int32[Array, "b l"]:
    """For each column, the first column of its segment."""
    changed = jnp.concatenate([jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], 1)
    columns = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    return jax.lax.cummax(jnp.where(changed, columns, 0), axis=1)
