"""The shared transformer block, stored once, and what each use of it owns (arXiv 2411.15242, figure 2; transformers'
`Zamba2AttentionDecoderLayer` and `Zamba2HybridLayer`).

Hybrid layer j runs block j mod num_mem_blocks. A use brings its own low-rank adapters and its own output matrix
`linear`; everything else belongs to the block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from zamba2_jax.cache import KeyValue
from zamba2_jax.config import Zamba2Config
from zamba2_jax.layers import decoding
from zamba2_jax.layers.activations import gated
from zamba2_jax.layers.linear import Adapter, Linear
from zamba2_jax.layers.lora import Loras, with_lora
from zamba2_jax.layers.norms import RMSNorm
from zamba2_jax.layers.projection import apart, projection
from zamba2_jax.layers.rope import rotate
from zamba2_jax.ops.attention import ATTENTION, attention, attention_with_weights, prefill_attention
from zamba2_jax.ops.decode.cached_attention import cached_attention, cached_attention_of_several
from zamba2_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """What every use of a shared block needs to know of the call.

    Attributes:
        rotation: cosines and sines (b, l, head_dim/2), or None without RoPE.
        segment_ids: (b, l) or None: without a cache, a token sees the earlier tokens of its own segment.
        token_mask: (b, l) or None: which of the call's tokens are real; a token sees, of these, the earlier real ones.
        mask: (b, l, slots) or None: with a cache that holds tokens already, the slots that each token sees.
        slot_mask: (b, slots) or None, with mask: the slots that hold a real token, this call's included.
        first_slot: () int32 or None: with a cache, the slot of the call's first column.
        dropout_key: key for attention dropout and for the LoRAs', or None for none.
        return_weights: whether attention probabilities are wanted.
        tentative: whether the tokens are a few after others, of which it is decided later how many count.
    """

    rotation: tuple[Float[Array, "b l half"], Float[Array, "b l half"]] | None
    segment_ids: Int[Array, "b l"] | None
    token_mask: Bool[Array, "b l"] | None
    mask: Bool[Array, "b l slots"] | None
    slot_mask: Bool[Array, "b slots"] | None
    first_slot: Int[Array, ""] | None
    dropout_key: jax.Array | None
    return_weights: bool = dataclasses.field(metadata={"static": True})
    tentative: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def is_decoding(self) -> bool:
        """Whether this is one token per row after others, and its output is all that is wanted."""
        one_token = self.mask is not None and self.mask.shape[1] == 1 and not self.tentative
        return one_token and self.dropout_key is None and not self.return_weights


class SharedAttention(nnx.Module):
    """Causal attention of width 2d, read from [hidden, embedding] and projected back to d. Scores are scaled by
    (head_dim / 2)^-1/2."""

    def __init__(self, config: Zamba2Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        self.dropout_rate = config.attention_dropout
        self.scale = (config.attention_head_dim / 2) ** -0.5
        width, head_dim = config.attention_hidden_size, config.attention_head_dim
        q_width, kv_width = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        options = {"std": config.initializer_range, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.q_proj = Linear(width, q_width, axes=("concat_embed", "q_heads"), **options)
        self.k_proj = Linear(width, kv_width, axes=("concat_embed", "kv_heads"), **options)
        self.v_proj = Linear(width, kv_width, axes=("concat_embed", "kv_heads"), **options)
        self.o_proj = Linear(q_width, config.hidden_size, axes=("q_heads", "embed"), **options)
        self.lora: Loras = None

    def __call__(
        self, x: Float[Array, "b l 2d"], use: SharedBlockUse, context: AttentionContext, past: KeyValue | None
    ) -> tuple[Float[Array, "b l d"], KeyValue | None, Float[Array, "b heads l s"] | None]:
        # Of one token, one product of all three is best, and one of the adapters'.
        for_query = for_key = for_value = x
        if x.shape[1] > 1:
            for_key = apart(for_query)
            for_value = apart(for_key)
        x = apart(for_value)
        lora = (context.dropout_key, self.lora, use.lora)
        query, key, value = self.q_proj(for_query), self.k_proj(for_key), self.v_proj(for_value)
        query = self._heads(with_lora(query, "q_proj", x, *lora), use.q_adapter, x, context, "q_heads")
        query = checkpoint_name(query, ATTENTION)
        key = self._heads(with_lora(key, "k_proj", x, *lora), use.k_adapter, x, context, "kv_heads")
        value = self._heads(with_lora(value, "v_proj", x, *lora), use.v_adapter, x, context, "kv_heads")
        if context.rotation is not None:
            query, key = rotate(query, *context.rotation), rotate(key, *context.rotation)

        visible = {"is_causal": True, "token_mask": context.token_mask}
        if context.segment_ids is not None:
            visible["segment_ids"] = (context.segment_ids, context.segment_ids)
        if past is not None:
            start = (0, context.first_slot, 0, 0)
            past = KeyValue(
                jax.lax.dynamic_update_slice(past.key, key.astype(past.key.dtype), start),
                jax.lax.dynamic_update_slice(past.value, value.astype(past.value.dtype), start),
            )
        own = key, value
        if context.mask is not None:
            key, value = past.key.astype(query.dtype), past.value.astype(query.dtype)
            visible = {"mask": context.mask}

        scale, weights = self.scale, None
        dropout_rate = self.dropout_rate if context.dropout_key is not None else 0.0
        if context.return_weights or dropout_rate > 0.0:
            mixed, weights = attention_with_weights(
                query, key, value, scale=scale, dropout_rate=dropout_rate, dropout_key=context.dropout_key, **visible
            )
        elif context.is_decoding:
            length = context.first_slot + 1
            mixed = cached_attention(query[:, 0], past.key, past.value, context.slot_mask, length, scale=scale)[:, None]
        elif context.tentative:
            length = context.first_slot + query.shape[1]
            mixed = cached_attention_of_several(query, past.key, past.value, context.mask, length, scale=scale)
        elif context.mask is not None:
            cached, first = (key, value), context.first_slot
            mixed = prefill_attention(
                query, *own, *cached, first, token_mask=context.token_mask, scale=scale, **visible
            )
        else:
            mixed = attention(query, key, value, scale=scale, **visible)
        mixed = mixed.reshape(*mixed.shape[:2], -1)
        mixed = projection(with_lora(self.o_proj(mixed), "o_proj", mixed, *lora))
        return mixed, past, weights if context.return_weights else None

    def _heads(
        self, projected: jax.Array, adapter: Adapter | None, x: jax.Array, context: AttentionContext, axis: str
    ) -> Float[Array, "b l heads head_dim"]:
        if adapter is not None:
            projected = projected + adapter(x, context.dropout_key)
        heads = projection(projected).reshape(*projected.shape[:2], -1, self.config.attention_head_dim)
        return constrain(heads, "batch", "length", axis, None)


class SharedMLP(nnx.Module):
    """act(gate) · up, projected down; gate and up are one product, to which the use's adapter is added."""

    def __init__(self, config: Zamba2Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.activation = config.hidden_act
        options = {
            "std": config.initializer_range,
            "use_bias": config.add_bias_linear,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        self.gate_up_proj = Linear(
            config.hidden_size, (2, config.intermediate_size), axes=("embed", None, "mlp"), **options
        )
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, axes=("mlp", "embed"), **options)
        self.lora: Loras = None

    def __call__(
        self, x: Float[Array, "b l d"], use: SharedBlockUse, dropout_key: jax.Array | None
    ) -> Float[Array, "b l d"]:
        lora = (dropout_key, self.lora, use.lora)
        gate_up = self.gate_up_proj(x)
        x = apart(x)
        gate_up = with_lora(gate_up, "gate_up_proj", x, *lora)
        gate_up = gate_up + use.gate_up_adapter(x, dropout_key)
        gate_up = projection(constrain(gate_up, "batch", "length", None, "mlp"))
        x = gated(self.activation, gate_up)
        return projection(with_lora(self.down_proj(x), "down_proj", x, *lora))


class SharedTransformerBlock(nnx.Module):
    """Norm, attention, norm, MLP: u -> MLP(norm(attention(norm([h, e])))), without residuals."""

    def __init__(self, config: Zamba2Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        norm = {"eps": config.rms_norm_eps, "dtype": dtype, "param_dtype": param_dtype}
        layer = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.input_layernorm = RMSNorm(config.attention_hidden_size, **norm)
        self.self_attn = SharedAttention(config, **layer)
        self.pre_ff_layernorm = RMSNorm(config.hidden_size, **norm)
        self.feed_forward = SharedMLP(config, **layer)

    def __call__(
        self,
        hidden: Float[Array, "b l d"],
        embedded: Float[Array, "b l d"],
        use: SharedBlockUse,
        context: AttentionContext,
        past: KeyValue | None,
        remember: Callable[[Callable], Callable] = lambda function: function,
    ) -> tuple[Float[Array, "b l d"], KeyValue | None, Float[Array, "b heads l s"] | None]:
        """The output of this use, after the use's own `linear`; the cache entry; the attention weights if wanted.

        `remember` is applied to attention, MLP (each with the norm before it) and `linear`, as functions of what flows
        between them: where rematerialisation cuts.
        """
        if context.is_decoding and decoding.shared_block_obstacle(self, use, hidden.shape[0]) is None:
            return *decoding.shared_block_step(self, hidden, embedded, use, context, past), None

        def attend(hidden, embedded, past):
            x, past, weights = self.self_attn(self.input_layernorm(hidden, embedded), use, context, past)
            return constrain(x, "batch", "length", None), past, weights

        def feed_forward(x):
            x = self.feed_forward(self.pre_ff_layernorm(x), use, context.dropout_key)
            return constrain(x, "batch", "length", None)

        def linear(x):
            output = with_lora(use.linear(x), "linear", x, context.dropout_key, use.lora)
            return constrain(output, "batch", "length", None)

        x, past, weights = remember(attend)(hidden, embedded, past)
        return remember(linear)(remember(feed_forward)(x)), past, weights


class SharedBlockUse(nnx.Module):
    """What one hybrid layer owns of its shared block: the adapters, the output matrix, and LoRAs of this use alone."""

    def __init__(self, config: Zamba2Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        options = {"std": config.initializer_range, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        rank = config.adapter_rank
        self.linear = Linear(config.hidden_size, config.hidden_size, axes=("embed", None), **options)
        self.gate_up_adapter = Adapter(
            config.hidden_size, rank, (2, config.intermediate_size), in_axis="embed", out_axes=(None, "mlp"), **options
        )

        def attention_adapter(axis: str) -> Adapter | None:
            if not config.use_shared_attention_adapter:
                return None
            width = config.attention_hidden_size
            return Adapter(width, rank, width, in_axis="concat_embed", out_axes=(axis,), **options)

        self.q_adapter = attention_adapter("q_heads")
        self.k_adapter = attention_adapter("kv_heads")
        self.v_adapter = attention_adapter("kv_heads")
        self.lora: Loras = None
