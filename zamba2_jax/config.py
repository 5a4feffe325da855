"""`Zamba2Config`: the shape of a Zamba2 model, checked once and then immutable.

Field names, defaults and meanings are those of `transformers.Zamba2Config`. What other programs write is translated
by `config_dialects`; this module knows one spelling only.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from zamba2_jax import config_checks as check
from zamba2_jax import config_dialects, costs

# fmt: off
HIDDEN_ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate",
    "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu",
    "sqrtsoftplus", "swish", "tanh",
)
# fmt: on
"""The parameter-free activation names of transformers' `ACT2CLS`."""

TRAINABLE_ACTIVATIONS = ("prelu", "xielu")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
DTYPES = ("float64", "float32", "bfloat16", "float16")

TRAINED_ROPE_THETA = 10000.0
LONG_CONTEXT_LENGTH = 16384
DEFAULT_HYBRID_LAYER_IDS = (6, 12, 18, 24, 30, 36, 42, 47, 51)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zamba2Config:
    """Shape and behaviour of a Zamba2 model: frozen, compared by value, hashable (as a static argument of `jax.jit`).

    Every value is checked at construction; a `ValueError` names the field, what came and what would do.

    Sizes
        `vocab_size` v, `hidden_size` d, `num_hidden_layers`, `intermediate_size` i (None: 4 d), `num_attention_heads` h
        over a width of 2 d, `num_key_value_heads` (None: h), `adapter_rank` r, `num_mem_blocks` (distinct shared
        blocks), `mamba_d_state` n, `mamba_d_conv` k, `mamba_expand` (E = expand d), `n_mamba_heads`,
        `mamba_ngroups` g, `chunk_size` q.
    `layers_block_type`
        One name per layer, kept as a tuple of "mamba" and "hybrid" (a shared transformer block before a mamba layer).
        transformers 5's "linear_attention" and Zyphra's "m" and "g" are accepted. None gives the pattern of
        Zamba2-2.7B, which has 54 layers; any other depth needs the list.
    `time_step_limit`
        None: dt is not clamped, in prefill and decode alike, as in training. (low, high): clamped in both.
        transformers on CPU clamps to (`time_step_min`, inf) whatever its file says. `time_step_min`, `time_step_max`
        and `time_step_floor` matter here for initialisation only.
    `rope_theta`, `rope_parameters`, `use_long_context`
        `rope_parameters={"rope_type": "default", "rope_theta": ...}` may be given instead of `rope_theta`; other
        kinds of RoPE are refused. `use_long_context` sets `max_position_embeddings` to 16384 and changes the base of
        RoPE: see `rotary_base`. RoPE is applied only with `use_mem_rope`.
    `use_conv_bias`
        False builds the convolutions without a bias. transformers ignores the field and always has one.
    `use_mamba_kernels`, `use_mem_eff_path`, `use_cache`, `num_logits_to_keep`
        Choose PyTorch kernels and defaults of PyTorch's calls. Kept so that a file survives a round trip; no effect
        here, where a call returns a cache if its own `use_cache` says so and `generate` always uses one.
    `num_labels`, `id2label`, `label2id`
        One fact in three forms: either map decides the others, and `num_labels` alone names LABEL_0, LABEL_1, ...
    `dtype`
        Name of the dtype of a checkpoint ("float32", "bfloat16", "float16", "float64"), or None for unknown.
    `eos_token_id`
        An id, several ids (kept as a tuple) or None.
    """

    vocab_size: int = 32000
    max_position_embeddings: int = 4096
    hidden_size: int = 2560
    num_hidden_layers: int = 54
    layers_block_type: Sequence[str] | None = None
    mamba_d_state: int = 64
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_ngroups: int = 1
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] | None = None
    n_mamba_heads: int = 8
    use_mamba_kernels: bool = True
    use_conv_bias: bool = True
    chunk_size: int = 256
    use_mem_eff_path: bool = False
    add_bias_linear: bool = False
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    attention_dropout: float = 0.0
    num_mem_blocks: int = 1
    use_shared_attention_adapter: bool = False
    adapter_rank: int = 128
    use_mem_rope: bool = False
    rope_theta: float = TRAINED_ROPE_THETA
    rope_parameters: dataclasses.InitVar[Mapping[str, Any] | None] = None
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    num_logits_to_keep: int | None = 1
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    use_long_context: bool = False
    tie_word_embeddings: bool = True
    num_labels: int = 2
    id2label: Mapping[int, str] | None = None
    label2id: Mapping[str, int] | None = None
    problem_type: str | None = None
    dtype: str | None = None
    architectures: tuple[str, ...] | None = None

    # ---- construction ----

    def __post_init__(self, rope_parameters: Mapping[str, Any] | None) -> None:
        labels = check.labels(self.num_labels, self.id2label, self.label2id)
        for name, value in zip(("num_labels", "id2label", "label2id"), labels, strict=True):
            self._set(name, value)
        for name in ("hidden_size", "num_attention_heads"):
            self._set(name, check.size(name, getattr(self, name)))
        if self.intermediate_size is None:
            self._set("intermediate_size", 4 * self.hidden_size)
        if self.num_key_value_heads is None:
            self._set("num_key_value_heads", self.num_attention_heads)
        if self.use_long_context:
            self._set("max_position_embeddings", LONG_CONTEXT_LENGTH)
        self._set("rope_theta", self._stored_rope_theta(rope_parameters))
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
            if field.type is float:
                self._set(name, check.number(name, value))
            if field.type is int or name in ("intermediate_size", "num_key_value_heads"):
                self._set(name, check.size(name, value))
        self._normalise_sequences()
        self._check_divisions()
        self._check_ranges()
        self._check_tokens()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen for everyone but its own construction

    def _stored_rope_theta(self, rope_parameters: Mapping[str, Any] | None) -> float:
        """`rope_theta` or what `rope_parameters` says, in one spelling, so that equal models are equal configs."""
        theta = check.number("rope_theta", self.rope_theta)
        factor = self._rope_factor()
        if rope_parameters is not None and (base := config_dialects.rope_base(rope_parameters)) is not None:
            if theta != TRAINED_ROPE_THETA:  # not the default, so both were given
                config_dialects.check_rope_theta(theta, base, factor)
            theta = check.number("rope_theta", base)
        return TRAINED_ROPE_THETA if math.isclose(theta, TRAINED_ROPE_THETA * factor, rel_tol=1e-9) else theta

    def _normalise_sequences(self) -> None:
        layers = self.layers_block_type
        if layers is None:
            if self.num_hidden_layers != 54:
                raise ValueError(
                    f"layers_block_type=None stands for the 54-layer pattern of Zamba2-2.7B, but num_hidden_layers="
                    f"{self.num_hidden_layers}; give a list of {self.num_hidden_layers} names, each 'mamba' or 'hybrid'"
                )
            layers = block_types(54, DEFAULT_HYBRID_LAYER_IDS)
        self._set("layers_block_type", config_dialects.layer_kinds(layers))
        if len(self.layers_block_type) != self.num_hidden_layers:
            raise ValueError(
                f"layers_block_type has {len(self.layers_block_type)} entries but num_hidden_layers="
                f"{self.num_hidden_layers}; they must agree"
            )
        if self.time_step_limit is not None:
            self._set("time_step_limit", check.interval("time_step_limit", self.time_step_limit))
        if self.architectures is not None:
            names = self.architectures
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"architectures must be None or a sequence of class names, got {names!r}")
            self._set("architectures", tuple(names))

    def _check_divisions(self) -> None:
        for whole_name, whole, part_name in (
            ("2 * hidden_size", 2 * self.hidden_size, "num_attention_heads"),
            ("num_attention_heads", self.num_attention_heads, "num_key_value_heads"),
            ("mamba_expand * hidden_size", self.mamba_expand * self.hidden_size, "n_mamba_heads"),
            # With the line above this one makes mamba_ngroups divide E, too.
            ("n_mamba_heads", self.n_mamba_heads, "mamba_ngroups"),
        ):
            part = getattr(self, part_name)
            if whole % part:
                raise ValueError(f"{part_name}={part} must divide {whole_name} = {whole}")
        if self.use_mem_rope and self.attention_head_dim % 2:
            raise ValueError(
                f"use_mem_rope rotates pairs of channels, but 2 * hidden_size / num_attention_heads = "
                f"{self.attention_head_dim} is odd; change num_attention_heads={self.num_attention_heads}"
            )
        if self.use_shared_attention_adapter and self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"use_shared_attention_adapter needs num_key_value_heads == num_attention_heads, got "
                f"{self.num_key_value_heads} and {self.num_attention_heads}: the k and v adapters have the full width"
            )

    def _check_ranges(self) -> None:
        for name, good, wanted in (
            ("attention_dropout", 0 <= self.attention_dropout < 1, "in [0, 1)"),
            ("rms_norm_eps", self.rms_norm_eps > 0, "positive"),
            ("rope_theta", self.rope_theta > 0, "positive"),
            ("initializer_range", self.initializer_range >= 0, "zero or positive"),
            ("time_step_min", self.time_step_min > 0, "positive"),
            ("time_step_max", self.time_step_max >= self.time_step_min, f"at least time_step_min={self.time_step_min}"),
            ("time_step_floor", self.time_step_floor >= 0, "zero or positive"),
            ("problem_type", self.problem_type in (None, *PROBLEM_TYPES), f"None or one of {', '.join(PROBLEM_TYPES)}"),
            ("dtype", self.dtype in (None, *DTYPES), f"None or one of {', '.join(DTYPES)}"),
        ):
            if not good:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        if self.hidden_act in TRAINABLE_ACTIVATIONS:
            raise ValueError(
                f"hidden_act={self.hidden_act!r} has trainable parameters, for which a Zamba2 checkpoint has no place; "
                f"use one of {', '.join(HIDDEN_ACTIVATIONS)}"
            )
        if self.hidden_act not in HIDDEN_ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(HIDDEN_ACTIVATIONS)}, got {self.hidden_act!r}")
        if self.use_long_context and self.attention_head_dim <= 2:
            raise ValueError(
                f"use_long_context scales the RoPE base by 8 ** (d / (d - 2)) and needs an attention head dim d above "
                f"2, got {self.attention_head_dim}; lower num_attention_heads={self.num_attention_heads}"
            )
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError(
                "problem_type='single_label_classification' needs num_labels of 2 or more, got 1; "
                "use 'regression' for one output"
            )
        if self.num_logits_to_keep is not None:
            kept = check.integer("num_logits_to_keep", self.num_logits_to_keep)
            if kept < 0:
                raise ValueError(f"num_logits_to_keep must be None, 0 (all) or positive, got {kept}")
            self._set("num_logits_to_keep", kept)

    def _check_tokens(self) -> None:
        for name in ("pad_token_id", "bos_token_id"):
            if getattr(self, name) is not None:
                self._set(name, self._token(name, getattr(self, name)))
        ids = self.eos_token_id
        if isinstance(ids, list | tuple):
            if not ids:
                raise ValueError(f"eos_token_id must be an id, a non-empty sequence of ids or None, got {ids!r}")
            self._set("eos_token_id", tuple(self._token("eos_token_id", token) for token in ids))
        elif ids is not None:
            self._set("eos_token_id", self._token("eos_token_id", ids))

    def _token(self, name: str, value: Any) -> int:
        token = check.integer(name, value)
        if not 0 <= token < self.vocab_size:
            raise ValueError(
                f"{name}={token} is outside the vocabulary, 0 to {self.vocab_size - 1}; None means no such token"
            )
        return token

    def replace(self, **changes: Any) -> "Zamba2Config":
        """A new config with `changes`, checked like any other.

        Fields that construction filled in (`intermediate_size`, `num_key_value_heads`, `max_position_embeddings` under
        `use_long_context`) keep their values; pass None to the first two to derive them again. A change of one of
        `num_labels`, `id2label` and `label2id` replaces all three. The base of RoPE is worked out anew from
        `rope_theta`, or from `rope_parameters` where they are given.

        `dataclasses.replace` does not know these rules: it would hand the old `rope_parameters` to the new config.
        """
        labels = {"num_labels": 2, "id2label": None, "label2id": None}
        if labels.keys() & changes.keys():
            changes = labels | changes
        if changes.get("rope_parameters") is not None:
            changes = {"rope_theta": TRAINED_ROPE_THETA} | changes
        # Unless told otherwise dataclasses.replace takes the property of this name, which is the old config's base.
        return dataclasses.replace(self, **{"rope_parameters": None} | changes)

    # ---- the published shapes ----

    @classmethod
    def zamba2_1_2b(cls, **overrides: Any) -> "Zamba2Config":
        """Zamba2-1.2B (and -Instruct): 1,215,064,704 parameters."""
        shape = {
            "hidden_size": 2048,
            "num_hidden_layers": 38,
            "layers_block_type": block_types(38, range(5, 36, 6)),
            "mamba_d_state": 128,
            "n_mamba_heads": 64,
            "use_mem_rope": True,
            "use_shared_attention_adapter": True,
        }
        return cls(**shape | overrides)

    @classmethod
    def zamba2_2_7b(cls, **overrides: Any) -> "Zamba2Config":
        """Zamba2-2.7B (and -Instruct): 2,662,214,560 parameters."""
        return cls(**{"n_mamba_heads": 80, "num_mem_blocks": 2} | overrides)

    @classmethod
    def zamba2_7b(cls, **overrides: Any) -> "Zamba2Config":
        """Zamba2-7B (and -Instruct): 7,356,749,648 parameters."""
        shape = {
            "hidden_size": 3584,
            "num_hidden_layers": 81,
            "layers_block_type": block_types(81, (6, *range(11, 78, 6))),
            "n_mamba_heads": 112,
            "mamba_ngroups": 2,
            "num_mem_blocks": 2,
            "use_mem_rope": True,
        }
        return cls(**shape | overrides)

    # ---- derived sizes ----

    @property
    def mamba_intermediate_size(self) -> int:
        """E, the width inside a mamba layer."""
        return self.mamba_expand * self.hidden_size

    @property
    def mamba_headdim(self) -> int:
        """p, the width of one mamba head."""
        return self.mamba_intermediate_size // self.n_mamba_heads

    @property
    def attention_hidden_size(self) -> int:
        """2 d: attention reads the hidden state beside the token embedding."""
        return 2 * self.hidden_size

    @property
    def attention_head_dim(self) -> int:
        """Width of one attention head, 2 d / h."""
        return self.attention_hidden_size // self.num_attention_heads

    @property
    def hybrid_layer_ids(self) -> tuple[int, ...]:
        """Indices of the layers that use a shared block, ascending."""
        return tuple(index for index, kind in enumerate(self.layers_block_type) if kind == "hybrid")

    @property
    def num_hybrid_layers(self) -> int:
        """How many times a shared block is used."""
        return len(self.hybrid_layer_ids)

    @property
    def num_shared_blocks(self) -> int:
        """Distinct shared blocks that exist: a block that no hybrid layer would reach is not built."""
        return min(self.num_mem_blocks, self.num_hybrid_layers)

    @property
    def rotary_base(self) -> float:
        """The RoPE base to compute with.

        Without `use_long_context` this is `rope_theta`. With it, the models were trained with 10000 scaled once by
        8 ** (d / (d - 2)), d the attention head dim, and files disagree on who scales: in transformers 5 a file carries
        the base it wants, in 4.x it holds the base before scaling (as published) or after it (as saved again, which
        4.x then scales twice). So a `rope_theta` of exactly 10000 is scaled once, and any other value is taken as it
        stands. A `rope_theta` that is the scaled 10000 is stored as 10000, since both mean the same model.
        """
        return self.rope_theta * self._rope_factor() if self.rope_theta == TRAINED_ROPE_THETA else self.rope_theta

    def _rope_factor(self) -> float:
        return config_dialects.long_context_factor(self.attention_head_dim) if self.use_long_context else 1.0

    def num_parameters(self) -> int:
        """Number of parameters of `Zamba2ForCausalLM`, each counted once; a tied head is the embedding."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self._count_layers(self.num_shared_blocks) + self.hidden_size  # final_layernorm

    def num_parameters_applied_per_token(self) -> int:
        """Number of parameters that a token meets in the layers and the head, a shared block counted at each use.

        The weights that one decode step reads, but for a row of the embedding and the d weights of the final norm.
        """
        return self.vocab_size * self.hidden_size + self._count_layers(self.num_hybrid_layers)

    def _count_layers(self, shared_blocks: int) -> int:
        d, E, i, r = self.hidden_size, self.mamba_intermediate_size, self.intermediate_size, self.adapter_rank
        bias = int(self.add_bias_linear)
        attention = self.num_attention_heads * self.attention_head_dim
        key_value = self.num_key_value_heads * self.attention_head_dim
        convolved = E + 2 * self.mamba_ngroups * self.mamba_d_state
        projected = E + convolved + self.n_mamba_heads
        mamba_layer = (
            d  # input_layernorm
            + (d + bias) * projected
            + (self.mamba_d_conv + int(self.use_conv_bias)) * convolved
            + 3 * self.n_mamba_heads  # A_log, D, dt_bias
            + E  # norm
            + (E + bias) * d
        )
        shared_block = (
            2 * d  # input_layernorm
            + 2 * d * (attention + 2 * key_value)
            + attention * d
            + d  # pre_ff_layernorm
            + (d + bias) * 2 * i
            + (i + bias) * d
        )
        use = d * d + r * (d + 2 * i)
        if self.use_shared_attention_adapter:
            use += 3 * r * (2 * d + attention)
        return self.num_hidden_layers * mamba_layer + shared_blocks * shared_block + self.num_hybrid_layers * use

    # ---- costs: `zamba2_jax.costs` has the formulas ----

    def flops_per_token(self, length: int, *, training: bool = False, chunk_size: int | None = None) -> float:
        """Operations (multiplications and additions) a token, on average over a sequence of `length` tokens.

        Args:
            length: of the sequence, read from its beginning; a token sees (length + 1) / 2 keys on average.
            training: three times the forward pass: the backward pass takes two products for each of its own. What
                gradient checkpointing recomputes is not counted, as is usual for a share of the peak rate.
            chunk_size: of the state-space recurrence, whose work inside a chunk grows with it; None is the config's.

        Raises:
            ValueError: `length` or `chunk_size` below 1.
        """
        chunk = check.size("chunk_size", self.chunk_size if chunk_size is None else chunk_size)
        keys = (check.size("length", length) + 1) / 2
        return costs.operations(self, keys=keys, chunk=min(chunk, length)).total * (3 if training else 1)

    def flops_per_decode_step(self, batch_size: int, context_length: int) -> float:
        """Operations that add one token to each of `batch_size` sequences, which then hold `context_length` tokens.

        Raises:
            ValueError: `batch_size` or `context_length` below 1.
        """
        keys = check.size("context_length", context_length)
        return check.size("batch_size", batch_size) * costs.operations(self, keys=keys, chunk=1).total

    def bytes_per_decode_step(
        self,
        batch_size: int,
        context_length: int,
        *,
        weight_itemsize: float = 2,
        cache_itemsize: float = 2,
        ssm_itemsize: float = 4,
    ) -> float:
        """Bytes that such a step must move: every weight read once per use, the Mamba2 states read and written, the
        filled slots' keys and values read, and the new token's written.

        Args:
            batch_size, context_length: as in `flops_per_decode_step`.
            weight_itemsize, cache_itemsize, ssm_itemsize: bytes of one number: of the weights; of keys, values and
                convolution windows; of the SSM states. The scales of quantised weights are not counted.

        Raises:
            ValueError: `batch_size` or `context_length` below 1.
        """
        rows, keys = check.size("batch_size", batch_size), check.size("context_length", context_length)
        state = costs.state_bytes(self, cache_itemsize=cache_itemsize, ssm_itemsize=ssm_itemsize)
        token = costs.key_value_bytes(self, cache_itemsize=cache_itemsize)
        return self.num_parameters_applied_per_token() * weight_itemsize + rows * (2 * state + (keys + 1) * token)

    def cache_bytes(
        self, batch_size: int, max_length: int, *, cache_itemsize: float = 2, ssm_itemsize: float = 4
    ) -> float:
        """Bytes of a cache of `max_length` slots for `batch_size` sequences, but for its book-keeping.

        Raises:
            ValueError: `batch_size` or `max_length` below 1.
        """
        rows, slots = check.size("batch_size", batch_size), check.size("max_length", max_length)
        state = costs.state_bytes(self, cache_itemsize=cache_itemsize, ssm_itemsize=ssm_itemsize)
        return rows * (state + slots * costs.key_value_bytes(self, cache_itemsize=cache_itemsize))

    # ---- files ----

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Zamba2Config":
        """The config that a config.json describes, in any of its three dialects.

        `values` may come from transformers 5.x, from transformers 4.48 to 4.57, or from Zyphra's fork (`state_size`,
        `mamba_headdim`, `ffn_hidden_size`, ..., with that fork's defaults for what is missing). A field that no dialect
        has is named in one `UserWarning`. Two fields that contradict each other, another `model_type`, or an option
        that this port does not have raise `ValueError`.
        """
        config = cls(**config_dialects.to_arguments(values, {field.name for field in dataclasses.fields(cls)}))
        config_dialects.check_derived(config, values)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that transformers 5.x loads, and 4.48 and later as far as they know the fields.

        Layers are spelled "mamba", which 5.x reads as its "linear_attention". `rope_parameters` holds `rotary_base`, as
        5.x uses it; `rope_theta` holds the base that 4.x, scaling under `use_long_context`, turns into the same.
        `time_step_limit` is written only where there is one.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("layers_block_type", "eos_token_id", "architectures", "time_step_limit"):
            if isinstance(values[name], tuple):
                values[name] = list(values[name])
        values |= {"id2label": dict(self.id2label), "label2id": dict(self.label2id), "model_type": "zamba2"}
        del values["num_labels"]  # id2label says it, and transformers keeps no such field in a file
        if self.time_step_limit is None:
            del values["time_step_limit"]
        if self.dtype is not None:
            values["torch_dtype"] = self.dtype
        values["rope_parameters"] = self.rope_parameters
        if self.rope_theta != TRAINED_ROPE_THETA:
            values["rope_theta"] = self.rope_theta / self._rope_factor()
        return values

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> "Zamba2Config":
        """Read config.json from a directory, or from a repository of the Hugging Face hub (cached in `cache_dir`).

        Raises `FileNotFoundError` where there is no such directory, repository or file, `ValueError` where the file is
        not JSON or describes another model.
        """
        path = config_dialects.find_config(
            name_or_path, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        return cls.from_dict(config_dialects.read_config(path))

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `to_dict()` to `directory`/config.json, making the directory; the file appears whole or not at all."""
        config_dialects.write_config(directory, self.to_dict())


def _rope_parameters(self: Zamba2Config) -> dict[str, Any]:
    """RoPE in transformers 5's form, with the base that is computed with (`rotary_base`)."""
    return {"rope_type": "default", "rope_theta": self.rotary_base}


# Attached here because inside the class the name already is the constructor argument of the same name.
Zamba2Config.rope_parameters = property(_rope_parameters)


def block_types(num_layers: int, hybrid: Sequence[int]) -> tuple[str, ...]:
    """`layers_block_type` of `num_layers` layers of which those in `hybrid` (0-based) use a shared block."""
    return tuple("hybrid" if index in hybrid else "mamba" for index in range(num_layers))
