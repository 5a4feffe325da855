"""Zamba2Model, Zamba2ForCausalLM, Zamba2ForSequenceClassification: the wiring, to be read beside figure 2 of arXiv
2411.15242."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from zamba2_jax import cache as cache_lib
from zamba2_jax.cache import Zamba2Cache
from zamba2_jax.config import Zamba2Config
from zamba2_jax.generation import generate
from zamba2_jax.inputs import (
    ModelInputs,
    check_class_labels,
    check_inputs,
    check_labels,
    check_logits_to_keep,
)
from zamba2_jax.layer_stack import Execution, LayerStack, Past
from zamba2_jax.layers import decoding
from zamba2_jax.layers.linear import Embed, Linear
from zamba2_jax.layers.mamba2 import MambaLayer
from zamba2_jax.layers.norms import RMSNorm
from zamba2_jax.layers.rope import rotation
from zamba2_jax.layers.shared_block import AttentionContext, SharedBlockUse, SharedTransformerBlock
from zamba2_jax.ops.losses import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    linear_causal_lm_loss,
    mean_squared_error,
)
from zamba2_jax.outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutputWithPast
from zamba2_jax.pretrained import PretrainedModel
from zamba2_jax.quantization import weight_itemsize
from zamba2_jax.sharding import constrain
from zamba2_jax.tentative import TentativeCache
from zamba2_jax.tokens import TokenLayout

CLASSIFICATION_LOSSES = {
    "regression": mean_squared_error,
    "single_label_classification": cross_entropy,
    "multi_label_classification": binary_cross_entropy_with_logits,
}


class Zamba2Model(PretrainedModel):
    """Embedding, Mamba2 layers with shared transformer blocks woven in, final norm.

    Every layer is a Mamba2 layer. Before a hybrid layer's mixer, a shared transformer block reads the stream together
    with the original embedding, and its output joins the mixer's input. Blocks are stored once (`shared_blocks`); what
    each use owns is in `shared_block_uses`, in the order of the hybrid layers.

    Args:
        config: the architecture.
        dtype: of computation.
        param_dtype: of stored parameters; None is `dtype`. float32 parameters with bfloat16 computation is the setting
            for training.
        rngs: for the initial weights.
    """

    def __init__(
        self,
        config: Zamba2Config,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype)
        layer = {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": rngs}
        self.embed_tokens = Embed(
            config.vocab_size, config.hidden_size, padding_id=config.pad_token_id, std=config.initializer_range, **layer
        )
        self.layers = nnx.List([MambaLayer(config, **layer) for _ in range(config.num_hidden_layers)])
        self.shared_blocks = nnx.List(
            [SharedTransformerBlock(config, **layer) for _ in range(config.num_shared_blocks)]
        )
        self.shared_block_uses = nnx.List([SharedBlockUse(config, **layer) for _ in range(config.num_hybrid_layers)])
        self.final_layernorm = RMSNorm(
            config.hidden_size, eps=config.rms_norm_eps, dtype=self.dtype, param_dtype=self.param_dtype
        )
        self.execution = Execution()

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        past_key_values: Zamba2Cache | None = None,
        inputs_embeds: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        cache_length: int | None = None,
        dropout_key: jax.Array | None = None,
        tentative: bool = False,
    ) -> BaseModelOutputWithPast:
        """Runs the model; pure, eager or under jit.

        Args:
            input_ids: (b, l) integers in [0, vocab_size). Either these or `inputs_embeds`.
            attention_mask: (b, l), 1 or True at real tokens, for this call's tokens; or (b, length + l) with a cache,
                for past and new ones, of which the last l are read. Masked tokens before a row's first and after its
                last real one are absent: the row continues as if it had not been padded. Between real tokens they are
                hidden, but time passes.
            position_ids: (b, l) or (1, l), for the rotary embedding. None counts from each row's first real token, or
                from the cache's.
            past_key_values: continue from this cache; the call takes the next l of its slots.
            inputs_embeds: (b, l, d), in place of embedded `input_ids`.
            segment_ids: (b, l) integers for packed rows: convolution, state, attention and positions do not cross from
                one segment to the next. Not together with a cache.
            use_cache: return a cache; implied by `past_key_values`.
            output_attentions: return attention probabilities (computed the plain way, (b, heads, l, keys) each).
            output_hidden_states: return the input of every layer and the final state.
            cache_length: slots of the cache that `use_cache=True` makes; None is `config.max_position_embeddings`.
            dropout_key: a `jax.random` key turns `config.attention_dropout` on, and the dropout of a LoRA
                (`zamba2_jax.add_lora`), as in training. None: no dropout.
            tentative: it is decided afterwards how many of the tokens count, in each row: what comes back in place of
                the cache is a `zamba2_jax.tentative.TentativeCache`, whose `keep` makes one. For guesses that the
                scores confirm or not. Needs `past_key_values`.

        Raises:
            ValueError: before anything runs, for inputs that contradict each other, have the wrong shape, hold ids
                outside the vocabulary, or do not fit into the cache. Values are checked where they are concrete, so not
                under jit.
        """
        inputs = check_inputs(
            self.config,
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            segment_ids,
            tentative,
        )
        return self.run(
            inputs,
            past_key_values,
            use_cache,
            output_attentions,
            output_hidden_states,
            cache_length,
            dropout_key,
            tentative,
        )

    def run(
        self,
        inputs: ModelInputs,
        past_key_values: Zamba2Cache | None,
        use_cache: bool,
        output_attentions: bool,
        output_hidden_states: bool,
        cache_length: int | None,
        dropout_key: jax.Array | None,
        tentative: bool = False,
    ) -> BaseModelOutputWithPast:
        """`__call__` for inputs that `check_inputs` has seen: models with a head check theirs together with these."""
        past = past_key_values
        if past is None and use_cache:
            slots = self.config.max_position_embeddings if cache_length is None else cache_length
            if slots < inputs.length:
                raise ValueError(f"cache_length={slots} is less than the {inputs.length} tokens of this call.")
            past = self.init_cache(inputs.batch_size, slots)
        empty = past_key_values is None
        layout = TokenLayout.make(
            inputs.batch_size,
            inputs.length,
            token_mask=inputs.token_mask,
            segment_ids=inputs.segment_ids,
            position_ids=inputs.position_ids,
            first_position=None if past is None else past.next_position,
            tentative=tentative,
        )
        slot_mask = None if past is None else _fill_slots(past, layout, inputs.length)
        context = self._attention_context(layout, past, None if empty else slot_mask, output_attentions)
        uses, count = self.config.num_hybrid_layers, self.config.num_hidden_layers
        keys = [None] * (uses + count) if dropout_key is None else list(jax.random.split(dropout_key, uses + count))
        embedded = self.embed_tokens(inputs.ids) if inputs.embeds is None else inputs.embeds.astype(self.dtype)
        embedded = constrain(embedded, "batch", "length", None)

        stack = LayerStack(
            layers=self.layers,
            blocks=self.shared_blocks,
            uses=self.shared_block_uses,
            hybrid_layer_ids=self.config.hybrid_layer_ids,
            embedded=embedded,
            layout=layout,
            context=context,
            keep_inputs=output_hidden_states,
        )
        before = Past(
            mamba=[None] * count if past is None else past.mamba,
            attention=[None] * uses if past is None else past.attention,
            dropout_keys=keys[:uses],
            mamba_dropout_keys=keys[uses:],
        )
        hidden, trail = stack.run(embedded, before, self._execution_for(past, layout))
        hidden = self.final_layernorm(hidden)

        present = None
        if tentative:
            present = TentativeCache(
                mamba=tuple(trail.mamba),
                attention=tuple(trail.attention),
                slot_mask=past.slot_mask,
                length=past.length,
                positions=layout.positions,
                next_position=past.next_position,
            )
        elif past is not None:
            present = Zamba2Cache(
                mamba=tuple(trail.mamba),
                attention=tuple(trail.attention),
                slot_mask=slot_mask,
                length=past.length + inputs.length,
                next_position=layout.next_position,
            )
            present = cache_lib.constrain_cache(present)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=present,
            hidden_states=(*trail.inputs, hidden) if output_hidden_states else None,
            attentions=tuple(trail.weights) if output_attentions else None,
        )

    def _execution_for(self, past: Zamba2Cache | None, layout: TokenLayout) -> Execution:
        """With a cache nothing is recomputed, since nothing is differentiated; one token, or a few guessed ones, are
        worth no copy of the weights."""
        if past is None:
            return self.execution
        return Execution(scan=self.execution.scan and not (layout.is_step or layout.tentative))

    def _attention_context(
        self,
        layout: TokenLayout,
        past: Zamba2Cache | None,
        slot_mask: Bool[Array, "b slots"] | None,
        output_attentions: bool,
    ) -> AttentionContext:
        angles = None
        if self.config.use_mem_rope:
            angles = rotation(layout.positions, self.config.attention_head_dim, self.config.rotary_base)
        mask = None
        if slot_mask is not None:  # else nothing is before this call, and the tokens see each other only
            slots = jnp.arange(past.max_length)[None, None]
            columns = jnp.arange(layout.positions.shape[1])[None, :, None]
            mask = slot_mask[:, None] & (slots <= past.length + columns)
        return AttentionContext(
            rotation=angles,
            segment_ids=layout.segment_ids,
            token_mask=layout.token_mask,
            mask=mask,
            slot_mask=slot_mask,
            first_slot=None if past is None else past.length,
            dropout_key=None,
            return_weights=output_attentions,
            tentative=layout.tentative,
        )


class Zamba2ForCausalLM(PretrainedModel):
    """Zamba2Model with a language-model head, tied to the embedding unless `config.tie_word_embeddings` is False.
    Arguments as there."""

    def __init__(
        self,
        config: Zamba2Config,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype)
        layer = {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": rngs}
        self.model = Zamba2Model(config, **layer)
        head = {"axes": ("embed", "vocab"), "std": config.initializer_range, **layer}
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, **head)

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        past_key_values: Zamba2Cache | None = None,
        inputs_embeds: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        logits_to_keep: int | ArrayLike = 0,
        cache_length: int | None = None,
        dropout_key: jax.Array | None = None,
        tentative: bool = False,
    ) -> CausalLMOutputWithPast:
        """Next-token scores, and the loss if labels are given.

        Args:
            labels: (b, l) integers, usually `input_ids` themselves: the shift by one happens here. -100 is not counted;
                neither is, in a packed row, the last token of a segment, whose successor belongs to another document.
                The loss does not read `logits` but makes scores of its own, a block of tokens at a time. Under jit,
                logits that the program does not return are not computed, so that `jax.grad` of the loss holds no (b, l,
                v) array; eager, both are.
            logits_to_keep: compute scores for the last so many tokens only; 0 for all. Or a 1-D integer array: for
                those columns. The loss needs them all.
            The others: as in `Zamba2Model.__call__`.

        Raises:
            ValueError: as in `Zamba2Model.__call__`; labels of another shape; labels together with `logits_to_keep`.
        """
        inputs = check_inputs(
            self.config,
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            segment_ids,
            tentative,
        )
        check_logits_to_keep(logits_to_keep, inputs)
        if labels is not None:
            labels = check_labels(labels, inputs, self.config.vocab_size)
            if np.ndim(logits_to_keep) or logits_to_keep:
                raise ValueError("labels need the scores of every token: leave logits_to_keep at 0, or labels out.")
        outputs = self.model.run(
            inputs,
            past_key_values,
            use_cache,
            output_attentions,
            output_hidden_states,
            cache_length,
            dropout_key,
            tentative,
        )
        logits = self._head(_keep_columns(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            if inputs.segment_ids is not None:
                labels = _forget_first_of_segment(labels, inputs.segment_ids)
            loss = self._loss(outputs.last_hidden_state, labels)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _head(self, hidden: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        one_token = self.lm_head is None and hidden.shape[1] == 1
        if one_token and decoding.head_obstacle(self.model.embed_tokens, hidden.shape[0]) is None:
            return decoding.head_scores(self.model.embed_tokens, hidden)
        logits = self.model.embed_tokens.attend(hidden) if self.lm_head is None else self.lm_head(hidden)
        return constrain(logits, "batch", "length", "vocab")

    def _loss(self, hidden: Float[Array, "b l d"], labels: Int[Array, "b l"]) -> Float[Array, ""]:
        if self.lm_head is None:
            return linear_causal_lm_loss(hidden, self.model.embed_tokens.matrix(), labels, vocab_axis=0)
        return linear_causal_lm_loss(hidden, self.lm_head.matrix(), labels, vocab_axis=1)

    generate = generate

    def flops_per_token(self, length: int, *, training: bool = False) -> float:
        """`config.flops_per_token`: operations a token, on average over a sequence of `length` tokens."""
        return self.config.flops_per_token(length, training=training)

    def bytes_per_decode_step(self, batch_size: int, context_length: int) -> float:
        """`config.bytes_per_decode_step` for weights as they are stored and a cache in the compute dtype."""
        sizes = {"weight_itemsize": weight_itemsize(self), "cache_itemsize": self.dtype.itemsize}
        return self.config.bytes_per_decode_step(batch_size, context_length, **sizes)


class Zamba2ForSequenceClassification(PretrainedModel):
    """Zamba2Model with a linear head on each row's last real token. Arguments as in `Zamba2Model`; `config.num_labels`
    scores."""

    def __init__(
        self,
        config: Zamba2Config,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype)
        layer = {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": rngs}
        self.model = Zamba2Model(config, **layer)
        self.score = Linear(
            config.hidden_size, config.num_labels, axes=("embed", "labels"), std=config.initializer_range, **layer
        )

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        past_key_values: Zamba2Cache | None = None,
        inputs_embeds: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        cache_length: int | None = None,
        dropout_key: jax.Array | None = None,
    ) -> SequenceClassifierOutputWithPast:
        """Class scores (b, num_labels), and the loss if labels are given.

        The row's last real token is the last one that is not `config.pad_token_id`, as in transformers. With
        `inputs_embeds` it is the last one of `attention_mask`, or the last column without a mask.

        Args:
            labels: (b,) integers for single-label classification; (b, num_labels) 0 or 1 for multi-label; (b,) or (b,
                num_labels) floats for regression. `config.problem_type` decides; where it is None: regression for one
                label, single-label for integers, else multi-label.
            The others: as in `Zamba2Model.__call__`.

        Raises:
            ValueError: as in `Zamba2Model.__call__`; labels whose shape does not fit the problem; several rows in a
                model without a padding token.
        """
        inputs = check_inputs(
            self.config, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, None
        )
        if self.config.pad_token_id is None and inputs.batch_size > 1:
            raise ValueError(
                f"a batch of {inputs.batch_size} rows needs config.pad_token_id to find each row's last token; set it, "
                "or pass rows one at a time."
            )
        if labels is not None:
            problem, labels = check_class_labels(
                labels, inputs.batch_size, self.config.num_labels, self.config.problem_type
            )
        outputs = self.model.run(
            inputs, past_key_values, use_cache, output_attentions, output_hidden_states, cache_length, dropout_key
        )
        hidden = outputs.last_hidden_state
        last = self._last_token(inputs)
        logits = self.score(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
        return SequenceClassifierOutputWithPast(
            loss=None if labels is None else CLASSIFICATION_LOSSES[problem](logits, labels),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last_token(self, inputs: ModelInputs) -> Int[Array, " b"]:
        if inputs.ids is not None and self.config.pad_token_id is not None:
            real = inputs.ids != self.config.pad_token_id
        elif inputs.ids is None and inputs.token_mask is not None:
            real = inputs.token_mask
        else:
            return jnp.full((inputs.batch_size,), inputs.length - 1, jnp.int32)
        return jnp.argmax(jnp.arange(inputs.length, dtype=jnp.int32) * real, axis=-1)


def _fill_slots(past: Zamba2Cache, layout: TokenLayout, length: int) -> Bool[Array, "b slots"]:
    real = jnp.ones((past.batch_size, length), bool) if layout.token_mask is None else layout.token_mask
    return jax.lax.dynamic_update_slice(past.slot_mask, real, (0, past.length))


def _keep_columns(hidden: Float[Array, "b l d"], logits_to_keep: int | ArrayLike) -> Float[Array, "b kept d"]:
    if isinstance(logits_to_keep, int | np.integer):
        return hidden if logits_to_keep == 0 else hidden[:, -int(logits_to_keep) :]
    return jnp.take(hidden, jnp.asarray(logits_to_keep), axis=1)


def _forget_first_of_segment(labels: Int[Array, "b l"], segment_ids: Int[Array, "b l"]) -> Int[Array, "b l"]:
    """Labels without each segment's first token: what precedes it belongs to another document."""
    first = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(first, -100, labels)
