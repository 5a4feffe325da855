"""Calls of which it is decided afterwards how many tokens count: the cache is that of a call of so many."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.test_cache import make

LENGTH = 6
# Of float32 numbers of size 1 that a few tokens' products and sums have gone through in another order.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(scope="module")
def model():
    return make(num_hidden_layers=2, layers_block_type=["mamba", "hybrid"])


@pytest.fixture(scope="module")
def call(model):
    graphdef, state = nnx.split(model)

    @functools.partial(jax.jit, static_argnames="tentative")
    def forward(state, ids, cache, mask=None, tentative=False):
        return nnx.merge(graphdef, state)(ids, mask, past_key_values=cache, tentative=tentative)

    return lambda ids, cache, *mask, **static: forward(state, np.asarray(ids), cache, *mask, **static)


@pytest.fixture(scope="module")
def cache(model, call, ids):
    """Two rows, of 6 and 4 tokens."""
    mask = np.ones(ids.shape, bool)
    mask[1, :2] = False
    return call(ids[::-1], model.init_cache(2, 40), mask).past_key_values


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(1).integers(1, 53, (2, LENGTH))


@pytest.mark.parametrize("count", [(0, 0), (1, 1), (2, 5), (6, 3), (6, 6)], ids=str)
def test_what_is_kept_is_what_a_shorter_call_leaves(call, cache, ids, count):
    counts = np.array(count)
    tentative = call(ids, cache, tentative=True)
    # A mask makes the tokens behind it absent, for state and positions alike.
    mask = np.arange(LENGTH) < counts[:, None]
    expected = call(ids, cache, mask)
    np.testing.assert_allclose(tentative.logits[mask], expected.logits[mask], **CLOSE)

    kept, expected = tentative.past_key_values.keep(counts), expected.past_key_values
    np.testing.assert_array_equal(kept.next_position, expected.next_position)
    np.testing.assert_array_equal(kept.slot_mask, expected.slot_mask)
    assert kept.length == cache.length + max(count)
    for ours, theirs in zip(jax.tree.leaves(kept.mamba), jax.tree.leaves(expected.mamba), strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)
    following = np.ones(ids.shape, bool)
    more = [call(ids + 1, cache, following).logits for cache in (kept, expected)]
    np.testing.assert_allclose(*more, **CLOSE)


def test_states_keep_their_dtype(model, call, ids):
    cache = model.init_cache(2, 40, ssm_dtype=jnp.bfloat16)
    kept = call(ids, cache, tentative=True).past_key_values.keep(np.array([2, 3]))
    assert kept.mamba[0].ssm.dtype == jnp.bfloat16


def test_a_single_token_can_be_taken_back(call, cache, ids):
    one = call(ids[:, :1], cache, tentative=True)
    back = one.past_key_values.keep(np.array([0, 1]))
    np.testing.assert_array_equal(back.mamba[0].ssm[0], cache.mamba[0].ssm[0])
    mask = np.arange(LENGTH) < np.array([[0], [1]])
    expected = call(ids, cache, mask)
    np.testing.assert_allclose(one.logits[1, 0], expected.logits[1, 0], **CLOSE)
    np.testing.assert_allclose(back.mamba[1].ssm, expected.past_key_values.mamba[1].ssm, **CLOSE)


def test_positions_are_those_of_the_call(call, cache, ids):
    tentative = call(ids, cache, tentative=True).past_key_values
    moved = dataclasses.replace(tentative, positions=tentative.positions + 100)
    before = cache.next_position
    np.testing.assert_array_equal(moved.keep(np.array([0, 2])).next_position, [before[0], before[1] + 100 + 2])


@pytest.mark.parametrize("tentative", [False, True])
def test_scanned_layers_are_not_stacked_for_it(ids, tentative):
    """A copy of all weights would cost more than the call."""
    model = make()
    model.scan_layers_enable()
    program = jax.make_jaxpr(lambda cache: model(ids, past_key_values=cache, tentative=tentative).logits)
    kernel = model.model.layers[0].mamba.zx_proj.kernel.shape
    made = [variable.aval.shape for equation in program(model.init_cache(2, 40)).eqns for variable in equation.outvars]
    assert any(shape[1:] == kernel for shape in made) is not tentative


def test_bad_input(model, call, cache, ids):
    with pytest.raises(ValueError, match="tentative=True needs past_key_values"):
        model(ids, tentative=True)
    with pytest.raises(ValueError, match="tentative=True takes no attention_mask"):
        model(ids, np.ones_like(ids), past_key_values=cache, tentative=True)
    output = call(ids, cache, tentative=True).past_key_values
    for count, message in (
        ([1, 7], r"count must be from 0 to 6, the tokens of the call, got \[1, 7\]"),
        ([1], r"count must be 2 integers, one per row, got int32 of shape \(1,\)"),
        ([0.5, 1.0], "count must be 2 integers, one per row, got float32"),
    ):
        with pytest.raises(ValueError, match=message):
            output.keep(np.asarray(count))
    with pytest.raises(ValueError, match=r"past_key_values must be a Zamba2Cache .* got TentativeCache"):
        model(ids, past_key_values=output)
