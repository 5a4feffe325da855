"""Options of one generate call: where each value comes from, and whether it makes sense.

A value is looked up in this order, as in transformers 5: the argument of `generate`, the `generation_config` argument,
the model's own generation config, transformers' default. A knob of transformers that is not implemented here raises by
name unless it is neutral. The model's own generation config came with a checkpoint and not from the caller: there such
knobs, and names that nobody knows, draw one warning.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import secrets
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class _Unset:
    """Marks an argument that was not given: `None` is a value of its own (it switches an option off, as in
    transformers).
    """

    def __repr__(self) -> str:
        return "<from generation_config>"


UNSET: Any = _Unset()

# transformers' defaults for what is set nowhere (GenerationConfig._get_default_generation_params).
_DEFAULTS: dict[str, Any] = {
    "max_length": None,
    "max_new_tokens": None,
    "min_length": 0,
    "min_new_tokens": None,
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "prefill_chunk": None,
    "stop_strings": None,
    "prompt_lookup_num_tokens": None,
    "max_matching_ngram_size": 2,
}
_DEFAULT_NEW_TOKENS = 20

# transformers' name for the same thing.
_ALIASES = {"prefill_chunk_size": "prefill_chunk"}

# transformers' knobs that are not implemented, each with the values (besides None) that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (),
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "cache_config": (),
    "cache_implementation": (),
    "constraints": (),
    "continuous_batching_config": (),
    "decoder_start_token_id": (),
    "diversity_penalty": (0.0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "is_assistant": (False,),
    "low_memory": (False,),
    "max_cache_len": (),
    "max_time": (),
    "num_beam_groups": (1,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "penalty_alpha": (0.0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "sequence_bias": (),
    "speculation_type": (),
    "suppress_tokens": (),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1.0,),
    "use_cache": (True,),
    "use_mtp": (False,),
    "watermarking_config": (),
}

# Entries of a generation config that say nothing about the tokens: provenance, torch.compile, settings of assistants
# that are refused above.
_INERT = frozenset(
    {
        "_from_model_config",
        "assistant_confidence_threshold",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "compile_config",
        "disable_compile",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "target_lookbehind",
        "transformers_version",
    }
)

_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p")
_BEAM_ONLY = ("length_penalty", "early_stopping")
_EXTRA_OUTPUTS = ("output_scores", "output_logits")
_LOOKUP_ONLY = ("max_matching_ngram_size",)


@dataclasses.dataclass(frozen=True)
class Options:
    """The checked values of one generate call. Names and meanings are transformers'; None and 0 as given there mean
    off.

    Attributes:
        max_new_tokens: tokens to add at most, already worked out from `max_length` where that was given.
        min_new_tokens: end-of-sequence tokens are forbidden before this many new ones, worked out from `min_length`
            likewise.
        temperature, top_k, top_p, min_p: None where they change nothing (and always without sampling).
        repetition_penalty: None where it changes nothing.
        no_repeat_ngram_size: 0 for off.
        eos_token_ids: possibly empty.
        pad_token_id: what finished rows are filled with; the first end-of-sequence token where no pad token is defined.
        stop_strings: possibly empty.
        prompt_lookup_num_tokens: None for off.
        max_matching_ngram_size: at least 1.
        seed: always a number; drawn from the operating system where none was given.
    """

    max_new_tokens: int
    min_new_tokens: int
    do_sample: bool
    num_beams: int
    num_return_sequences: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int
    length_penalty: float
    early_stopping: bool | str
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    return_dict_in_generate: bool
    output_scores: bool
    output_logits: bool
    prefill_chunk: int | None
    stop_strings: tuple[str, ...]
    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int
    seed: int


def merge(
    generation_config: Any, model_generation_config: Any, config: Any, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Every option's value, unchecked, by the order of precedence at the top of this module.

    Args:
        generation_config: the argument of `generate`: a transformers GenerationConfig, a dict, or None.
        model_generation_config: the model's own, of the same kinds; what cannot be followed there is warned of. Where
            it is None the token ids come from `config`.
        config: the model's config; `bos_token_id`, `eos_token_id` and `pad_token_id` are read.
        arguments: keyword arguments; `UNSET` ones are skipped, None is kept.

    Raises:
        ValueError: a name that is unknown, or a knob of transformers that is not implemented and not neutral, in
            `generation_config` or `arguments`.
    """
    if model_generation_config is None:
        model_generation_config = {
            name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
    values = dict(_DEFAULTS)
    for source in (_read_model(model_generation_config), _read(generation_config, "generation_config")):
        values |= {name: value for name, value in source.items() if value is not None}
    # An unknown argument that is None asks for nothing (a tokenizer's `token_type_ids=None`); transformers lets it pass
    # too.
    given = {name: value for name, value in arguments.items() if value is not UNSET}
    known = {name: value for name, value in given.items() if name in _DEFAULTS or value is not None}
    return values | _select(known, "the arguments of generate")


def special_tokens(values: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The checked `bos_token_id`, `pad_token_id` and `eos_token_ids` of merged values.

    Without a padding id the first end-of-sequence id pads, as in transformers.

    Raises:
        ValueError: an id outside the vocabulary, or several where one is meant.
    """
    single = {}
    for name in ("bos_token_id", "pad_token_id"):
        ids = _token_ids(values[name], name, vocab_size)
        if len(ids) > 1:
            raise ValueError(f"{name} must be one token id, got {values[name]!r}.")
        single[name] = ids[0] if ids else None
    eos_token_ids = _token_ids(values["eos_token_id"], "eos_token_id", vocab_size)
    if single["pad_token_id"] is None and eos_token_ids:
        single["pad_token_id"] = eos_token_ids[0]
    return {**single, "eos_token_ids": eos_token_ids}


def check(
    values: Mapping[str, Any],
    *,
    prompt_length: int,
    vocab_size: int,
    max_position_embeddings: int,
    explicit: Sequence[str],
    seed: int | None,
) -> Options:
    """Checks merged values and works out what depends on the prompt.

    Args:
        values: from `merge`.
        prompt_length: columns of the prompt, padding included, as transformers counts `max_length`.
        vocab_size: token ids must be below it.
        max_position_embeddings: longer sequences draw a warning.
        explicit: names that the caller gave as arguments: checked even where they have no effect, which draws a
            warning.
        seed: None for one from the operating system.

    Raises:
        ValueError: a value that cannot be served, naming it, what came and what would do.
    """
    do_sample = _flag(values, "do_sample")
    num_beams = _integer(values, "num_beams", minimum=1, none=1)
    num_return_sequences = _integer(values, "num_return_sequences", minimum=1, none=1)
    if num_return_sequences > 1:
        if num_beams == 1 and not do_sample:
            raise ValueError(
                f"num_return_sequences must be 1 for greedy decoding, which finds one sequence, got "
                f"{num_return_sequences}; set do_sample=True or num_beams."
            )
        if 1 < num_beams < num_return_sequences:
            raise ValueError(f"num_return_sequences must be at most num_beams={num_beams}, got {num_return_sequences}.")

    tokens = special_tokens(values, vocab_size)
    sampling = _sampling(values, explicit, do_sample)
    _warn_without_effect(values, explicit, do_sample=do_sample, num_beams=num_beams)
    max_new_tokens = _max_new_tokens(values, prompt_length, max_position_embeddings)
    return Options(
        max_new_tokens=max_new_tokens,
        min_new_tokens=_min_new_tokens(values, prompt_length, max_new_tokens),
        do_sample=do_sample,
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        repetition_penalty=_unless(1.0, _number(values, "repetition_penalty", above=0.0, none=1.0)),
        no_repeat_ngram_size=_integer(values, "no_repeat_ngram_size", minimum=0, none=0),
        length_penalty=_number(values, "length_penalty", none=1.0),
        early_stopping=_early_stopping(values["early_stopping"]),
        eos_token_ids=tokens["eos_token_ids"],
        pad_token_id=tokens["pad_token_id"],
        return_dict_in_generate=_flag(values, "return_dict_in_generate"),
        output_scores=_flag(values, "output_scores"),
        output_logits=_flag(values, "output_logits"),
        prefill_chunk=None if values["prefill_chunk"] is None else _integer(values, "prefill_chunk", minimum=1),
        stop_strings=_stop_strings(values["stop_strings"], num_beams),
        prompt_lookup_num_tokens=_prompt_lookup(values, num_beams, num_return_sequences),
        max_matching_ngram_size=_integer(values, "max_matching_ngram_size", minimum=1, none=2),
        seed=_seed(seed),
        **sampling,
    )


def _read(source: Any, where: str) -> dict[str, Any]:
    """The options in a caller's generation config."""
    return _select(_mapping(source, where), where)


def _read_model(source: Any) -> dict[str, Any]:
    """The options in the model's own generation config, with one warning that names what is passed over."""
    selected, unsupported, unknown = _sort(_mapping(source, "the model's generation_config"))
    ignored = unsupported | {name: value for name, value in unknown.items() if value is not None}
    if ignored:
        names = ", ".join(f"{name}={value!r}" for name, value in ignored.items())
        _warn(f"The model's generation_config asks for what generate does not have; ignored: {names}.")
    return selected


def _mapping(source: Any, where: str) -> Mapping[str, Any]:
    """A generation config of any kind as a mapping; None is an empty one."""
    if source is None:
        return {}
    if not isinstance(source, Mapping):
        if not hasattr(source, "to_dict"):
            raise ValueError(
                f"{where} must be a transformers GenerationConfig, a dict or None, got {type(source).__name__}."
            )
        return source.to_dict()
    return source


def _select(source: Mapping[str, Any], where: str) -> dict[str, Any]:
    selected, unsupported, unknown = _sort(source)
    for name, value in unsupported.items():
        raise ValueError(f"{name}={value!r} in {where} is not supported; leave it out.")
    for name in unknown:
        raise ValueError(f"{name} in {where} is not an option of generate; known are {', '.join(sorted(_DEFAULTS))}.")
    return selected


def _sort(source: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Our options, knobs of transformers that are not implemented and not neutral, and names that nobody knows."""
    selected, unsupported, unknown = {}, {}, {}
    for name, value in source.items():
        name = _ALIASES.get(name, name)
        if name in _DEFAULTS:
            selected[name] = value
        elif name in _UNSUPPORTED:
            if value is not None and not any(_same(value, neutral) for neutral in _UNSUPPORTED[name]):
                unsupported[name] = value
        elif name not in _INERT:
            unknown[name] = value
    return selected, unsupported, unknown


def _same(value: Any, neutral: Any) -> bool:
    return isinstance(value, numbers.Number) and value == neutral


def _unless(neutral: float, value: float | None) -> float | None:
    return None if value == neutral else value


def _integer(values: Mapping[str, Any], name: str, *, minimum: int, none: int | None = None) -> int:
    value = values[name]
    if value is None and none is not None:
        return none
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}.")
    return int(value)


def _number(values: Mapping[str, Any], name: str, *, none: float, above: float = -math.inf) -> float:
    value = values[name]
    if value is None:
        return none
    if not _is_number(value) or not math.isfinite(value) or value <= above:
        bound = "" if above == -math.inf else f" above {above:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}.")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _flag(values: Mapping[str, Any], name: str) -> bool:
    value = values[name]
    if value is None:
        return False
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def _sampling(values: Mapping[str, Any], explicit: Sequence[str], do_sample: bool) -> dict[str, Any]:
    if not do_sample:  # what the caller gave is checked all the same; a config file may hold what is not in use
        values = {name: values[name] if name in explicit else None for name in _SAMPLING_ONLY}
    temperature = values["temperature"]
    if temperature is not None and not (_is_number(temperature) and 0 < temperature < math.inf):
        raise ValueError(
            f"temperature must be a finite number above 0, got {temperature!r}; for greedy decoding set "
            "do_sample=False and leave it out."
        )
    top_p = values["top_p"]
    if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"top_p must be above 0 and at most 1 (1 switches it off), got {top_p!r}.")
    min_p = values["min_p"]
    if min_p is not None and not (_is_number(min_p) and 0 <= min_p <= 1):
        raise ValueError(f"min_p must be from 0 to 1 (None switches it off), got {min_p!r}.")
    try:
        top_k = _integer(values, "top_k", minimum=0, none=0)
    except ValueError as error:
        raise ValueError(f"{str(error)[:-1]}; 0 or None switches it off.") from None
    if not do_sample:
        return dict.fromkeys(_SAMPLING_ONLY)
    return {
        "temperature": None if temperature is None else _unless(1.0, float(temperature)),
        "top_k": top_k or None,
        "top_p": None if top_p is None else _unless(1.0, float(top_p)),
        "min_p": None if min_p is None else _unless(0.0, float(min_p)),
    }


def _token_ids(value: Any, name: str, vocab_size: int) -> tuple[int, ...]:
    if value is None:
        return ()
    array = np.asarray(value)
    if array.size == 0 or array.ndim > 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be a token id or a list of them, got {value!r}.")
    ids = tuple(int(token) for token in array.reshape(-1))
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"{name} must be in the vocabulary, from 0 to {vocab_size - 1}, got {outside[0]}.")
    return ids


def _early_stopping(value: Any) -> bool | str:
    if value is None:
        return False
    if not (isinstance(value, bool) or value == "never"):
        raise ValueError(f"early_stopping must be True, False or 'never', got {value!r}.")
    return value


def _stop_strings(value: Any, num_beams: int) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if texts is None:
        return ()
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop_strings must be a text or a list of them, none of them empty, got {value!r}.")
    if texts and num_beams > 1:
        raise ValueError(
            f"stop_strings={value!r} do not go with beam search, got num_beams={num_beams}; set it to 1, or leave them "
            "out and cut the result."
        )
    return tuple(texts)


def _prompt_lookup(values: Mapping[str, Any], num_beams: int, num_return_sequences: int) -> int | None:
    if values["prompt_lookup_num_tokens"] is None:
        return None
    count = _integer(values, "prompt_lookup_num_tokens", minimum=1)
    for name, value in (("num_beams", num_beams), ("num_return_sequences", num_return_sequences)):
        if value > 1:
            raise ValueError(
                f"prompt_lookup_num_tokens={count} is for one continuation at a time, got {name}={value}; set it to 1, "
                "or prompt_lookup_num_tokens to None."
            )
    for name in _EXTRA_OUTPUTS:
        if _flag(values, name) and _flag(values, "return_dict_in_generate"):
            raise ValueError(
                f"prompt_lookup_num_tokens={count} adds several tokens at a time, and {name} are fetched after every "
                "one; leave out either."
            )
    return count


def _seed(seed: Any) -> int:
    if seed is None:
        return secrets.randbits(32)
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, or None for a fresh one, got {seed!r}.")
    return int(seed)


def _max_new_tokens(values: Mapping[str, Any], prompt_length: int, max_position_embeddings: int) -> int:
    """`max_new_tokens` wins over `max_length`; with neither, 20 new tokens within the model's positions, as in
    transformers.
    """
    if values["max_new_tokens"] is not None:
        max_new_tokens = _integer(values, "max_new_tokens", minimum=1)
    else:
        if values["max_length"] is not None:
            max_length = _integer(values, "max_length", minimum=1)
        else:
            max_length = min(prompt_length + _DEFAULT_NEW_TOKENS, max_position_embeddings)
            _warn(
                f"Neither max_new_tokens nor max_length is set: generating at most {_DEFAULT_NEW_TOKENS} tokens. "
                "Set max_new_tokens."
            )
        max_new_tokens = max_length - prompt_length
        if max_new_tokens < 1:
            raise ValueError(
                f"max_length must be larger than the prompt's {prompt_length} columns, which it includes, got "
                f"{max_length}; raise it or set max_new_tokens."
            )
    if prompt_length + max_new_tokens > max_position_embeddings:
        _warn(
            f"The prompt's {prompt_length} columns and {max_new_tokens} new tokens exceed max_position_embeddings="
            f"{max_position_embeddings}, the longest text the model was made for."
        )
    return max_new_tokens


def _min_new_tokens(values: Mapping[str, Any], prompt_length: int, max_new_tokens: int) -> int:
    if values["min_new_tokens"] is not None:
        name, minimum = "min_new_tokens", _integer(values, "min_new_tokens", minimum=0)
    else:
        name, minimum = "min_length", max(0, _integer(values, "min_length", minimum=0, none=0) - prompt_length)
    if minimum > max_new_tokens:
        _warn(
            f"{name}={values[name]} cannot be reached: generation ends after {max_new_tokens} new tokens. Lower it or "
            "raise max_new_tokens."
        )
    return minimum


def _warn_without_effect(
    values: Mapping[str, Any], explicit: Sequence[str], *, do_sample: bool, num_beams: int
) -> None:
    """Warns of arguments that this call ignores. Values from a config file stay silent, as in transformers."""
    for names, idle, remedy in (
        (_SAMPLING_ONLY, not do_sample, "do_sample=True"),
        (_BEAM_ONLY, num_beams == 1, "num_beams above 1"),
        (_EXTRA_OUTPUTS, not values["return_dict_in_generate"], "return_dict_in_generate=True"),
        (_LOOKUP_ONLY, values["prompt_lookup_num_tokens"] is None, "prompt_lookup_num_tokens"),
    ):
        for name in names:
            value = values[name]
            if idle and name in explicit and value is not None and value != _DEFAULTS[name]:
                _warn(f"{name}={value!r} has no effect without {remedy}.")


def _warn(message: str) -> None:
    # Name the line that called generate: _warn <- check's helper <- check <- generate <- its caller, as near as a
    # constant can say.
    warnings.warn(message, UserWarning, stacklevel=5)
