"""What a Zamba2 model costs: operations and bytes, from its shape alone.

An operation is a multiplication or an addition: a matrix of m numbers costs 2 m a token. A shared block counts at every
use. Norms, activations, RoPE, softmax and the embedding's look-up are left out, a few operations per number that
streams through; so are biases.

Letters: d hidden, E = expand d the width inside a mamba layer, h mamba heads of p channels, g groups, n state, k conv
width, q chunk length, i MLP width, a and c the widths of queries and of keys, r adapter rank, v vocab, l length.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zamba2_jax.config import Zamba2Config


@dataclasses.dataclass(frozen=True)
class Operations:
    """Operations of a forward pass, by where they are spent.

    Attributes:
        mamba_matrices: a layer's projections, 2 d (2 E + 2 g n + h) + 2 E d.
        convolution: 2 k (E + 2 g n) a layer.
        ssd: the state-space recurrence in chunks, 2 q g n (B against C) + 2 q E (the weights those make, against x)
            + 4 E n (into the state, and out of it) a layer. The q x q square is counted whole, as it is computed. q = 1
            gives the recurrent step, near enough.
        shared_matrices: 2 (2 d (a + 2 c) + a d + 3 d i + d²) a use, and the adapters' 2 r (d + 2 i), with adapters of
            the attention 2 r (2 d + a) more for each of q, k and v.
        attention: 4 a for each key that a token sees, a use.
        head: 2 v d.
    """

    mamba_matrices: float
    convolution: float
    ssd: float
    shared_matrices: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def operations(config: Zamba2Config, *, keys: float, chunk: float) -> Operations:
    """Operations a token, for one that sees `keys` keys and is computed in chunks of `chunk` tokens."""
    d, E, h, i, r = (
        config.hidden_size,
        config.mamba_intermediate_size,
        config.n_mamba_heads,
        config.intermediate_size,
        config.adapter_rank,
    )
    groups_state = config.mamba_ngroups * config.mamba_d_state
    queries = config.num_attention_heads * config.attention_head_dim
    key_width = config.num_key_value_heads * config.attention_head_dim
    layers, uses = config.num_hidden_layers, config.num_hybrid_layers
    shared = 2 * d * (queries + 2 * key_width) + queries * d + 3 * d * i + d * d + r * (d + 2 * i)
    if config.use_shared_attention_adapter:
        shared += 3 * r * (2 * d + queries)
    return Operations(
        mamba_matrices=2 * layers * (d * (2 * E + 2 * groups_state + h) + E * d),
        convolution=2 * layers * config.mamba_d_conv * (E + 2 * groups_state),
        ssd=2 * layers * (chunk * (groups_state + E) + 2 * E * config.mamba_d_state),
        shared_matrices=2 * uses * shared,
        attention=4 * uses * queries * keys,
        head=2 * config.vocab_size * d,
    )


def state_bytes(config: Zamba2Config, *, cache_itemsize: float, ssm_itemsize: float) -> float:
    """Bytes of a sequence's Mamba2 states, whatever its length: E n numbers a layer, and its convolutions' windows,
    (k - 1) (E + 2 g n) numbers."""
    E, n = config.mamba_intermediate_size, config.mamba_d_state
    window = (config.mamba_d_conv - 1) * (E + 2 * config.mamba_ngroups * n)
    return config.num_hidden_layers * (E * n * ssm_itemsize + window * cache_itemsize)


def key_value_bytes(config: Zamba2Config, *, cache_itemsize: float) -> float:
    """Bytes of one token's keys and values: 2 c numbers a use of a shared block."""
    return 2 * config.num_hybrid_layers * config.num_key_value_heads * config.attention_head_dim * cache_itemsize
