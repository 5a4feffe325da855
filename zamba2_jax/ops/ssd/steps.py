"""Time steps: how they are made of a projection's output, and that output with all it takes, for a kernel to do so."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from zamba2_jax.ops._checks import check_floating, check_shape
from zamba2_jax.ops.gate import Behind


@functools.partial(jax.jit, static_argnames=("limit",))
def time_step(
    dt: jax.Array,
    dt_bias: jax.Array,
    *,
    limit: tuple[float, float] | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Makes the time steps of `ssd` from the projection's output: softplus(dt + dt_bias), in float32.

    Args:
      dt: (..., h), floating.
      dt_bias: (h,).
      limit: None, or (low, high) between which the steps are clipped.
      mask: None, or (...) bool; steps are zero where it is False, so that those tokens pass no time.

    Returns:
      (..., h) float32.

    Raises:
      ValueError: a shape, dtype or limit that does not fit, naming the argument.
    """
    if dt.ndim < 1:
        raise ValueError(f"dt has shape {dt.shape}; it must be (..., h)")
    check_floating("dt", dt)
    check_shape("dt_bias", dt_bias, dt.shape[-1:], "(h,)")
    step = jax.nn.softplus(dt.astype(jnp.float32) + dt_bias.astype(jnp.float32))
    if limit is not None:
        if len(limit) != 2 or not 0 <= limit[0] <= limit[1]:
            raise ValueError(f"limit is {limit!r}; it must be None or (low, high) with 0 <= low <= high")
        step = jnp.clip(step, *limit)
    if mask is not None:
        check_shape("mask", mask, dt.shape[:-1], "the shape of dt without its last axis")
        if mask.dtype != jnp.bool_:
            raise ValueError(f"mask has dtype {mask.dtype}; it must be bool, True at real tokens")
        step = jnp.where(mask[..., None], step, 0.0)
    return step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RawSteps:
    """dt and A of `ssd` before they are made: a kernel makes both where it reads them, and writes neither.

    Attributes:
        behind: columns of which the last are the raw time steps.
        bias: (h,), added to them.
        A_log: (h,), log(-A).
        mask: (b, l) bool or None; steps are zero where it is False.
        limit: None, or (low, high) between which the steps are clipped.
    """

    behind: Behind
    bias: jax.Array
    A_log: jax.Array
    mask: jax.Array | None
    limit: tuple[float, float] | None = dataclasses.field(metadata={"static": True})

    @property
    def heads(self) -> int:
        return self.bias.shape[0]

    def made(self) -> tuple[jax.Array, jax.Array]:
        """dt (b, l, h) and A (h,), float32."""
        dt = time_step(self.behind.last(self.heads), self.bias, limit=self.limit, mask=self.mask)
        return dt, -jnp.exp(self.A_log.astype(jnp.float32))
