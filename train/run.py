"""A training run from top to bottom: `pretrain`, `finetune` and `classify` differ in their task alone."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from train import models, run_directory
from train.checkpoints import Checkpoints
from train.feeding import Feed
from train.metrics import Reporter
from train.options import RunOptions
from train.processes import join
from train.step import Count, Loss, Params, Program, Skeleton, TrainState, make_program
from zamba2_jax import Zamba2Config
from zamba2_jax.sharding import check_mesh, make_mesh

PROFILE_AFTER = 4  # steps that compile or warm up, and would hide the others in a trace


class Batches(Protocol):
    """An endless iterator of this process's share of every batch, with a position to save."""

    def __next__(self) -> Mapping[str, np.ndarray]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Task(Protocol):
    """What is learned from what. Making one checks every option and every file that it concerns."""

    config: Zamba2Config
    tokenizer: Any
    loss: Loss
    count: Count
    kind: str  # of checkpoints: "params" or "lora"
    data_fingerprint: str | None
    evaluates: bool  # whether there is something to evaluate at the end: held-out data, or else the training data

    def summary(self) -> str: ...

    def abstract_model(self) -> nnx.Module: ...

    def trainable(self, model: nnx.Module) -> nnx.filterlib.Filter: ...

    def initial_model(self, mesh: Mesh) -> nnx.Module: ...

    def batches(self, share: tuple[int, int]) -> Batches: ...

    def evaluate(self, program: Program, params: Params, frozen: Params) -> dict[str, float]: ...

    def samples(self, model: nnx.Module) -> Iterator[tuple[str, str]]: ...


class DivergedError(RuntimeError):
    """A run that cannot go on: its losses are not finite any more."""


def train(options: RunOptions, open_task: Callable[[RunOptions], Task]) -> None:
    """Trains, from the beginning or from the last checkpoint in `options.output`, until `options.steps` are made or the
    process is asked to stop.

    Raises:
        ValueError, OSError: what was asked for does not make sense, cannot be read or cannot be written; before
            anything is compiled, but for a disk that fills up later.
        DivergedError: `max_bad_steps` in a row were not finite.
    """
    # ---- this process and its devices
    join(options)
    mesh = make_mesh(options.mesh)

    # ---- what is asked for: every bad input is found here
    task = open_task(options)
    check_mesh(task.config, mesh, batch_size=options.batch_size // options.accumulate, seq_len=options.seq_len)
    feed = Feed(mesh, options.batch_size)
    description = run_directory.describe(options, task.config, task.data_fingerprint)
    resuming = run_directory.check_directory(options.output, description, options.warmup_steps is None)
    if resuming:
        options = dataclasses.replace(options, warmup_steps=run_directory.settled_warmup(options.output))

    # ---- the step, as abstract values
    abstract = task.abstract_model()
    skeleton = Skeleton(abstract, task.trainable(abstract))
    program = make_program(skeleton, options, mesh, task.loss, task.count)

    # ---- its directory
    run_directory.wait_for_all("train: the output directory was looked at")
    if not resuming and jax.process_index() == 0:
        run_directory.begin(options.output, description, task.config, task.tokenizer)
    run_directory.wait_for_all("train: the output directory is there")
    keep = {"keep_last": options.keep_last, "keep_best": options.keep_best}
    with (
        Checkpoints(options.output, kind=task.kind, **keep) as checkpoints,
        StopRequest() as stop,
        contextlib.ExitStack() as stack,
    ):
        # ---- the state: from the last checkpoint, or from the beginning
        batches = task.batches(feed.share)
        start = checkpoints.latest_step() or 0
        if start > options.steps:
            raise ValueError(
                f"--output {options.output} has made {start} steps already, more than --steps {options.steps}"
            )
        if start:
            state, position = checkpoints.restore(start, program.state)
            batches.set_state(position)
            frozen = skeleton.split(task.initial_model(mesh))[1] if program.frozen else {}
        else:
            params, frozen = skeleton.split(task.initial_model(mesh))
            state = program.init_state(params, jax.random.fold_in(jax.random.key(options.seed), 1))
            del params

        # ---- train
        stack.enter_context(jax.set_mesh(mesh))
        operations = task.config.flops_per_token(options.seq_len, training=True)
        reporter = Reporter(options, start=start, operations_per_token=operations)
        reporter.say(_opening(options, program, mesh, start))
        reporter.say(task.summary())
        pending: tuple[int, dict[str, jax.Array]] | None = None
        losses: list[float] = []  # since the last checkpoint
        saved = start
        profile = Profile(options)

        def read_metrics() -> None:
            """Of the last step but one, usually: the devices are at work on the next while the host waits for them."""
            nonlocal pending
            if pending is None:
                return
            step, metrics = pending[0], {name: value.item() for name, value in jax.device_get(pending[1]).items()}
            pending = None
            reporter.step(step, metrics)
            losses.append(metrics["loss"])
            if metrics["bad_steps"] >= options.max_bad_steps:
                raise DivergedError(
                    f"the loss or its gradient was not finite in {metrics['bad_steps']} steps in a row, "
                    f"{step - metrics['bad_steps'] + 1} to {step}; their updates were skipped. The last checkpoint is "
                    f"that of step {checkpoints.latest_step() or 0}."
                )

        try:
            for step in range(start + 1, options.steps + 1):
                profile.before(step - start, state)
                state, metrics = program.train_step(state, frozen, feed.place(next(batches)))
                read_metrics()
                pending = (step, metrics)

                last = stop.requested() or step == options.steps
                evaluated = None
                due = options.eval_data and step % (options.eval_every or options.save_every) == 0
                if due or (last and task.evaluates):
                    read_metrics()
                    if not stop.seen:  # who asks to stop may not wait for long
                        evaluated = task.evaluate(program, state.params, frozen)
                        reporter.evaluation(step, evaluated)
                if _every(getattr(options, "sample_every", 0), step):
                    read_metrics()
                    for prompt, text in task.samples(skeleton.build(state.params, frozen)):
                        reporter.sample(step, prompt, text)
                if step % options.save_every == 0 or last:
                    read_metrics()
                    reporter.flush()
                    if options.eval_data:
                        loss = None if evaluated is None else evaluated["loss"]
                    else:
                        loss = float(np.mean(losses))
                    checkpoints.save(step, state, batches.get_state(), loss)
                    if task.kind == "lora":  # small, and what all who use the run want of it, however it ends
                        models.save_adapter(skeleton.build(state.params, frozen), options.output, options.model)
                    losses.clear()
                    saved = step
                    reporter.restart_clock()
                if last:
                    break

            # ---- the end
            read_metrics()
            profile.end(state)
            checkpoints.wait()
            if stop.seen:
                reporter.say(f"asked to stop: step {saved} is saved; the same command goes on from there")
            else:
                reporter.say(f"done: {options.steps} steps, the last checkpoint is in {options.output}")
        finally:
            reporter.close()


class StopRequest:
    """SIGTERM and Ctrl-C, remembered until a step is done. A second Ctrl-C ends the process at once.

    In a job of several processes SIGTERM is JAX's, from the moment that they are connected: it makes all agree on the
    step to stop at, the next that none of them has begun, whichever was told.
    """

    def __init__(self) -> None:
        self.seen = False
        self._steps = 0  # made by this process, not by the run: what is agreed on may date from before the first
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: Any) -> None:
        if self.seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.seen = True

    def requested(self) -> bool:
        """Whether to stop after the step just made. To be asked after each; every process gets the same answer."""
        if jax.process_count() > 1:
            self._steps += 1
            # True for one number only, the first that no process had come to.
            self.seen = self.seen or multihost_utils.reached_preemption_sync_point(self._steps)
        return self.seen


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


class Profile:
    """The profiler's trace of `profile_steps` steps, after those that compile and warm up."""

    def __init__(self, options: RunOptions):
        self._directory = str(options.output / "profile")
        self._first = PROFILE_AFTER + 1
        self._end = self._first + options.profile_steps if jax.process_index() == 0 else self._first
        self._running = False

    def before(self, number: int, state: TrainState) -> None:
        """To be called before the step that is the `number`-th since the start."""
        if number == self._first < self._end:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory)
            self._running = True
        elif number == self._end:
            self.end(state)

    def end(self, state: TrainState) -> None:
        if self._running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._running = False


def _opening(options: RunOptions, program: Program, mesh: Mesh, start: int) -> str:
    trained = sum(array.size for array in program.state.params.values())
    frozen = f"{sum(array.size for array in program.frozen.values()):,} frozen" if program.frozen else ""
    if quantization := models.quantization(options):  # elements would say little: there are two int4 to a byte
        size = sum(array.size * array.dtype.itemsize for array in program.frozen.values())
        frozen = f"a frozen model of {quantization} matrices, {size / 1e6:,.1f} MB"
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    kind = jax.devices()[0].device_kind
    return (
        f"{trained:,} parameters trained"
        + (f", {frozen}" if frozen else "")
        + f"; {jax.device_count()} x {kind} ({axes}); {options.batch_size} x {options.seq_len} tokens a step; "
        + (f"goes on from step {start}" if start else "starts")
        + f"; {options.output}"
    )
