"""Zamba2ForSequenceClassification against PyTorch: pooling and the three losses, chosen as transformers does."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from bench.oracle import jit_call, pair, relative_error, to_torch, tokens

KIND = "Zamba2ForSequenceClassification"
TOLERANCE = 1e-4


def labels_for(problem: str, num_labels: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    if problem == "regression":
        return rng.normal(size=3 if num_labels == 1 else (3, num_labels)).astype(np.float32)
    if problem == "multi_label_classification":
        return rng.integers(0, 2, (3, num_labels)).astype(np.float32)
    return rng.integers(0, num_labels, 3)


@pytest.mark.parametrize("named", [True, False], ids=["problem_type", "inferred"])
@pytest.mark.parametrize(
    ("problem", "num_labels"),
    [
        ("regression", 1),
        ("regression", 3),
        ("single_label_classification", 3),
        ("multi_label_classification", 3),
    ],
)
def test_scores_and_losses_equal_pytorch(oracle_dir, problem, num_labels, named):
    if problem == "regression" and num_labels > 1 and not named:
        pytest.skip("several float labels without a problem_type mean multi-label classification")
    models = pair(oracle_dir, "2.7B", KIND, num_labels=num_labels, problem_type=problem if named else None)
    models.torch.config.problem_type = problem if named else None  # transformers writes down what it inferred
    ids = tokens(131, 3, 12)
    mask = np.ones_like(ids)
    ids[1, 7:] = ids[2, :5] = mask[1, 7:] = mask[2, :5] = 0  # right and left padding
    labels = labels_for(problem, num_labels)
    with torch.no_grad():
        expected = models.torch(to_torch(ids), attention_mask=to_torch(mask), labels=to_torch(labels), use_cache=False)
    actual = jit_call(models.jax)(input_ids=ids, attention_mask=mask, labels=labels)
    assert actual.logits.shape == (3, num_labels)
    assert relative_error(actual.logits, expected.logits) < TOLERANCE
    assert relative_error(actual.loss, expected.loss) < TOLERANCE


def test_embeddings_take_the_last_column_or_the_masks_last_token(oracle_dir):
    models = pair(oracle_dir, "2.7B", KIND, num_labels=3)
    ids = tokens(131, 2, 9)
    embeds = models.jax.model.embed_tokens(ids)
    call = jit_call(models.jax)
    assert relative_error(call(inputs_embeds=embeds).logits, call(input_ids=ids).logits) < 1e-6
    mask = np.ones_like(ids)
    mask[1, 4:] = 0
    short = jit_call(models.jax)(input_ids=ids[1:, :4]).logits
    assert relative_error(call(inputs_embeds=embeds, attention_mask=mask).logits[1:], short) < 1e-5


def test_every_parameter_gets_a_gradient(oracle_dir):
    model = pair(oracle_dir, "1.2B", KIND, num_labels=3).jax
    graphdef, params = nnx.split(model)
    ids, labels = tokens(131, 2, 9), np.array([0, 2])
    grads = jax.jit(jax.grad(lambda params: nnx.merge(graphdef, params)(ids, labels=labels).loss))(params)
    for path, leaf in nnx.to_flat_state(grads):
        assert np.abs(leaf.get_value()).max() > 0, path


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((2, 3)), r"single_label_classification must have shape \(2,\), got \(2, 3\)"),
        (np.zeros(2), "must be integers, got float"),
        (np.array([0, 3]), r"-100 or in \[0, 3\), got 3"),
    ],
)
def test_labels_that_do_not_fit_are_refused(oracle_dir, labels, message):
    model = pair(oracle_dir, "2.7B", KIND, num_labels=3, problem_type="single_label_classification").jax
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: model(tokens(131, 2, 4), labels=labels))


def test_several_rows_need_a_padding_token(oracle_dir):
    model = pair(oracle_dir, "2.7B", KIND, num_labels=3, pad_token_id=None).jax
    with pytest.raises(ValueError, match="2 rows needs config"):
        jax.eval_shape(lambda: model(tokens(131, 2, 4)))
    assert jit_call(model)(input_ids=tokens(131, 1, 4)).logits.shape == (1, 3)
