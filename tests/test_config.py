"""Zamba2Config: defaults, checks and derived numbers."""

import copy
import dataclasses
import math
import pickle

import pytest
import transformers
from transformers.activations import ACT2CLS

from tests.config_cases import SMALL, changed, small
from zamba2_jax.config import HIDDEN_ACTIVATIONS, TRAINABLE_ACTIVATIONS, Zamba2Config


def test_defaults_are_those_of_transformers():
    theirs = transformers.Zamba2Config()
    ours = Zamba2Config()
    for field in dataclasses.fields(Zamba2Config):
        if field.name in ("layers_block_type", "rope_theta", "time_step_limit", "hybrid_layer_ids"):
            continue
        assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert [
        {"mamba": "linear_attention"}.get(kind, kind) for kind in ours.layers_block_type
    ] == theirs.layers_block_type
    assert ours.rope_parameters == theirs.rope_parameters
    assert ours.time_step_limit is None
    for name in ("mamba_headdim", "attention_hidden_size", "attention_head_dim"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert list(ours.hybrid_layer_ids) == theirs.hybrid_layer_ids


def test_activation_names_are_those_of_transformers():
    assert set(HIDDEN_ACTIVATIONS) | set(TRAINABLE_ACTIVATIONS) == set(ACT2CLS)


def test_sequences_become_tuples_and_numbers_plain():
    config = small(
        layers_block_type=["linear_attention", "g", "m", "hybrid"],
        time_step_limit=[0, 2],
        eos_token_id=[2, 3],
        architectures=["Zamba2ForCausalLM"],
        attention_dropout=0,
    )
    assert config.layers_block_type == SMALL["layers_block_type"]
    assert config.time_step_limit == (0.0, 2.0)
    assert config.eos_token_id == (2, 3)
    assert config.architectures == ("Zamba2ForCausalLM",)
    assert isinstance(config.attention_dropout, float)
    assert small(time_step_limit=(0.001, math.inf)).time_step_limit == (0.001, math.inf)


def test_omitted_sizes_are_derived():
    config = small()
    assert (config.intermediate_size, config.num_key_value_heads) == (128, 4)
    assert (config.mamba_intermediate_size, config.mamba_headdim) == (64, 16)
    assert (config.attention_hidden_size, config.attention_head_dim) == (64, 16)
    assert (config.hybrid_layer_ids, config.num_hybrid_layers) == ((1, 3), 2)
    assert config.num_shared_blocks == 2
    assert small(num_mem_blocks=5).num_shared_blocks == 2
    assert small(num_mem_blocks=1).num_shared_blocks == 1


def test_frozen_hashable_comparable_and_copied():
    config = small()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 64
    assert config == small()
    assert hash(config) == hash(small())
    assert config != small(adapter_rank=4)
    assert len({config, small(), small(adapter_rank=4)}) == 2
    for duplicate in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert duplicate == config
        assert hash(duplicate) == hash(config)


def test_labels_are_one_fact():
    assert small().id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert small(num_labels=3).label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    named = small(id2label={"1": "b", "0": "a", "2": "c"})
    assert named.num_labels == 3
    assert named.id2label == {0: "a", 1: "b", 2: "c"}
    assert named == small(label2id={"c": 2, "a": 0, "b": "1"})
    assert repr(named.id2label) == "{0: 'a', 1: 'b', 2: 'c'}"


def test_replace_works_out_the_base_of_rope_anew():
    shape = Zamba2Config.zamba2_1_2b
    assert shape().replace(rope_theta=5e5) == shape(rope_theta=5e5)
    assert shape(rope_theta=5e5).replace(rope_theta=1e4) == shape()
    assert shape(rope_theta=5e5).replace(adapter_rank=4).rotary_base == 5e5
    assert shape(rope_theta=5e5).replace(rope_parameters={"rope_theta": 1e4}).rotary_base == 1e4
    assert shape(rope_theta=5e5).replace(rope_parameters=None).rotary_base == 5e5
    long = shape().replace(use_long_context=True)
    assert long == shape(use_long_context=True)
    assert long.replace(use_long_context=False).rotary_base == 1e4
    fewer_heads = {"num_attention_heads": 16, "num_key_value_heads": None}
    assert long.replace(**fewer_heads) == shape(use_long_context=True, **fewer_heads)
    assert long.replace(**fewer_heads).rotary_base == pytest.approx(1e4 * 8 ** (256 / 254))


def test_replace_rebuilds_what_hangs_together():
    config = small(id2label={0: "a", 1: "b", 2: "c"})
    assert config.replace(adapter_rank=4).id2label == config.id2label
    assert config.replace(num_labels=5) == small(num_labels=5)
    assert config.replace(id2label={0: "x"}).label2id == {"x": 0}
    assert config.replace(hidden_size=64).intermediate_size == 128
    assert config.replace(hidden_size=64, intermediate_size=None).intermediate_size == 256
    other_base = small(rope_theta=2e4).replace(rope_parameters={"rope_type": "default", "rope_theta": 3e4})
    assert other_base.rope_theta == 3e4
    with pytest.raises(ValueError, match="chunk_size must be a positive integer, got 0"):
        config.replace(chunk_size=0)


# ---- what is refused ----

SIZES = (
    "vocab_size max_position_embeddings hidden_size num_hidden_layers mamba_d_state mamba_d_conv mamba_expand "
    "mamba_ngroups n_mamba_heads chunk_size intermediate_size num_attention_heads num_key_value_heads num_mem_blocks "
    "adapter_rank num_labels"
)


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2"])
@pytest.mark.parametrize("name", SIZES.split())
def test_sizes_are_positive_integers(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a positive integer, got {value!r}$"):
        small(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 7}, r"num_attention_heads=7 must divide 2 \* hidden_size = 64"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads = 4"),
        ({"n_mamba_heads": 5}, r"n_mamba_heads=5 must divide mamba_expand \* hidden_size = 64"),
        ({"mamba_ngroups": 3}, "mamba_ngroups=3 must divide n_mamba_heads = 4"),
        ({"num_attention_heads": 64, "use_mem_rope": True}, "1 is odd; change num_attention_heads=64"),
        (
            {"num_key_value_heads": 2, "use_shared_attention_adapter": True},
            "needs num_key_value_heads == num_attention_heads, got 2 and 4",
        ),
        (
            {"num_attention_heads": 32, "use_long_context": True},
            "head dim d above 2, got 2; lower num_attention_heads=32",
        ),
        ({"layers_block_type": None}, "num_hidden_layers=4; give a list of 4 names, each 'mamba' or 'hybrid'"),
        ({"layers_block_type": ["mamba"] * 3}, "layers_block_type has 3 entries but num_hidden_layers=4"),
        ({"layers_block_type": ["mamba", "m", "x", "g"]}, r"layers_block_type\[2\] must be one of mamba, .*, got 'x'"),
        ({"layers_block_type": "mgmg"}, "layers_block_type must be a sequence of layer kinds, got 'mgmg'"),
        ({"attention_dropout": 1.0}, r"attention_dropout must be in \[0, 1\), got 1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout must be in"),
        ({"attention_dropout": "0.1"}, "attention_dropout must be a finite number, got '0.1'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be positive, got 0.0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a finite number, got nan"),
        ({"rope_theta": 0}, "rope_theta must be positive"),
        ({"initializer_range": -1}, "initializer_range must be zero or positive, got -1.0"),
        ({"time_step_min": 0}, "time_step_min must be positive"),
        ({"time_step_min": 0.2}, "time_step_max must be at least time_step_min=0.2, got 0.1"),
        ({"time_step_floor": -1}, "time_step_floor must be zero or positive"),
        ({"time_step_limit": (1, 1)}, r"time_step_limit must be None or a pair .* 0 <= low < high, got \(1, 1\)"),
        ({"time_step_limit": (-1, 1)}, "time_step_limit must be"),
        ({"time_step_limit": (0, math.nan)}, "time_step_limit must be"),
        ({"time_step_limit": (0, 1, 2)}, "time_step_limit must be"),
        ({"time_step_limit": 0.1}, "time_step_limit must be"),
        ({"hidden_act": "prelu"}, "hidden_act='prelu' has trainable parameters.* use one of gelu,"),
        ({"hidden_act": "xielu"}, "hidden_act='xielu' has trainable parameters"),
        ({"hidden_act": "softsign"}, "hidden_act must be one of gelu, .*, got 'softsign'"),
        ({"use_mem_rope": 1}, "use_mem_rope must be True or False, got 1"),
        ({"pad_token_id": 64}, "pad_token_id=64 is outside the vocabulary, 0 to 63; None means no such token"),
        ({"pad_token_id": -1}, "pad_token_id=-1 is outside"),
        ({"bos_token_id": True}, "bos_token_id must be an integer, got True"),
        ({"eos_token_id": [2, 64]}, "eos_token_id=64 is outside"),
        ({"eos_token_id": []}, r"eos_token_id must be an id, a non-empty sequence of ids or None, got \[\]"),
        ({"num_logits_to_keep": -1}, r"num_logits_to_keep must be None, 0 \(all\) or positive, got -1"),
        ({"problem_type": "ranking"}, "problem_type must be None or one of regression, .*, got 'ranking'"),
        ({"problem_type": "single_label_classification", "num_labels": 1}, "needs num_labels of 2 or more, got 1"),
        ({"dtype": "int8"}, "dtype must be None or one of float64, float32, bfloat16, float16, got 'int8'"),
        ({"architectures": "Zamba2ForCausalLM"}, "architectures must be None or a sequence of class names"),
        (
            {"id2label": {0: "a", 2: "b"}},
            "id2label must give each of the ids 0, 1, ... a name of its own, got {0: 'a', 2",
        ),
        ({"id2label": {0: "a", 1: "a"}}, "id2label must give each"),
        ({"id2label": {}}, "id2label must give each"),
        ({"id2label": {"x": "a"}}, "a label's id must be an integer, got 'x'"),
        ({"id2label": ["a", "b"]}, "id2label must be None or a mapping"),
        ({"id2label": {0: "a"}, "label2id": {"a": 1}}, "label2id must be None or the inverse of id2label"),
        ({"id2label": {0: "a"}, "num_labels": 3}, "num_labels=3 contradicts the 1 labels of id2label"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope_type='yarn'; only 'default' is supported",
        ),
        ({"rope_parameters": {"type": "linear"}}, "rope_type='linear'; only 'default'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5; only 1.0"),
        ({"rope_parameters": {"factor": 2.0}}, "got also factor"),
        ({"rope_parameters": 1e4}, "rope_parameters must be a mapping"),
        (
            {"rope_theta": 2e4, "rope_parameters": {"rope_theta": 3e4}},
            "rope_theta=20000.0 contradicts the rope_theta=30000.0",
        ),
    ],
)
def test_refused_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


# ---- published shapes ----


@pytest.mark.parametrize(
    ("preset", "parameters", "applied", "heads", "head_dim"),
    [
        (Zamba2Config.zamba2_1_2b, 1_215_064_704, 1_760_352_896, 64, 128),
        (Zamba2Config.zamba2_2_7b, 2_662_214_560, 3_855_020_960, 80, 160),
        (Zamba2Config.zamba2_7b, 7_356_749_648, 11_030_550_352, 112, 224),
    ],
)
def test_published_shapes(preset, parameters, applied, heads, head_dim):
    config = preset()
    assert config.num_parameters() == parameters
    assert config.num_parameters_applied_per_token() == applied
    assert (config.n_mamba_heads, config.mamba_headdim, config.attention_head_dim) == (heads, 64, head_dim)
    assert preset(tie_word_embeddings=False).num_parameters() == parameters + config.vocab_size * config.hidden_size


def test_published_layer_patterns_and_overrides():
    assert Zamba2Config.zamba2_1_2b().hybrid_layer_ids == (5, 11, 17, 23, 29, 35)
    assert Zamba2Config.zamba2_2_7b().hybrid_layer_ids == (6, 12, 18, 24, 30, 36, 42, 47, 51)
    assert Zamba2Config.zamba2_7b().hybrid_layer_ids == (6, 11, 17, 23, 29, 35, 41, 47, 53, 59, 65, 71, 77)
    assert Zamba2Config.zamba2_1_2b(adapter_rank=8, num_mem_blocks=2).num_mem_blocks == 2


@pytest.mark.parametrize(
    "name", ["add_bias_linear", "use_shared_attention_adapter", "num_key_value_heads", "num_mem_blocks"]
)
def test_parameter_count_is_that_of_transformers(name):
    config = changed(name)
    theirs = transformers.Zamba2ForCausalLM(transformers.Zamba2Config(**config.to_dict()))
    assert config.num_parameters() == sum(parameter.numel() for parameter in theirs.parameters())


def test_convolutions_without_bias_count_less():
    convolved = 64 + 2 * 64
    assert small().num_parameters() - small(use_conv_bias=False).num_parameters() == 4 * convolved


# ---- long context ----

SCALED = 10000 * 8 ** (16 / 14)  # small() has an attention head dim of 16


@pytest.mark.parametrize(
    ("written", "rotary_base"),
    [
        ({"rope_theta": 10000}, 10000.0),
        ({"rope_theta": 10000, "use_long_context": True}, SCALED),  # 4.x as published
        ({"rope_theta": SCALED, "use_long_context": True}, SCALED),  # 4.x saved again
        ({"rope_theta": SCALED * SCALED / 10000, "use_long_context": True}, SCALED * SCALED / 10000),  # ... and again
        ({"rope_parameters": {"rope_type": "default", "rope_theta": SCALED}, "use_long_context": True}, SCALED),  # 5.x
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "use_long_context": True}, SCALED),
        ({"rope_parameters": {"rope_theta": SCALED}, "rope_theta": 10000, "use_long_context": True}, SCALED),  # ours
        ({"rope_parameters": None, "use_long_context": True}, SCALED),
        ({"rope_scaling": None, "rope_theta": 5e5}, 5e5),
        ({"use_long_context": True, "rope_theta": 5e5}, 5e5),
    ],
)
def test_long_context(written, rotary_base):
    config = Zamba2Config.from_dict(SMALL | written)
    assert config.rotary_base == pytest.approx(rotary_base, rel=1e-12)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": config.rotary_base}
    assert config.max_position_embeddings == (16384 if written.get("use_long_context") else 4096)
    assert Zamba2Config.from_dict(config.to_dict()) == config
    in_transformers_5 = transformers.Zamba2Config(**config.to_dict())
    assert in_transformers_5.rope_parameters["rope_theta"] == config.rotary_base
    factor = 8 ** (16 / 14) if config.use_long_context else 1
    assert config.to_dict()["rope_theta"] * factor == pytest.approx(config.rotary_base)  # what 4.x makes of it


def test_long_context_spellings_are_one_config():
    plain = small(use_long_context=True)
    assert plain == small(use_long_context=True, rope_theta=SCALED)
    assert plain == small(use_long_context=True, rope_parameters={"rope_theta": SCALED})
    assert plain.rope_theta == 10000.0


# ---- dialects ----
