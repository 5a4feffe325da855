"""What is refused, in which words, and that nothing was written or compiled by then."""

import json
import socket
import threading

import numpy as np
import pytest
from flax import nnx

from tests.train.conftest import CONFIG
from train import classification, cli
from train.options import ClassifyOptions, FinetuneOptions, ProcessOptions, RunOptions, check_options
from train.plan import PlanOptions
from train.preset_file import defaults_from_preset
from train.processes import Job, find_job, roll_call
from zamba2_jax import Zamba2Config, Zamba2ForCausalLM


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps must be positive, got 0"),
        ({"batch_size": 4, "accumulate": 3}, "--accumulate 3 must divide --batch-size 4"),
        ({"decay_steps": 3}, "--decay-steps belongs to --schedule wsd, not cosine"),
        ({"warmup_steps": 7}, "--warmup-steps take 7 steps, more than --steps 6"),
        ({"eval_every": 3}, "--eval-every needs --eval-data"),
        ({"adam_beta1": 1.0}, "--adam-beta1 must be at least 0 and below 1, got 1.0"),
        ({"num_processes": 2}, "--coordinator-address, --num-processes and --process-id belong together"),
        ({"mesh": "data=3"}, "mesh 'data=3' is for 3 devices .* and there are 1"),
        ({"mesh": "rows=1"}, "names an axis 'rows'"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"model": "9b"}, "--model 9b is neither one of the published shapes"),
        ({"model": "1.2b", "tokenizer": None}, "--model 1.2b has no tokenizer of its own; give --tokenizer"),
    ],
)
def test_refused(workspace, tmp_path, capsys, changes, message):
    assert workspace.train("pretrain", tmp_path / "run", **changes) == 2
    assert message.split(".*")[0] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_line_that_is_not_json(workspace, tmp_path, capsys):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"text": "the cat"}\n{"text": \n')
    assert workspace.train("pretrain", tmp_path / "run", data=data) == 2
    assert "line 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_does_not_fit(workspace, tmp_path, capsys):
    config = json.loads((workspace.path / "model" / "config.json").read_text()) | {"vocab_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert workspace.train("pretrain", tmp_path / "run", model=tmp_path / "config.json") == 2
    assert "vocabulary does not fit the model" in capsys.readouterr().err


def test_widths_that_int4_does_not_suit(workspace, tmp_path, capsys):
    config = Zamba2Config(**CONFIG | {"hidden_size": 12, "n_mamba_heads": 4})
    Zamba2ForCausalLM(config, rngs=nnx.Rngs(0)).save_pretrained(tmp_path / "model")
    options = {"model": tmp_path / "model", "lora_rank": 2, "quantize": "int4"}
    assert workspace.train("finetune", tmp_path / "run", **options) == 2
    assert "int4 needs input widths that are multiples of 8, which these are not" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_option(workspace, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        workspace.train("pretrain", tmp_path / "run", learning_rte=1)
    assert stopped.value.code == 2
    assert "learning-rte" in capsys.readouterr().err


def test_an_unknown_command(capsys):
    assert cli.main(["pretrian"]) == 2
    assert "there is no command pretrian; there are pretrain, finetune" in capsys.readouterr().err


class TestOutputDirectory:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"seed": 1}, "--seed was 0 and is now 1"),
            ({"learning_rate": 0.5}, "--learning-rate was 0.01 and is now 0.5"),
            ({"seq_len": 16}, "--seq-len was 32 and is now 16"),
            ({"attention_dropout": 0.1}, "the model's attention_dropout was 0.0 and is now 0.1"),
        ],
    )
    def test_another_run(self, workspace, finished, capsys, changes, message):
        before = (finished / "metrics.jsonl").read_bytes()
        assert workspace.train("pretrain", finished, **{"steps": 20} | changes) == 2
        error = capsys.readouterr().err
        assert "holds another run" in error
        assert message in error
        assert (finished / "metrics.jsonl").read_bytes() == before

    def test_fewer_steps_than_were_made(self, workspace, finished, capsys):
        assert workspace.train("pretrain", finished, steps=5) == 2
        assert "has made 12 steps already, more than --steps 5" in capsys.readouterr().err

    def test_something_else(self, workspace, tmp_path, capsys):
        (tmp_path / "thesis.txt").write_text("mine")
        assert workspace.train("pretrain", tmp_path) == 2
        assert "holds files that are no run (thesis.txt)" in capsys.readouterr().err


class TestOptions:
    def test_lora_options_need_a_rank(self, tmp_path):
        with pytest.raises(ValueError, match="--lora-alpha needs --lora-rank"):
            check_options(FinetuneOptions(model="m", data=("d",), output=tmp_path / "run", steps=1, lora_alpha=4.0))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"quantize": "int8"}, "--quantize int8 needs --lora-rank: integers are not trained"),
            ({"quantize": "int2", "lora_rank": 2}, "--quantize must be int8 or int4, got int2"),
        ],
    )
    def test_integers(self, tmp_path, changes, message):
        run = {"model": "m", "data": ("d",), "output": tmp_path / "run", "steps": 1}
        plan = {"model": "1.2b", "topology": "h100:1"}
        for kind, options in ((FinetuneOptions, run), (ClassifyOptions, run), (PlanOptions, plan)):
            with pytest.raises(ValueError, match=message):
                check_options(kind(**options, **changes))

    def test_every_fault_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=r"--steps must be positive.*--keep-last must be positive"):
            check_options(RunOptions(output=tmp_path / "run", steps=0, keep_last=0))

    def test_presets(self, tmp_path):
        preset = tmp_path / "mine.toml"
        preset.write_text('command = "pretrain"\nlearning-rate = 1\ndata = ["a.txt"]\n')
        words = ["--preset", str(preset), "--model", "7b", "--output", str(tmp_path / "run"), "--steps", "3"]
        options = cli.parse("pretrain", words)
        assert (options.learning_rate, options.data, options.steps) == (1.0, ("a.txt",), 3)
        assert cli.parse("pretrain", [*words, "--learning-rate", "2"]).learning_rate == 2.0

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("learning_rte = 1.0", "sets learning_rte, which is no option of finetune; did you mean learning_rate"),
            ('steps = "many"', "steps = 'many' does not do for --steps, which takes int"),
            ('command = "pretrain"', "is for pretrain, not for finetune"),
            ("[optimizer]\nx = 1", r"holds the table \[optimizer\]"),
            ("steps", "is not valid TOML"),
        ],
    )
    def test_bad_presets(self, tmp_path, text, message):
        (tmp_path / "mine.toml").write_text(text)
        with pytest.raises(ValueError, match=message):
            defaults_from_preset(FinetuneOptions, str(tmp_path / "mine.toml"))

    def test_no_such_preset(self):
        with pytest.raises(FileNotFoundError, match="--preset mine is neither a file nor one of those shipped"):
            defaults_from_preset(FinetuneOptions, "mine")


class TestLabels:
    def examples(self, tmp_path, *labels):
        path = tmp_path / "labels.jsonl"
        path.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels))
        return classification.read_examples([str(path)])

    def test_out_of_range(self, tmp_path):
        examples = self.examples(tmp_path, 0, 3)
        with pytest.raises(ValueError, match="line 2 has the label 3, which is out of range: labels are 0 to 1"):
            classification.make_targets(examples, classification.SINGLE, {0: "no", 1: "yes"})

    def test_kinds(self, tmp_path):
        single = self.examples(tmp_path, "no", "yes")
        assert classification.problem_of(single) == classification.SINGLE
        np.testing.assert_array_equal(
            classification.make_targets(single, classification.SINGLE, {0: "no", 1: "yes"}), [0, 1]
        )
        several = self.examples(tmp_path, ["a", "c"], [])
        assert classification.problem_of(several) == classification.MULTI
        np.testing.assert_array_equal(
            classification.make_targets(several, classification.MULTI, {0: "a", 1: "b", 2: "c"}), [[1, 0, 1], [0, 0, 0]]
        )
        numbers = self.examples(tmp_path, 1, 0.5)  # as some writers put 1.0
        assert classification.problem_of(numbers) == classification.REGRESSION
        np.testing.assert_array_equal(
            classification.make_targets(numbers, classification.REGRESSION, {0: "x"}), [[1.0], [0.5]]
        )

    def test_scores(self):
        logits = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 1.0]])
        found = classification.scores(logits, np.array([0, 1, 1, 1]), classification.SINGLE)
        assert found == {"accuracy": 0.75, "f1": pytest.approx((2 / 3 + 4 / 5) / 2)}
        wanted = np.array([[1, 1], [0, 1], [1, 1], [0, 0]])
        several = classification.scores(np.sign(logits - 0.5), wanted, classification.MULTI)
        assert several["accuracy"] == 0.5
        assert several["f1_micro"] == pytest.approx(2 * 4 / (5 + 5))
        assert classification.scores(np.array([[1.0]]), np.array([[3.0]]), classification.REGRESSION) == {"mse": 4.0}


class TestProcesses:
    def test_who_never_joins_is_named(self):
        address = f"localhost:{_free_port()}"
        heard = {}

        def call(index):
            try:
                roll_call(Job(address, 3, index, "the flags"), 1.5)
            except TimeoutError as error:
                heard[index] = str(error)

        threads = [threading.Thread(target=call, args=(index,)) for index in (0, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert heard.keys() == {0, 2}
        assert all(text.startswith("process 1 of 3 did not join within 1.5 s") for text in heard.values())

    def test_no_process_0(self):
        with pytest.raises(TimeoutError, match=r"process 0 did not answer at localhost:\d+ within 0.3 s"):
            roll_call(Job(f"localhost:{_free_port()}", 2, 1, "the flags"), 0.3)

    def test_slurm(self):
        options = ProcessOptions()
        variables = {
            "SLURM_NTASKS": "4",
            "SLURM_PROCID": "2",
            "SLURM_STEP_NODELIST": "gpu[003-006,9]",
            "SLURM_JOB_ID": "7",
        }
        assert find_job(options, variables | {"SLURM_NNODES": "4"}) == Job("gpu003:61007", 4, 2, "SLURM")
        # Two tasks to a host: each has a GPU, by its own number or as the only one that SLURM lets it see.
        shared = variables | {"SLURM_NNODES": "2", "SLURM_LOCALID": "1"}
        assert find_job(options, shared).device == 1
        assert find_job(options, shared | {"CUDA_VISIBLE_DEVICES": "0,1"}).device == 1
        assert find_job(options, shared | {"CUDA_VISIBLE_DEVICES": "3"}).device is None
        assert find_job(options, {}) is None


def _free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
