"""The commands, run in this process: what they write, print and return."""

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx

import zamba2_jax
from convert.cli import main
from tests.checkpoint.files import read, saved, write
from tests.checkpoint.test_roundtrip import same
from zamba2_jax.checkpoint.orbax import OrbaxParameters
from zamba2_jax.checkpoint.parameters import HuggingFaceParameters

CausalLM = zamba2_jax.Zamba2ForCausalLM


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def run(capsys):
    """Runs a command; returns its exit code, output and errors."""

    def call(*arguments):
        capsys.readouterr()  # what making the checkpoint printed
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def pair(root, tmp_path_factory):
    """A Hugging Face checkpoint and its conversion."""
    source, target = saved(root, "7B"), tmp_path_factory.mktemp("converted") / "orbax"
    assert main(["from-hf", str(source), str(target)]) == 0
    return source, target


def test_a_classifiers_lora(root, tmp_path, run):
    """Merged into the checkpoint that its training began with, which had other labels, and no head."""
    base, directory = saved(root, "1.2B"), tmp_path / "run"
    labels = {0: "no", 1: "perhaps", 2: "yes"}
    config = zamba2_jax.Zamba2Config.from_pretrained(base)
    config = config.replace(id2label=labels, problem_type="single_label_classification")
    model = zamba2_jax.Zamba2ForSequenceClassification(config, rngs=nnx.Rngs(1))
    zamba2_jax.add_lora(model, zamba2_jax.LoraConfig(r=2, target_modules=["in_proj"]), rngs=nnx.Rngs(2))
    config.save_pretrained(directory)
    zamba2_jax.save_lora(model, directory / "adapter")
    started = {"command": "classify", "options": {"model": str(base), "quantize": "int8"}}
    (directory / "run.json").write_text(json.dumps(started))
    code, out, _ = run("to-hf", directory, tmp_path / "hf")
    assert (code, f"{base} with the LoRA of {directory} merged into it" in out) == (0, True)
    merged = zamba2_jax.Zamba2ForSequenceClassification.from_pretrained(tmp_path / "hf")
    assert (merged.config.id2label, merged.config.problem_type) == (labels, "single_label_classification")
    np.testing.assert_array_equal(merged.score.kernel[...], model.score.kernel[...])
    # B is zero, so that nothing was added to the weights, which were never rounded.
    assert same(merged.model, zamba2_jax.Zamba2Model.from_pretrained(base))


def test_loras_of_single_uses(root, tmp_path, run):
    """The block that they are on cannot take them in: its uses' own adapters do, with a higher rank."""
    base, directory = saved(root, "1.2B"), tmp_path / "run"
    model = CausalLM.from_pretrained(base)
    config = zamba2_jax.LoraConfig(r=2, target_modules=["q_proj"], shared="use", init_lora_weights="gaussian")
    zamba2_jax.add_lora(model, config, rngs=nnx.Rngs(2))
    for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        leaf.set_value(leaf[...] + 0.1)  # B is zero otherwise
    model.config.save_pretrained(directory)
    zamba2_jax.save_lora(model, directory / "adapter")
    (directory / "run.json").write_text(json.dumps({"command": "finetune", "options": {"model": str(base)}}))
    assert run("to-hf", directory, tmp_path / "hf")[0] == 0
    merged = CausalLM.from_pretrained(tmp_path / "hf")
    assert merged.config.adapter_rank == model.config.adapter_rank + 2
    ids = np.arange(4, 24)[None]
    np.testing.assert_allclose(merged(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    assert np.abs(merged(ids).logits - CausalLM.from_pretrained(base)(ids).logits).max() > 0.1


def test_there_and_back(root, tmp_path, run):
    source = saved(root, "1.2B", dtype="bfloat16")
    code, out, err = run("from-hf", source, tmp_path / "orbax")
    assert (code, err) == (0, "")
    assert f"wrote {tmp_path / 'orbax'}; load it with Zamba2ForCausalLM.from_pretrained(" in out
    assert same(CausalLM.from_pretrained(tmp_path / "orbax"), CausalLM.from_pretrained(source))
    code, out, _ = run("to-hf", tmp_path / "orbax", tmp_path / "back")
    assert code == 0
    assert filecmp.cmp(source / "model.safetensors", tmp_path / "back" / "model.safetensors", shallow=False)
    code, _, _ = run("to-hf", tmp_path / "orbax", tmp_path / "sharded", "--max-shard-size", "60KB")
    assert code == 0
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2


def test_dtype_and_overwrite(pair, tmp_path, run):
    source, _ = pair
    assert run("from-hf", source, tmp_path / "small", "--dtype", "bfloat16")[0] == 0
    model = CausalLM.from_pretrained(tmp_path / "small")
    assert model.model.layers[0].mamba.out_proj.kernel.dtype == "bfloat16"
    assert model.model.layers[0].mamba.A_log.dtype == "float32"
    code, _, err = run("from-hf", source, tmp_path / "small")
    assert (code, err.count("\n")) == (2, 1)
    assert "is not empty; give another directory, or --overwrite" in err
    assert run("from-hf", source, tmp_path / "small", "--overwrite")[0] == 0
    assert CausalLM.from_pretrained(tmp_path / "small").dtype == "float32"


def test_progress(pair, tmp_path, run):
    assert "Writing orbax: 100%" in run("from-hf", pair[0], tmp_path / "orbax", "--progress")[2]


def test_errors_are_one_message(pair, tmp_path, run):
    source, converted = pair
    for arguments, message in (
        (("from-hf", tmp_path / "nowhere", tmp_path / "x"), "There is no directory"),
        (("from-hf", converted, tmp_path / "x"), "is a zamba2_jax checkpoint already"),
        (("to-hf", converted, converted, "--overwrite"), "source and target are the same directory"),
        (("to-hf", converted, tmp_path / "x", "--max-shard-size", "huge"), "max_shard_size must be a positive number"),
        (("verify", source, converted, "--prompt-ids", "5 999"), "holds 999, but the vocabulary ends at 130"),
    ):
        code, _, err = run(*arguments)
        assert code == 2
        assert err.splitlines()[-1].startswith("error: ")
        assert message in err
        assert "Traceback" not in err
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("command", "reader"), [("from-hf", HuggingFaceParameters), ("to-hf", OrbaxParameters)])
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_conversion_leaves_nothing(pair, tmp_path, run, monkeypatch, command, reader, error):
    read_parameter, count = reader.read, 0

    def read_then_fail(self, path, index=None):
        nonlocal count
        count += 1
        if count > 50:
            raise error
        return read_parameter(self, path, index)

    monkeypatch.setattr(reader, "read", read_then_fail)
    arguments = (command, pair[0] if command == "from-hf" else pair[1], tmp_path / "target")
    if isinstance(error, RuntimeError):  # not an error of the input: a traceback is right
        with pytest.raises(RuntimeError, match="boom"):
            run(*arguments)
    else:
        code, _, err = run(*arguments)
        assert code == 2
        assert "nothing was left behind" in err
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_told_by_every_command(pair, tmp_path, run):
    source = write(tmp_path / "damaged", pair[0], {})
    header = b'{"model.final_layernorm.weight":{"dtype":"F32","shape":[8],"data_offsets":[0]}}'
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    message = "model.final_layernorm.weight has data_offsets [0], which are no start and end."
    code, out, err = run("inspect", source)
    assert (code, err) == (1, "")
    assert f"1 fault:\n  model.safetensors: its safetensors header is damaged: {message}" in out
    for arguments in (
        ("from-hf", source, tmp_path / "x"),
        ("to-hf", source, tmp_path / "x"),
        ("verify", source, source),
    ):
        code, _, err = run(*arguments)
        assert code == 2
        assert err.startswith("error: the checkpoint in ")
        assert message in err


_LIMITED = """
import resource, signal, sys
from convert.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["from-hf", "to-hf"])
def test_writes_that_the_system_refuses(pair, tmp_path, command):
    """One line and nothing left behind, where the system itself fails: Orbax's threads log tracebacks of their own."""
    source = pair[0] if command == "from-hf" else pair[1]
    project = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, command, str(source), str(tmp_path / "target")],
        cwd=project,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: [Errno 27] the disk is full, or a file is larger than ")
    assert "nothing was left behind of the checkpoint" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_warnings_are_lines(root, tmp_path, run):
    source = saved(root, "2.7B")
    tensors = read(source)
    tensors["model.layers.1.shared_transformer.feed_forward.gate_up_proj_adapter_list.1.0.weight"] = torch.ones(2)
    directory = write(tmp_path / "slots", source, tensors)
    code, _, err = run("from-hf", directory, tmp_path / "orbax")
    assert code == 0
    assert err.startswith(f"warning: {directory}: 1 adapter tensors in slots that their shared block never uses")


def test_inspect(pair, run):
    source, converted = pair
    config = CausalLM.from_pretrained(source).config
    code, out, _ = run("inspect", source)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["tensor", "shape", "dtype"]
    (line,) = [line for line in lines if "layers.3.shared_transformer.self_attn.q_proj" in line]
    assert line.split(maxsplit=5)[1:] == ["64", "x", "64", "F32", "shared by layers 3, 6"]
    assert f"Zamba2ForCausalLM, {len(read(source))} tensors in 1 file" in out
    counts = f"{config.num_parameters():,} stored, {config.num_parameters_applied_per_token():,} applied"
    assert counts in out
    assert lines[-1] == "no faults"

    code, out, _ = run("inspect", converted)
    assert code == 0
    assert counts in out
    assert "model.shared_blocks.1.self_attn.q_proj.kernel" in out
    assert out.splitlines()[-1] == "no faults"


def test_inspect_a_broken_checkpoint(root, tmp_path, run):
    source = saved(root, "7B")
    tensors = read(source)
    copy = tensors["model.layers.1.shared_transformer.pre_ff_layernorm.weight"]
    tensors["model.layers.4.shared_transformer.pre_ff_layernorm.weight"] = copy
    tensors["model.layers.1.shared_transformer.feed_forward.gate_up_proj_adapter_list.1.0.weight"] = torch.ones(2)
    tensors["model.surplus"] = torch.ones(2)
    del tensors["model.layers.0.mamba.D"]
    code, out, _ = run("inspect", write(tmp_path / "broken", source, tensors))
    assert code == 1
    assert "copy of model.layers.1.shared_transformer.pre_ff_layernorm.weight" in out
    assert "ignored: an adapter in a slot that its shared block never uses" in out
    assert "1 tensors repeat others" in out
    assert out.splitlines()[-3:] == [
        "2 faults:",
        "  model.surplus: unexpected; Zamba2ForCausalLM of this config has no such tensor.",
        "  model.layers.0.mamba.D: missing; shape (8,) is needed.",
    ]

    converted = tmp_path / "orbax"
    assert run("from-hf", source, converted)[0] == 0
    config = json.loads((converted / "config.json").read_text())
    (converted / "config.json").write_text(json.dumps(config | {"intermediate_size": 77}))
    code, out, _ = run("inspect", converted)
    assert code == 1
    assert "down_proj.kernel: has shape (128, 32), but the config asks for (77, 32)" in out


def test_verify(pair, tmp_path, run):
    source, converted = pair
    code, out, _ = run("verify", source, converted, "--parameters-only")
    assert code == 0
    assert "0 differ, largest difference 0" in out
    assert out.splitlines()[-1] == "passed"

    tensors = read(source)
    tensors["model.layers.2.mamba.D"][1] += 0.5
    changed = write(tmp_path / "changed", source, tensors)
    code, out, _ = run("verify", converted, changed, "--parameters-only")
    assert code == 1
    assert "1 differ, largest difference 0.5" in out
    assert "0.5  model.layers.2.mamba.D" in out
    assert out.splitlines()[-1] == "FAILED"
    assert run("verify", converted, changed, "--parameters-only", "--tolerance", "0.6")[0] == 0


def test_verify_runs_both_models(pair, tmp_path, run):
    source, converted = pair
    code, out, _ = run("verify", converted, source, "--layers", "--prompt-ids", "3,1,4 1 5")
    assert code == 0
    assert f"PyTorch on {source}, zamba2_jax on {converted}, float32, 5 tokens" in out
    names = [line.rsplit("largest difference", 1)[0].split(" largest")[0].strip() for line in out.splitlines()[2:-1]]
    assert names == [*(f"hidden state {index}" for index in range(8)), "logits"]
    tensors = read(source)
    tensors["model.final_layernorm.weight"] *= 1.5
    changed = write(tmp_path / "changed", source, tensors)
    code, out, _ = run("verify", changed, converted, "--tolerance", "10", "--prompt-ids", "3,1,4 1 5")
    assert code == 1
    assert "hidden state" not in out


def test_verify_without_hugging_face(pair, run):
    code, out, _ = run("verify", pair[1], pair[1])
    assert code == 0
    assert "outputs: not compared, for PyTorch neither side is Hugging Face's" in out


def test_verify_refuses_other_shapes(pair, root, run):
    code, _, err = run("verify", pair[1], saved(root, "2.7B"))
    assert code == 2
    assert "are models of different shapes" in err


@pytest.mark.parametrize("command", [[], ["from-hf"], ["to-hf"], ["inspect"], ["verify"]])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    assert f"python -m convert {command[0] if command else 'from-hf'}" in capsys.readouterr().out


def test_bad_prompt_ids(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["verify", "a", "b", "--prompt-ids", "one two"])
    assert exit_.value.code == 2
    assert 'expected token ids such as "1 415 2936", got' in capsys.readouterr().err
