"""Configs of the tests of Zamba2Config."""

from zamba2_jax.config import Zamba2Config

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "layers_block_type": ("mamba", "hybrid", "mamba", "hybrid"),
    "n_mamba_heads": 4,
    "num_attention_heads": 4,
    "num_mem_blocks": 2,
}


def small(**changes) -> Zamba2Config:
    return Zamba2Config(**SMALL | changes)


# One non-default value for every field; a field added without one fails test_every_field_is_written.
OTHER_VALUES = {
    "vocab_size": 66,
    "max_position_embeddings": 128,
    "hidden_size": 64,
    "num_hidden_layers": (3, {"layers_block_type": ("mamba", "hybrid", "mamba")}),
    "layers_block_type": ("mamba", "mamba", "mamba", "hybrid"),
    "mamba_d_state": 8,
    "mamba_d_conv": 3,
    "mamba_expand": 3,
    "mamba_ngroups": 2,
    "time_step_min": 0.002,
    "time_step_max": 0.2,
    "time_step_floor": 1e-5,
    "time_step_limit": (0.0, 1.0),
    "n_mamba_heads": 8,
    "use_mamba_kernels": False,
    "use_conv_bias": False,
    "chunk_size": 16,
    "use_mem_eff_path": True,
    "add_bias_linear": True,
    "intermediate_size": 48,
    "hidden_act": "silu",
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "attention_dropout": 0.1,
    "num_mem_blocks": 1,
    "use_shared_attention_adapter": True,
    "adapter_rank": 4,
    "use_mem_rope": True,
    "rope_theta": 500000.0,
    "initializer_range": 0.01,
    "rms_norm_eps": 1e-6,
    "use_cache": False,
    "num_logits_to_keep": 0,
    "pad_token_id": None,
    "bos_token_id": 5,
    "eos_token_id": (2, 3),
    "use_long_context": True,
    "tie_word_embeddings": False,
    "num_labels": 3,
    "id2label": {0: "no", 1: "yes"},
    "label2id": {"no": 0, "yes": 1},
    "problem_type": "regression",
    "dtype": "bfloat16",
    "architectures": ("Zamba2ForCausalLM",),
}


def changed(name: str) -> Zamba2Config:
    value = OTHER_VALUES[name]
    value, more = value if isinstance(value, tuple) and isinstance(value[-1], dict) else (value, {})
    return small(**{name: value} | more)


# ---- defaults and construction ----


LAYERS = ["mamba", "hybrid", "mamba", "hybrid"]
EXPECTED = Zamba2Config(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=4,
    layers_block_type=LAYERS,
    mamba_d_state=8,
    n_mamba_heads=4,
    mamba_ngroups=2,
    intermediate_size=48,
    num_attention_heads=4,
    num_mem_blocks=2,
    use_shared_attention_adapter=True,
    adapter_rank=6,
    use_mem_rope=True,
    dtype="bfloat16",
    eos_token_id=(2, 3),
    architectures=("Zamba2ForCausalLM",),
)
SHARED = {
    "architectures": ["Zamba2ForCausalLM"],
    "model_type": "zamba2",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "mamba_ngroups": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_mem_blocks": 2,
    "use_mem_rope": True,
    "eos_token_id": [2, 3],
    "kv_channels": 8,
    "num_query_groups": 4,
    "mamba_headdim": 16,
}
TRANSFORMERS_4 = SHARED | {
    "layers_block_type": LAYERS,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "n_mamba_heads": 4,
    "intermediate_size": 48,
    "adapter_rank": 6,
    "use_shared_attention_adapter": True,
    "rope_theta": 10000,
    "time_step_limit": None,
    "attention_head_dim": 16,
    "attention_hidden_size": 64,
    "hybrid_layer_ids": [1, 3],
    "torch_dtype": "bfloat16",
    "transformers_version": "4.56.2",
    "_name_or_path": "./",
    "use_cache": True,
}
TRANSFORMERS_5 = {
    name: value for name, value in TRANSFORMERS_4.items() if name not in ("rope_theta", "torch_dtype")
} | {
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "dtype": "bfloat16",
    "output_hidden_states": False,
    "return_dict": True,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "problem_type": None,
}
ZYPHRA = SHARED | {
    "layers_block_type": ["m", "g", "m", "g"],
    "state_size": 8,
    "conv_dimension": 4,
    "expansion_factor": 2,
    "ffn_hidden_size": 48,
    "gated_linear_unit": True,
    "lora_rank": 6,
    "use_shared_attention_lora": True,
    "use_shared_block_lora": True,
    "rope_theta": 10000,
    "sliding_window": None,
    "ft_lora": False,
    "use_mamba_kernels": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
}
DIALECTS = {"transformers 4": TRANSFORMERS_4, "transformers 5": TRANSFORMERS_5, "Zyphra": ZYPHRA}
