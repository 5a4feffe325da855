"""What the models return: transformers' output classes as JAX pytrees, with the same field names and meanings."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from zamba2_jax.cache import Zamba2Cache
from zamba2_jax.tentative import TentativeCache


class ModelOutput:
    """Attribute, string and integer access to the fields that are set, as transformers' `ModelOutput` gives."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order of declaration."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: str | int) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BaseModelOutputWithPast(ModelOutput):
    """Output of `Zamba2Model`.

    Attributes:
        last_hidden_state: (b, l, d), after the final norm.
        past_key_values: the cache with this call's tokens in it, if one was asked for or given; of a tentative call,
            what `keep` makes it of.
        hidden_states: num_hidden_layers + 1 arrays (b, l, d): the input of every layer, then `last_hidden_state`.
        attentions: per hybrid layer, the attention probabilities (b, heads, l, keys).
    """

    last_hidden_state: jax.Array
    past_key_values: Zamba2Cache | TentativeCache | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CausalLMOutputWithPast(ModelOutput):
    """Output of `Zamba2ForCausalLM`.

    Attributes:
        loss: () float32, the mean next-token cross entropy over labels that are not -100; only when labels were given.
        logits: (b, kept, v) in the compute dtype.
        past_key_values, hidden_states, attentions: as in `BaseModelOutputWithPast`.
    """

    loss: jax.Array | None = None
    logits: jax.Array | None = None
    past_key_values: Zamba2Cache | TentativeCache | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceClassifierOutputWithPast(ModelOutput):
    """Output of `Zamba2ForSequenceClassification`.

    Attributes:
        loss: () float32; cross entropy, binary cross entropy or mean squared error by `config.problem_type`.
        logits: (b, num_labels), of each row's last real token.
        past_key_values, hidden_states, attentions: as in `BaseModelOutputWithPast`.
    """

    loss: jax.Array | None = None
    logits: jax.Array | None = None
    past_key_values: Zamba2Cache | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
