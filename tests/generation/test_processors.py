"""The logits processors against transformers' classes, and what is drawn from the scores that they leave."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as reference

from zamba2_jax.generation import processors, programs

ROWS, VOCAB = 5, 97


@pytest.fixture(scope="module")
def scores():
    return np.random.default_rng(0).normal(scale=3, size=(ROWS, VOCAB)).astype(np.float32)


@pytest.fixture(scope="module")
def history():
    """Few different tokens, so that pairs repeat. Rows begin in different columns; the buffer goes on after the end."""
    tokens = np.random.default_rng(1).integers(0, 6, (ROWS, 23)).astype(np.int32)
    return tokens, np.array([0, 0, 3, 5, 12], np.int32), np.int32(17)


def expect(warper, scores, tokens=None):
    tokens = np.zeros((ROWS, 1)) if tokens is None else tokens
    return warper(torch.from_numpy(tokens).long(), torch.from_numpy(scores)).numpy()


@pytest.mark.parametrize(("k", "bound"), [(1, 64), (5, 64), (64, 64), (5, VOCAB), (97, VOCAB)])
def test_top_k(scores, k, bound):
    ours = processors.top_k(jnp.asarray(scores), jnp.int32(k), bound=bound)
    np.testing.assert_array_equal(ours, expect(reference.TopKLogitsWarper(k), scores))


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
def test_top_p(scores, p, keep):
    ours = processors.top_p(jnp.asarray(scores), jnp.float32(p), bound=VOCAB, keep=keep)
    np.testing.assert_array_equal(ours, expect(reference.TopPLogitsWarper(p, min_tokens_to_keep=keep), scores))


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("p", [0.01, 0.1, 0.7, 1.0])
def test_min_p(scores, p, keep):
    ours = processors.min_p(jnp.asarray(scores), jnp.float32(p), keep=keep)
    np.testing.assert_array_equal(ours, expect(reference.MinPLogitsWarper(p, min_tokens_to_keep=keep), scores))


def test_top_p_after_top_k(scores):
    after_k = processors.top_k(jnp.asarray(scores), jnp.int32(20), bound=64)
    ours = processors.top_p(after_k, jnp.float32(0.8), bound=64)
    theirs = expect(reference.TopPLogitsWarper(0.8), expect(reference.TopKLogitsWarper(20), scores))
    np.testing.assert_array_equal(ours, theirs)


def test_ties_at_the_threshold_stay():
    scores = jnp.asarray([[3.0, 2.0, 2.0, 2.0, 1.0]])
    assert np.isfinite(processors.top_k(scores, jnp.int32(2), bound=5)).tolist() == [[True, True, True, True, False]]
    assert np.isfinite(processors.top_p(scores, jnp.float32(0.6), bound=3)).tolist() == [
        [True, True, True, True, False]
    ]


def test_repetition_penalty(scores, history):
    tokens, start, end = history
    ours = processors.repetition_penalty(jnp.asarray(scores), tokens, start, end, jnp.float32(1.4))
    warper = reference.RepetitionPenaltyLogitsProcessor(1.4, prompt_ignore_length=torch.from_numpy(start))
    np.testing.assert_allclose(ours, expect(warper, scores, tokens[:, :end]), rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_no_repeat_ngram(scores, history, size):
    tokens, start, end = history
    ours = processors.no_repeat_ngram(jnp.asarray(scores), tokens, start, end, size)
    warper = reference.NoRepeatNGramLogitsProcessor(size)
    for row in range(ROWS):  # transformers has no start per row
        alone = torch.from_numpy(tokens[row : row + 1, start[row] : end]).long()
        theirs = warper(alone, torch.from_numpy(scores[row : row + 1])).numpy()
        np.testing.assert_array_equal(ours[row], theirs[0])


def chi_square(counts, probabilities):
    """The statistic and a bound that true draws exceed once in 10^4 seeds (Wilson and Hilferty's approximation); ours
    are fixed.
    """
    expected = probabilities * counts.sum()
    assert expected.min() > 5
    freedom = len(counts) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    return ((counts - expected) ** 2 / expected).sum(), bound


def test_draws_follow_the_distribution_and_steps_are_independent():
    scores = jnp.log(jnp.asarray([0.1, 0.2, 0.3, 0.4]))

    @jax.jit
    def draw(seed, step):
        return jnp.argmax(scores + programs.gumbel_noise(seed, step, (20_000, 4)), axis=-1)

    first, second, other_seed = draw(np.uint32(7), 0), draw(np.uint32(7), 1), draw(np.uint32(8), 0)
    joint = np.outer(np.exp(scores), np.exp(scores)).reshape(-1)
    for pair in ((first, second), (first, other_seed), (first[:-1], first[1:])):
        counts = np.bincount(np.asarray(pair[0] * 4 + pair[1]), minlength=16)
        statistic, bound = chi_square(counts, joint)
        assert statistic < bound


def test_a_row_draws_the_same_in_any_batch():
    noise = functools.partial(programs.gumbel_noise, np.uint32(3), 5)
    np.testing.assert_array_equal(noise((2, 9)), noise((6, 9))[:2])


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7, "top_k": 30, "min_p": 0.05}, {"temperature": 1.5, "top_k": 0, "top_p": 0.7}],
    ids=str,
)
def test_generate_samples_from_what_transformers_would(models, options):
    """512 draws of one token, against transformers' warpers on torch's logits."""
    ids = np.array([[5, 17, 40, 80]])
    with torch.no_grad():
        scores = models.torch(torch.from_numpy(ids)).logits[:, -1]
    if "temperature" in options:
        scores = reference.TemperatureLogitsWarper(options["temperature"])(None, scores)
    if options.get("top_k"):
        scores = reference.TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = reference.TopPLogitsWarper(options["top_p"])(None, scores)
    if "min_p" in options:
        scores = reference.MinPLogitsWarper(options["min_p"])(None, scores)
    probabilities = scores.softmax(-1)[0].numpy().astype(np.float64)

    drawn = models.jax.generate(
        ids, max_new_tokens=1, do_sample=True, num_return_sequences=512, seed=11, pad_token_id=0, **options
    )
    counts = np.bincount(drawn[:, -1], minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    # Rare tokens together, so that every cell expects enough.
    common = probabilities * 512 > 6
    counts = np.append(counts[common], counts[~common].sum())
    probabilities = np.append(probabilities[common], probabilities[~common].sum())
    if probabilities[-1] * 512 <= 5:
        counts, probabilities = counts[:-1], probabilities[:-1] / probabilities[:-1].sum()
    statistic, bound = chi_square(counts, probabilities)
    assert statistic < bound


def test_beam_sampling_at_a_low_temperature_is_beam_search(models):
    """The scores of all steps are divided alike, so with noise that is small beside them the order is that of beam
    search.
    """
    ids = np.array([[5, 17, 40, 80]])
    options = {"max_new_tokens": 8, "num_beams": 3, "eos_token_id": None, "pad_token_id": 0}
    expected = models.jax.generate(ids, **options)
    drawn = models.jax.generate(ids, do_sample=True, temperature=1e-4, top_k=0, seed=0, **options)
    np.testing.assert_array_equal(drawn, expected)
    warm = {"do_sample": True, "temperature": 2.0, "top_k": 0}
    one, same, other = (models.jax.generate(ids, seed=seed, **warm, **options) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
