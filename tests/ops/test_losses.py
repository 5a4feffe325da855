"""The losses against PyTorch's and transformers' own."""

import jax
import numpy as np
import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from zamba2_jax.ops.losses import (
    binary_cross_entropy_with_logits,
    causal_lm_loss,
    cross_entropy,
    mean_squared_error,
)

# Means of fewer than 100 float32 terms of size 1 to 10.
TOLERANCE = 2e-6
VOCABULARY = 11


@pytest.fixture
def batch():
    """Logits (3, 7, v) large enough to need the maximum taken out, and labels of which some are ignored."""
    random = np.random.default_rng(0)
    logits = (30 * random.standard_normal((3, 7, VOCABULARY))).astype(np.float32)
    labels = random.integers(0, VOCABULARY, (3, 7))
    labels[0, :3] = labels[2, 5:] = -100
    return logits, labels


class TestCausal:
    @pytest.mark.parametrize("num_items", [None, 5])
    def test_oracle(self, batch, num_items):
        logits, labels = batch
        wanted = ForCausalLMLoss(torch.tensor(logits), torch.tensor(labels), VOCABULARY, num_items)
        np.testing.assert_allclose(causal_lm_loss(logits, labels, num_items=num_items), wanted, rtol=TOLERANCE)

    def test_gradient(self, batch):
        logits, labels = batch
        tensor = torch.tensor(logits, requires_grad=True)
        ForCausalLMLoss(tensor, torch.tensor(labels), VOCABULARY).backward()
        gradient = jax.grad(causal_lm_loss)(logits, labels)
        np.testing.assert_allclose(gradient, tensor.grad, atol=1e-7)

    def test_bfloat16_logits_are_raised(self, batch):
        logits, labels = batch
        low = jax.numpy.asarray(logits, jax.numpy.bfloat16)
        loss = causal_lm_loss(low, labels)
        assert loss.dtype == jax.numpy.float32
        np.testing.assert_allclose(loss, causal_lm_loss(low.astype(jax.numpy.float32), labels), rtol=TOLERANCE)

    def test_ignore_index(self, batch):
        logits, labels = batch
        np.testing.assert_array_equal(
            causal_lm_loss(logits, np.where(labels == -100, -1, labels), ignore_index=-1),
            causal_lm_loss(logits, labels),
        )

    def test_nothing_counts(self, batch):
        logits, labels = batch
        nothing = np.full_like(labels, -100)
        assert ForCausalLMLoss(torch.tensor(logits), torch.tensor(nothing), VOCABULARY).isnan()
        assert np.isnan(causal_lm_loss(logits, nothing))
        assert causal_lm_loss(logits, nothing, num_items=4) == 0

    def test_errors(self, batch):
        logits, labels = batch
        with pytest.raises(ValueError, match=r"logits has shape \(7, 11\); it must be \(b, l, v\)"):
            causal_lm_loss(logits[0], labels[0])
        with pytest.raises(ValueError, match=r"labels has shape \(3, 6\); it must be \(b, l\) = \(3, 7\)"):
            causal_lm_loss(logits, labels[:, 1:])
        with pytest.raises(ValueError, match="labels has dtype float32; it must be an integer type"):
            causal_lm_loss(logits, labels.astype(np.float32))


class TestClassification:
    def test_cross_entropy(self, batch):
        logits, labels = batch[0][:, 0], batch[1][:, 4]
        labels[1] = -100
        wanted = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
        np.testing.assert_allclose(cross_entropy(logits, labels), wanted, rtol=TOLERANCE)
        assert np.isnan(cross_entropy(logits, np.full_like(labels, -100)))

    def test_binary_cross_entropy(self):
        """Logits of size 100 as well, where the naive form overflows."""
        logits = np.array([[100.0, -100.0, 0.3], [-2.0, 50.0, 1.0]], np.float32)
        labels = np.array([[0.0, 1.0, 0.25], [1.0, 1.0, 0.0]], np.float32)
        wanted = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(logits), torch.tensor(labels))
        np.testing.assert_allclose(binary_cross_entropy_with_logits(logits, labels), wanted, rtol=TOLERANCE)

    def test_mean_squared_error(self):
        random = np.random.default_rng(0)
        predictions, labels = random.standard_normal((2, 5, 3)).astype(np.float32)
        wanted = torch.nn.functional.mse_loss(torch.tensor(predictions), torch.tensor(labels))
        np.testing.assert_allclose(mean_squared_error(predictions, labels), wanted, rtol=TOLERANCE)

    def test_errors(self):
        zeros = np.zeros((2, 3), np.float32)
        with pytest.raises(ValueError, match=r"labels has shape \(3,\); it must be .* = \(2,\)"):
            cross_entropy(zeros, np.zeros(3, np.int32))
        with pytest.raises(ValueError, match=r"labels has shape \(2,\); it must be the shape of logits = \(2, 3\)"):
            binary_cross_entropy_with_logits(zeros, np.zeros(2, np.float32))
        with pytest.raises(ValueError, match=r"labels has shape \(3, 2\); it must be the shape of predictions"):
            mean_squared_error(zeros, np.zeros((3, 2), np.float32))
        with pytest.raises(ValueError, match="predictions has dtype int32"):
            mean_squared_error(np.zeros((2, 3), np.int32), zeros)
