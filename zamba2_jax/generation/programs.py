"""The compiled programs of generation: prefill, the first token, and one loop that runs on the device until every row
is done.

The first token has a program of its own, a small one, so that nobody waits for the loop's to be compiled, or loaded,
who waits for that token.

The loop's upper bound is traced: asking for more tokens does not recompile, and streaming runs the same program again
with the bound moved on.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import operator
import weakref
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int16, Int32, UInt32

from zamba2_jax.cache import Zamba2Cache
from zamba2_jax.compilation import jit_many_tokens
from zamba2_jax.executables import jit_kept
from zamba2_jax.generation.processors import Knobs, Processors, Prompt, process
from zamba2_jax.program_key import digest
from zamba2_jax.sharding import constrain, constrain_whole, generation_mesh, mesh_of


class Structure:
    """A model without its arrays: hashable, so a static argument. Equal for two models of one shape and dtype."""

    def __init__(self, model: nnx.Module):
        # The model hashes with its generation config, but other settings of generation must not recompile programs.
        bare = copy.copy(model)
        bare.generation_config = None
        self._graphdef, state = nnx.split(bare)
        self._leaves, self._treedef = jax.tree.flatten(state)
        self._variables = jax.tree.leaves(state, is_leaf=_is_variable)
        self._hash = hash((self._graphdef, self._treedef))

    def take_weights(self) -> list[jax.Array]:
        """The arrays, once: a structure stays in jit's cache for good, and must not keep a model's weights there."""
        leaves, self._leaves, self._variables = self._leaves, None, None
        return leaves

    @property
    def variables(self) -> list[nnx.Variable]:
        """Whose values the arrays are, until they are taken; empty where the two do not match one to one."""
        same = len(self._variables) == len(self._leaves) and all(
            variable.get_raw_value() is leaf for variable, leaf in zip(self._variables, self._leaves, strict=True)
        )
        return list(self._variables) if same else []

    def key_parts(self) -> list[str]:
        """What `zamba2_jax.program_key` is to know of it."""
        return [self._digest]

    @functools.cached_property
    def _digest(self) -> str:
        return digest([self._graphdef, self._treedef])

    def model(self, weights: list[jax.Array]) -> Any:
        return nnx.merge(self._graphdef, self._treedef.unflatten(weights))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Structure) and (self._treedef, self._graphdef) == (other._treedef, other._graphdef)


# Per model: the objects it was made of when it was last taken apart, its structure, and the variables of its arrays. To
# walk a model of some hundred arrays as NNX does costs as much as several decoding steps; to see that it is made of the
# same objects as before, a tenth of that.
_TAKEN_APART: weakref.WeakKeyDictionary[nnx.Module, tuple[list[Any], Structure, list[nnx.Variable]]]
_TAKEN_APART = weakref.WeakKeyDictionary()


def take_apart(model: nnx.Module) -> tuple[Structure, list[jax.Array]]:
    """The structure of a model and its arrays as they are now. Fast where the model was taken apart before and only the
    values of its arrays have changed since."""
    parts = _parts(model)
    before, structure, variables = _TAKEN_APART.get(model, (None, None, None))
    if before is not None and len(before) == len(parts) and all(map(operator.is_, before, parts)):
        return structure, [variable.get_raw_value() for variable in variables]
    structure = Structure(model)
    variables = structure.variables
    if variables:
        _TAKEN_APART[model] = parts, structure, variables
    else:
        _TAKEN_APART.pop(model, None)
    return structure, structure.take_weights()


def on_mesh_of(weights: list[jax.Array]) -> contextlib.AbstractContextManager:
    """Puts the mesh in use that the weights are spread over, if they are; else leaves everything as it is.

    Raises:
        ValueError: they are spread over two.
    """
    mesh = mesh_of(weights)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(generation_mesh(mesh))


def _parts(model: nnx.Module) -> list[Any]:
    """All that hangs on a model's modules, attribute by attribute, down to its variables."""
    parts, modules = [], [model]
    for module in modules:
        for value in vars(module).values():
            parts.append(value)
            if _is_inner(type(value)):
                modules.append(value)
    return parts


@functools.cache
def _is_inner(kind: type) -> bool:
    return issubclass(kind, nnx.Pytree) and not issubclass(kind, nnx.Variable)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Greedy decoding or sampling on its way. Rows r = batch * num_return_sequences.

    Attributes:
        tokens: (r, columns), prompt and new tokens, then padding.
        step: (), new tokens so far.
        finished: (r,), rows that have ended.
        done: (), nothing is left to do.
        scores, logits: (r, v) of the latest step, processed and raw; None unless asked for.
        stop: (r,), how much of a stop string each row ends with: a row of the table that `decode` gets; None without.
    """

    tokens: Int32[Array, "r columns"]
    step: Int32[Array, ""]
    finished: Bool[Array, " r"]
    done: Bool[Array, ""]
    scores: Float[Array, "r v"] | None
    logits: Float[Array, "r v"] | None
    stop: Int32[Array, " r"] | None = None


@functools.partial(jit_kept, static_argnames=("structure", "chunk", "capacity", "ssm_dtype"), jit=jit_many_tokens)
def prefill(
    structure: Structure,
    weights: list[jax.Array],
    ids: Int32[Array, "b columns"],
    positions: Int32[Array, "b columns"],
    mask: Bool[Array, "b columns"],
    chunks: Int32[Array, ""],
    cache: Zamba2Cache | None,
    *,
    chunk: int,
    capacity: int,
    ssm_dtype: jnp.dtype,
) -> tuple[Float[Array, "b v"], Zamba2Cache]:
    """Reads `chunks` times `chunk` columns; returns the last column's scores (float32) and the cache.

    A given cache is not consumed: the caller may continue from it again.
    """
    model = structure.model(weights)
    batch_size = ids.shape[0]
    if cache is None:
        cache = model.init_cache(batch_size, capacity, ssm_dtype=ssm_dtype)

    def read_chunk(index, carry):
        _, cache = carry
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=index * chunk, slice_size=chunk, axis=1)
        output = model(
            part(ids),
            attention_mask=part(mask),
            position_ids=part(positions),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return _scores(output.logits), output.past_key_values

    nothing = jnp.zeros((batch_size, model.config.vocab_size), jnp.float32)
    return jax.lax.fori_loop(0, chunks, read_chunk, (nothing, cache))


@functools.partial(jit_kept, static_argnames=("copies",))
def repeat_rows(
    logits: Float[Array, "b v"], cache: Zamba2Cache, *, copies: int
) -> tuple[Float[Array, "r v"], Zamba2Cache]:
    """Every row `copies` times, neighbouring: one prefill serves all hypotheses of a prompt."""
    rows = jnp.repeat(jnp.arange(logits.shape[0]), copies)
    return logits[rows], cache.reorder(rows)


@functools.partial(jit_kept, static_argnames=("processors",))
def begin(
    logits: Float[Array, "r v"],
    state: Decoding,
    prompt: Prompt,
    knobs: Knobs,
    stop_table: Int16[Array, "states v"] | None = None,
    *,
    processors: Processors,
) -> Decoding:
    """The state with the first new token, from the prefill's `logits`."""
    return constrain_whole(
        choose(logits, state, prompt=prompt, knobs=knobs, stop_table=stop_table, processors=processors)
    )


@functools.partial(jit_kept, static_argnames=("structure", "processors", "hold_finished"), donate_argnames=("cache",))
def decode(
    structure: Structure,
    weights: list[jax.Array],
    cache: Zamba2Cache,
    state: Decoding,
    prompt: Prompt,
    knobs: Knobs,
    until: Int32[Array, ""],
    stop_table: Int16[Array, "states v"] | None = None,
    *,
    processors: Processors,
    hold_finished: bool = False,
) -> tuple[Zamba2Cache, Decoding]:
    """Adds tokens, after those that `begin` and earlier calls have, until `until` new ones stand or every row is
    finished.

    A row is finished by an end-of-sequence token, or where `stop_table` (`StopStrings.table`) says so. With
    `hold_finished` the padding of finished rows does not enter the cache.
    """
    model = structure.model(weights)
    choose_next = functools.partial(choose, prompt=prompt, knobs=knobs, stop_table=stop_table, processors=processors)

    def unfinished(carry: tuple[Zamba2Cache, Decoding]) -> Bool[Array, ""]:
        _, state = carry
        return (state.step < until) & ~state.done

    def add_token(carry: tuple[Zamba2Cache, Decoding]) -> tuple[Zamba2Cache, Decoding]:
        cache, state = carry
        last = jax.lax.dynamic_slice_in_dim(state.tokens, prompt.length + state.step - 1, 1, axis=1)
        going_on = ~state.finished if hold_finished else None
        logits, cache = next_logits(model, last, prompt.tokens + state.step - 1, cache, going_on)
        return cache, choose_next(logits, state)

    cache, state = jax.lax.while_loop(unfinished, add_token, (cache, state))
    return cache, constrain_whole(state)  # for the host of each process to read


def choose(
    logits: Float[Array, "r v"],
    state: Decoding,
    *,
    prompt: Prompt,
    knobs: Knobs,
    stop_table: Int16[Array, "states v"] | None,
    processors: Processors,
) -> Decoding:
    """The state with one more token per row; padding, in a row that is finished."""
    token, scores = pick(logits, state.tokens, state.step, prompt, knobs, processors)
    token = jnp.where(state.finished, knobs.pad_token_id, token)
    finished = state.finished | is_end(token, knobs)
    stop = None
    if stop_table is not None:
        stop = stop_table[state.stop, token].astype(jnp.int32)
        finished |= stop < 0
        stop = jnp.maximum(stop, 0)
    return Decoding(
        tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, prompt.length + state.step)),
        step=state.step + 1,
        finished=finished,
        done=finished.all(),
        scores=None if state.scores is None else scores,
        logits=None if state.logits is None else logits,
        stop=stop,
    )


def pick(
    logits: Float[Array, "r v"],
    tokens: Int32[Array, "r columns"],
    step: Int32[Array, ""],
    prompt: Prompt,
    knobs: Knobs,
    processors: Processors,
) -> tuple[Int32[Array, " r"], Float[Array, "r v"]]:
    """Each row's new token number `step`, and the processed scores it is of. Of `tokens` those before it are read."""
    scores = process(logits, tokens, prompt, step, processors, knobs)
    noise = gumbel_noise(knobs.seed, step, scores.shape) if processors.sample else 0.0
    return jnp.argmax(scores + noise, axis=-1).astype(jnp.int32), scores


def is_end(token: Int32[Array, "*shape"], knobs: Knobs) -> Bool[Array, "*shape"]:
    """Whether it is an end-of-sequence token."""
    return (token[..., None] == knobs.eos_token_ids).any(axis=-1)


def next_logits(
    model: Any,
    last: Int32[Array, "r 1"],
    position: Int32[Array, " r"],
    cache: Zamba2Cache,
    rows: Bool[Array, " r"] | None = None,
) -> tuple[Float[Array, "r v"], Zamba2Cache]:
    """One recurrent step: float32 scores of the token after `last`, and the cache with `last` in it (for `rows`)."""
    output = model(
        last,
        attention_mask=None if rows is None else rows[:, None],
        position_ids=position[:, None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return _scores(output.logits), output.past_key_values


def _scores(logits: Float[Array, "r 1 v"]) -> Float[Array, "r v"]:
    """Of the one token, with all of the vocabulary on every device of a mesh: what follows sorts and sums it."""
    return constrain(logits[:, 0].astype(jnp.float32), "batch", None)


def gumbel_noise(seed: UInt32[Array, ""], step: Int32[Array, ""], shape: tuple[int, int]) -> Float[Array, "r n"]:
    """Noise whose argmax with log-probabilities is a draw from them.

    Each row and step has a key of its own: what a row draws depends on neither the batch's size nor how steps are
    grouped into calls.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(shape[0]))
    return jax.vmap(lambda row_key: jax.random.gumbel(row_key, shape[1:], jnp.float32))(keys)


def where(condition: Bool[Array, ""], yes: Any, no: Any) -> Any:
    """Leafwise choice between two states."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
