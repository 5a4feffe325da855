"""What is seen of a run: a line per step in a file, TensorBoard, a progress bar, a picture of the loss."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from train.options import RunOptions

METRICS, EVALUATIONS, SAMPLES, PICTURE = "metrics.jsonl", "eval.jsonl", "samples.jsonl", "loss.png"
TRAINED = "training"  # `data` of a line of EVALUATIONS that is of what was trained on

# bfloat16 operations a second of dense matrix products, by the name that JAX gives the chip; makers' data sheets.
PEAK_OPERATIONS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA A10": 125e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_operations(device_kind: str) -> float | None:
    """Of the chip that JAX calls `device_kind`; None if it is not in the table. The longest name that fits counts:
    "NVIDIA H100 80GB HBM3" is an "NVIDIA H100", and no "TPU v5p" is a "TPU v5"."""
    words = device_kind.split()
    names = [name for name in PEAK_OPERATIONS if words[: len(name.split())] == name.split()]
    return PEAK_OPERATIONS[max(names, key=len)] if names else None


class Reporter:
    """Writes and shows what process 0 is told; the other processes' reporters do nothing.

    Args:
        options: of the run.
        start: the step that the run goes on from, 0 at first. Lines beyond it are cut off: their steps are to be made
            again.
        operations_per_token: for the share of the peak rate.
    """

    def __init__(self, options: RunOptions, *, start: int, operations_per_token: float):
        self._enabled = jax.process_index() == 0
        self._options = options
        self._start = start
        self._operations = operations_per_token
        peak = peak_operations(jax.devices()[0].device_kind)
        self._peak = None if peak is None else peak * jax.device_count()
        self._steps: list[int] = []
        self._losses: list[float] = []
        self._evaluations: list[tuple[int, float]] = []
        self._last_time = self._begin = time.perf_counter()
        if not self._enabled:
            return
        directory = options.output
        for line in _cut(directory / METRICS, start):
            self._remember(line)
        for line in _cut(directory / EVALUATIONS, start):
            if line.get("data") != TRAINED:
                self._evaluations.append((line["step"], line["loss"]))
        _cut(directory / SAMPLES, start)
        self._files = {name: (directory / name).open("a", encoding="utf-8") for name in (METRICS, EVALUATIONS, SAMPLES)}
        self._board = None
        if options.tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)
        show = sys.stderr.isatty() if options.progress is None else options.progress
        self._bar = (
            tqdm(total=options.steps, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1) if show else None
        )

    def say(self, text: str) -> None:
        """A line for the reader, above the bar."""
        if self._enabled:
            if self._bar is not None:
                self._bar.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of one step, which are on the host by now."""
        if not self._enabled:
            return
        now = time.perf_counter()
        speed = metrics["tokens"] / max(now - self._last_time, 1e-9)
        self._last_time = now
        line = {
            "step": step,
            "loss": _number(metrics["loss"]),
            "grad_norm": _number(metrics["grad_norm"]),
            "learning_rate": metrics["learning_rate"],
            "tokens_per_second": round(speed, 1),
            "tokens": int(metrics["tokens"]),
            "skipped": int(metrics["skipped"]),
            "seconds": round(now - self._begin, 3),
        }
        share = None if self._peak is None else speed * self._operations / self._peak
        if share is not None:
            line["share_of_peak"] = round(share, 4)
        self._write(METRICS, line)
        self._remember(line)
        if self._board is not None:
            for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "share_of_peak"):
                if line.get(name) is not None:
                    self._board.add_scalar(f"train/{name}", line[name], step)
        self._show(step, line, share)

    def _show(self, step: int, line: Mapping[str, Any], share: float | None) -> None:
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        norm = "not finite" if line["grad_norm"] is None else f"{line['grad_norm']:.3g}"
        shown = {"loss": loss, "tok/s": f"{line['tokens_per_second']:,.0f}"}
        if share is not None:
            shown["peak"] = f"{share:.1%}"
        shown["grad"] = norm
        if line["skipped"]:
            shown["skipped"] = line["skipped"]
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()
        elif step % self._options.log_every == 0 or step == self._options.steps:
            done = step - self._start
            left = (self._options.steps - step) * (time.perf_counter() - self._begin) / max(done, 1)
            numbers = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {step}/{self._options.steps}  {numbers}  left {_clock(left)}", file=sys.stderr, flush=True)

    def evaluation(self, step: int, result: Mapping[str, float]) -> None:
        """Of the model after `step` steps; `result` has a "loss" and what else there is.

        Without --eval-data it is of the training data: it is marked as such, and is no point of the held-out curve.
        """
        if not self._enabled:
            return
        held_out = bool(self._options.eval_data)
        mark = {} if held_out else {"data": TRAINED}
        self._write(EVALUATIONS, {"step": step, **mark, **{name: _number(value) for name, value in result.items()}})
        if held_out:
            self._evaluations.append((step, result["loss"]))
        if self._board is not None:
            for name, value in result.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self._board.add_scalar(f"{'eval' if held_out else 'fit'}/{name}", value, step)
        title = "evaluation" if held_out else "evaluation on the training data (there is no --eval-data)"
        self.say(f"step {step}  {title}  " + "  ".join(f"{name} {_short(value)}" for name, value in result.items()))
        self._last_time = time.perf_counter()

    def sample(self, step: int, prompt: str, text: str) -> None:
        """What the model wrote after `prompt`."""
        if not self._enabled:
            return
        self._write(SAMPLES, {"step": step, "prompt": prompt, "text": text})
        if self._board is not None:
            self._board.add_text("sample", f"{prompt}**{text}**", step)
        self.say(f"step {step}  sample  {prompt!r} -> {text!r}")
        self._last_time = time.perf_counter()

    def flush(self) -> None:
        """Everything on disk, before a checkpoint that counts on it; and the picture."""
        if not self._enabled:
            return
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        if self._board is not None:
            self._board.flush()
        try:
            draw(self._options.output / PICTURE, self._steps, self._losses, self._evaluations)
        except OSError as error:  # no reason to stop
            self.say(f"{PICTURE} could not be written: {error}")
        self._last_time = time.perf_counter()

    def restart_clock(self) -> None:
        """After something that was no step."""
        self._last_time = time.perf_counter()

    def close(self) -> None:
        if not self._enabled:
            return
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()
        if self._bar is not None:
            self._bar.close()

    def _write(self, name: str, line: Mapping[str, Any]) -> None:
        self._files[name].write(json.dumps(line) + "\n")
        self._files[name].flush()

    def _remember(self, line: Mapping[str, Any]) -> None:
        if line["loss"] is not None:
            self._steps.append(line["step"])
            self._losses.append(line["loss"])


def _cut(path: Path, last: int) -> list[dict[str, Any]]:
    """The lines of steps up to `last`, which are all that the file then holds. A torn last line is among the others."""
    if not path.is_file():
        return []
    kept, texts = [], []
    with path.open(encoding="utf-8") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if line["step"] <= last:
                kept.append(line)
                texts.append(text if text.endswith("\n") else text + "\n")
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text("".join(texts), encoding="utf-8")
    os.replace(temporary, path)
    return kept


def draw(path: Path, steps: list[int], losses: list[float], evaluations: list[tuple[int, float]]) -> None:
    """The loss of every step, its running mean, and the evaluations, as a PNG."""
    from matplotlib.figure import Figure

    if not steps:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="training, each step")
    smooth, mean, weight = [], 0.0, 0.0
    for loss in losses:  # an exponential mean over some 50 steps
        mean, weight = 0.98 * mean + 0.02 * loss, 0.98 * weight + 0.02
        smooth.append(mean / weight)
    axes.plot(steps, smooth, color="C0", label="training, running mean")
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), "o-", color="C1", markersize=4, label="evaluation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(f".{path.name}.writing")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)


def _number(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
