"""Whole runs of a tiny model: what they write, that they go on after anything, and that the result is a checkpoint."""

import json
import random
import signal
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.experimental import multihost_utils

from bench import oracle
from convert.cli import main as convert
from tests.train.conftest import finish, lines, losses, wait_until
from train import cli, metrics, models
from train.run import StopRequest
from zamba2_jax import Zamba2Config, Zamba2ForCausalLM, load_lora


class TestOutput:
    def test_files(self, finished):
        names = {path.name for path in finished.iterdir()}
        assert {"run.json", "config.json", "tokenizer.json", "loss.png", "tensorboard", "checkpoints"} <= names
        assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert any((finished / "tensorboard").iterdir())

    def test_metrics(self, finished):
        found = lines(finished)
        assert [line["step"] for line in found] == list(range(1, 13))
        wanted = {"loss", "grad_norm", "learning_rate", "tokens_per_second", "tokens", "skipped"}
        assert all(wanted <= line.keys() for line in found)
        assert found[-1]["loss"] < found[0]["loss"]

    def test_share_of_the_peak_and_profile(self, workspace, finished, tmp_path, monkeypatch):
        monkeypatch.setitem(metrics.PEAK_OPERATIONS, "cpu", 1e9)  # as if it were a chip of the table
        run = tmp_path / "run"
        assert workspace.train("pretrain", run, steps=7, profile_steps=2) == 0
        assert len(list((run / "profile").rglob("*.xplane.pb"))) == 1
        operations = Zamba2Config.from_pretrained(finished).flops_per_token(32, training=True)
        line = lines(run)[-1]
        assert line["share_of_peak"] == pytest.approx(
            line["tokens_per_second"] * operations / 1e9,
            rel=1e-2,
            abs=6e-5,  # it is written with four decimals
        )

    def test_evaluations_and_samples(self, finished):
        found = lines(finished, "eval.jsonl")
        assert [line["step"] for line in found] == [3, 6, 9, 12]
        assert all(line["perplexity"] == pytest.approx(np.exp(line["loss"])) for line in found)
        samples = lines(finished, "samples.jsonl")
        assert [(line["step"], line["prompt"]) for line in samples] == [
            (6, "the cat"),
            (6, ""),
            (12, "the cat"),
            (12, ""),
        ]

    def test_the_last_checkpoints_are_kept(self, finished):
        kept = {int(path.name) for path in (finished / "checkpoints").iterdir() if path.name.isdigit()}
        best = min(lines(finished, "eval.jsonl"), key=lambda line: line["loss"])["step"]
        assert kept == {9, 12, best}


class TestResult:
    def test_loads_as_a_checkpoint(self, finished):
        ids = np.arange(4, 20)[None]
        last = Zamba2ForCausalLM.from_pretrained(finished)(ids).logits
        np.testing.assert_array_equal(Zamba2ForCausalLM.from_pretrained(f"{finished}@12")(ids).logits, last)
        assert not np.array_equal(Zamba2ForCausalLM.from_pretrained(f"{finished}@9")(ids).logits, last)
        with pytest.raises(FileNotFoundError, match=r"no such checkpoint; its steps: .*9, 12"):
            Zamba2ForCausalLM.from_pretrained(f"{finished}@5")

    def test_to_hugging_face(self, finished, tmp_path):
        assert convert(["to-hf", str(finished), str(tmp_path / "hf")]) == 0
        theirs = transformers.Zamba2ForCausalLM.from_pretrained(tmp_path / "hf").eval()
        oracle.without_dt_clamp(theirs)
        ids = np.arange(4, 24)[None]
        ours = oracle.jit_call(Zamba2ForCausalLM.from_pretrained(finished, dtype=jnp.float32))(input_ids=ids).logits
        with torch.no_grad():
            wanted = theirs(torch.tensor(ids), use_cache=False).logits
        assert oracle.relative_error(ours, wanted) < 1e-5
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
        assert tokenizer("the cat")["input_ids"] == [1, 4, 6]

    def test_eval_finds_the_loss_of_training(self, workspace, finished, tmp_path, capsys):
        words = ["eval", "--model", str(finished), "--data", str(workspace.path / "heldout.jsonl")]
        words += ["--seq-len", "32", "--batch-size", "2", "--dtype", "float32", "--output", str(tmp_path / "r.json")]
        assert cli.main([*words, "--data-cache", str(workspace.path / "cache")]) == 0
        result = json.loads((tmp_path / "r.json").read_text())
        wanted = lines(finished, "eval.jsonl")[-1]
        assert result["tokens"] == wanted["tokens"]
        assert result["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert "perplexity" in capsys.readouterr().out


class TestLearning:
    def test_few_documents_are_learned_by_heart(self, workspace, tmp_path):
        data = tmp_path / "few.jsonl"
        texts = ["the cat sat on the mat and then it ran", "a dog was good", "she was fast and he was slow"]
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        options = {"steps": 200, "save_every": 200, "batch_size": 1, "learning_rate": 2e-2, "warmup_steps": 10}
        assert workspace.train("pretrain", tmp_path / "run", data=data, weight_decay=0.0, **options) == 0
        # What begins each text is as likely as the other two, which is all that is left to guess.
        begin = 3 * np.log(3) / 24
        print(
            f"learned by heart: {losses(tmp_path / 'run')[-1]:.3f} nats a token, of which {begin:.3f} cannot be known"
        )
        assert losses(tmp_path / "run")[-1] < begin + 0.05

    def test_finetune_with_lora(self, workspace, finished, tmp_path):
        run = tmp_path / "lora"
        options = {"model": finished, "tokenizer": None, "lora_rank": 2}
        assert workspace.train("finetune", run, **options) == 0
        assert losses(run)[-1] < losses(run)[0]
        assert {path.name for path in (run / "adapter").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        assert not (run / "checkpoints" / "6" / "params").exists()
        # It goes on.
        assert workspace.train("finetune", run, steps=8, **options | {"warmup_steps": None}) == 0
        assert len(losses(run)) == 8
        # Merged, it is a checkpoint with the loss that training left.
        assert convert(["to-hf", str(run), str(tmp_path / "merged")]) == 0
        ids = np.arange(4, 24)[None]
        base = Zamba2ForCausalLM.from_pretrained(finished)(ids).logits
        merged = Zamba2ForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        assert np.abs(merged - base).max() > 1e-3
        with pytest.raises(ValueError, match="trained a LoRA: load the model that it began with"):
            Zamba2ForCausalLM.from_pretrained(run)

    def test_a_killed_lora_leaves_the_adapter_of_its_last_checkpoint(self, workspace, finished, tmp_path, monkeypatch):
        class KilledError(BaseException):
            pass

        written, save = [], models.save_adapter

        def save_and_be_killed(model, directory, base):
            save(model, directory, base)
            written.append((directory / "adapter" / "adapter_model.safetensors").read_bytes())
            if len(written) == 2:
                raise KilledError

        monkeypatch.setattr(models, "save_adapter", save_and_be_killed)
        run = tmp_path / "lora"
        options = {"model": finished, "tokenizer": None, "lora_rank": 2, "save_every": 1}
        with pytest.raises(KilledError):
            workspace.train("finetune", run, **options)
        assert written[0] != written[1]
        assert convert(["to-hf", str(run), str(tmp_path / "merged")]) == 0
        ids = np.arange(4, 24)[None]
        tuned = Zamba2ForCausalLM.from_pretrained(finished)
        load_lora(tuned, run / "adapter")
        merged = Zamba2ForCausalLM.from_pretrained(tmp_path / "merged")
        np.testing.assert_allclose(merged(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-4)


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


class TestGoingOn:
    OPTIONS = {"steps": 40, "save_every": 2}  # noqa: RUF012

    @pytest.fixture(scope="class")
    def uninterrupted(self, workspace):
        run = workspace.path / "uninterrupted"
        assert workspace.train("pretrain", run, **self.OPTIONS) == 0
        return losses(run)

    def test_after_kills_and_a_termination(self, workspace, uninterrupted, tmp_path):
        """SIGKILL in the middle of a save, SIGTERM, and more steps than before: the losses are the same to the bit."""
        run = tmp_path / "run"
        words = workspace.arguments("pretrain", run, **self.OPTIONS)
        process = workspace.start(words)
        wait_until(lambda: len(lines(run)) >= 7 and unfinished(run), process)
        process.kill()
        process.communicate()
        before = len(lines(run))
        assert 0 < before < 40

        process = workspace.start(words)
        wait_until(lambda: len(lines(run)) > 12, process)
        process.send_signal(signal.SIGTERM)
        assert "asked to stop: step" in finish(process)
        stopped = len(losses(run))
        assert stopped < 40
        assert (run / "checkpoints" / str(stopped)).is_dir()

        assert workspace.train("pretrain", run, **self.OPTIONS) == 0
        assert losses(run) == uninterrupted
        assert not unfinished(run)

    @pytest.mark.slow
    def test_after_ten_kills(self, workspace, uninterrupted, tmp_path):
        run, draw = tmp_path / "run", random.Random(0)
        words = workspace.arguments("pretrain", run, **self.OPTIONS)
        for kill in range(10):
            process = workspace.start(words)
            if kill % 2:  # during a save
                wait_until(lambda: unfinished(run), process)
            else:  # anywhere, the start among it
                target = min(39, len(lines(run)) + draw.randint(-2, 4))
                wait_until(lambda target=target: len(lines(run)) >= target, process)
            process.kill()
            process.communicate()
        assert workspace.train("pretrain", run, **self.OPTIONS) == 0
        assert losses(run) == uninterrupted
        print("ten kills, five of them during a save: the losses of all steps are those of the uninterrupted run")

    TWO = {"schedule": "wsd", "decay_steps": 0, "warmup_steps": 0, "batch_size": 8, "seq_len": 16}  # noqa: RUF012

    def start_two(self, workspace, run, *, devices, **options):
        joined = {"coordinator_address": f"localhost:{free_port()}", "num_processes": 2}
        words = workspace.arguments("pretrain", run, **self.TWO, **joined, **options)
        return [workspace.start([*words, "--process-id", str(index)], devices=devices) for index in range(2)]

    def stop_two(self, run, processes, told):
        """SIGTERM to the processes `told` in the middle of a run; the step that both then stopped at."""
        wait_until(lambda: len(lines(run)) >= 5, processes[0])
        for index in told:
            processes[index].send_signal(signal.SIGTERM)
        outputs = [finish(process) for process in processes]
        stopped = len(losses(run))
        assert f"asked to stop: step {stopped} is saved" in outputs[0]
        assert "asked" not in outputs[1]  # only process 0 speaks
        assert (run / "checkpoints" / str(stopped)).is_dir()
        return stopped

    def test_two_processes_then_one(self, workspace, tmp_path):
        """Two processes of four devices train; one is told to stop, both save and stop. One of eight goes on, on
        another mesh. The losses are those of one process all the way."""
        run, alone = tmp_path / "run", tmp_path / "alone"
        options = {"learning_rate": 1e-3}
        processes = self.start_two(workspace, run, devices=4, steps=100_000, mesh="data=2,fsdp=4", **options)
        steps = self.stop_two(run, processes, told=[1]) + 3
        options |= self.TWO | {"steps": steps}
        finish(workspace.start(workspace.arguments("pretrain", run, mesh="fsdp=8", **options), devices=8))
        assert workspace.train("pretrain", alone, mesh="auto", **options) == 0
        assert len(losses(run)) == steps
        np.testing.assert_allclose(losses(run), losses(alone), rtol=1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize("told", [[0], [0, 1]])
    def test_two_processes_go_on(self, workspace, tmp_path, told):
        """Whichever is told to stop, and whenever: the losses are, to the bit, those of two that nobody stopped."""
        run, whole = tmp_path / "run", tmp_path / "whole"
        steps = self.stop_two(run, self.start_two(workspace, run, devices=1, steps=100_000, mesh="fsdp=2"), told) + 3
        for directory in (run, whole):
            for process in self.start_two(workspace, directory, devices=1, steps=steps, mesh="fsdp=2"):
                finish(process)
        assert len(losses(run)) == steps
        assert losses(run) == losses(whole)

    def test_a_full_disk(self, workspace, tmp_path):
        """The checkpoint before stays good, and there is a message."""
        run = tmp_path / "run"
        options = {"schedule": "wsd", "decay_steps": 0, "warmup_steps": 0}
        assert workspace.train("pretrain", run, steps=3, **options) == 0
        words = workspace.arguments("pretrain", run, steps=6, **options)
        output = finish(workspace.start([*words, "--no-tensorboard"], largest_file=16), code=2)
        assert "the checkpoint of step 3 is complete. Make room and give the same command again" in output
        assert output.splitlines()[-1].startswith("error: the disk is full")
        assert "Traceback" not in output  # of Orbax's threads, which fail for the same reason
        assert workspace.train("pretrain", run, steps=6, **options) == 0
        assert len(losses(run)) == 6

    def test_losses_that_are_not_finite(self, workspace, tmp_path, capsys):
        run = tmp_path / "run"
        options = {"learning_rate": 1e30, "warmup_steps": 0, "max_bad_steps": 3, "save_every": 1, "steps": 20}
        assert workspace.train("pretrain", run, **options) == 1
        assert "was not finite in 3 steps in a row, 2 to 4; their updates were skipped" in capsys.readouterr().err
        assert (run / "checkpoints").is_dir()
        assert [line["loss"] for line in lines(run)[1:]] == [None] * 3


class TestTermination:
    """What several processes agree on; that it works between them, `TestGoingOn` shows."""

    def test_agreed_before_the_first_step(self, monkeypatch):
        """A notice that comes while a checkpoint is read is about the first step after it, whatever its number."""
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        jax_agreed_on = 1
        monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda number: number == jax_agreed_on)
        stop = StopRequest()
        assert [stop.requested() for _ in range(3)] == [True, True, True]

    def test_a_step_that_is_over_is_not_agreed_on(self, workspace, tmp_path, monkeypatch):
        """Orbax leaves it to the training loop to ask: from a thread it would ask about steps that are over."""

        def ask(number):
            raise AssertionError(f"asked about {number}")

        monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", ask)
        assert workspace.train("pretrain", tmp_path / "run", steps=6) == 0
        assert len(losses(tmp_path / "run")) == 6


def unfinished(run):
    """Whether a checkpoint is being written."""
    return any("tmp" in path.name for path in (run / "checkpoints").glob("*"))
