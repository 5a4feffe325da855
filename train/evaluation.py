"""`eval`: loss and perplexity of a checkpoint."""

from __future__ import annotations

import json

import jax
import numpy as np
from flax import nnx

from train import language, models
from train.feeding import Feed
from train.options import EvalOptions
from train.processes import join
from train.step import Skeleton, make_eval_step
from zamba2_jax import Zamba2ForCausalLM
from zamba2_jax.sharding import check_mesh, make_mesh


def evaluate_checkpoint(options: EvalOptions) -> int:
    """Prints the loss and perplexity of `options.model` on `options.data`; returns 0.

    Raises:
        ValueError, OSError: a checkpoint, tokenizer, mesh or data that does not do.
    """
    # ---- this process, its devices, and what is asked for
    join(options)
    mesh = make_mesh(options.mesh)
    config = models.config_of_checkpoint(options.model, "Zamba2ForCausalLM")
    check_mesh(config, mesh, batch_size=options.batch_size, seq_len=options.seq_len)
    tokenizer = models.load_tokenizer(options.tokenizer, options.model)
    data = language.open_text(options, options.data, tokenizer, config.vocab_size, seed=options.seed, pack=True)

    # ---- the model, and one pass over the data
    model = Zamba2ForCausalLM.from_pretrained(options.model, dtype=options.dtype, mesh=mesh)
    skeleton = Skeleton(model, nnx.Nothing())
    _, arrays = skeleton.split(model)
    step = make_eval_step(skeleton, language.make_loss(), language.count_tokens, mesh)
    feed = Feed(mesh, options.batch_size)
    batches = data.evaluation_batches(options.batch_size, shard=feed.share, limit=options.eval_batches)
    with jax.set_mesh(mesh):
        result = language.evaluate(lambda batch: step({}, arrays, batch), map(feed.place, batches))

    # ---- what came out
    if jax.process_index() == 0:
        print(
            f"loss {result['loss']:.6f} nats a token, perplexity {result['perplexity']:.4f}, {result['tokens']:,} tokens"
        )
        if options.output is not None:
            finite = {name: value if np.isfinite(value) else None for name, value in result.items()}
            options.output.write_text(json.dumps(finite, indent=2) + "\n", encoding="utf-8")
    return 0
