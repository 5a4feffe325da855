"""The three dialects of config.json are one config."""

import copy
import math

import pytest
import transformers

from tests.config_cases import DIALECTS, EXPECTED, LAYERS, TRANSFORMERS_4, TRANSFORMERS_5, ZYPHRA
from zamba2_jax.config import Zamba2Config


@pytest.mark.parametrize("dialect", DIALECTS)
def test_three_dialects_are_one_config(dialect):
    written = copy.deepcopy(DIALECTS[dialect])
    assert Zamba2Config.from_dict(written) == EXPECTED
    assert written == DIALECTS[dialect]  # the argument is left as it was


def test_zyphra_defaults_are_zyphra_s():
    old = {"hidden_size": 256, "num_hidden_layers": 1, "layers_block_type": ["m"], "num_attention_heads": 4}
    assert Zamba2Config.from_dict(old).n_mamba_heads == 8  # heads of 64, where transformers has 8 heads of any width
    assert Zamba2Config.from_dict(old | {"expansion_factor": 3}).n_mamba_heads == 12
    assert Zamba2Config.from_dict(old | {"state_size": 4, "model_type": "mamba"}).mamba_d_state == 4
    assert Zamba2Config.from_dict(old | {"num_mem_heads": 0}).num_attention_heads == 4


def test_layer_types_is_an_alias():
    aliased = {name: value for name, value in TRANSFORMERS_5.items() if name != "layers_block_type"}
    aliased["layer_types"] = TRANSFORMERS_5["layers_block_type"]
    assert Zamba2Config.from_dict(aliased) == EXPECTED
    assert Zamba2Config.from_dict(aliased | {"layers_block_type": LAYERS}) == EXPECTED


def test_unknown_fields_are_named_once():
    with pytest.warns(UserWarning, match="unknown to zamba2_jax are ignored: apples, pears") as caught:
        config = Zamba2Config.from_dict(TRANSFORMERS_4 | {"pears": 1, "apples": None})
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert config == EXPECTED


def test_fields_that_transformers_writes_are_known():
    generation_defaults = transformers.GenerationConfig._get_default_generation_params()
    assert Zamba2Config.from_dict(transformers.Zamba2Config().to_dict()) == Zamba2Config()
    assert Zamba2Config.from_dict(TRANSFORMERS_4 | generation_defaults) == EXPECTED


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (TRANSFORMERS_4, {"model_type": "llama"}, "model_type must be 'zamba2', got 'llama'"),
        (TRANSFORMERS_4, {"model_type": "mamba"}, "model_type must be 'zamba2', got 'mamba'"),
        (TRANSFORMERS_4, {"state_size": 16}, "state_size=16 contradicts mamba_d_state=8"),
        (TRANSFORMERS_4, {"dtype": "float32"}, "torch_dtype='bfloat16' contradicts dtype='float32'"),
        (TRANSFORMERS_4, {"layer_types": ["m", "m", "m", "g"]}, "layer_types=.* contradicts layers_block_type="),
        (TRANSFORMERS_4, {"mamba_headdim": 64}, "mamba_headdim=64 contradicts the other fields, which give 16"),
        (TRANSFORMERS_4, {"head_dim": 8}, "head_dim=8 contradicts the other fields, which give 16"),
        (TRANSFORMERS_4, {"attention_head_dim": 8}, "attention_head_dim=8 contradicts"),
        (TRANSFORMERS_4, {"attention_hidden_size": 8}, "attention_hidden_size=8 contradicts"),
        (
            TRANSFORMERS_4,
            {"hybrid_layer_ids": [0]},
            r"hybrid_layer_ids=\[0\] contradicts the other fields, .* \[1, 3\]",
        ),
        (TRANSFORMERS_4, {"kv_channels": 9}, "kv_channels=9 contradicts"),
        (TRANSFORMERS_4, {"num_query_groups": 1}, "num_query_groups=1 contradicts"),
        (
            TRANSFORMERS_4,
            {"rope_parameters": {"rope_theta": 2e4}},
            "rope_theta=10000 contradicts the rope_theta=20000.0",
        ),
        (TRANSFORMERS_4, {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type='linear'; only 'default'"),
        (TRANSFORMERS_4, {"id2label": {"0": "a"}, "num_labels": 4}, "num_labels=4 contradicts"),
        (TRANSFORMERS_4, {"layers_block_type": None}, "give a list of 4 names"),
        (TRANSFORMERS_4, {"hidden_size": None}, "hidden_size must be a positive integer, got None"),
        (ZYPHRA, {"mamba_headdim": 24}, r"mamba_headdim=24 must be positive and divide expand \* hidden_size = 64"),
        (ZYPHRA, {"hidden_size": "32"}, "hidden_size must be a positive integer, got '32'"),
        (ZYPHRA, {"num_mem_heads": 2}, "num_mem_heads=2 contradicts"),
        (ZYPHRA, {"gated_linear_unit": False}, "gated_linear_unit=False is not supported, only True"),
        (ZYPHRA, {"use_shared_block_lora": False}, "use_shared_block_lora=False is not supported, only True"),
        (ZYPHRA, {"sliding_window": 4096}, "sliding_window=4096 is not supported, only None"),
        (ZYPHRA, {"ft_lora": True}, "ft_lora=True is not supported"),
        (ZYPHRA, {"use_low_rank_mamba_proj": True}, "use_low_rank_mamba_proj=True is not supported"),
    ],
)
def test_contradictions_and_foreign_options_are_refused(base, changes, message):
    with pytest.raises(ValueError, match=message):
        Zamba2Config.from_dict(base | changes)


def test_only_mappings_are_configs():
    with pytest.raises(ValueError, match="a config must be a mapping of fields, got list"):
        Zamba2Config.from_dict([1])


def test_tagged_infinity_of_transformers_5_is_read():
    limited = TRANSFORMERS_5 | {"time_step_limit": [0.001, {"__float__": "Infinity"}]}
    assert Zamba2Config.from_dict(limited).time_step_limit == (0.001, math.inf)


def test_dtype_with_torch_s_prefix():
    assert Zamba2Config.from_dict(TRANSFORMERS_4 | {"torch_dtype": "torch.float16"}).dtype == "float16"


# ---- round trips ----
