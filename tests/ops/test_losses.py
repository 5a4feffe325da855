"""The losses against PyTorch's and transformers' own."""

import os
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AbstractMesh
from transformers.loss.loss_utils import ForCausalLMLoss

from zamba2_jax.ops import blocked_cross_entropy
from zamba2_jax.ops.losses import (
    binary_cross_entropy_with_logits,
    causal_lm_loss,
    cross_entropy,
    linear_causal_lm_loss,
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


LENGTH, WIDTH = 37, 16


@pytest.fixture(scope="module")
def head_batch():
    """hidden (3, 37, 16) and head (v, 16) with scores of size 10 to 30, labels of which some are ignored."""
    random = np.random.default_rng(0)
    hidden = (2 * random.standard_normal((3, LENGTH, WIDTH))).astype(np.float32)
    head = (2 * random.standard_normal((VOCABULARY, WIDTH))).astype(np.float32)
    labels = random.integers(0, VOCABULARY, (3, LENGTH))
    labels[0, :3] = labels[2, 5:9] = -100
    return hidden, head, labels


class TestLinearCausal:
    """Against PyTorch in float64 on logits that it makes from the same hidden states and head."""

    def wanted(self, hidden, head, labels, num_items=None):
        tensors = [torch.tensor(np.float64(array), requires_grad=True) for array in (hidden, head)]
        # transformers' function would round to float32 first.
        logits = (tensors[0] @ tensors[1].T)[:, :-1].reshape(-1, VOCABULARY)
        total = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)[:, 1:].reshape(-1), reduction="sum")
        loss = total / (num_items or (labels[:, 1:] != -100).sum())
        loss.backward()
        return loss.item(), [tensor.grad.numpy() for tensor in tensors]

    # One block, blocks of one token, a last block that is partly filler, and one that divides the row.
    @pytest.mark.parametrize("columns", [None, 1, 10, 37])
    @pytest.mark.parametrize(("vocab_axis", "num_items"), [(0, None), (1, 5)])
    def test_loss_and_gradients(self, head_batch, columns, vocab_axis, num_items):
        hidden, head, labels = head_batch

        def loss(hidden, head):
            head = head.T if vocab_axis == 1 else head
            return linear_causal_lm_loss(
                hidden, head, labels, vocab_axis=vocab_axis, num_items=num_items, block_columns=columns
            )

        wanted, wanted_gradients = self.wanted(*head_batch, num_items)
        value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)
        np.testing.assert_allclose(value, wanted, rtol=TOLERANCE)
        np.testing.assert_allclose(loss(hidden, head), value, rtol=TOLERANCE)  # with and without a gradient
        for ours, theirs in zip(gradients, wanted_gradients, strict=True):
            # Scores of up to 30 are off by 2e-6, and probabilities with them.
            np.testing.assert_allclose(ours, theirs, atol=4e-6 * np.abs(theirs).max())

    def test_bfloat16(self, head_batch):
        """Products of bfloat16 operands are summed in float32: only the slope of the scores is rounded, and the
        results. The head's gradient leaves the sum over blocks in float32 where the head is kept so."""
        hidden, head, labels = (jnp.asarray(array) for array in head_batch)
        hidden = hidden.astype(jnp.bfloat16)
        low_head = head.astype(jnp.bfloat16)
        wanted, wanted_gradients = self.wanted(np.float32(hidden), np.float32(low_head), head_batch[2])
        loss = jax.value_and_grad(
            lambda hidden, head: linear_causal_lm_loss(hidden, head, labels, block_columns=10), argnums=(0, 1)
        )
        value, gradients = loss(hidden, low_head)
        assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.bfloat16]
        _, (_, high_slope) = loss(hidden, low_head.astype(jnp.float32))
        assert high_slope.dtype == jnp.float32
        np.testing.assert_allclose(value, wanted, rtol=TOLERANCE)
        for ours, theirs in zip((*gradients, high_slope), (*wanted_gradients, wanted_gradients[1]), strict=True):
            error = np.linalg.norm(np.float64(ours) - theirs) / np.linalg.norm(theirs)
            assert error < 2 * 2.0**-9

    def test_hessian_vector_product(self, head_batch):
        """Forward over reverse: the stored gradient's own derivative."""
        hidden, head, labels = head_batch
        direction = np.random.default_rng(1).standard_normal(hidden.shape).astype(np.float32)

        def product(loss):
            return jax.jvp(jax.grad(loss), (hidden,), (direction,))[1]

        ours = product(lambda hidden: linear_causal_lm_loss(hidden, head, labels, block_columns=10))
        plain = product(lambda hidden: causal_lm_loss(hidden @ head.T, labels))
        np.testing.assert_allclose(ours, plain, atol=1e-5 * np.abs(plain).max())

    @pytest.mark.parametrize(("columns", "vocab_axis"), [(None, 0), (10, 1)])
    def test_z_loss(self, head_batch, columns, vocab_axis):
        """Loss and gradients are those of the plain formula, differentiated by JAX."""
        hidden, head, labels = head_batch

        def plain(hidden, head):
            scores = (hidden @ head.T)[:, :-1]
            z = jax.nn.logsumexp(scores, axis=-1)
            chosen = jnp.take_along_axis(scores, jnp.maximum(labels[:, 1:], 0)[..., None], -1)[..., 0]
            counts = labels[:, 1:] != -100
            return jnp.sum(jnp.where(counts, z - chosen + 0.01 * z**2, 0.0)) / jnp.sum(counts)

        def ours(hidden, head):
            head = head.T if vocab_axis == 1 else head
            options = {"vocab_axis": vocab_axis, "block_columns": columns}
            return linear_causal_lm_loss(hidden, head, labels, z_loss=0.01, **options)

        wanted, wanted_gradients = jax.value_and_grad(plain, argnums=(0, 1))(hidden, head)
        value, gradients = jax.value_and_grad(ours, argnums=(0, 1))(hidden, head)
        assert value > linear_causal_lm_loss(hidden, head, labels, vocab_axis=0) + 0.1
        np.testing.assert_allclose(value, wanted, rtol=1e-5)
        np.testing.assert_allclose(ours(hidden, head), value, rtol=TOLERANCE)
        for mine, other in zip(gradients, wanted_gradients, strict=True):
            np.testing.assert_allclose(mine, other, atol=1e-5 * np.abs(other).max())

    def test_nothing_counts(self, head_batch):
        hidden, head, labels = head_batch
        nothing = np.full_like(labels, -100)
        assert np.isnan(linear_causal_lm_loss(hidden, head, nothing))
        gradient = jax.grad(lambda h: linear_causal_lm_loss(h, head, nothing, num_items=4, block_columns=10))(hidden)
        assert not gradient.any()

    def test_ignore_index(self, head_batch):
        hidden, head, labels = head_batch
        np.testing.assert_array_equal(
            linear_causal_lm_loss(hidden, head, np.where(labels == -100, -1, labels), ignore_index=-1),
            linear_causal_lm_loss(hidden, head, labels),
        )

    def test_no_more_than_a_block_of_scores_in_memory(self):
        batch, length, width, vocabulary, columns = 2, 512, 8, 4096, 64
        hidden = jax.ShapeDtypeStruct((batch, length, width), jnp.bfloat16)
        head = jax.ShapeDtypeStruct((vocabulary, width), jnp.float32)
        labels = jax.ShapeDtypeStruct((batch, length), jnp.int32)

        def blocked(hidden, head, labels):
            return linear_causal_lm_loss(hidden, head, labels, block_columns=columns)

        def plain(hidden, head, labels):
            return causal_lm_loss(hidden @ head.T.astype(hidden.dtype), labels)

        def compiled(loss):
            return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, head, labels).compile()

        def largest(program):
            shapes = re.findall(r"[a-z]+\d+\[([\d,]+)\]", program.as_text())
            return max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)

        everything, block = batch * length * vocabulary, batch * columns * vocabulary
        assert largest(compiled(plain)) == everything
        assert largest(compiled(blocked)) == block
        # A block's scores, their exponentials and slopes, in float32 at most, and the head twice.
        memory = compiled(blocked).memory_analysis().temp_size_in_bytes
        assert memory < 4 * (4 * block + 3 * vocabulary * width)
        assert memory < 0.2 * compiled(plain).memory_analysis().temp_size_in_bytes

    def test_block_size(self):
        columns = blocked_cross_entropy.columns_per_block
        assert columns(1, 100, 32000) == 100
        assert columns(4, 4096, 32000) == 524
        assert columns(1024, 4096, 32000) == 128  # few tokens a device, if there are many
        with jax.sharding.use_abstract_mesh(AbstractMesh((64, 4), ("data", "tensor"))):
            assert columns(1024, 4096, 32000) == 524

    def test_a_vocabulary_spread_over_devices(self):
        """Each device makes the scores of its own words for its own rows; only sums over words, and gradients, move."""
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(MESH_PROGRAM)],
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-2000:]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"hidden": np.zeros((LENGTH, WIDTH), np.float32)}, r"hidden has shape \(37, 16\); it must have 3 axes"),
            ({"hidden": np.zeros((3, LENGTH, WIDTH), int)}, "hidden has dtype int.*; it must be a floating-point type"),
            ({"head": np.zeros((WIDTH, VOCABULARY), np.float32)}, r"head has shape \(16, 11\); with vocab_axis=0 its"),
            ({"head": np.zeros(WIDTH, np.float32)}, r"head has shape \(16,\); it must have 2 axes, \(v, d\)"),
            ({"head": np.zeros((VOCABULARY, WIDTH), int)}, "head has dtype int.*; it must be a floating-point type"),
            ({"vocab_axis": 2}, "vocab_axis is 2; it must be 0 for a head"),
            (
                {"labels": np.zeros((3, LENGTH - 1), int)},
                r"labels has shape \(3, 36\); it must be \(b, l\) = \(3, 37\)",
            ),
            ({"labels": np.zeros((3, LENGTH), np.float32)}, "labels has dtype float32; it must be an integer type"),
            ({"block_columns": 0}, "block_columns is 0; it must be None or at least 1"),
            ({"z_loss": -1e-4}, "z_loss is -0.0001; it must be 0 or a small positive number"),
        ],
    )
    def test_errors(self, head_batch, changes, message):
        arguments = dict(zip(("hidden", "head", "labels"), head_batch, strict=True))
        with pytest.raises(ValueError, match=message):
            linear_causal_lm_loss(**(arguments | changes))


MESH_PROGRAM = r"""
    import re
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from zamba2_jax.ops.losses import linear_causal_lm_loss

    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    batch, length, width, vocabulary, columns = 8, 64, 32, 1024, 16
    random = np.random.default_rng(0)
    arrays = (
        random.standard_normal((batch, length, width)).astype(np.float32),
        random.standard_normal((vocabulary, width)).astype(np.float32),
        random.integers(0, vocabulary, (batch, length)),
    )
    specs = (P(("data", "fsdp")), P("tensor", "fsdp"), P(("data", "fsdp")))
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    gradient = jax.value_and_grad(
        lambda hidden, head, labels: linear_causal_lm_loss(hidden, head, labels, block_columns=columns), argnums=(0, 1)
    )
    spread = [jax.device_put(array, sharding) for array, sharding in zip(arrays, shardings)]
    compiled = jax.jit(gradient, out_shardings=(None, tuple(shardings[:2]))).lower(*spread).compile()
    own_scores = batch // 4 * columns * vocabulary // 2
    shapes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    assert max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes) == own_scores
    loss, slopes = compiled(*spread)
    wanted, wanted_slopes = jax.jit(gradient)(*arrays)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    # Sums of 1024 numbers in float32, in two orders: either was up to 1e-6 of the largest from float64's.
    for ours, theirs in zip(slopes, wanted_slopes):
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * np.abs(theirs).max())
"""


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
