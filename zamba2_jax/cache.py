"""Zamba2Cache: everything a model remembers of the tokens it has read, as one immutable pytree.

A Mamba2 layer remembers the last k-1 inputs of its convolution and one state matrix per head, whatever the length. Each
*use* of a shared transformer block has keys and values of its own, one slot per token; the slots are allocated up front
so that shapes stay fixed under jit.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import TYPE_CHECKING, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from zamba2_jax.config import Zamba2Config
from zamba2_jax.executables import jit_kept
from zamba2_jax.sharding import constrain

if TYPE_CHECKING:
    from zamba2_jax.pretrained import PretrainedModel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MambaState:
    """State of one Mamba2 layer.

    Attributes:
        conv_x: (b, k-1, E), the inputs of the x convolution that the next token's window still reaches.
        conv_bc: (b, k-1, 2, G*N), the same for B and C.
        ssm: (b, h, p, n), float32 unless the cache was made otherwise.
    """

    conv_x: Float[Array, "b window inner"]
    conv_bc: Float[Array, "b window 2 groups_state"]
    ssm: Float[Array, "b h p n"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValue:
    """Keys and values of one use of a shared block: (b, max_length, kv_heads, head_dim) each, keys already rotated."""

    key: Float[Array, "b slots kv_heads head_dim"]
    value: Float[Array, "b slots kv_heads head_dim"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Zamba2Cache:
    """What a model carries from one call to the next. Immutable: a call returns a new one.

    All rows of a batch share the slot index: a call of l columns takes slots `length` to `length + l - 1` in every row,
    padding included; `slot_mask` says which hold a real token.

    Attributes:
        mamba: one `MambaState` per layer.
        attention: one `KeyValue` per hybrid layer.
        slot_mask: (b, max_length), True where a slot holds a real token.
        length: () int32, slots taken so far.
        next_position: (b,) int32, the position of each row's next token.
    """

    mamba: tuple[MambaState, ...]
    attention: tuple[KeyValue, ...]
    slot_mask: Bool[Array, "b slots"]
    length: Int32[Array, ""]
    next_position: Int32[Array, " b"]

    @property
    def batch_size(self) -> int:
        return self.slot_mask.shape[0]

    @property
    def max_length(self) -> int:
        """Number of slots."""
        return self.slot_mask.shape[1]

    def get_seq_length(self) -> int:
        """Slots taken so far, padding included, as a Python int (not under jit)."""
        return int(self.length)

    def reorder(self, rows: Int32[Array, " r"]) -> Zamba2Cache:
        """A cache of r rows: row i is this cache's row `rows[i]`. Serves beams, which drop and double rows."""
        return jax.tree.map(lambda leaf: leaf if leaf.ndim == 0 else jnp.take(leaf, rows, axis=0), self)

    def repeat(self, n: int) -> Zamba2Cache:
        """A cache of b * n rows, every row n times, copies side by side (`jnp.repeat`): one prefix, read once, for n
        continuations.

        Raises:
            ValueError: n below 1.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}.")
        return _repeat(self, n=n)

    def resize(self, max_length: int) -> Zamba2Cache:
        """The same memory with `max_length` slots, and without the slots that padding took.

        Real tokens move to the front of their row, in their order; what a later token sees is the same. `length`
        becomes the largest number of real tokens that a row holds. Not under jit.

        Raises:
            ValueError: fewer slots than a row has real tokens.
        """
        tokens = int(self.slot_mask.sum(axis=1).max())
        if max_length < max(tokens, 1):
            raise ValueError(
                f"max_length must be at least {max(tokens, 1)}, the tokens in the cache, got {max_length}."
            )
        return _resize(self, max_length=max_length)

    def save(self, path: str | os.PathLike[str], model: PretrainedModel) -> None:
        """Writes the cache to one safetensors file, replacing it in one step.

        The Mamba2 states take the same space whatever was read; keys and values take that of the tokens they are of,
        padding left out. All keep their dtypes. The file also says which model it is of: its config, and samples of all
        its weights as bfloat16, so that the same checkpoint loaded in another dtype counts as the same model.

        Args:
            path: the file, such as "prefix.safetensors"; its directory must exist.
            model: the model that filled the cache.

        Raises:
            ValueError: a cache that is not of this model's shape.
            OSError: the file cannot be written; what was there before stays.
        """
        from zamba2_jax import cache_file

        cache_file.write(path, self, model)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: PretrainedModel, max_length: int | None = None) -> Self:
        """Reads a file written by `save`.

        Args:
            path: the file.
            model: the model that is to continue; it must be the one that filled the cache.
            max_length: slots. None takes as many as there are tokens: `generate` makes a full cache larger by itself,
                calls of the model need room.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: no such file's format, a damaged one, one of another model (naming what differs), or fewer slots
                than tokens.
        """
        from zamba2_jax import cache_file

        return cache_file.read(path, model, max_length)[0]


@functools.partial(jit_kept, static_argnames=("n",))
def _repeat(cache: Zamba2Cache, *, n: int) -> Zamba2Cache:
    return cache.reorder(jnp.repeat(jnp.arange(cache.batch_size), n))


@functools.partial(jit_kept, static_argnames=("max_length",))
def _resize(cache: Zamba2Cache, *, max_length: int) -> Zamba2Cache:
    # A stable sort puts the real slots first and leaves them in order.
    order = jnp.argsort(~cache.slot_mask, axis=1, stable=True)[:, :max_length]
    real = jnp.take_along_axis(cache.slot_mask, order, axis=1)
    more = (0, max_length - order.shape[1])

    def move(slots: Float[Array, "b slots kv_heads head_dim"]) -> Float[Array, "b max_length kv_heads head_dim"]:
        moved = jnp.where(real[..., None, None], jnp.take_along_axis(slots, order[..., None, None], axis=1), 0)
        return jnp.pad(moved, ((0, 0), more, (0, 0), (0, 0)))

    return dataclasses.replace(
        cache,
        attention=jax.tree.map(move, cache.attention),
        slot_mask=jnp.pad(real, ((0, 0), more)),
        length=cache.slot_mask.sum(axis=1).max().astype(jnp.int32),
    )


def constrain_cache(cache: Zamba2Cache) -> Zamba2Cache:
    """The cache, which on the mesh in use is to be split by rows and heads, as what goes into it is."""

    def mamba_state(state: MambaState) -> MambaState:
        return MambaState(
            conv_x=constrain(state.conv_x, "batch", None, "mamba_inner"),
            conv_bc=constrain(state.conv_bc, "batch", None, None, "mamba_groups"),
            ssm=constrain(state.ssm, "batch", "mamba_heads", None, None),
        )

    def slots(array: jax.Array) -> jax.Array:
        return constrain(array, "batch", None, "kv_heads", None)

    return Zamba2Cache(
        mamba=tuple(map(mamba_state, cache.mamba)),
        attention=tuple(KeyValue(slots(part.key), slots(part.value)) for part in cache.attention),
        slot_mask=constrain(cache.slot_mask, "batch", None),
        length=cache.length,
        next_position=constrain(cache.next_position, "batch"),
    )


def init_cache(
    config: Zamba2Config,
    batch_size: int,
    max_length: int,
    dtype: jax.typing.DTypeLike,
    ssm_dtype: jax.typing.DTypeLike = jnp.float32,
) -> Zamba2Cache:
    """An empty cache.

    Args:
        config: shapes.
        batch_size: rows.
        max_length: slots for keys and values; the Mamba2 states do not grow with it.
        dtype: of keys, values and convolution windows.
        ssm_dtype: of the SSM states as they are stored between steps; the arithmetic is float32 always. They are sums
            over the whole past, so every step's rounding stays in them; many rows decode faster with bfloat16 all the
            same, because the states are most of what such a step reads and writes.

    Raises:
        ValueError: `batch_size` or `max_length` below 1, an `ssm_dtype` that is not a floating one.
    """
    if not jnp.issubdtype(ssm_dtype, jnp.floating):
        raise ValueError(f"ssm_dtype must be a floating dtype such as float32 or bfloat16, got {jnp.dtype(ssm_dtype)}.")
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    window = config.mamba_d_conv - 1
    groups_state = config.mamba_ngroups * config.mamba_d_state
    kv_shape = (batch_size, max_length, config.num_key_value_heads, config.attention_head_dim)

    # Every leaf is an array of its own: a donated cache must not name one buffer twice.
    def mamba_state() -> MambaState:
        return MambaState(
            conv_x=jnp.zeros((batch_size, window, config.mamba_intermediate_size), dtype),
            conv_bc=jnp.zeros((batch_size, window, 2, groups_state), dtype),
            ssm=jnp.zeros((batch_size, config.n_mamba_heads, config.mamba_headdim, config.mamba_d_state), ssm_dtype),
        )

    cache = Zamba2Cache(
        mamba=tuple(mamba_state() for _ in range(config.num_hidden_layers)),
        attention=tuple(
            KeyValue(jnp.zeros(kv_shape, dtype), jnp.zeros(kv_shape, dtype)) for _ in range(config.num_hybrid_layers)
        ),
        slot_mask=jnp.zeros((batch_size, max_length), bool),
        length=jnp.zeros((), jnp.int32),
        next_position=jnp.zeros((batch_size,), jnp.int32),
    )
    return constrain_cache(cache)
