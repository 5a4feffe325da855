"""`python -m train classify` from beginning to end: it learns a rule, and says how well."""

import json
import random

import jax.numpy as jnp
import numpy as np

from tests.train.conftest import WORDS, lines
from train import cli
from zamba2_jax import Zamba2ForSequenceClassification


def write_examples(path, count, seed):
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            words = draw.choices([word for word in WORDS if word not in ("good", "cat")], k=draw.randint(3, 8))
            for word in ("good", "cat"):
                if draw.random() < 0.5:
                    words.insert(draw.randint(0, len(words)), word)
            file.write(json.dumps({"text": " ".join(words), "label": "praise" if "good" in words else "blame"}) + "\n")


def test_learns_a_rule(workspace, finished, tmp_path):
    train, heldout = tmp_path / "train.jsonl", tmp_path / "heldout.jsonl"
    write_examples(train, 2048, seed=0)
    write_examples(heldout, 64, seed=1)
    output = tmp_path / "run"
    arguments = ["classify", "--model", finished, "--data", train, "--eval-data", heldout, "--output", output]
    arguments += ["--steps", 120, "--batch-size", 32, "--seq-len", 16, "--learning-rate", 3e-2, "--dtype", "float32"]
    assert not cli.main([str(argument) for argument in arguments])

    report = lines(output, "eval.jsonl")[-1]
    assert report["accuracy"] > 0.9
    assert report["f1"] > 0.9

    model = Zamba2ForSequenceClassification.from_pretrained(output, dtype=jnp.float32)
    scores = np.asarray(model(np.array([[1, 4, 24, 6], [1, 4, 25, 6]])).logits)
    assert scores.shape == (2, 2)
