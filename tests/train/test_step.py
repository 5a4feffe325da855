"""The step on arrays: its arithmetic against PyTorch's, against itself in parts, and against plain formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from bench import oracle
from train import language
from train.optimizer import decays, make_schedule
from train.options import StepOptions
from train.step import Program, Skeleton, make_program
from zamba2_jax import Zamba2ForCausalLM
from zamba2_jax.sharding import make_mesh

ROWS, LENGTH = 4, 24


@pytest.fixture(scope="module")
def models(oracle_dir):
    return oracle.pair(oracle_dir, "1.2B", num_hidden_layers=3, layers_block_type=oracle.layer_types(3, (1,)))


def make_batch(vocab_size, seed=0, rows=ROWS, padded=0):
    """Two documents to a row, and some padding in the first rows."""
    ids = oracle.tokens(vocab_size, rows, LENGTH, seed).astype(np.int32)
    segments = np.repeat([[1] * 10 + [2] * (LENGTH - 10)], rows, axis=0).astype(np.int32)
    labels = ids.copy()
    for row in range(padded):
        segments[row, LENGTH - 3 * (row + 1) :] = 0
        labels[row, LENGTH - 3 * (row + 1) :] = -100
    return {"input_ids": ids, "labels": labels, "segment_ids": segments}


def options(**changes):
    return StepOptions(**({"steps": 50, "batch_size": ROWS, "learning_rate": 1e-3, "warmup_steps": 5} | changes))


def start(model, step_options, **loss):
    """The program and the state of step 0 of a concrete model, whose own arrays stay."""
    skeleton = Skeleton(model)
    mesh = make_mesh("auto", jax.devices()[:1])
    program = make_program(skeleton, step_options, mesh, language.make_loss(**loss), language.count_tokens)
    params = jax.tree.map(jnp.copy, skeleton.split(model)[0])
    return program, program.init_state(params, jax.random.key(0))


class TestOptimizer:
    def test_what_decays(self, models):
        names = list(Skeleton(models.jax).split(models.jax)[0])
        without = {name.rsplit(".", 1)[-1] for name in names if not decays(name)}
        assert without == {"A_log", "D", "dt_bias", "scale", "bias"}
        # Every vector is without, every matrix with it.
        arrays = Skeleton(models.jax).split(models.jax)[0]
        assert all(decays(name) == name.endswith(("kernel", "embedding")) for name in arrays)

    def test_cosine(self):
        schedule = make_schedule(options(steps=100, warmup_steps=10, min_learning_rate_ratio=0.1))
        rates = [float(schedule(step)) for step in range(101)]
        np.testing.assert_allclose(rates[:10], np.arange(1, 11) * 1e-4, rtol=1e-6)
        np.testing.assert_allclose(rates[10], 1e-3, rtol=1e-6)
        np.testing.assert_allclose(rates[55], (1e-3 + 1e-4) / 2, rtol=1e-6)
        np.testing.assert_allclose(rates[100], 1e-4, rtol=1e-6)

    def test_warmup_stable_decay(self):
        schedule = make_schedule(options(steps=100, warmup_steps=10, schedule="wsd", decay_steps=20))
        rates = [float(schedule(step)) for step in range(101)]
        np.testing.assert_allclose(rates[9:81], 1e-3, rtol=1e-6)
        np.testing.assert_allclose(rates[90], (1e-3 + 1e-4) / 2, rtol=1e-6)
        np.testing.assert_allclose(rates[100], 1e-4, rtol=1e-6)

    @pytest.mark.parametrize("warmup", [0, 1])
    def test_short_warmups(self, warmup):
        assert float(make_schedule(options(warmup_steps=warmup))(0)) == pytest.approx(1e-3)


def torch_losses(model, step_options, batches):
    """transformers' model trained by torch.optim.AdamW; a packed row's documents are run apart."""
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and "conv1d" not in name]
    convolutions = [p for name, p in model.named_parameters() if name.endswith("conv1d.weight")]
    others = [p for name, p in model.named_parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed + convolutions, "weight_decay": step_options.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(step_options.adam_beta1, step_options.adam_beta2),
        eps=step_options.adam_epsilon,
    )
    schedule = make_schedule(step_options)
    losses, norms = [], []
    for step, batch in enumerate(batches):
        total, count = 0.0, 0
        for ids, segments in zip(batch["input_ids"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.max() + 1):
                document = torch.tensor(ids[segments == segment], dtype=torch.long)[None]
                logits = model(document, use_cache=False).logits[0, :-1]
                total = total + torch.nn.functional.cross_entropy(logits, document[0, 1:], reduction="sum")
                count += document.shape[1] - 1
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), step_options.max_grad_norm)))
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(step))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


class TestAgainstPyTorch:
    def test_fifty_steps(self, oracle_dir):
        """The same weights, batches and hyperparameters: clipped gradients, decay, warmup and cosine. Packed documents
        here, each by itself there."""
        changes = {"num_hidden_layers": 2, "layers_block_type": oracle.layer_types(2, (1,)), "vocab_size": 64}
        config = oracle.torch_config("1.2B", **changes)
        source = oracle.torch_model(config, seed=3)
        oracle.save(source, oracle_dir / "fifty")
        model = Zamba2ForCausalLM.from_pretrained(oracle_dir / "fifty", dtype=jnp.float32)
        step_options = options(weight_decay=0.1, max_grad_norm=1.0)
        batches = [make_batch(64, seed, rows=2, padded=1) for seed in range(5)] * 10

        program, state = start(model, step_options)
        losses, norms = [], []
        for batch in batches:
            state, metrics = program.train_step(state, {}, batch)
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
        wanted, wanted_norms = torch_losses(source, step_options, batches)
        assert wanted[-1] < wanted[0] - 1.0
        assert max(wanted_norms) > 1.0
        print(f"50 steps beside PyTorch: losses differ by at most {np.abs(np.subtract(losses, wanted)).max():.1e}")
        np.testing.assert_allclose(losses, wanted, atol=1e-3)
        np.testing.assert_allclose(norms, wanted_norms, rtol=1e-2)


class TestLoss:
    def test_packed_documents_are_apart(self, models):
        """The loss of packed rows is the token-weighted mean of the documents', each run by itself."""
        batch = make_batch(models.jax.config.vocab_size, padded=2)
        program, state = start(models.jax, options())
        total, count = program.eval_step(state.params, {}, batch)
        call = oracle.jit_call(models.jax)
        sums, tokens = 0.0, 0
        for ids, segments in zip(batch["input_ids"], batch["segment_ids"], strict=True):
            for segment in (1, 2):
                document = ids[segments == segment][None]
                loss = call(input_ids=document, labels=document).loss
                sums += float(loss) * (document.shape[1] - 1)
                tokens += document.shape[1] - 1
        assert int(count) == tokens
        print(f"packed and apart: losses differ by {abs(float(total) / int(count) / (sums / tokens) - 1):.1e} relative")
        np.testing.assert_allclose(float(total) / int(count), sums / tokens, rtol=1e-6)

    def test_accumulation(self, models):
        """Parts with different numbers of tokens: loss, norm and the next parameters are those of the whole batch."""
        batch = make_batch(models.jax.config.vocab_size, padded=2)
        whole, state = start(models.jax, options())
        state, metrics = whole.train_step(state, {}, batch)
        in_parts, other = start(models.jax, options(accumulate=4))
        other, other_metrics = in_parts.train_step(other, {}, batch)
        np.testing.assert_allclose(other_metrics["loss"], metrics["loss"], rtol=1e-6)
        np.testing.assert_allclose(other_metrics["grad_norm"], metrics["grad_norm"], rtol=1e-5)
        # Adam's first moment after one step is a tenth of the gradient.
        moments, other_moments = (found.optimizer[1].mu for found in (state, other))
        for name, wanted in moments.items():
            np.testing.assert_allclose(other_moments[name], wanted, atol=1e-5 * float(jnp.abs(wanted).max()))

    def test_z_loss_is_added(self, models):
        batch = make_batch(models.jax.config.vocab_size)
        program, state = start(models.jax, options())
        with_z, _ = start(models.jax, options(), z_loss=1e-2)
        assert program.eval_step(state.params, {}, batch)[0] < with_z.eval_step(state.params, {}, batch)[0]


class TestBadSteps:
    def test_skipped_and_counted(self, models):
        """A step whose loss is not finite changes nothing but the counts; the next good one goes on as if it had not
        been."""
        batch = make_batch(models.jax.config.vocab_size)
        program, state = start(models.jax, options(warmup_steps=0, schedule="wsd", decay_steps=0))
        _, clean = start(models.jax, options())
        bad = jax.tree.map(jnp.copy, state)
        bad = dataclasses.replace(bad, params=bad.params | {"model.final_layernorm.scale": jnp.full(32, jnp.inf)})
        poisoned = {name: np.asarray(array) for name, array in bad.params.items()}
        for count in (1, 2):
            bad, metrics = program.train_step(bad, {}, batch)
            assert not np.isfinite(metrics["loss"])
            assert (int(metrics["bad_steps"]), int(metrics["skipped"]), int(bad.step)) == (count, count, count)
        for name, array in poisoned.items():
            np.testing.assert_array_equal(bad.params[name], array)
        assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(bad.optimizer))

        mended = dataclasses.replace(bad, params=clean.params)
        mended, metrics = program.train_step(mended, {}, batch)
        state, wanted = program.train_step(state, {}, batch)
        assert (int(metrics["bad_steps"]), int(metrics["skipped"]), int(mended.step)) == (0, 2, 3)
        assert metrics["loss"] == wanted["loss"]
        for name, array in state.params.items():
            np.testing.assert_array_equal(mended.params[name], array)


class TestProgram:
    def test_state_is_donated(self, models):
        batch = make_batch(models.jax.config.vocab_size)
        program, state = start(models.jax, options())
        text = program.train_step.lower(state, {}, batch).compile().as_text()
        aliases = text.split("input_output_alias={", 1)[1].split("entry_computation_layout", 1)[0]
        assert aliases.count("-alias") >= len(jax.tree.leaves(state)) - 1  # the key comes out as it came in

    def test_compiles_from_abstract_values(self, models):
        """What `plan` does: nothing is allocated, and the program is the same."""
        config = models.jax.config
        abstract = nnx.eval_shape(lambda: Zamba2ForCausalLM(config, rngs=nnx.Rngs(0)))
        mesh = make_mesh("auto", jax.devices()[:1])
        program = make_program(Skeleton(abstract), options(), mesh, language.make_loss(), language.count_tokens)
        assert isinstance(program, Program)
        shapes = dict.fromkeys(("input_ids", "labels", "segment_ids"), (ROWS, LENGTH))
        with jax.set_mesh(mesh):
            lowered = program.train_step.lower(program.state, program.frozen, program.abstract_batch(shapes))
        concrete, state = start(models.jax, options())
        assert jax.tree.structure(state) == jax.tree.structure(program.state)
        with jax.set_mesh(mesh):
            other = concrete.train_step.lower(state, {}, make_batch(config.vocab_size))
        assert lowered.out_tree == other.out_tree
