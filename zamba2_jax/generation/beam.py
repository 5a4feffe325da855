"""Beam search on the device, token for token transformers' `_beam_search`; with sampling, its beam sampling.

Per prompt there are k running beams and k finished hypotheses. A step scores every continuation of every running beam,
takes the K best, moves those that just ended among the finished ones if they are good enough, and continues with the k
best that have not ended. K is large enough for k continuations to be left when all the best ones end. Dead or empty
entries carry a score of about -1e9.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from zamba2_jax.cache import Zamba2Cache
from zamba2_jax.executables import jit_kept
from zamba2_jax.generation.processors import EARLY_STOPPING, Knobs, Processors, Prompt, process
from zamba2_jax.generation.programs import Structure, gumbel_noise, next_logits, where
from zamba2_jax.sharding import constrain_whole

_DEAD = -1e9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hypotheses:
    """k hypotheses per prompt.

    Attributes:
        tokens: (b, k, columns), prompt and new tokens, then padding.
        scores: (b, k) float32; of running beams the summed log-probability, of finished ones that over length **
            length_penalty.
        origins: (b, k, columns), for each new token the row (of b * k) that it continued; -1 beyond the last.
    """

    tokens: Int32[Array, "b k columns"]
    scores: Float[Array, "b k"]
    origins: Int32[Array, "b k columns"]

    def take(self, chosen: Int32[Array, "b m"]) -> Hypotheses:
        return Hypotheses(
            jnp.take_along_axis(self.tokens, chosen[:, :, None], axis=1),
            jnp.take_along_axis(self.scores, chosen, axis=1),
            jnp.take_along_axis(self.origins, chosen[:, :, None], axis=1),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """Beam search on its way.

    Attributes:
        running, finished: the k beams in work, the k best that ended.
        is_finished: (b, k), which entries of `finished` are filled.
        improvable: (b,), whether running beams may still beat the finished ones.
        step: (), new tokens so far.
        done: (), nothing is left to do.
        scores, logits: (b * k, v) of the latest step, processed log-probabilities and raw scores; None unless asked
            for.
    """

    running: Hypotheses
    finished: Hypotheses
    is_finished: Bool[Array, "b k"]
    improvable: Bool[Array, " b"]
    step: Int32[Array, ""]
    done: Bool[Array, ""]
    scores: Float[Array, "r v"] | None
    logits: Float[Array, "r v"] | None


def start(tokens: np.ndarray, num_beams: int, scores: np.ndarray | None, logits: np.ndarray | None) -> BeamSearch:
    """The state before the first step; `tokens` (b, columns) hold prompt and padding. All NumPy: nothing compiles."""
    batch_size = tokens.shape[0]
    beams = np.repeat(tokens[:, None], num_beams, axis=1)
    origins = np.full(beams.shape, -1, np.int32)
    dead = np.full((batch_size, num_beams), _DEAD, np.float32)
    # All beams start equal, so only the first may be continued: the others would find the same tokens again.
    first_alive = dead.copy()
    first_alive[:, 0] = 0
    return BeamSearch(
        running=Hypotheses(beams, first_alive, origins),
        finished=Hypotheses(beams, dead, origins),
        is_finished=np.zeros((batch_size, num_beams), bool),
        improvable=np.ones(batch_size, bool),
        step=np.int32(0),
        done=np.bool_(False),
        scores=scores,
        logits=logits,
    )


@functools.partial(jit_kept, static_argnames=("structure", "processors"), donate_argnames=("cache",))
def decode_beams(
    structure: Structure,
    weights: list[jax.Array],
    cache: Zamba2Cache,
    logits: Float[Array, "r v"],
    state: BeamSearch,
    prompt: Prompt,
    knobs: Knobs,
    max_new_tokens: Int32[Array, ""],
    until: Int32[Array, ""],
    *,
    processors: Processors,
) -> tuple[Zamba2Cache, BeamSearch]:
    """Runs beam search until `until` new tokens stand or it is done. `logits` are the prefill's, for step 0."""
    model = structure.model(weights)
    advance = functools.partial(
        _advance, prompt=prompt, knobs=knobs, max_new_tokens=max_new_tokens, processors=processors
    )

    def unfinished(carry: tuple[Zamba2Cache, BeamSearch]) -> Bool[Array, ""]:
        _, state = carry
        return (state.step < until) & ~state.done

    def add_token(carry: tuple[Zamba2Cache, BeamSearch]) -> tuple[Zamba2Cache, BeamSearch]:
        cache, state = carry
        last = jax.lax.dynamic_slice_in_dim(state.running.tokens, prompt.length + state.step - 1, 1, axis=2)
        logits, cache = next_logits(model, last.reshape(-1, 1), prompt.tokens + state.step - 1, cache)
        state = advance(logits, state)
        # The beams that go on may continue other rows than their own, some twice.
        rows = jax.lax.dynamic_index_in_dim(state.running.origins, state.step - 1, axis=2, keepdims=False)
        return cache.reorder(rows.reshape(-1)), state

    # Before the first step all rows of a prompt are equal, so this one leaves the cache as it is.
    state = where(state.step == 0, advance(logits, state), state)
    cache, state = jax.lax.while_loop(unfinished, add_token, (cache, state))
    return cache, constrain_whole(state)


def _advance(
    logits: Float[Array, "r v"],
    state: BeamSearch,
    *,
    prompt: Prompt,
    knobs: Knobs,
    max_new_tokens: Int32[Array, ""],
    processors: Processors,
) -> BeamSearch:
    """One step of the search, given the scores of the next token for every running beam."""
    num_beams, columns = state.running.tokens.shape[1:]
    flat_tokens = state.running.tokens.reshape(-1, columns)
    scores = process(jax.nn.log_softmax(logits), flat_tokens, prompt, state.step, processors, knobs)

    candidates = _continue(state, scores, prompt, knobs, processors)
    count = candidates.scores.shape[1]
    new = jax.lax.dynamic_index_in_dim(candidates.tokens, prompt.length + state.step, axis=2, keepdims=False)
    ended = (new[:, :, None] == knobs.eos_token_ids).any(axis=-1) | (state.step + 1 >= max_new_tokens)

    going_on = dataclasses.replace(candidates, scores=candidates.scores + jnp.where(ended, _DEAD, 0.0))
    running = going_on.take(jax.lax.top_k(going_on.scores, num_beams)[1])

    # Only the k best candidates may be results; the rest are there to keep the search going.
    just_finished = ended & (jnp.arange(count) < num_beams)
    stop_when_full = knobs.early_stopping == EARLY_STOPPING[True]
    closed = (state.is_finished.all(axis=1) & stop_when_full) | ~state.improvable
    new_length = (state.step + 1).astype(jnp.float32)
    results = dataclasses.replace(
        candidates,
        scores=candidates.scores / new_length**knobs.length_penalty
        + jnp.where(closed[:, None], _DEAD, 0.0)
        + jnp.where(just_finished, 0.0, _DEAD),
    )
    merged = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), state.finished, results)
    best = jax.lax.top_k(merged.scores, num_beams)[1]
    finished = merged.take(best)
    is_finished = jnp.take_along_axis(jnp.concatenate([state.is_finished, just_finished], axis=1), best, axis=1)

    improvable = state.improvable & _may_improve(running, finished, is_finished, new_length, max_new_tokens, knobs)
    may_go_on = improvable.any() & ~(is_finished.all() & stop_when_full) & ~ended.all()
    return BeamSearch(
        running=running,
        finished=finished,
        is_finished=is_finished,
        improvable=improvable,
        step=state.step + 1,
        done=~may_go_on,
        scores=None if state.scores is None else scores,
        logits=None if state.logits is None else logits,
    )


def _continue(
    state: BeamSearch, scores: Float[Array, "r v"], prompt: Prompt, knobs: Knobs, processors: Processors
) -> Hypotheses:
    """The K best one-token continuations of the running beams, or K drawn without replacement, best or first drawn
    first.
    """
    batch_size, num_beams, _ = state.running.tokens.shape
    vocab_size = scores.shape[-1]
    total = scores.reshape(batch_size, num_beams, vocab_size) + state.running.scores[:, :, None]
    total = total.reshape(batch_size, -1)
    ranked = total
    if processors.sample:
        # The largest of log-probabilities plus Gumbel noise, in order, are draws without replacement.
        ranked = total + gumbel_noise(knobs.seed, state.step, total.shape)
    count = processors.keep * num_beams
    chosen = jax.lax.top_k(ranked, count)[1]
    beam, token = chosen // vocab_size, chosen % vocab_size

    continued = state.running.take(beam)
    row = beam + jnp.arange(batch_size)[:, None] * num_beams
    return Hypotheses(
        tokens=_write(continued.tokens, token, prompt.length + state.step),
        scores=jnp.take_along_axis(total, chosen, axis=1),
        origins=_write(continued.origins, row, state.step),
    )


def _may_improve(
    running: Hypotheses,
    finished: Hypotheses,
    is_finished: Bool[Array, "b k"],
    length: Float[Array, ""],
    max_new_tokens: Int32[Array, ""],
    knobs: Knobs,
) -> Bool[Array, " b"]:
    """Whether the best running beam might still beat the worst finished one.

    Judged at its present length; with early_stopping="never" and a penalty that favours length, at the longest possible
    one.
    """
    never = (knobs.early_stopping == EARLY_STOPPING["never"]) & (knobs.length_penalty > 0)
    length = jnp.where(never, max_new_tokens.astype(jnp.float32), length)
    best_running = running.scores[:, :1] / length**knobs.length_penalty
    worst_finished = jnp.where(is_finished, finished.scores.min(axis=1, keepdims=True), _DEAD)
    return (best_running > worst_finished).any(axis=1)


def _write(
    array: Int32[Array, "b m columns"], values: Int32[Array, "b m"], column: Int32[Array, ""]
) -> Int32[Array, "b m columns"]:
    return jax.lax.dynamic_update_slice(array, values[:, :, None].astype(jnp.int32), (0, 0, column))
