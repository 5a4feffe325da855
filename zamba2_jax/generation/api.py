"""generate(): from a prompt to tokens, with transformers' names, defaults and meanings."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from zamba2_jax.cache import Zamba2Cache
from zamba2_jax.generation import beam, lookup, options, processors, programs, prompt
from zamba2_jax.generation.options import UNSET, Options
from zamba2_jax.generation.prompt import Prefill, PromptBatch
from zamba2_jax.generation.stop_strings import StopStrings, stop_strings_of
from zamba2_jax.outputs import ModelOutput

# Without a stream_block, tokens are fetched as often as the eye notices.
_SECONDS_PER_BLOCK = 0.05
_LARGEST_BLOCK = 32


@dataclasses.dataclass(frozen=True)
class GenerateOutput(ModelOutput):
    """What `generate(return_dict_in_generate=True)` returns. All but the cache are NumPy arrays.

    Attributes:
        sequences: (r, l + new) int32, r = batch * num_return_sequences.
        scores: per new token (r, v) float32, after all processors; with `output_scores`.
        logits: per new token (r, v) float32, the model's own; with `output_logits`.
        past_key_values: the cache, which holds all real tokens of each row of `sequences` but the row's last. Pass it
            back with a longer `input_ids`.
        model_calls: with `prompt_lookup_num_tokens`, the calls of the model that added the tokens after the first.
    """

    sequences: np.ndarray
    scores: tuple[np.ndarray, ...] | None = None
    logits: tuple[np.ndarray, ...] | None = None
    past_key_values: Zamba2Cache | None = None
    model_calls: int | None = None


@dataclasses.dataclass(frozen=True)
class GenerateBeamOutput(ModelOutput):
    """The same for beam search, where one row of `scores` and `logits` is one running beam: (batch * num_beams, v).

    Attributes:
        sequences_scores: (r,) float32, the summed log-probability over length ** length_penalty; with `output_scores`.
        beam_indices: (r, new) int32, which running beam each new token continued; -1 after the end.
        sequences, scores, logits: as in `GenerateOutput`; scores are log-probabilities.
        past_key_values: the cache of the beams that were still running, not of `sequences`.
    """

    sequences: np.ndarray
    sequences_scores: np.ndarray | None = None
    scores: tuple[np.ndarray, ...] | None = None
    logits: tuple[np.ndarray, ...] | None = None
    beam_indices: np.ndarray | None = None
    past_key_values: Zamba2Cache | None = None


class Streamer(Protocol):
    """What `generate` asks of a streamer; transformers' TextStreamer and TextIteratorStreamer have it."""

    def put(self, value: np.ndarray) -> None: ...

    def end(self) -> None: ...


def generate(
    model: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    generation_config: Any = None,
    *,
    max_new_tokens: int | None = UNSET,
    max_length: int | None = UNSET,
    min_new_tokens: int | None = UNSET,
    min_length: int | None = UNSET,
    do_sample: bool | None = UNSET,
    temperature: float | None = UNSET,
    top_k: int | None = UNSET,
    top_p: float | None = UNSET,
    min_p: float | None = UNSET,
    repetition_penalty: float | None = UNSET,
    no_repeat_ngram_size: int | None = UNSET,
    num_beams: int | None = UNSET,
    length_penalty: float | None = UNSET,
    early_stopping: bool | str | None = UNSET,
    num_return_sequences: int | None = UNSET,
    eos_token_id: int | list[int] | None = UNSET,
    pad_token_id: int | None = UNSET,
    bos_token_id: int | None = UNSET,
    return_dict_in_generate: bool | None = UNSET,
    output_scores: bool | None = UNSET,
    output_logits: bool | None = UNSET,
    prefill_chunk: int | None = UNSET,
    stop_strings: str | list[str] | None = UNSET,
    prompt_lookup_num_tokens: int | None = UNSET,
    max_matching_ngram_size: int | None = UNSET,
    tokenizer: Any = None,
    seed: int | None = None,
    streamer: Streamer | None = None,
    stream_block: int | None = None,
    should_stop: Callable[[], bool] | None = None,
    past_key_values: Zamba2Cache | None = None,
    cache_length: int | None = None,
    ssm_dtype: DTypeLike | None = None,
    inputs_embeds: Any = None,
    **others: Any,
) -> np.ndarray | GenerateOutput | GenerateBeamOutput:
    """Continues prompts: greedily, by sampling (`do_sample=True`), or by beam search (`num_beams` > 1; with `do_sample`
    beam sampling).

    Names, defaults and meanings are those of transformers 5. What is not given comes from `generation_config`, then
    from the model's own (generation_config.json), then from transformers' defaults: greedy, 20 new tokens, top_k 50
    when sampling. An explicit None switches an option off. A knob of transformers that is missing here raises by name;
    in the model's own generation config it is warned of.

    Rows may be padded on either side, and each is continued as it would be alone. (As in transformers,
    `no_repeat_ngram_size` sees the padding to a row's left, and `min_length` and `max_length` count it.)

    A model whose weights are spread over a mesh (`from_pretrained(mesh=...)`) generates on it: rows are split over data
    and fsdp where they divide, heads over tensor, and the cache with them.

    The prompt is read in chunks of a fixed size, and the whole token loop runs on the device. Texts (prompt and new
    tokens) of up to 1024, 4096, 16384, … tokens share two compiled programs each, one that reads the prompt and one
    that adds tokens, and so do all values of numeric options.

    Args:
        model: a `Zamba2ForCausalLM`; as a method, the model itself.
        input_ids: (b, l) integers: NumPy, JAX, or lists of equal length. None starts from `bos_token_id`.
        attention_mask: (b, l), 1 at real tokens. None takes tokens other than `pad_token_id` as real (all of them, if
            that also ends sequences). Masked tokens between real ones are hidden, but time passes over them, as in
            transformers.
        generation_config: a transformers GenerationConfig or a dict.
        max_new_tokens, max_length: tokens to add at most; `max_length` counts the prompt too and yields to
            `max_new_tokens`.
        min_new_tokens, min_length: no end of sequence before that many, counted likewise.
        temperature, top_k, top_p, min_p: shape the distribution that tokens are drawn from, in this order.
        repetition_penalty, no_repeat_ngram_size: discourage and forbid what was said already, in the prompt too.
        length_penalty, early_stopping: for beam search.
        num_return_sequences: results per prompt, neighbouring rows; for sampling, or up to `num_beams`.
        eos_token_id: one id or several that end a sequence; None: none does.
        pad_token_id: fills finished rows (after beam search, an id of 0 counts as not given there, and the first
            end-of-sequence id fills: transformers does so).
        return_dict_in_generate, output_scores, output_logits: return a `GenerateOutput` or `GenerateBeamOutput`. Scores
            and logits are fetched after every token, which costs speed.
        prefill_chunk: columns per prefill call (transformers: `prefill_chunk_size`). None takes 128, 512 or 2048 for
            texts of up to 1024, 4096 or more tokens, and less for many rows.
        stop_strings, tokenizer: a text or several; a row ends with the token that completes one of them, as after an
            end-of-sequence token. The tokenizer says what tokens read as. Not for beam search.
        prompt_lookup_num_tokens: guess so many tokens at a time, by looking up where in the text so far its last tokens
            stood before, and read the guesses in one call: the same tokens, drawn ones too, in fewer calls where the
            text repeats itself (code, summaries, answers that quote). For one row. None: no guesses. A call of so many
            tokens sums in another order than one of a single token, so that in bfloat16 two scores that are all but
            equal may change places.
        max_matching_ngram_size: the most last tokens that are looked up; then fewer, down to one. Default 2.
        seed: integer in [0, 2**32). Equal seeds draw equal tokens, streaming or not. None: a fresh one from the
            operating system.
        streamer: an object with `put` and `end`, such as transformers' `TextStreamer`. It gets the prompt (b, l), then
            each step's tokens (b,), as from transformers. Not for beam search.
        stream_block: tokens to compute between two deliveries; guesses that are right may bring more. None adapts to
            about 20 deliveries a second.
        should_stop: is asked after every delivery, or as often where there is no streamer; True ends all rows where
            they are. Not for beam search.
        past_key_values: a cache that holds the beginning of `input_ids`, which is the whole text as in transformers;
            only the rest is read. One that was returned or loaded, or `cache.repeat(n)`; row i's first
            `next_position[i]` real tokens are taken to be in it, wherever its padding is now. It stays valid; where it
            is too small, a larger copy goes on.
        cache_length: slots for keys and values. None takes the smallest of 1024, 4096, 16384, … that holds the text,
            and room for padding the prompt to whole chunks: 1152, 4608, 18432, ….
        ssm_dtype: of the Mamba2 states between tokens; None is float32. bfloat16 halves what many rows read and write
            per token, and rounds the sum over the past at every one of them.
        inputs_embeds: not supported.

    Returns:
        (b * num_return_sequences, l + new) int32 NumPy array: the prompt as given and what follows, up to the longest
        row. NumPy because tokenizers decode it, and because slicing it compiles nothing.

    Raises:
        ValueError: before anything runs; names the argument, what it was, and what would do.
    """
    arguments = {
        "max_new_tokens": max_new_tokens,
        "max_length": max_length,
        "min_new_tokens": min_new_tokens,
        "min_length": min_length,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "num_beams": num_beams,
        "length_penalty": length_penalty,
        "early_stopping": early_stopping,
        "num_return_sequences": num_return_sequences,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "bos_token_id": bos_token_id,
        "return_dict_in_generate": return_dict_in_generate,
        "output_scores": output_scores,
        "output_logits": output_logits,
        "prefill_chunk": prefill_chunk,
        "stop_strings": stop_strings,
        "prompt_lookup_num_tokens": prompt_lookup_num_tokens,
        "max_matching_ngram_size": max_matching_ngram_size,
        **others,
    }
    if inputs_embeds is not None:
        also = " together with input_ids" if input_ids is not None else ""
        raise ValueError(f"generate does not take inputs_embeds{also}; pass input_ids alone.")
    config = model.config
    values = options.merge(generation_config, getattr(model, "generation_config", None), config, arguments)
    tokens = options.special_tokens(values, config.vocab_size)
    batch = prompt.read_prompt(input_ids, attention_mask, vocab_size=config.vocab_size, **tokens)
    opts = options.check(
        values,
        prompt_length=batch.length,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        explicit=[name for name, value in arguments.items() if value is not UNSET],
        seed=seed,
    )
    _check_streaming(streamer, stream_block, should_stop, opts)
    if opts.stop_strings and tokenizer is None:
        raise ValueError(
            f"stop_strings={list(opts.stop_strings)} need tokenizer=, which says what tokens read as; "
            "stop_strings=None goes on without them."
        )
    if opts.prompt_lookup_num_tokens and batch.input_ids.shape[0] > 1:
        raise ValueError(
            f"prompt_lookup_num_tokens={opts.prompt_lookup_num_tokens} is for one prompt at a time, got "
            f"{batch.input_ids.shape[0]} rows; pass them one by one, or prompt_lookup_num_tokens=None."
        )
    ssm_dtype = _check_ssm_dtype(ssm_dtype, past_key_values)
    plan = prompt.plan_prefill(
        batch,
        max_new_tokens=opts.max_new_tokens,
        prefill_chunk=opts.prefill_chunk,
        cache_length=cache_length,
        cache=past_key_values,
        guesses=opts.prompt_lookup_num_tokens or 0,
    )
    copies = max(opts.num_beams, opts.num_return_sequences)
    structure, weights = programs.take_apart(model)
    with programs.on_mesh_of(weights):
        if streamer is not None:
            streamer.put(np.repeat(batch.input_ids, copies, axis=0))
        if past_key_values is not None and plan.capacity != past_key_values.max_length:
            past_key_values = past_key_values.resize(plan.capacity)
        logits, cache = programs.prefill(
            structure,
            weights,
            plan.ids,
            plan.positions,
            plan.mask,
            np.int32(plan.chunks),
            past_key_values,
            chunk=plan.chunk,
            capacity=plan.capacity,
            ssm_dtype=ssm_dtype,
        )
        if copies > 1:
            logits, cache = programs.repeat_rows(logits, cache, copies=copies)
        if opts.num_beams > 1:
            return _run_beams(structure, weights, logits, cache, batch, plan, opts, config.vocab_size)
        stops = stop_strings_of(opts.stop_strings, tokenizer, config.vocab_size) if opts.stop_strings else None
        watch = _Watch(streamer, stream_block, should_stop)
        return _run_rows(structure, weights, logits, cache, batch, plan, opts, config.vocab_size, stops, watch)


@dataclasses.dataclass(frozen=True)
class _Watch:
    """Who looks on while tokens are made. Arguments of `generate`."""

    streamer: Streamer | None = None
    stream_block: int | None = None
    should_stop: Callable[[], bool] | None = None


def _check_streaming(
    streamer: Streamer | None, stream_block: int | None, should_stop: Callable[[], bool] | None, opts: Options
) -> None:
    if should_stop is not None and opts.num_beams > 1:
        raise ValueError(
            f"should_stop cannot end beam search, which has no text before it is done; got num_beams={opts.num_beams}, "
            "set it to 1."
        )
    if streamer is not None and opts.num_beams > 1:
        raise ValueError(
            f"streamer cannot follow beam search, whose text is known only at the end; got num_beams={opts.num_beams}, "
            "set it to 1."
        )
    if stream_block is not None and (
        isinstance(stream_block, bool) or not isinstance(stream_block, int) or stream_block < 1
    ):
        raise ValueError(f"stream_block must be an integer of at least 1, or None to adapt, got {stream_block!r}.")


def _check_ssm_dtype(ssm_dtype: DTypeLike | None, cache: Zamba2Cache | None) -> np.dtype:
    if ssm_dtype is None:
        return jnp.dtype(jnp.float32)
    if cache is not None:
        raise ValueError(
            f"ssm_dtype={ssm_dtype!r} has no use with past_key_values, whose states have one; leave it out."
        )
    try:
        dtype = jnp.dtype(ssm_dtype)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"ssm_dtype must be a floating dtype such as float32 or bfloat16, got {ssm_dtype!r}.")
    return dtype


def _run_rows(
    structure: programs.Structure,
    weights: list[jax.Array],
    logits: jax.Array,
    cache: Zamba2Cache,
    batch: PromptBatch,
    plan: Prefill,
    opts: Options,
    vocab_size: int,
    stops: StopStrings | None,
    watch: _Watch,
) -> np.ndarray | GenerateOutput:
    """Greedy decoding and sampling."""
    copies = opts.num_return_sequences
    static, knobs = processors.split(opts, vocab_size)
    fill = 0 if opts.pad_token_id is None else opts.pad_token_id
    guesses = opts.prompt_lookup_num_tokens or 0
    buffer = prompt.token_buffer(batch, prompt.buffer_columns(batch, opts.max_new_tokens, plan, guesses), fill)
    buffer = np.repeat(buffer, copies, axis=0)
    record = _Record(opts, (buffer.shape[0], vocab_size))
    state = programs.Decoding(
        tokens=buffer,
        step=np.int32(0),
        finished=np.zeros(buffer.shape[0], bool),
        done=np.bool_(False),
        scores=record.no_scores,
        logits=record.no_logits,
        stop=None if stops is None else np.repeat(stops.start(_real_tokens(batch)), copies),
    )
    device_prompt = batch.device_prompt(copies)
    stop_table = None if stops is None else stops.table
    # Someone who gets the cache may continue a row that ended before others.
    hold_finished = opts.return_dict_in_generate and buffer.shape[0] > 1

    step = 0
    calls = 0 if guesses else None
    streamer = watch.streamer
    state = programs.begin(logits, state, device_prompt, knobs, stop_table, processors=static)
    for until in _bounds(opts.max_new_tokens, record, watch):
        now = (structure, weights, cache, state, device_prompt, knobs, np.int32(until))
        if until > 1 and guesses:
            cache, state, more = lookup.decode(
                *now,
                np.int32(opts.max_new_tokens),
                stop_table,
                processors=static,
                num_tokens=guesses,
                ngram_size=opts.max_matching_ngram_size,
            )
            calls += int(more)
        elif until > 1:
            cache, state = programs.decode(*now, stop_table, processors=static, hold_finished=hold_finished)
        record.read(state)
        if streamer is not None:
            new = np.asarray(state.tokens)[:, batch.length + step : batch.length + record.step]
            for tokens in new.T:
                streamer.put(tokens)
        step = record.step
        if bool(state.done) or (watch.should_stop is not None and watch.should_stop()):
            break
    if streamer is not None:
        streamer.end()

    new = np.asarray(state.tokens)[:, batch.length : batch.length + step]
    sequences = np.concatenate([np.repeat(batch.input_ids, copies, axis=0), new], axis=1)
    if not opts.return_dict_in_generate:
        return sequences
    return GenerateOutput(sequences, record.scores, record.logits, cache, calls)


def _real_tokens(batch: PromptBatch) -> list[list[int]]:
    return [tokens[real].tolist() for tokens, real in zip(batch.tokens, batch.mask, strict=True)]


def _run_beams(
    structure: programs.Structure,
    weights: list[jax.Array],
    logits: jax.Array,
    cache: Zamba2Cache,
    batch: PromptBatch,
    plan: Prefill,
    opts: Options,
    vocab_size: int,
) -> np.ndarray | GenerateBeamOutput:
    """Beam search and beam sampling."""
    static, knobs = processors.split(opts, vocab_size)
    # transformers takes a padding id of 0 for none here (`pad or eos[0]`); results are to agree token for token.
    fill = (opts.pad_token_id or opts.eos_token_ids[0]) if opts.eos_token_ids else 0
    buffer = prompt.token_buffer(batch, prompt.buffer_columns(batch, opts.max_new_tokens, plan), fill)
    rows = batch.input_ids.shape[0]
    record = _Record(opts, (rows * opts.num_beams, vocab_size))
    state = beam.start(buffer, opts.num_beams, record.no_scores, record.no_logits)
    device_prompt = batch.device_prompt(opts.num_beams)
    for until in _bounds(opts.max_new_tokens, record, _Watch()):
        cache, state = beam.decode_beams(
            structure,
            weights,
            cache,
            logits,
            state,
            device_prompt,
            knobs,
            np.int32(opts.max_new_tokens),
            np.int32(until),
            processors=static,
        )
        record.read(state)
        if bool(state.done):
            break

    def best(array: jax.Array) -> np.ndarray:
        kept = np.asarray(array)[:, : opts.num_return_sequences]
        return kept.reshape(-1, *kept.shape[2:])

    origins = best(state.finished.origins)
    new = int((origins >= 0).sum(axis=1).max())
    tokens = best(state.finished.tokens)[:, batch.length : batch.length + new]
    sequences = np.concatenate([np.repeat(batch.input_ids, opts.num_return_sequences, axis=0), tokens], axis=1)
    if not opts.return_dict_in_generate:
        return sequences
    return GenerateBeamOutput(
        sequences=sequences,
        sequences_scores=best(state.finished.scores) if opts.output_scores else None,
        scores=record.scores,
        logits=record.logits,
        beam_indices=origins[:, :new],
        past_key_values=cache,
    )


class _Record:
    """Follows the steps on the host: their number, and each one's scores and logits where they were asked for."""

    def __init__(self, opts: Options, shape: tuple[int, int]):
        keep_scores = opts.return_dict_in_generate and opts.output_scores
        keep_logits = opts.return_dict_in_generate and opts.output_logits
        self.scores: tuple[np.ndarray, ...] | None = () if keep_scores else None
        self.logits: tuple[np.ndarray, ...] | None = () if keep_logits else None
        self.no_scores = np.zeros(shape, np.float32) if keep_scores else None
        self.no_logits = np.zeros(shape, np.float32) if keep_logits else None
        self.step = 0

    @property
    def every_step(self) -> bool:
        return self.scores is not None or self.logits is not None

    def read(self, state: programs.Decoding | beam.BeamSearch) -> None:
        self.step = int(state.step)
        if self.scores is not None:
            self.scores += (np.asarray(state.scores),)
        if self.logits is not None:
            self.logits += (np.asarray(state.logits),)


def _bounds(max_new_tokens: int, record: _Record, watch: _Watch) -> Iterator[int]:
    """Up to which new token to run before the host looks: to the end, unless someone wants to see tokens earlier.
    Guesses that were right may bring more, which `record` then says."""
    if record.every_step:
        yield from range(1, max_new_tokens + 1)
        return
    if watch.streamer is None and watch.should_stop is None:
        yield max_new_tokens
        return
    block = 1
    while record.step < max_new_tokens:
        began, before = time.perf_counter(), record.step
        yield min(before + block, max_new_tokens)
        if watch.stream_block is not None:
            block = watch.stream_block
        else:
            seconds_per_token = (time.perf_counter() - began) / (record.step - before)
            block = int(min(max(_SECONDS_PER_BLOCK / seconds_per_token, 1), _LARGEST_BLOCK))
