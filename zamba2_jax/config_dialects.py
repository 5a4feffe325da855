"""The file config.json: finding, reading and writing it, and turning its three dialects into `Zamba2Config` arguments.

The dialects are those of transformers 5.x, of transformers 4.48 to 4.57, and of Zyphra's own fork (older revisions on
the hub). They are told apart field by field, since a file converted by hand may mix them.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zamba2_jax.hub import as_path, hub_id

LAYER_KINDS = {"mamba": "mamba", "linear_attention": "mamba", "m": "mamba", "hybrid": "hybrid", "g": "hybrid"}
"""Every accepted spelling of a layer kind -> ours."""

FORK_NAMES = {
    "state_size": "mamba_d_state",
    "conv_dimension": "mamba_d_conv",
    "expansion_factor": "mamba_expand",
    "ffn_hidden_size": "intermediate_size",
    "lora_rank": "adapter_rank",
    "use_shared_attention_lora": "use_shared_attention_adapter",
}
"""Zyphra's field name -> ours, where only the name differs."""

ALIASES = FORK_NAMES | {"layer_types": "layers_block_type", "torch_dtype": "dtype"}

FORK_OPTIONS = {
    "gated_linear_unit": (True, "the MLP of every published Zamba2 is gated"),
    "use_shared_block_lora": (True, "the shared MLP always has adapters"),
    "sliding_window": (None, "attention always sees the whole past"),
    "window_size": (None, "attention always sees the whole past"),
    "ft_lora": (False, "extra fine-tuning adapters are not part of the model"),
    "use_low_rank_mamba_proj": (False, "mamba projections are always of full rank"),
}
"""Options of Zyphra's code: the one value that transformers and this port have, and why."""

FORK_HEADDIM = 64

# fmt: off
IGNORED = frozenset((
    # What transformers writes about itself, the file or PyTorch, none of which changes what the model computes.
    "model_type", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "auto_map",
    "custom_pipelines", "return_dict", "output_hidden_states", "output_attentions", "torchscript", "use_bfloat16",
    "tf_legacy_loss", "pruned_heads", "is_encoder_decoder", "is_decoder", "add_cross_attention",
    "cross_attention_hidden_size", "tie_encoder_decoder", "chunk_size_feed_forward", "finetuning_task",
    "task_specific_params", "tokenizer_class", "prefix", "sep_token_id", "decoder_start_token_id",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "_experts_implementation", "experts_implementation", "tie_last_hidden_states",
    "bias_gelu_fusion",
    # Defaults of generation, which older versions kept in this file; generation_config.json is where they count.
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "epsilon_cutoff", "eta_cutoff",
    "encoder_repetition_penalty", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
))
# fmt: on

DERIVED = {
    "attention_head_dim": lambda config: config.attention_head_dim,
    "head_dim": lambda config: config.attention_head_dim,
    "attention_hidden_size": lambda config: config.attention_hidden_size,
    "kv_channels": lambda config: config.hidden_size // config.num_attention_heads,
    "num_query_groups": lambda config: config.num_attention_heads,
    "num_mem_heads": lambda config: config.num_attention_heads,
    "mamba_headdim": lambda config: config.mamba_headdim,
    "hybrid_layer_ids": lambda config: list(config.hybrid_layer_ids),
}
"""Fields that follow from others: a file may hold them, and they must agree."""

ROPE_FIELDS = ("rope_theta", "rope_parameters", "rope_scaling")


def is_fork(values: Mapping[str, Any]) -> bool:
    """Whether `values` uses spellings that only Zyphra's fork writes."""
    layers = values.get("layers_block_type")
    letters = isinstance(layers, Sequence) and ("m" in layers or "g" in layers)
    return letters or bool((FORK_NAMES.keys() | FORK_OPTIONS.keys()) & values.keys())


def to_arguments(values: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """Arguments of `Zamba2Config` (field names `known`) from the content of a config.json in any dialect.

    Raises `ValueError` for another model, contradicting duplicates and unsupported options; warns once, by name, of
    fields that no dialect has.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"a config must be a mapping of fields, got {type(values).__name__}")
    model_type = values.get("model_type")
    if model_type not in (None, "zamba2") and not (model_type == "mamba" and is_fork(values)):
        raise ValueError(f"model_type must be 'zamba2', got {model_type!r}: this is the config of another model")

    arguments = {name: _decode(value) for name, value in values.items() if name in known and name not in ROPE_FIELDS}
    for alias, name in ALIASES.items():
        if values.get(alias) is not None:
            _merge(arguments, name, values[alias], alias)
    if isinstance(arguments.get("dtype"), str):
        arguments["dtype"] = _plain_dtype(arguments["dtype"])
    for name, (supported, reason) in FORK_OPTIONS.items():
        if values.get(name, supported) != supported:
            raise ValueError(f"{name}={values[name]!r} is not supported, only {supported!r}: {reason}")
    _add_mamba_heads(arguments, values)
    _add_rope(arguments, values)

    recognised = known | ALIASES.keys() | FORK_OPTIONS.keys() | DERIVED.keys() | IGNORED | set(ROPE_FIELDS)
    unknown = sorted(str(name) for name in values.keys() - recognised)
    if unknown:
        message = f"config fields unknown to zamba2_jax are ignored: {', '.join(unknown)}"
        warnings.warn(message, UserWarning, stacklevel=3)
    return arguments


def check_derived(config: Any, values: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a derived field of the file contradicts the fields that it follows from."""
    for name, derive in DERIVED.items():
        # Zyphra's standalone code writes 0 for "no such heads given".
        if values.get(name) is None or (name == "num_mem_heads" and values[name] == 0):
            continue
        given = list(values[name]) if isinstance(values[name], list | tuple) else values[name]
        if given != derive(config):
            raise ValueError(
                f"{name}={given!r} contradicts the other fields, which give {derive(config)!r}; correct one"
            )
    theta, base = values.get("rope_theta"), rope_base(values.get("rope_parameters") or values.get("rope_scaling") or {})
    if theta is not None and base is not None:
        factor = long_context_factor(config.attention_head_dim) if config.use_long_context else 1.0
        check_rope_theta(theta, base, factor)


def rope_base(parameters: Mapping[str, Any]) -> float | None:
    """The base in transformers 5's `rope_parameters`, None without one; `ValueError` for any RoPE but the default."""
    if not isinstance(parameters, Mapping):
        raise ValueError(f"rope_parameters must be a mapping with rope_type and rope_theta, got {parameters!r}")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_parameters has rope_type={kind!r}; only 'default' is supported")
    partial = parameters.get("partial_rotary_factor", 1.0)
    if partial not in (None, 1.0):
        raise ValueError(
            f"rope_parameters has partial_rotary_factor={partial!r}; only 1.0, the whole head, is supported"
        )
    unknown = sorted(map(str, parameters.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}))
    if unknown:
        raise ValueError(f"rope_parameters may hold rope_type and rope_theta, got also {', '.join(unknown)}")
    return parameters.get("rope_theta")


def check_rope_theta(theta: float, base: float, factor: float) -> None:
    """The separate `rope_theta` and the `base` of `rope_parameters` must agree, up to the long-context `factor`.

    The factor, since transformers 4.x scales the separate field while loading and 5.x does not.
    """
    if not any(math.isclose(base, theta * scale, rel_tol=1e-6) for scale in (1.0, factor)):
        raise ValueError(
            f"rope_theta={theta!r} contradicts the rope_theta={base!r} of rope_parameters; give one of them"
        )


def long_context_factor(head_dim: int) -> float:
    """What `use_long_context` multiplies a RoPE base of 10000 by; 1 for head dims that `Zamba2Config` then refuses."""
    return 8.0 ** (head_dim / (head_dim - 2)) if head_dim > 2 else 1.0


def layer_kinds(layers: Any) -> tuple[str, ...]:
    """A list of layer kinds of any dialect as a tuple of "mamba" and "hybrid"; `ValueError` names an unknown kind."""
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise ValueError(f"layers_block_type must be a sequence of layer kinds, got {layers!r}")
    for index, kind in enumerate(layers):
        if not isinstance(kind, str) or kind not in LAYER_KINDS:
            raise ValueError(f"layers_block_type[{index}] must be one of {', '.join(LAYER_KINDS)}, got {kind!r}")
    return tuple(LAYER_KINDS[kind] for kind in layers)


def find_config(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike | None,
    local_files_only: bool,
) -> Path:
    """Path of the config.json of a directory or hub repository; `FileNotFoundError` says what was looked for."""
    path = as_path(name_or_path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"no config.json in the directory {path}")
        return path / "config.json"
    name = hub_id(name_or_path)
    if name is None:
        raise FileNotFoundError(
            f"{path} is not a directory; give a model directory or a hub id such as Zyphra/Zamba2-1.2B"
        )

    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        found = huggingface_hub.hf_hub_download(
            name, "config.json", revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"{name!r} is no directory here, and its config.json (revision {revision or 'main'}) was not found on the "
            f"hub or in its cache: {error}"
        ) from error
    return Path(found)


def read_config(path: Path) -> dict[str, Any]:
    """Content of a config.json; `ValueError` where it is not JSON or not recognisably a Zamba2 config."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # covers undecodable bytes as well as malformed JSON
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    if values.get("model_type") is None and not is_fork(values) and "layers_block_type" not in values:
        raise ValueError(f"{path} has neither model_type 'zamba2' nor fields of Zamba2, e.g. layers_block_type")
    return values


def write_config(directory: str | os.PathLike, values: Mapping[str, Any]) -> None:
    """Write `values` to `directory`/config.json through a temporary file beside it: no reader sees half of it."""
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, "config.json")
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            # An infinite time-step limit becomes the bare word Infinity, which every version of transformers reads.
            file.write(json.dumps(values, indent=2, sort_keys=True) + "\n")
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _merge(arguments: dict[str, Any], name: str, value: Any, alias: str) -> None:
    """Take `value`, found under `alias`, as field `name`, unless the field is there and says otherwise."""
    present = arguments.get(name)
    if present is not None and _comparable(name, present) != _comparable(name, value):
        raise ValueError(f"{alias}={value!r} contradicts {name}={present!r}; the two names mean the same field")
    arguments[name] = value


def _comparable(name: str, value: Any) -> Any:
    if name == "layers_block_type":
        return layer_kinds(value)
    return _plain_dtype(value) if name == "dtype" and isinstance(value, str) else value


def _plain_dtype(name: str) -> str:
    return name.removeprefix("torch.")


def _decode(value: Any) -> Any:
    """Undo transformers 5's spelling of non-finite numbers, {"__float__": "Infinity"}."""
    if isinstance(value, list | tuple):
        return [_decode(item) for item in value]
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return value


def _add_mamba_heads(arguments: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Zyphra's fork gives the width of a mamba head (64 unless said), transformers their number."""
    head_dim = values.get("mamba_headdim", FORK_HEADDIM if is_fork(values) else None)
    if arguments.get("n_mamba_heads") is not None or head_dim is None:
        return
    hidden, expand = arguments.get("hidden_size", 2560), arguments.get("mamba_expand", 2)
    if not isinstance(hidden, int) or not isinstance(expand, int):
        return  # the constructor names the culprit
    if not isinstance(head_dim, int) or head_dim < 1 or hidden * expand % head_dim:
        raise ValueError(
            f"mamba_headdim={head_dim!r} must be positive and divide expand * hidden_size = {hidden * expand}"
        )
    arguments["n_mamba_heads"] = hidden * expand // head_dim


def _add_rope(arguments: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Take the base from `rope_parameters` (5.x; `rope_scaling` is its older name), else from `rope_theta` (4.x)."""
    base = rope_base(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = values.get("rope_theta") if base is None else base
    if theta is not None:
        arguments["rope_theta"] = theta
