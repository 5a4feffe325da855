"""`train plan` without the TPU compiler, but for the last test: bytes by kind, the search, the estimate, the words."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from bench.sizes import TINY
from train import plan
from train.options import FinetuneOptions, PretrainOptions
from train.plan import PlanOptions, bytes_by_kind, estimate, largest_batch, make_step
from train.preset_file import PRESETS, defaults_from_preset, read_preset
from zamba2_jax import Zamba2Config, Zamba2ForCausalLM, quantize
from zamba2_jax.sharding import MESH_AXES, check_mesh, make_mesh, mesh_sizes
from zamba2_jax.tpu_slices import parse_slice


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The config.json of a small model."""
    path = tmp_path_factory.mktemp("small") / "config.json"
    path.write_text(json.dumps(Zamba2Config(**TINY).to_dict()))
    return str(path)


def abstract_mesh(axes, count):
    return AbstractMesh(tuple(mesh_sizes(axes, count).values()), MESH_AXES)


def options(model, **changes):
    values = {"model": model, "topology": "h100:8", "batch_size": 8, "seq_len": 256, "dtype": "float32"}
    return PlanOptions(**(values | changes))


# ---- bytes by kind


def test_bytes_by_kind_are_those_of_the_arguments(small):
    asked = options(small, batch_size=2, seq_len=32)
    mesh = make_mesh("auto", jax.devices()[:1])
    program = make_step(asked, mesh)
    batch = program.abstract_batch(plan.batch_shapes(asked))
    kinds = bytes_by_kind(program, batch)
    with jax.set_mesh(mesh):
        memory = program.train_step.lower(program.state, program.frozen, batch).compile().memory_analysis()
    # Beside the arrays there are a key, a step and two counts.
    assert 0 <= memory.argument_size_in_bytes - sum(kinds.values()) < 100
    assert kinds["batch"] == 3 * 2 * 32 * 4
    assert kinds["parameters"] == 4 * plan.config_of(small).num_parameters()
    assert kinds["optimiser"] == 2 * kinds["parameters"] + 4
    assert kinds["frozen parameters"] == 0


def test_bytes_by_kind_are_of_one_device(small):
    def kinds(axes):
        program = make_step(options(small), abstract_mesh(axes, 8))
        return bytes_by_kind(program, program.abstract_batch(plan.batch_shapes(options(small))))

    whole, parts = kinds("data=8"), kinds("fsdp=8")
    assert whole["parameters"] == 4 * plan.config_of(small).num_parameters()
    assert whole["batch"] == parts["batch"] == 3 * 256 * 4
    assert parts["parameters"] < whole["parameters"] / 3  # norms and adapters of so small a model stay whole
    assert parts["optimiser"] == 2 * parts["parameters"] + 4


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_bytes_of_integers(small, kind):
    """Those of all arrays of the model without its LoRAs; beside them, a copy of the head alone is reckoned with."""
    asked = options(small, lora_rank=2, topology="h100:1")
    program, config = make_step(asked, abstract_mesh("auto", 1)), plan.config_of(small)
    with_integers = dataclasses.replace(asked, quantize=kind)
    smaller = make_step(with_integers, abstract_mesh("auto", 1))
    before, after = estimate(asked, config, program), estimate(with_integers, config, smaller)
    model = nnx.eval_shape(lambda: quantize(Zamba2ForCausalLM(config, rngs=nnx.Rngs(0)), kind))
    arrays = jax.tree.leaves(nnx.state(model))
    assert after["frozen parameters"] == sum(array.size * array.dtype.itemsize for array in arrays)
    assert after["frozen parameters"] < {"int8": 0.5, "int4": 0.4}[kind] * before["frozen parameters"]
    assert after["loss"] - before["loss"] == 4 * config.vocab_size * config.hidden_size
    assert {name for name in after if after[name] != before[name]} == {"frozen parameters", "loss"}


# ---- the batch that fits


def line(per_row, fixed, usable, log):
    def measure(rows):
        log.append(rows)
        size = fixed + per_row * rows
        return size <= usable, size

    return measure


@pytest.mark.parametrize("start", [4, 8, 40, 100])
def test_the_largest_batch_is_found_and_measured(start):
    log = []
    found = largest_batch(line(3.0, 10.0, 200.0, log), start, 4, 200.0, 6)
    assert found.fits == 60  # 63 rows would fit, and 64 would not
    assert found.too_large == 64 or len(log) < 6
    assert found.fits in log
    assert len(set(log)) == len(log)


def test_memory_that_is_no_line():
    """The compiler saves memory where it is short: what is proposed is measured, and the next ones after it."""
    log = []

    def measure(rows):
        log.append(rows)
        size = 10 + 3 * rows if rows < 40 else 130 + 1.5 * (rows - 40)
        return size <= 200, size

    found = largest_batch(measure, 8, 4, 200, 8)
    assert found.fits == 84
    assert found.too_large == 88


def test_nothing_fits():
    log = []
    found = largest_batch(line(3.0, 500.0, 200.0, log), 16, 8, 200.0, 5)
    assert found.fits is None
    assert found.too_large == 8
    assert "no batch that was tried fits, down to 8 rows" in plan._batch_lines(found, "x")[0]


# ---- the TPU's answer, told


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that needs 2 GB and 0.5 GB for each row on a chip, of 15.75 GiB."""
    asked = []

    def compile_step(options, chip):
        asked.append(options.batch_size)
        size = int(2e9 + 0.5e9 * options.batch_size / 4)
        usable = int(15.75 * 2**30)
        outcome = {"usable_bytes": usable, "bytes": size, "seconds": 61.0, "error": None}
        outcome["kinds"] = {"parameters": 10**8, "frozen parameters": 0, "optimiser": 2 * 10**8, "batch": 1000}
        if size > usable:
            return outcome | {"status": "does not fit", "error": f"Used {size / 2**30:.2f}G of 15.75G hbm"}
        gather = {"kind": "all-gather", "count": 4, "runs": 12, "bytes": 3e9}
        found = {"kernels": {"ssd_forward": 2}, "collectives": [gather], "unread_loops": 0}
        return outcome | {"status": "ok", "code_bytes": 10**6} | found

    monkeypatch.setattr(plan, "_compile", compile_step)
    monkeypatch.setattr(plan, "check_compiler", lambda: None)
    return asked


def test_what_is_printed(compiler, small, capsys, tmp_path):
    result = tmp_path / "plan.json"
    command = ["--model", small, "--topology", "v5e:2x2", "--batch-size", "8", "--seq-len", "256"]
    assert plan.main([*command, "--output", str(result)]) == 0
    text = capsys.readouterr().out
    assert "fits: 3.00 GB a chip of 16.91 GB usable (16 GB HBM); compiled in 61 s" in text
    assert "(4 chips; fsdp=4): 8 x 256 tokens a step" in text
    assert "activations and the rest" in text
    assert "2.70 GB" in text
    assert "all-gather              4 in the program, run    12 times     3.00 GB" in text
    assert "a bound, not a forecast" in text
    assert "fused kernels: 2 ssd_forward" in text
    assert "largest batch seen to fit: 116 rows (120 do not)" in text
    written = json.loads(result.read_text())
    assert (written["largest_batch"], written["compilations"]) == (116, len(compiler))
    config = plan.config_of(small)
    operations = config.flops_per_token(256, training=True) * 8 * 256 / 4
    assert written["operations"] == pytest.approx(operations)
    assert written["bound_seconds"] == pytest.approx(operations / 197e12)


def test_what_does_not_fit(compiler, small, capsys):
    command = ["--model", small, "--topology", "v5e:2x2", "--batch-size", "160", "--seq-len", "256", "--no-search"]
    assert plan.main(command) == 1
    text = capsys.readouterr().out
    assert "DOES NOT FIT: 22.00 GB a chip of 16.91 GB usable" in text
    assert "the compiler: Used 20.49G of 15.75G hbm" in text
    assert compiler == [160]


def process(code, out="", err=""):
    return lambda *_, **__: subprocess.CompletedProcess([], code, out, err)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (process(0, '{"status": "busy", "error": "another process uses libtpu"}'), OSError, "another process uses"),
        (process(0, '{"status": "error", "error": "Mosaic: no"}'), ValueError, "Mosaic: no"),
        (process(0, '{"status": "invalid", "error": "libtpu does not take"}'), ValueError, "does not take"),
        (process(1, "", "Traceback: x"), OSError, "ended with code 1: Traceback: x"),
        (process(-9), OSError, "signal 9 .is there enough memory"),
    ],
)
def test_what_the_compiler_may_say(monkeypatch, small, run, error, message):
    monkeypatch.setattr(plan.subprocess, "run", run)
    with pytest.raises(error, match=message):
        plan._compile(options(small, topology="v5e:2x2"), "v5e")


def test_too_slow(monkeypatch, small):
    def run(*_, timeout, **__):
        raise subprocess.TimeoutExpired("x", timeout)

    monkeypatch.setattr(plan.subprocess, "run", run)
    with pytest.raises(OSError, match="not compiled after 5 s; give a larger --timeout"):
        plan._compile(options(small, topology="v5e:2x2", timeout=5), "v5e")


def test_without_the_compiler(monkeypatch, small):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install libtpu"):
        plan.main(["--model", small, "--topology", "v5e:2x2"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topology": "v5e:2x2", "mesh": "fsdp=8"}, "is for 8 devices .fsdp=8., and there are 4"),
        ({"topology": "v5e:2x2", "batch_size": 6}, "fsdp=4 does not divide the rows of a batch, 6"),
        ({"topology": "v5e:2x2", "accumulate": 2, "batch_size": 4}, "does not divide the rows of a batch, 2"),
        ({"topology": "v5e:4x4", "mesh": "tensor=16", "batch_size": 4}, "tensor=16 does not divide n_mamba_heads"),
        ({"topology": "v7:2x2"}, "no topology 'v7:2x2'"),
        ({"topology": "h100:x"}, "after the colon comes the number of GPUs"),
        ({"model": "8b"}, "--model 8b is neither"),
    ],
)
def test_bad_input(small, changes, message, monkeypatch):
    monkeypatch.setattr(plan, "check_compiler", lambda: None)
    values = {"model": small, "topology": "h100:1", "batch_size": 8} | changes
    arguments = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with pytest.raises((ValueError, OSError), match=message):
        plan.main(arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timeout": 0}, "--timeout must be positive, got 0"),
        ({"batch_size": 0}, "--batch-size must be positive, got 0"),
        (
            {"gradient_checkpointing": "all"},
            "--gradient-checkpointing must be one of none, layer, attention, projections, got all",
        ),
    ],
)
def test_bad_options(small, changes, message):
    with pytest.raises(ValueError, match=message):
        options(small, **changes)


# ---- GPUs


def total(model, mesh="auto", count=1, **changes):
    asked = options(model, **changes)
    return sum(estimate(asked, plan.config_of(model), make_step(asked, abstract_mesh(mesh, count))).values())


@pytest.mark.parametrize(
    ("model", "count", "rows", "length", "scan", "needed"),
    [
        # Arguments and temporaries of the same step compiled by libtpu 0.0.42, which has fused kernels for
        # the recurrence and attention as GPUs have: v5e:2x2 and v5e:4x4, bfloat16, gradient checkpointing "layer".
        ("demo", 4, 4, 1024, False, 19_964_416 + 60_612_608),
        ("1.2b", 16, 16, 4096, True, 1_171_267_072 + 3_796_835_840),
    ],
)
def test_the_estimate_against_a_compiler(model, count, rows, length, scan, needed):
    changes = {"batch_size": rows, "seq_len": length, "scan_layers": scan, "dtype": "bfloat16"}
    estimated = total(model, count=count, gradient_checkpointing="layer", **changes)
    assert 0.75 < estimated / needed < 1.35


def test_a_7b_model_of_integers_should_fit_on_24_gb(tmp_path, capsys):
    """The figures of docs/training.md."""
    command = ["--model", "7b", "--topology", "rtx4090:1", "--lora-rank", "8", "--quantize", "int4", "--no-search"]
    command += ["--batch-size", "1", "--seq-len", "2048", "--gradient-checkpointing", "layer"]
    assert plan.main([*command, "--output", str(tmp_path / "plan.json")]) == 0
    assert "7b, LoRA of rank 8 beside int4 matrices, on rtx4090:1" in capsys.readouterr().out
    result = json.loads((tmp_path / "plan.json").read_text())
    assert [round(size / 1e9, 1) for size in (result["bytes"], result["kinds"]["frozen parameters"])] == [9.0, 4.1]


def test_the_estimate_is_marked_and_finds_a_batch(capsys):
    command = ["--model", "1.2b", "--topology", "h100:8", "--batch-size", "8", "--seq-len", "4096"]
    assert plan.main([*command, "--gradient-checkpointing", "layer"]) == 0
    text = capsys.readouterr().out
    assert "should fit" in text
    assert "an ESTIMATE by formula" in text
    assert "by the same estimate at most" in text
    assert "only a run will tell" in text
    assert plan.main([*command, "--topology", "l4:1", "--no-search"]) == 1
    assert "SHOULD NOT FIT" in capsys.readouterr().out


def test_the_estimate_falls_with_the_policy_and_the_mesh(small):
    none, kept, layer = (total(small, gradient_checkpointing=policy) for policy in ("none", "projections", "layer"))
    assert none > kept > layer
    assert total(small, count=8) < total(small, mesh="data=8", count=8) < none
    assert total(small, accumulate=4, gradient_checkpointing="layer") < layer


# ---- presets

SHIPPED = sorted(PRESETS.glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_presets(path, tmp_path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for wanted in ("# command:  python -m train ", "# hardware: ", "# result:   "):
        assert sum(line.startswith(wanted) for line in head) >= 1, wanted
    assert f"--preset {path.stem}" in "\n".join(head)

    command = read_preset(path.stem)["command"]
    options_class = {"pretrain": PretrainOptions, "finetune": FinetuneOptions}[command]
    values = vars(defaults_from_preset(options_class, path.stem))
    run = options_class(**values | {"data": ("x",), "tokenizer": "x", "output": tmp_path / "run"})  # its own checks

    topology = re.search(r"topology (v\d\w:[\dx]+)", "\n".join(head))
    if topology is None:
        return
    size = parse_slice(topology[1]).size
    mesh = abstract_mesh(run.mesh, size)
    check_mesh(plan.config_of(run.model), mesh, batch_size=run.batch_size // run.accumulate, seq_len=run.seq_len)
    assert f"--topology {topology[1]}" in "\n".join(head)


def test_plan_takes_the_step_of_a_preset():
    planned = plan.parse(["--preset", "pretrain-7b-v5e-256", "--topology", "v5e:16x16", "--batch-size", "512"])
    assert (planned.model, planned.mesh, planned.batch_size, planned.seq_len) == ("7b", "fsdp=256", 512, 4096)
    assert planned.gradient_checkpointing == "layer"
    tuned = plan.parse(["--preset", "finetune-1.2b-lora-gpu", "--topology", "rtx4090:1"])
    assert tuned.lora_rank == 16
    assert plan.config_of(tuned.model) == Zamba2Config.zamba2_1_2b()


def test_a_preset_of_another_command(tmp_path):
    path = tmp_path / "classify.toml"
    path.write_text('command = "classify"\n')
    with pytest.raises(ValueError, match="is for classify; plan takes those of pretrain and finetune"):
        plan.parse(["--preset", str(path), "--topology", "v5e:2x2"])


# ---- the compiler itself


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed")
def test_a_real_compilation(tmp_path):
    """A model of two layers for four chips, in rows that the TPU's kernels take."""
    config = Zamba2Config(
        **(TINY | {"hidden_size": 128, "n_mamba_heads": 4, "num_attention_heads": 2, "mamba_d_state": 64})
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    command = ["--model", str(tmp_path / "config.json"), "--topology", "v5e:2x2", "--batch-size", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "train", "plan", *command, "--seq-len", "512", "--no-search"],
        capture_output=True,
        text=True,
        cwd=plan.ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "fits: " in done.stdout
    assert "16.91 GB usable" in done.stdout
    assert "ssd_forward" in done.stdout
    assert "splash" in done.stdout
    assert "all-gather" in done.stdout
    assert "reduce-scatter" in done.stdout
