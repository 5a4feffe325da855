"""`python -m train plan`: does a run fit, before its machine is rented?

For a TPU slice the training step itself is compiled, by the TPU's own compiler, on this machine (`train.plan_compile`).
For GPUs, for which there is no such compiler here, memory is estimated (`train.gpu_estimate`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import numpy as np
import tyro
from jax.sharding import AbstractMesh, Mesh

from train import gpu_estimate, models
from train.language import count_tokens, make_loss
from train.metrics import peak_operations
from train.options import FinetuneOptions, LoraOptions, ModelOptions, PretrainOptions, StepOptions, check_options
from train.preset_file import defaults_from_preset, read_preset, take_preset
from train.step import Program, Skeleton, make_program
from zamba2_jax import Zamba2Config, Zamba2ForCausalLM
from zamba2_jax.checkpoint.files import read_json
from zamba2_jax.layer_stack import CHECKPOINT_POLICIES
from zamba2_jax.sharding import BATCH_AXES, LENGTH_AXIS, MESH_AXES, check_mesh, mesh_sizes
from zamba2_jax.tpu_slices import CHIPS, check_compiler, compiler_environment, parse_slice

ROOT = Path(__file__).parent.parent
DEMO = Path(__file__).with_name("demo") / "config.json"
MOST_COMPILATIONS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(LoraOptions, StepOptions, ModelOptions):
    """Compiles the step of a run for a TPU slice that is not there, or estimates its memory on GPUs: does it fit?

    python -m train plan --model 7b --topology v5e:16x16 --mesh fsdp=256 --batch-size 256 --seq-len 4096
    """

    command: ClassVar[str] = "plan"
    model: str
    """A published shape (1.2b, 2.7b, 7b), demo, a published checkpoint's id, a config.json, or a directory with one."""
    topology: str
    """A TPU slice, such as v5e:16x16, v5p:4x4x4 or v5p-128; or GPUs and their number, such as h100:8."""
    mesh: str = "auto"
    """Devices by axis, such as "data=2,fsdp=4" (axes: data, fsdp, tensor, sequence); auto puts all on fsdp."""
    steps: int = 1000
    """Of the run. They change nothing here."""
    seq_len: int = 1024
    """Tokens per row."""
    gradient_checkpointing: Literal["none", "layer", "attention", "projections"] = "none"
    """What the backward pass recomputes to save memory: nothing, all but each layer's input, all but that and
    attention, or all but those and wide products."""
    scan_layers: bool = False
    """Compile one body for all equal layers."""
    attention_dropout: float | None = None
    """Probability that an attention weight is dropped in training; default: the model's config."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser of the scores."""
    search: bool = True
    """Look for the largest batch that fits, by more compilations."""
    timeout: int = 7200
    """Seconds that one compilation may take."""
    output: Path | None = None
    """A file to write the result to, as JSON."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.gradient_checkpointing not in CHECKPOINT_POLICIES:
            names = ", ".join(CHECKPOINT_POLICIES)
            raise ValueError(f"--gradient-checkpointing must be one of {names}, got {self.gradient_checkpointing}.")
        if self.timeout <= 0:
            raise ValueError(f"--timeout must be positive, got {self.timeout}.")


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns 0 if the step fits, 1 if it does not.

    Raises:
        ValueError, OSError, ImportError: it cannot be done as asked.
    """
    jax.config.update("jax_platforms", "cpu")  # nothing here runs on a device
    options = parse(arguments)
    config = config_of(options.model)
    if options.topology.partition(":")[0] in gpu_estimate.GPUS:
        result, lines = _plan_for_gpus(options, config)
    else:
        result, lines = _plan_for_tpus(options, config)
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if result["status"] == "ok" else 1


def parse(arguments: Sequence[str]) -> PlanOptions:
    """The options, checked. A preset is one of pretrain or finetune: what it says of the step is taken."""
    preset, rest = take_preset(list(arguments))
    values = {}
    if preset is not None:
        command = read_preset(preset).get("command", "pretrain")
        classes = {"pretrain": PretrainOptions, "finetune": FinetuneOptions}
        if command not in classes:
            raise ValueError(f"--preset {preset} is for {command}; plan takes those of {' and '.join(classes)}.")
        values = vars(defaults_from_preset(classes[command], preset))
    fields = {field.name: field for field in dataclasses.fields(PlanOptions)}
    instance = object.__new__(PlanOptions)
    for name, field in fields.items():
        value = tyro.MISSING if field.default is dataclasses.MISSING else field.default
        if name in values and name != "output" and values[name] is not tyro.MISSING:
            value = values[name]
        object.__setattr__(instance, name, value)
    return tyro.cli(PlanOptions, prog="python -m train plan", default=instance, args=rest)


def config_of(name: str) -> Zamba2Config:
    """The config of `--model`; those of published checkpoints are known without their files.

    Raises:
        ValueError, OSError: there is none.
    """
    published = name.lower().removeprefix("zyphra/zamba2-").removesuffix("-instruct").removesuffix("-v2")
    if name == "demo":
        return Zamba2Config.from_dict(read_json(DEMO))
    return models.config_of_shape(published if published in models.SHAPES else name)


def make_step(options: PlanOptions, mesh: Mesh | AbstractMesh) -> Program:
    """The step that `pretrain` or `finetune` would run with these options."""
    config = models.with_dropout(config_of(options.model), options)
    model = models.abstract_model(Zamba2ForCausalLM, config, options, param_dtype=models.base_dtype(options))
    if models.adapts(options):
        model = models.adapted(model, options)
    skeleton = Skeleton(model, models.trainable(model, options))
    loss = make_loss(z_loss=options.z_loss, dropout=models.has_dropout(config, options))
    return make_program(skeleton, options, mesh, loss, count_tokens)


def batch_shapes(options: PlanOptions) -> dict[str, tuple[int, int]]:
    return dict.fromkeys(("input_ids", "labels", "segment_ids"), (options.batch_size, options.seq_len))


def bytes_by_kind(program: Program, batch: Any) -> dict[str, int]:
    """Bytes on a device of what the step is given."""
    return {
        "parameters": _device_bytes(program.state.params),
        "frozen parameters": _device_bytes(program.frozen),
        "optimiser": _device_bytes(program.state.optimizer),
        "batch": _device_bytes(batch),
    }


def _device_bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


# ---- the batch that fits


@dataclasses.dataclass(frozen=True)
class Found:
    """The largest batch that was seen to fit, None if none did; the smallest that was seen not to; bytes by batch."""

    fits: int | None
    too_large: int | None
    measured: Mapping[int, float]


def largest_batch(
    measure: Callable[[int], tuple[bool, float]], start: int, unit: int, usable: float, attempts: int
) -> Found:
    """The largest multiple of `unit` rows that fits, with at most `attempts` calls of `measure`.

    Args:
        measure: rows -> whether they fit, and the bytes that they need.
        start: rows to begin with, a multiple of `unit`.
        usable: bytes. Memory grows by much the same for each row: a line through two measurements says which batch to
            try next, and only what was measured counts.
    """
    measured: dict[int, float] = {}
    fits: int | None = None
    too_large: int | None = None
    rows = start
    while len(measured) < attempts:
        good, measured[rows] = measure(rows)
        if good:
            fits = rows if fits is None else max(fits, rows)
        else:
            too_large = rows if too_large is None else min(too_large, rows)
        if len(measured) == 1:
            rows = 2 * start if good else start // 2 // unit * unit
        else:
            (x0, y0), (x1, y1) = sorted(measured.items(), key=lambda item: abs(item[1] - usable))[:2]
            slope = (y1 - y0) / (x1 - x0)
            rows = math.floor((x0 + (usable - y0) / slope) / unit + 1e-9) * unit if slope > 0 else 2 * max(measured)
        rows = max(rows, (fits or 0) + unit)
        if too_large is not None:
            rows = min(rows, too_large - unit)
        if rows < unit or rows <= (fits or 0):
            break
    return Found(fits, too_large, measured)


def _unit(options: PlanOptions, sizes: Mapping[str, int]) -> int:
    """A batch must be a multiple of so many rows."""
    return math.prod(sizes[axis] for axis in BATCH_AXES) * options.accumulate


# ---- TPUs


def _plan_for_tpus(options: PlanOptions, config: Zamba2Config) -> tuple[dict[str, Any], list[str]]:
    tpus = parse_slice(options.topology)
    check_compiler()
    sizes = mesh_sizes(options.mesh, tpus.size)
    _check(options, config, sizes)
    outcomes: dict[int, dict[str, Any]] = {}

    def measure(rows: int) -> tuple[bool, float]:
        _say(f"compiling {options.model} for {tpus.topology}, {rows} rows of {options.seq_len} tokens a step ...")
        outcome = outcomes[rows] = _compile(dataclasses.replace(options, batch_size=rows), tpus.chip)
        usable = outcome["usable_bytes"] or CHIPS[tpus.chip].hbm_bytes
        if outcome["status"] == "ok" and outcome["bytes"] > usable:
            outcome["status"] = "does not fit"
        _say(f"  {outcome['status']}: {_gb(outcome['bytes'])} a chip of {_gb(usable)}, {outcome['seconds']:.0f} s")
        return outcome["status"] == "ok", outcome["bytes"]

    measure(options.batch_size)
    asked = outcomes[options.batch_size]
    usable = asked["usable_bytes"] or CHIPS[tpus.chip].hbm_bytes
    result = asked | {
        "topology": tpus.topology,
        "chips": tpus.size,
        "hbm_bytes": CHIPS[tpus.chip].hbm_bytes,
        "mesh": {axis: size for axis, size in sizes.items() if size > 1},
        "batch_size": options.batch_size,
        "seq_len": options.seq_len,
        "compilations": 1,
    }
    result |= _bound(options, config, tpus.size, CHIPS[tpus.chip].device_kind)
    found = None
    if options.search:

        def once(rows: int) -> tuple[bool, float]:
            return measure(rows) if rows not in outcomes else (asked["status"] == "ok", asked["bytes"])

        found = largest_batch(once, options.batch_size, _unit(options, sizes), usable, MOST_COMPILATIONS)
        result |= {"largest_batch": found.fits, "too_large": found.too_large, "compilations": len(outcomes)}
    return result, _tpu_lines(options, result, usable, found)


def _check(options: PlanOptions, config: Zamba2Config, sizes: Mapping[str, int]) -> AbstractMesh:
    mesh = AbstractMesh(tuple(sizes.values()), MESH_AXES)
    check_mesh(config, mesh, batch_size=options.batch_size // options.accumulate, seq_len=options.seq_len)
    return mesh


def _compile(options: PlanOptions, chip: str) -> dict[str, Any]:
    """What `train.plan_compile` says.

    Raises:
        ValueError: it, or the compiler, could not do as asked. OSError: another process has the compiler, or this one
            had no memory or time left.
    """
    values = {name: value for name, value in vars(options).items() if name != "output"}
    command = [sys.executable, "-m", "train.plan_compile"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(values),
            cwd=ROOT,
            env=os.environ | compiler_environment(chip),
            capture_output=True,
            text=True,
            timeout=options.timeout,
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"the step was not compiled after {options.timeout} s; give a larger --timeout.") from error
    if done.returncode < 0:
        raise OSError(
            f"the compiler was ended by signal {-done.returncode}"
            + (" (is there enough memory on this machine?)" if done.returncode == -9 else "")
            + f": {' '.join(done.stderr[-600:].split())}"
        )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise OSError(f"the compiler ended with code {done.returncode}: {' '.join(done.stderr[-800:].split())}")
    outcome = json.loads(lines[-1])
    if outcome["status"] == "busy":
        raise OSError(outcome["error"])
    if outcome["status"] in ("invalid", "error"):
        raise ValueError(outcome["error"])
    return outcome


def _bound(options: PlanOptions, config: Zamba2Config, count: int, device_kind: str) -> dict[str, Any]:
    """Operations of a step on each device, and the time that they take at its peak rate."""
    operations = config.flops_per_token(options.seq_len, training=True)
    if models.adapts(options):
        operations *= 2 / 3  # no gradient of the frozen matrices
    operations *= options.batch_size * options.seq_len / count
    peak = peak_operations(device_kind)
    return {"operations": operations, "bound_seconds": operations / peak, "peak_operations": peak}


def _tpu_lines(options: PlanOptions, result: Mapping[str, Any], usable: float, found: Found | None) -> list[str]:
    kinds = {kind: size for kind, size in result["kinds"].items() if size}
    rest = result["bytes"] - sum(kinds.values())
    code = result.get("code_bytes", 0)
    lines = _head(options, result)
    verdict = "fits" if result["status"] == "ok" else "DOES NOT FIT"
    lines.append(
        f"{verdict}: {_gb(result['bytes'])} a chip of {_gb(usable)} usable ({result['hbm_bytes'] / 1e9:.0f} GB HBM); "
        f"compiled in {result['seconds']:.0f} s"
    )
    if result["status"] != "ok" and result["error"]:
        lines.append(f"  the compiler: {result['error']}")
    for kind, size in kinds.items():
        lines.append(f"  {kind:26s}{_gb(size):>12s}")
    if code:
        lines.append(f"  {'program':26s}{_gb(code):>12s}")
    lines.append(f"  {'activations and the rest':26s}{_gb(rest - code):>12s}")
    lines += _bound_lines(result)
    if result["status"] == "ok":
        lines.append("collectives a step, and what a chip receives in them:")
        for kind in result["collectives"]:
            counts = f"{kind['count']:5d} in the program, run {kind['runs']:5d} times"
            lines.append(f"  {kind['kind']:20s}{counts}{_gb(kind['bytes']):>12s}")
        if not result["collectives"]:
            lines.append("  none")
        if result["unread_loops"]:
            lines.append(f"  (the turns of {result['unread_loops']} loops could not be read; they count as one)")
        kernels = ", ".join(f"{count} {name}" for name, count in result["kernels"].items()) or "none"
        lines.append(f"fused kernels: {kernels}")
    if found is not None:
        lines += _batch_lines(found, f"{len(found.measured)} compilations, a line through two choosing the next one")
    return lines


def _head(options: PlanOptions, result: Mapping[str, Any]) -> list[str]:
    axes = ", ".join(f"{axis}={size}" for axis, size in result["mesh"].items()) or "one device"
    what = f"LoRA of rank {options.lora_rank}" if models.adapts(options) else "all parameters"
    if kind := models.quantization(options):
        what += f" beside {kind} matrices"
    return [
        f"{options.model}, {what}, on {result['topology']} ({result['chips']} chips; {axes}): {options.batch_size} x "
        f"{options.seq_len} tokens a step"
        + (f" in {options.accumulate} parts" if options.accumulate > 1 else "")
        + f", {options.dtype}, gradient checkpointing {options.gradient_checkpointing}"
        + (", layers scanned" if options.scan_layers else "")
    ]


def _bound_lines(result: Mapping[str, Any]) -> list[str]:
    return [
        f"operations a chip and step: {result['operations'] / 1e12:.2f}e12, recomputation not counted; at the peak of "
        f"{result['peak_operations'] / 1e12:.0f}e12 a second they take {result['bound_seconds'] * 1e3:.0f} ms: a "
        "bound, not a forecast"
    ]


def _batch_lines(found: Found, how: str) -> list[str]:
    tried = ", ".join(f"{rows}: {_gb(size)}" for rows, size in sorted(found.measured.items()))
    if found.fits is None:
        text = f"no batch that was tried fits, down to {min(found.measured)} rows"
    else:
        text = f"largest batch seen to fit: {found.fits} rows"
        if found.too_large is not None:
            text += f" ({found.too_large} do not)"
    return [f"{text}; by {how} ({tried})"]


# ---- GPUs


def _plan_for_gpus(options: PlanOptions, config: Zamba2Config) -> tuple[dict[str, Any], list[str]]:
    name, _, number = options.topology.partition(":")
    if number and not (number.isascii() and number.isdigit() and int(number) > 0):
        raise ValueError(f"--topology {options.topology}: after the colon comes the number of GPUs, such as {name}:8.")
    count = int(number or 1)
    memory, usable = gpu_estimate.usable(name)
    sizes = mesh_sizes(options.mesh, count)
    mesh = _check(options, config, sizes)
    program = make_step(options, mesh)
    kinds = estimate(options, config, program)

    def measure(rows: int) -> tuple[bool, float]:
        total = sum(estimate(dataclasses.replace(options, batch_size=rows), config, program).values())
        return total <= usable, total

    total = sum(kinds.values())
    result = {
        "status": "ok" if total <= usable else "does not fit",
        "estimate": True,
        "bytes": total,
        "kinds": kinds,
        "usable_bytes": usable,
        "hbm_bytes": memory,
        "topology": options.topology,
        "chips": count,
        "mesh": {axis: size for axis, size in sizes.items() if size > 1},
        "batch_size": options.batch_size,
        "seq_len": options.seq_len,
    } | _bound(options, config, count, gpu_estimate.GPUS[name][1])
    lines = _head(options, result)
    verdict = "should fit" if result["status"] == "ok" else "SHOULD NOT FIT"
    lines.append(
        f"{verdict}: {_gb(total)} a GPU, an ESTIMATE by formula, of {_gb(usable)} that JAX takes of {_gb(memory)} by "
        "default (XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 gives it more)"
    )
    lines += [f"  {kind:26s}{_gb(size):>12s}" for kind, size in kinds.items() if size]
    lines += _bound_lines(result)
    if options.search:
        found = largest_batch(measure, options.batch_size, _unit(options, sizes), usable, 64)
        result |= {"largest_batch": found.fits}
        rows = "no batch" if found.fits is None else f"at most {found.fits} rows"
        lines.append(f"by the same estimate {rows} a step should fit; only a run will tell")
    return result, lines


def estimate(options: PlanOptions, config: Zamba2Config, program: Program) -> dict[str, float]:
    """Bytes on a GPU by kind, estimated; `program` is the step, of whatever number of rows."""
    mesh = program.mesh
    kinds: dict[str, float] = dict(bytes_by_kind(program, program.abstract_batch(batch_shapes(options))))
    itemsize = {"float32": 4, "bfloat16": 2}[options.dtype]
    devices_of_batch = math.prod(mesh.shape[axis] for axis in (*BATCH_AXES, LENGTH_AXIS))
    arrays = jax.tree.leaves((program.state.params, program.frozen))
    stored_in = mesh.size // mesh.shape["data"]
    rows = gpu_estimate.Rows(
        tokens=max(1, options.batch_size * options.seq_len // options.accumulate // devices_of_batch),
        itemsize=itemsize,
        policy=options.gradient_checkpointing,
        scan=options.scan_layers,
        tensor=mesh.shape["tensor"],
        trains_head=not models.adapts(options),
        widens_head=models.quantization(options) is not None,
    )
    # Integers stay as they are until a product widens them.
    cast = sum(leaf.size * min(itemsize, leaf.dtype.itemsize) for leaf in arrays)
    weights = {"trained": kinds["parameters"], "cast": cast // stored_in}
    return kinds | gpu_estimate.working_bytes(config, rows, weights=weights)


def _gb(size: float) -> str:
    if size >= 1e8:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.2f} MB"


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
