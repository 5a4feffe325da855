"""Prompt-lookup decoding: several tokens per call of the model, where the text repeats itself.

What followed the last few tokens when they stood in the text before is a guess at what follows now (transformers'
`prompt_lookup_num_tokens`). One call reads the last token and the guesses, which costs little more than reading one
token where the weights are what takes the time. Every token is then chosen as the plain loop would choose it, from the
same processors and the same noise, as far as the guesses were right: the text is the same, and so is the cache, which
forgets the wrong guesses.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int16, Int32

from zamba2_jax.cache import Zamba2Cache
from zamba2_jax.executables import jit_kept
from zamba2_jax.generation import programs
from zamba2_jax.generation.processors import Knobs, Processors, Prompt
from zamba2_jax.generation.programs import Decoding, Structure
from zamba2_jax.sharding import constrain, constrain_whole


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Carry:
    """Of the loop. guesses (1, n) follow the text so far; found () says whether there are any; calls () counts the
    model's."""

    cache: Zamba2Cache
    state: Decoding
    guesses: Int32[Array, "1 n"]
    found: Bool[Array, ""]
    calls: Int32[Array, ""]


@functools.partial(
    jit_kept, static_argnames=("structure", "processors", "num_tokens", "ngram_size"), donate_argnames=("cache",)
)
def decode(
    structure: Structure,
    weights: list[jax.Array],
    cache: Zamba2Cache,
    state: Decoding,
    prompt: Prompt,
    knobs: Knobs,
    until: Int32[Array, ""],
    limit: Int32[Array, ""],
    stop_table: Int16[Array, "states v"] | None = None,
    *,
    processors: Processors,
    num_tokens: int,
    ngram_size: int,
) -> tuple[Zamba2Cache, Decoding, Int32[Array, ""]]:
    """`programs.decode` of one row by guesses of `num_tokens` tokens after groups of up to `ngram_size`. Adds tokens
    until at least `until` new ones stand, at most `limit`; returns also how many calls of the model that took.

    The cache needs `num_tokens` slots more than the text, and so does the token buffer.
    """
    model = structure.model(weights)
    choices = {"prompt": prompt, "knobs": knobs, "stop_table": stop_table, "processors": processors}

    def carry(cache: Zamba2Cache, state: Decoding, calls: Int32[Array, ""]) -> _Carry:
        end = prompt.length + state.step
        guesses, found = look_up(state.tokens[0], prompt.real[0], end, num_tokens=num_tokens, ngram_size=ngram_size)
        # The last token that may be added needs no guess.
        return _Carry(cache, state, guesses[None], found & (state.step + 1 < limit), calls)

    def unfinished(now: _Carry) -> Bool[Array, ""]:
        return (now.state.step < until) & ~now.state.done

    def last_token(state: Decoding) -> Int32[Array, "1 1"]:
        return jax.lax.dynamic_slice_in_dim(state.tokens, prompt.length + state.step - 1, 1, axis=1)

    def add_token(now: _Carry) -> _Carry:
        position = prompt.tokens + now.state.step - 1
        logits, cache = programs.next_logits(model, last_token(now.state), position, now.cache)
        return carry(cache, programs.choose(logits, now.state, **choices), now.calls + 1)

    def add_tokens(now: _Carry) -> _Carry:
        position = prompt.tokens + now.state.step - 1
        output = model(
            jnp.concatenate([last_token(now.state), now.guesses], axis=1),
            position_ids=position[:, None] + jnp.arange(num_tokens + 1),
            past_key_values=now.cache,
            tentative=True,
        )
        logits = constrain(output.logits.astype(jnp.float32), "batch", None, None)
        state, count = choose_several(logits, now.guesses, now.state, limit, **choices)
        # The last new token has yet to be read, as after a plain step; the one before the guesses was read now.
        return carry(output.past_key_values.keep(count[None]), state, now.calls + 1)

    # Two loops inside one, for a choice between two calls of the model: a conditional would copy the cache.
    def add(now: _Carry) -> _Carry:
        now = jax.lax.while_loop(lambda now: unfinished(now) & ~now.found, add_token, now)
        return jax.lax.while_loop(lambda now: unfinished(now) & now.found, add_tokens, now)

    now = jax.lax.while_loop(unfinished, add, carry(cache, state, jnp.int32(0)))
    return now.cache, constrain_whole(now.state), constrain_whole(now.calls)


def look_up(
    tokens: Int32[Array, " columns"],
    start: Int32[Array, ""],
    end: Int32[Array, ""],
    *,
    num_tokens: int,
    ngram_size: int,
) -> tuple[Int32[Array, " num_tokens"], Bool[Array, ""]]:
    """What followed the last tokens of columns `start` to `end` - 1 where they stood before, and whether they did.

    Of groups of the last `ngram_size` tokens and fewer, the longest that stood before decides, and of its places the
    latest. (transformers takes the first. With 10 guesses for the demo model's own code, 4.9 tokens a call came of the
    latest, 4.1 of the first.) Where less than `num_tokens` tokens followed, the text is taken to repeat from there.
    """
    columns = jnp.arange(tokens.shape[0])
    matches = (columns >= start) & (columns < end - 1)  # a group's last column, which another follows
    sizes = jnp.zeros_like(columns)
    for back in range(ngram_size):
        same = jnp.roll(tokens, back) == tokens[jnp.maximum(end - 1 - back, 0)]
        matches &= same & (columns - back >= start)
        sizes += matches
    last = jnp.argmax(sizes * columns.size + columns)  # where they are as long, the later one
    following = jnp.maximum(end - 1 - last, 1)
    return tokens[last + 1 + jnp.arange(num_tokens) % following], sizes[last] > 0


def choose_several(
    logits: Float[Array, "1 several v"],
    guesses: Int32[Array, "1 n"],
    state: Decoding,
    limit: Int32[Array, ""],
    *,
    prompt: Prompt,
    knobs: Knobs,
    stop_table: Int16[Array, "states v"] | None,
    processors: Processors,
) -> tuple[Decoding, Int32[Array, ""]]:
    """`programs.choose` after the last token and after each guess (several = n + 1), up to the first token that is not
    as guessed, that ends the row, or that is number `limit`. Returns the state and how many tokens were added.
    """
    several = logits.shape[1]
    place = (0, prompt.length + state.step)
    # A token is chosen as if all guesses before it were right; where they are not, it is not taken.
    guessed = jax.lax.dynamic_update_slice(state.tokens, guesses, place)
    steps = state.step + jnp.arange(several)

    def pick(logits: Float[Array, "1 v"], step: Int32[Array, ""]) -> Int32[Array, " 1"]:
        return programs.pick(logits, guessed, step, prompt, knobs, processors)[0]

    chosen = jax.vmap(pick, in_axes=(1, 0), out_axes=1)(logits, steps)
    ended = programs.is_end(chosen, knobs)
    stops = None
    if stop_table is not None:

        def read(stop: Int32[Array, " 1"], token: Int32[Array, " 1"]):
            after = stop_table[stop, token].astype(jnp.int32)
            return jnp.maximum(after, 0), after

        stops = jax.lax.scan(read, state.stop, chosen.T)[1]
        ended |= stops.T < 0
    goes_on = (chosen[:, :-1] == guesses) & ~ended[:, :-1]
    count = jnp.minimum(1 + jnp.cumprod(goes_on[0]).sum(), limit - state.step)

    before = jax.lax.dynamic_slice(state.tokens, place, chosen.shape)
    taken = jnp.where(jnp.arange(several) < count, chosen, before)
    finished = state.finished | ended[:, count - 1]
    state = Decoding(
        tokens=jax.lax.dynamic_update_slice(state.tokens, taken, place),
        step=state.step + count,
        finished=finished,
        done=finished.all(),
        scores=None,
        logits=None,
        stop=None if stops is None else jnp.maximum(stops[count - 1], 0),
    )
    return state, count
