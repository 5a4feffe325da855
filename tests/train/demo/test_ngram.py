"""The 5-gram model that the shipped model is compared with must be a good one, or the comparison says nothing."""

import math

import numpy as np
import pytest

from train.demo.ngram import NGramModel


@pytest.fixture(scope="module")
def documents():
    """A second-order chain over 7 tokens, which a model of 3-grams can learn and one of 2-grams cannot."""
    random = np.random.default_rng(0)
    table = random.dirichlet(np.full(7, 0.3), size=(7, 7))
    found = []
    for length in random.integers(3, 400, 60):
        tokens = [0, 1]
        while len(tokens) < length:
            tokens.append(int(random.choice(7, p=table[tokens[-2], tokens[-1]])))
        found.append(np.array(tokens))
    return table, found


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one(documents, order):
    model = NGramModel(documents[1][:20], 7, order)
    for context in ([0], [0, 1], [6, 6, 6, 6, 6, 6], [3, 1, 4, 1, 5]):
        total = sum(math.exp(model.log_probabilities(np.array([*context, token]))[-1]) for token in range(7))
        assert total == pytest.approx(1.0, abs=1e-12)


def test_longer_contexts_reach_the_entropy_of_the_source(documents):
    table, found = documents
    train, heldout = found[:50], found[50:]
    losses = [
        -np.concatenate([NGramModel(train, 7, order).log_probabilities(document) for document in heldout]).mean()
        for order in (1, 2, 3)
    ]
    source = -np.mean([math.log(table[a, b, c]) for d in heldout for a, b, c in zip(d, d[1:], d[2:], strict=False)])
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < source + 0.06
    assert losses[1] > source + 0.2


def test_a_bigram_by_hand():
    # Bigrams ab ab ac: counts 2 and 1. Discounts, by n1 = n2 = 1 and nothing else: y = 1/3, D1 = 1/3, D2 = 2 - 3y = 1.
    model = NGramModel([np.array([0, 1]), np.array([0, 1]), np.array([0, 2])], 4, order=2)
    probability = math.exp(model.log_probabilities(np.array([0, 1]))[0])
    # Single tokens: a stands first and counts 3 times; b and c each follow one token.
    unigrams = model.log_probabilities(np.array([1, 1]))  # nothing follows b: the single tokens decide
    assert probability == pytest.approx((2 - 1) / 3 + (1 / 3 + 1) / 3 * math.exp(unigrams[0]))


def test_ngrams_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="5-grams of 8000 tokens do not fit into 64 bits"):
        NGramModel([np.arange(9)], 8000)
    with pytest.raises(ValueError, match="no document holds 5 tokens"):
        NGramModel([np.arange(4)], 10)
