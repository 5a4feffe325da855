"""generate against transformers' own, float32, token for token."""

import numpy as np
import pytest
import torch

from bench.oracle import to_torch


def both(models, ids, mask, **options):
    """The same call of both; torch first."""
    with torch.no_grad():
        expected = models.torch.generate(to_torch(ids), attention_mask=to_torch(mask), **options)
    return expected, models.jax.generate(ids, mask, **options)


def assert_equal(expected, actual):
    np.testing.assert_array_equal(actual, expected.numpy())


def greedy(models, ids, mask, count):
    return models.jax.generate(ids, mask, max_new_tokens=count, eos_token_id=None)[:, ids.shape[1] :]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    ],
    ids=str,
)
def test_greedy_and_processors(models, prompts, options):
    ids, mask = prompts
    assert_equal(*both(models, ids, mask, max_new_tokens=24, **options))


def test_processors_change_something(models, prompts):
    """Otherwise the test above says nothing about them."""
    ids, mask = prompts
    plain = models.jax.generate(ids, mask, max_new_tokens=24)
    for options in ({"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}):
        assert not np.array_equal(plain, models.jax.generate(ids, mask, max_new_tokens=24, **options)), options


def test_rows_that_end_early_are_padded(models, prompts):
    ids, mask = prompts
    plain = greedy(models, ids, mask, 12)
    eos = [int(plain[0, 3]), int(plain[1, 8])]
    expected, actual = both(models, ids, mask, max_new_tokens=12, eos_token_id=eos, pad_token_id=7)
    assert_equal(expected, actual)
    assert (actual[0, 11 + 4 :] == 7).any()


def test_output_ends_with_the_longest_row(models, prompts):
    ids, mask = prompts
    plain = greedy(models, ids, mask, 12)
    eos = [int(row[5]) for row in plain]
    expected, actual = both(models, ids, mask, max_new_tokens=12, eos_token_id=eos)
    assert_equal(expected, actual)
    assert actual.shape[1] < 11 + 12


@pytest.mark.parametrize("options", [{"min_new_tokens": 6}, {"min_length": 15}], ids=str)
def test_minimum_length(models, prompts, options):
    ids, mask = prompts
    eos = [int(token) for token in greedy(models, ids, mask, 12)[:, 1]]
    assert_equal(*both(models, ids, mask, max_new_tokens=12, eos_token_id=eos, **options))


def test_maximum_length_counts_the_prompt(models, prompts):
    ids, mask = prompts
    assert_equal(*both(models, ids, mask, max_length=20))


def test_scores_and_logits(models, prompts):
    ids, mask = prompts
    eos = [int(greedy(models, ids, mask, 12)[1, 4])]
    expected, actual = both(
        models,
        ids,
        mask,
        max_new_tokens=8,
        eos_token_id=eos,
        repetition_penalty=1.3,
        min_new_tokens=3,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert_equal(expected.sequences, actual.sequences)
    assert len(actual.scores) == len(expected.scores) == len(actual.logits)
    for name in ("scores", "logits"):
        for ours, theirs in zip(getattr(actual, name), getattr(expected, name), strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-4)


BEAM_OPTIONS = [
    {},
    {"length_penalty": 2.0},
    {"length_penalty": -1.0},
    {"length_penalty": 0.0, "early_stopping": "never"},
    {"early_stopping": True},
    {"early_stopping": True, "length_penalty": 0.5},
    {"early_stopping": "never", "length_penalty": 1.5},
    {"early_stopping": "never", "length_penalty": -0.5},
]


@pytest.mark.parametrize("options", BEAM_OPTIONS, ids=str)
def test_beam_search(models, prompts, options):
    ids, mask = prompts
    plain = greedy(models, ids, mask, 14)
    # Tokens that beams come upon early, so that they end at many lengths.
    eos = [int(token) for token in plain[:, 2]]
    expected, actual = both(
        models, ids, mask, max_new_tokens=14, num_beams=3, num_return_sequences=3, eos_token_id=eos, **options
    )
    assert_equal(expected, actual)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
        {"num_beams": 4, "num_return_sequences": 2, "eos_token_id": None},
    ],
    ids=str,
)
def test_beam_search_of_other_widths(models, prompts, options):
    ids, mask = prompts
    eos = {"eos_token_id": int(greedy(models, ids, mask, 14)[1, 2])}
    assert_equal(*both(models, ids, mask, max_new_tokens=14, **(eos | options)))


def test_beam_scores(models, prompts):
    ids, mask = prompts
    eos = [int(token) for token in greedy(models, ids, mask, 14)[:, 2]]
    expected, actual = both(
        models,
        ids,
        mask,
        max_new_tokens=9,
        num_beams=3,
        num_return_sequences=2,
        eos_token_id=eos,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert_equal(expected.sequences, actual.sequences)
    assert_equal(expected.beam_indices, actual.beam_indices)
    np.testing.assert_allclose(actual.sequences_scores, expected.sequences_scores.numpy(), rtol=0, atol=1e-4)
    assert len(actual.scores) == len(expected.scores)
    for name in ("scores", "logits"):
        for ours, theirs in zip(getattr(actual, name), getattr(expected, name), strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-4)


def test_padding_is_recognised_without_a_mask(models, prompts):
    ids, _ = prompts
    with torch.no_grad():
        expected = models.torch.generate(to_torch(ids), max_new_tokens=6)
    assert_equal(expected, models.jax.generate(ids, max_new_tokens=6))


def test_masked_tokens_between_real_ones(models):
    """Hidden, but time passes; also right before the last token and across what would be several chunks."""
    ids = np.random.default_rng(2).integers(3, 131, (3, 11))
    mask = np.ones((3, 11), int)
    mask[0, 4:6] = 0
    mask[1, 9] = 0
    mask[2, [0, 1, 5]] = 0
    assert_equal(*both(models, ids, mask, max_new_tokens=10))


def test_start_from_nothing(models):
    with torch.no_grad():
        expected = models.torch.generate(max_new_tokens=6)
    assert_equal(expected, models.jax.generate(max_new_tokens=6))
