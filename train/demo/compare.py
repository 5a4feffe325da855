"""`python -m train.demo.compare MODEL CORPUS`: held-out loss of a model beside that of a 5-gram model.

Both predict the same tokens: all of every held-out document but its first, the end token included. The model sees at
most `--window` tokens back, within the document.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from train.demo.ngram import NGramModel
from zamba2_jax import Zamba2ForCausalLM
from zamba2_jax.checkpoint.files import find_checkpoint
from zamba2_jax.ops.losses import linear_causal_lm_loss

ROWS = 16


def read_documents(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """The token ids of every document, as training sees them: begin token, text, end token."""
    with path.open(encoding="utf-8") as lines:
        return [np.array([*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]) for line in lines]


def windows(documents: Sequence[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Pieces of at most `length` tokens. Each begins with the last token of the one before: every token but a
    document's first is predicted exactly once."""
    for document in documents:
        for start in range(0, len(document) - 1, length - 1):
            yield document[start : start + length]


def model_loss(model: Zamba2ForCausalLM, documents: Sequence[np.ndarray], window: int) -> tuple[float, int]:
    """Mean loss per predicted token in nats, and the number of those tokens."""
    graph, state = nnx.split(model)

    @jax.jit
    def summed_loss(state, ids, labels):
        model = nnx.merge(graph, state)
        hidden = model.model(ids).last_hidden_state
        return linear_causal_lm_loss(hidden, model.model.embed_tokens.matrix(), labels, num_items=1)

    pieces = sorted(windows(documents, window), key=len)
    total, count = 0.0, 0
    for first in range(0, len(pieces), ROWS):
        ids = np.zeros((ROWS, window), np.int32)
        labels = np.full((ROWS, window), -100, np.int32)
        for row, piece in enumerate(pieces[first : first + ROWS]):
            ids[row, : len(piece)] = labels[row, : len(piece)] = piece
            count += len(piece) - 1
        total += float(summed_loss(state, ids, labels))
    return total / count, count


def ngram_loss(train: Sequence[np.ndarray], heldout: Sequence[np.ndarray], vocab_size: int) -> tuple[float, int]:
    """The same of the 5-gram model."""
    model = NGramModel(train, vocab_size)
    losses = -np.concatenate([model.log_probabilities(document) for document in heldout])
    return float(losses.mean()), len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.demo.compare", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--window", type=int, default=1024, help="tokens of context (default: %(default)s)")
    arguments = parser.parse_args()

    directory = find_checkpoint(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    train, heldout = (read_documents(arguments.corpus / f"{side}.jsonl", tokenizer) for side in ("train", "heldout"))
    model = Zamba2ForCausalLM.from_pretrained(directory, dtype="float32")
    loss, count = model_loss(model, heldout, arguments.window)
    other, other_count = ngram_loss(train, heldout, len(tokenizer))
    assert count == other_count, (count, other_count)
    print(f"{count:,} held-out tokens, {sum(map(len, train)):,} tokens of training text")
    print(f"model   {loss:.4f} nats a token, perplexity {math.exp(loss):.2f}")
    print(f"5-gram  {other:.4f} nats a token, perplexity {math.exp(other):.2f}")
    print(f"difference {other - loss:.4f} nats a token")


if __name__ == "__main__":
    main()
