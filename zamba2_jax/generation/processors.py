"""Functions that reshape next-token scores before a token is chosen: transformers' logits processors as pure functions
of arrays.

Which of them run is static (`Processors`), so that an unused one costs nothing; their parameters are traced (`Knobs`),
so that another temperature does not compile another program. Rows here are hypotheses: with beams there are several per
prompt.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from zamba2_jax.generation.options import Options

# The threshold of top_k is the k-th largest of the largest `bound` scores. The bound is static, k is not; so k moves
# freely up to it.
_TOP_K_BOUNDS = (64, 256, 1024, 4096)
_EOS_SLOTS = 4


@dataclasses.dataclass(frozen=True)
class Processors:
    """Which processors run. Hashable: a static argument of the compiled programs.

    Attributes:
        repetition_penalty, min_new_tokens, temperature, top_p, min_p: whether that processor runs.
        no_repeat_ngram_size: n, 0 for off. Static because windows have that width.
        top_k_bound: the largest k that the program can serve, 0 for off.
        sample: draw a token; otherwise take the best.
        keep: tokens that top_k, top_p and min_p must leave. For beam search also how many continuations per beam are
            looked at: more than there are ends of sequence, so that the search can go on.
    """

    repetition_penalty: bool
    no_repeat_ngram_size: int
    min_new_tokens: bool
    temperature: bool
    top_k_bound: int
    top_p: bool
    min_p: bool
    sample: bool
    keep: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Knobs:
    """The numbers for `Processors`: scalars, and `eos_token_ids` (e,). Those of an absent processor are not read."""

    repetition_penalty: Float[Array, ""]
    min_new_tokens: Int32[Array, ""]
    temperature: Float[Array, ""]
    top_k: Int32[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    eos_token_ids: Int32[Array, " e"]
    pad_token_id: Int32[Array, ""]
    seed: jax.Array
    length_penalty: Float[Array, ""]
    early_stopping: Int32[Array, ""]


EARLY_STOPPING = {False: 0, True: 1, "never": 2}


def split(options: Options, vocab_size: int) -> tuple[Processors, Knobs]:
    """The static and the traced half of the options. NumPy scalars: making them compiles nothing."""
    keep = 1 if options.num_beams == 1 else max(2, len(options.eos_token_ids) + 1)
    top_k = min(max(options.top_k or 0, keep), vocab_size)
    bounds = [bound for bound in (*_TOP_K_BOUNDS, vocab_size) if top_k <= bound <= vocab_size]
    processors = Processors(
        repetition_penalty=options.repetition_penalty is not None,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
        min_new_tokens=options.min_new_tokens > 0 and bool(options.eos_token_ids),
        temperature=options.temperature is not None,
        top_k_bound=bounds[0] if options.top_k else 0,
        top_p=options.top_p is not None,
        min_p=options.min_p is not None,
        sample=options.do_sample,
        keep=keep,
    )

    def number(value: float | None) -> np.float32:
        return np.float32(0.0 if value is None else value)

    knobs = Knobs(
        repetition_penalty=number(options.repetition_penalty),
        min_new_tokens=np.int32(options.min_new_tokens),
        temperature=number(options.temperature),
        top_k=np.int32(top_k),
        top_p=number(options.top_p),
        min_p=number(options.min_p),
        # Filled up with an id that no token has: one or three end-of-sequence ids, the program is the same.
        eos_token_ids=np.pad(
            np.asarray(options.eos_token_ids, np.int32),
            (0, max(0, _EOS_SLOTS - len(options.eos_token_ids))),
            constant_values=vocab_size,
        ),
        pad_token_id=np.int32(0 if options.pad_token_id is None else options.pad_token_id),
        seed=np.uint32(options.seed),
        length_penalty=number(options.length_penalty),
        early_stopping=np.int32(EARLY_STOPPING[options.early_stopping]),
    )
    return processors, knobs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
    """Where the prompt stands in the token buffer, which holds it from column 0 and the new tokens after it.

    Attributes:
        length: (), columns of the prompt; row r's last real token is in column length - 1.
        given: (b,), the first column that the caller gave; before it there is nothing (a right-padded row was moved
            right).
        real: (b,), the first column that the mask lets through.
        tokens: (b,), how many tokens the mask lets through.
    """

    length: Int32[Array, ""]
    given: Int32[Array, " b"]
    real: Int32[Array, " b"]
    tokens: Int32[Array, " b"]


def process(
    scores: Float[Array, "r v"],
    tokens: Int32[Array, "r columns"],
    prompt: Prompt,
    step: Int32[Array, ""],
    processors: Processors,
    knobs: Knobs,
) -> Float[Array, "r v"]:
    """All processors in transformers' order. `tokens` is filled up to column prompt.length + step, and `step` tokens
    are new.
    """
    end = prompt.length + step
    if processors.repetition_penalty:
        scores = repetition_penalty(scores, tokens, prompt.real, end, knobs.repetition_penalty)
    if processors.no_repeat_ngram_size:
        scores = no_repeat_ngram(scores, tokens, prompt.given, end, processors.no_repeat_ngram_size)
    if processors.min_new_tokens:
        early = step < knobs.min_new_tokens
        is_eos = jnp.zeros(scores.shape[-1], bool).at[knobs.eos_token_ids].set(True, mode="drop")
        scores = jnp.where(early & is_eos, -jnp.inf, scores)
    if processors.temperature:
        scores = scores / knobs.temperature
    if processors.top_k_bound:
        scores = top_k(scores, knobs.top_k, bound=processors.top_k_bound)
    if processors.top_p:
        # What top_k left fits its bound, save for ties at the threshold, which are equal and so cannot move it.
        bound = processors.top_k_bound or scores.shape[-1]
        scores = top_p(scores, knobs.top_p, bound=bound, keep=processors.keep)
    if processors.min_p:
        scores = min_p(scores, knobs.min_p, keep=processors.keep)
    return scores


def repetition_penalty(
    scores: Float[Array, "r v"],
    tokens: Int32[Array, "r columns"],
    start: Int32[Array, " r"],
    end: Int32[Array, ""],
    penalty: Float[Array, ""],
) -> Float[Array, "r v"]:
    """Makes tokens that stand in columns start to end - 1 less likely: positive scores are divided, negative ones
    multiplied.
    """
    columns = jnp.arange(tokens.shape[1])[None]
    inside = (columns >= start[:, None]) & (columns < end)
    seen = _mark(tokens, inside, scores.shape[1])
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def no_repeat_ngram(
    scores: Float[Array, "r v"],
    tokens: Int32[Array, "r columns"],
    start: Int32[Array, " r"],
    end: Int32[Array, ""],
    size: int,
) -> Float[Array, "r v"]:
    """Forbids the tokens that would make the last `size` tokens a group seen before in columns start to end - 1."""
    windows = tokens.shape[1] - size + 1
    if windows < 1:
        return scores
    first = jnp.arange(windows)[None]
    matches = (first >= start[:, None]) & (first + size <= end)
    for offset in range(size - 1):
        # Where a row is shorter than the prefix the slice is clamped to column 0; no window fits such a row, so nothing
        # matches.
        last = jax.lax.dynamic_slice_in_dim(tokens, end - (size - 1) + offset, 1, axis=1)
        matches &= tokens[:, offset : offset + windows] == last
    banned = _mark(tokens[:, size - 1 :], matches, scores.shape[1])
    return jnp.where(banned, -jnp.inf, scores)


def top_k(scores: Float[Array, "r v"], k: Int32[Array, ""], *, bound: int) -> Float[Array, "r v"]:
    """Keeps the k largest scores (and those equal to the k-th); k may be traced up to the static `bound`."""
    largest = jax.lax.top_k(scores, bound)[0]
    threshold = jax.lax.dynamic_slice_in_dim(largest, k - 1, 1, axis=1)
    return jnp.where(scores < threshold, -jnp.inf, scores)


def top_p(scores: Float[Array, "r v"], p: Float[Array, ""], *, bound: int, keep: int = 1) -> Float[Array, "r v"]:
    """Keeps the fewest most likely tokens whose probabilities add up to p, at least `keep` (and those equal to the last
    one kept).

    Only the largest `bound` scores are looked at: give the vocabulary's size unless fewer are finite.
    """
    largest = jax.lax.top_k(scores, bound)[0]
    probabilities = jnp.exp(largest - jax.nn.logsumexp(scores, axis=-1, keepdims=True))
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < p) | (jnp.arange(bound)[None] < keep)
    threshold = jnp.min(jnp.where(kept, largest, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scores < threshold, -jnp.inf, scores)


def min_p(scores: Float[Array, "r v"], p: Float[Array, ""], *, keep: int = 1) -> Float[Array, "r v"]:
    """Keeps the tokens at least p times as likely as the most likely one, and at least `keep`."""
    largest = jax.lax.top_k(scores, keep)[0]
    threshold = jnp.minimum(largest[:, :1] + jnp.log(p), largest[:, -1:])
    return jnp.where(scores < threshold, -jnp.inf, scores)


def _mark(tokens: Int32[Array, "r n"], chosen: Bool[Array, "r n"], vocab_size: int) -> Bool[Array, "r v"]:
    """True at the vocabulary entries that the chosen tokens name."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    spare = vocab_size  # a column of its own for what was not chosen, dropped by the slice
    marks = jnp.zeros((tokens.shape[0], vocab_size + 1), bool)
    return marks.at[rows, jnp.where(chosen, tokens, spare)].set(True)[:, :vocab_size]
