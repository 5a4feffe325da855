"""Checkpoints of a run: Orbax's manager, and what goes into one.

RUN/checkpoints/STEP/ holds `params` (the trained parameters in the format of `zamba2_jax.checkpoint`, so that a run's
directory loads as any checkpoint; `lora` instead for a LoRA), `optimizer`, `progress` (step, random key, counts) and
`data` (the position in the data). A directory gets its number for a name when all of it is on disk: a half-written one
has another name, and is removed by the next run.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import traverse_util
from orbax.checkpoint.checkpoint_managers import preservation_policy

from train.step import Params, TrainState
from zamba2_jax.checkpoint.destination import no_room
from zamba2_jax.checkpoint.files import CHECKPOINTS
from zamba2_jax.checkpoint.orbax import is_thread_report


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, but for a question that is the training loop's to ask.

    Orbax asks JAX about a termination, too: at every save and, in a thread, of the step saved when it is on disk. JAX
    takes the last step that it was asked about for the one that a process has reached. Told an earlier one, it can
    agree with the other processes on a step that is over: this one would never stop there, and they would wait for it.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of a run, written in the background.

    Args:
        directory: the run's.
        kind: "params" if all parameters are trained, "lora" if a LoRA is.
        keep_last: how many of the latest to keep.
        keep_best: how many to keep beside them for the lowest metric.
    """

    def __init__(self, directory: Path, *, kind: str = "params", keep_last: int = 1, keep_best: int = 0):
        self._kind = kind
        policies = [preservation_policy.LatestN(keep_last)]
        if keep_best:
            policies.append(
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics["loss"],
                    reverse=True,  # the last ones in order are kept, so the lowest come last
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = _Manager(
            (directory / CHECKPOINTS).absolute(),
            item_handlers={
                **{name: ocp.StandardCheckpointHandler() for name in (kind, "optimizer", "progress")},
                "data": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
            ),
        )

    def latest_step(self) -> int | None:
        """Of the last complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data: Mapping[str, Any], loss: float | None) -> None:
        """Copies everything off the devices, and returns; a thread writes it.

        Args:
            loss: what `keep_best` goes by; None for none.

        Raises:
            OSError: there is no room for this one, or there was none for the one before.
        """
        items = {
            self._kind: ocp.args.StandardSave(nested(state.params)),
            "optimizer": ocp.args.StandardSave(state.optimizer),
            "progress": ocp.args.StandardSave(_progress(state)),
            "data": ocp.args.JsonSave(dict(data)),
        }
        metrics = None if loss is None or not math.isfinite(loss) else {"loss": loss}
        with self._clear_message():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of `step` and the data's position.

        Args:
            abstract: shapes, dtypes, and the shardings to restore with, whatever they were when it was saved.

        Raises:
            ValueError: the checkpoint holds a model or an optimiser of another shape.
        """
        self._check_shapes(step, abstract.params)
        items = {
            self._kind: nested(abstract.params),
            "optimizer": abstract.optimizer,
            "progress": _progress(abstract),
        }
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardRestore(tree) for name, tree in items.items()}, data=ocp.args.JsonRestore()
            ),
        )
        progress = dict(restored["progress"])
        key = jax.random.wrap_key_data(progress.pop("key"))
        params = traverse_util.flatten_dict(restored[self._kind], sep=".")
        return TrainState(params=params, optimizer=restored["optimizer"], key=key, **progress), restored["data"]

    def _check_shapes(self, step: int, params: Params) -> None:
        metadata = self._manager.item_metadata(step)[self._kind]
        if metadata is None:
            raise ValueError(
                f"{self._manager.directory / str(step)} holds no {self._kind!r}: it is of another kind of run "
                f"({'full training' if self._kind == 'lora' else 'a LoRA'})."
            )
        stored = {name: tuple(leaf.shape) for name, leaf in traverse_util.flatten_dict(metadata.tree, sep=".").items()}
        wanted = {name: tuple(leaf.shape) for name, leaf in params.items()}
        differing = sorted(name for name, _ in stored.items() ^ wanted.items())
        if differing:
            name = differing[0]
            raise ValueError(
                f"{self._manager.directory / str(step)} is a checkpoint of another shape: {len(set(differing))} "
                f"parameters differ, such as {name}, {stored.get(name, 'absent')} there and "
                f"{wanted.get(name, 'absent')} in this model."
            )

    def wait(self) -> None:
        """Returns when all that was saved is on disk.

        Raises:
            OSError: there was no room for it.
        """
        with self._clear_message():
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        self._quiet = _Quiet()
        self._quiet.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            self.wait()
            self.close()
        else:
            with contextlib.suppress(OSError, ValueError, RuntimeError):  # the error that ends the run is to be seen
                self.close()
        if not isinstance(error, OSError):  # of which threads that are still at work would speak later
            self._quiet.end()

    @contextlib.contextmanager
    def _clear_message(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = _why_no_room(error)
            if reason is None:
                raise
            last = self.latest_step()
            kept = f"the checkpoint of step {last} is complete" if last is not None else "no checkpoint was complete"
            raise OSError(
                f"{reason}: a checkpoint could not be written to {self._manager.directory}; {kept}. Make room and give "
                "the same command again."
            ) from error


def _why_no_room(error: BaseException | None) -> str | None:
    """In words, if a full disk is behind `error`."""
    while error is not None:
        if (reason := no_room(error)) is not None:
            return reason
        error = error.__cause__ or error.__context__
    return None


class _Quiet:
    """Keeps a failed save to one message, that of the error which ends the run. Orbax's threads and tasks log the same
    failure with a traceback each, and every write that was under way prints that its event loop is gone by now."""

    _LOGGERS = ("absl", "asyncio")

    def begin(self) -> None:
        for name in self._LOGGERS:
            logging.getLogger(name).addFilter(self._is_news)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._print

    def end(self) -> None:
        for name in self._LOGGERS:
            logging.getLogger(name).removeFilter(self._is_news)
        sys.unraisablehook = self._hook

    @staticmethod
    def _is_news(record: logging.LogRecord) -> bool:
        if record.exc_info and _why_no_room(record.exc_info[1]):
            return False
        return not is_thread_report(record)

    def _print(self, unraisable: Any) -> None:
        """What tensorstore calls for a write that nobody waits for any more."""
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)


def nested(params: Params) -> dict[str, Any]:
    """Parameters as the tree that `zamba2_jax.checkpoint` keeps on disk."""
    return traverse_util.unflatten_dict(params, sep=".")


def _progress(state: TrainState) -> dict[str, Any]:
    key = state.key
    if isinstance(key, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, key)
        data = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)
    else:
        data = jax.random.key_data(key)
    return {"step": state.step, "key": data, "skipped": state.skipped, "bad_steps": state.bad_steps}
