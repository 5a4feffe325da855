"""`python -m train classify` from beginning to end, on its three problems: it learns a rule, and says how well."""

import json
import random

import jax.numpy as jnp
import numpy as np
import pytest

from bench import oracle
from convert.cli import main as convert
from tests.train.conftest import WORDS, lines, make_tokenizer
from train import classification, cli
from zamba2_jax import Zamba2ForSequenceClassification

# Of a text's words. The variance of regression's labels is a half.
LABELS = {
    "single": lambda words: "praise" if "good" in words else "blame",
    "multi": lambda words: [name for name, word in (("animal", "cat"), ("praise", "good")) if word in words],
    "regression": lambda words: float("good" in words) - float("cat" in words),
}
CLASSES = {"single": ["blame", "praise"], "multi": ["animal", "praise"]}


def write_examples(path, problem, count, seed):
    """Texts in half of which "good" comes twice, and "cat" in half. The model must find either anywhere."""
    draw = random.Random(seed)
    others = [word for word in WORDS if word not in ("good", "cat")]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            words = draw.choices(others, k=draw.randint(3, 6))
            words += [word for word in ("good", "cat") if draw.random() < 0.5 for _ in range(2)]
            draw.shuffle(words)
            file.write(json.dumps({"text": " ".join(words), "label": LABELS[problem](words)}) + "\n")


@pytest.fixture(scope="module")
def checkpoint(finished, tmp_path_factory):
    """A causal model as transformers keeps it."""
    path = tmp_path_factory.mktemp("classify") / "checkpoint"
    assert convert(["to-hf", str(finished), str(path)]) == 0
    return path


def classify(checkpoint, data, output, *, steps, **options):
    values = {"model": checkpoint, "data": data, "output": output, "steps": steps, "batch_size": 32, "seq_len": 16}
    values |= {"learning_rate": 1e-2, "schedule": "wsd", "decay_steps": 0, "dtype": "float32"}
    words = [word for name, value in (values | options).items() for word in ("--" + name.replace("_", "-"), str(value))]
    return cli.main(["classify", *words])


def predict(run, path):
    """The scores of the finished run for a file's texts, padded on the left here; and the file's labels."""
    model, tokenizer = Zamba2ForSequenceClassification.from_pretrained(run, dtype=jnp.float32), make_tokenizer()
    examples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    inputs = tokenizer(
        [example["text"] for example in examples],
        padding="max_length",
        max_length=12,
        padding_side="left",
        return_tensors="np",
    )
    call = oracle.jit_call(model)
    scores = call(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return np.asarray(scores), [example["label"] for example in examples], model.config


def f1(found, wanted):
    """The harmonic mean of precision and recall of boolean decisions."""
    hits = np.sum(found & wanted)
    precision, recall = hits / max(np.sum(found), 1), hits / max(np.sum(wanted), 1)
    return 2 * precision * recall / (precision + recall) if hits else 0.0


@pytest.mark.parametrize("problem", LABELS)
def test_learns_a_rule(problem, checkpoint, tmp_path):
    train, heldout, run = tmp_path / "train.jsonl", tmp_path / "heldout.jsonl", tmp_path / "run"
    write_examples(train, problem, 1024, seed=0)
    write_examples(heldout, problem, 40, seed=1)
    assert classify(checkpoint, train, run, steps=100, eval_data=heldout) == 0
    report = lines(run, "eval.jsonl")[-1]
    assert (report["step"], report["texts"]) == (100, 40)
    scores, labels, config = predict(run, heldout)

    if problem == "regression":
        wanted = np.array(labels)
        assert np.var(wanted) > 0.4  # what the mean alone would reach
        assert report["mse"] < 0.1
        assert report["mse"] == pytest.approx(sum((scores[:, 0] - wanted) ** 2) / 40, rel=1e-3, abs=1e-5)
        return
    names = CLASSES[problem]
    assert list(config.id2label.values()) == names
    if problem == "single":
        wanted = np.array([[name == label for name in names] for label in labels])
        found = np.stack([scores[:, 0] >= scores[:, 1], scores[:, 0] < scores[:, 1]], axis=1)
    else:
        wanted = np.array([[name in label for name in names] for label in labels])
        found = scores > 0  # a probability above a half
        assert report["f1_micro"] == pytest.approx(f1(found.ravel(), wanted.ravel()))
    assert report["accuracy"] == pytest.approx(sum((found == wanted).all(axis=1)) / 40)
    assert report["f1"] == pytest.approx((f1(found[:, 0], wanted[:, 0]) + f1(found[:, 1], wanted[:, 1])) / 2)
    # Guessing reaches 0.5 and 0.25, and F1 of two thirds where all is said to be true.
    assert report["accuracy"] > 0.9
    assert report["f1"] > 0.95


def test_without_held_out_data_the_training_data_is_reported(checkpoint, tmp_path, capsys):
    data, run = tmp_path / "train.jsonl", tmp_path / "run"
    write_examples(data, "single", 100, seed=0)
    assert classify(checkpoint, data, run, steps=2) == 0
    (report,) = lines(run, "eval.jsonl")
    assert report["data"] == "training"
    assert report["texts"] == 64  # of two steps
    assert "step 2  evaluation on the training data (there is no --eval-data)  loss" in capsys.readouterr().err
    scores, labels, _ = predict(run, data)
    chosen = [index * 100 // 64 for index in range(64)]
    right = [CLASSES["single"][np.argmax(scores[index])] == labels[index] for index in chosen]
    assert report["accuracy"] == pytest.approx(np.mean(right))


def test_scores_that_miss():
    """By hand: 4 texts of two labels; the first is found in 2 of 3 and wrongly once, the second never."""
    logits = np.array([[1, -1], [1, -1], [-1, -1], [1, -1]], np.float32)
    wanted = np.array([[1, 0], [1, 1], [1, 0], [0, 0]], np.float32)
    found = classification.scores(logits, wanted, classification.MULTI)
    assert found == {"accuracy": 0.25, "f1_micro": pytest.approx(4 / 7), "f1": pytest.approx((2 / 3 + 0) / 2)}
