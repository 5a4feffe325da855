"""`--quantize`: a LoRA is trained beside a frozen model of integers."""

import jax
import numpy as np
import pytest
from flax import nnx

from convert.cli import main as convert
from tests.train.conftest import lines, losses
from train import cli
from train.language import LanguageTask
from train.step import Skeleton, make_program
from zamba2_jax import Zamba2ForCausalLM, load_lora, merge_lora
from zamba2_jax.lora import trainable
from zamba2_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def options(workspace, finished):
    constant = {"schedule": "wsd", "decay_steps": 0, "warmup_steps": 0}  # the same for every number of steps
    heldout = {"eval_data": workspace.path / "heldout.jsonl", "eval_every": 6}
    samples = {"sample_every": 6, "sample_prompts": "the cat", "sample_tokens": 2}
    what = {"model": finished, "tokenizer": None, "lora_rank": 2, "quantize": "int4"}
    return what | constant | heldout | samples


@pytest.fixture(scope="module")
def run(workspace, options):
    run = workspace.path / "beside-integers"
    assert workspace.train("finetune", run, **options) == 0
    return run


def test_goes_on_exactly(workspace, options, run, tmp_path, capsys):
    assert workspace.train("finetune", tmp_path / "run", **options | {"steps": 3, "eval_every": 3}) == 0
    assert "parameters trained, a frozen model of int4 matrices, 0.0 MB;" in capsys.readouterr().err
    assert workspace.train("finetune", tmp_path / "run", **options) == 0
    assert losses(tmp_path / "run") == losses(run)
    assert losses(run)[-1] < losses(run)[0]
    assert workspace.train("finetune", tmp_path / "run", **options | {"quantize": "int8"}) == 2
    assert '--quantize was "int4" and is now "int8"' in capsys.readouterr().err


def test_what_is_saved_is_the_adapter(workspace, options, finished, run):
    """Loaded beside the integers, it has the loss that the run ended with."""
    assert (run / "checkpoints" / "6" / "lora").is_dir()
    assert not (run / "checkpoints" / "6" / "params").exists()
    assert [line["prompt"] for line in lines(run, "samples.jsonl")] == ["the cat"]
    model = Zamba2ForCausalLM.from_pretrained(finished, dtype="float32", quantize="int4")
    load_lora(model, run / "adapter")
    asked = cli.parse("finetune", workspace.arguments("finetune", run, **options)[1:])
    task, mesh, skeleton = LanguageTask(asked), make_mesh("auto"), Skeleton(model, trainable(model))
    program = make_program(skeleton, asked, mesh, task.loss, task.count)
    with jax.set_mesh(mesh):
        assert task.evaluate(program, *skeleton.split(model))["loss"] == lines(run, "eval.jsonl")[-1]["loss"]


def test_it_is_merged_into_the_unrounded_model(finished, run, tmp_path):
    assert convert(["to-hf", str(run), str(tmp_path / "merged")]) == 0
    wanted = Zamba2ForCausalLM.from_pretrained(finished)
    before = wanted.model.layers[0].mamba.zx_proj.kernel[...]
    load_lora(wanted, run / "adapter")
    merge_lora(wanted)
    merged = Zamba2ForCausalLM.from_pretrained(tmp_path / "merged")
    assert np.abs(merged.model.layers[0].mamba.zx_proj.kernel[...] - before).max() > 1e-4
    leaves = zip(*(nnx.to_flat_state(nnx.state(model)) for model in (merged, wanted)), strict=True)
    for (path, one), (_, other) in leaves:
        np.testing.assert_allclose(one[...], other[...], rtol=1e-6, atol=1e-7, err_msg=str(path))
