"""Checks of arguments that the ops share. Each raises ValueError naming the argument, what came, and what would do."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def check_shape(name: str, array: jax.Array, shape: Sequence[int], meaning: str) -> None:
    """`meaning` spells the shape in letters, such as "(b, l, h)"."""
    if array.shape != tuple(shape):
        raise ValueError(f"{name} has shape {array.shape}; it must be {meaning} = {tuple(shape)}")


def check_rank(name: str, array: jax.Array, rank: int, meaning: str) -> None:
    if array.ndim != rank:
        raise ValueError(f"{name} has shape {array.shape}; it must have {rank} axes, {meaning}")


def check_floating(name: str, array: jax.Array) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {array.dtype}; it must be a floating-point type")


def check_integer(name: str, array: jax.Array) -> None:
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {array.dtype}; it must be an integer type")


def check_boolean(name: str, array: jax.Array) -> None:
    if array.dtype != jnp.bool_:
        raise ValueError(f"{name} has dtype {array.dtype}; it must be bool, True where a value takes part")


def check_choice(name: str, value: str | None, choices: Sequence[str]) -> None:
    if value is not None and value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be None or one of {', '.join(map(repr, choices))}")
