"""Our own format: config.json, generation_config.json and tokenizer files, and the parameters as an Orbax tree in
`params`.

Any Orbax reader can restore `params`: a nested dictionary by the names of our parameter tree. Values are written and
read one at a time, so that converting a model needs the memory of its largest tensor.
"""

import asyncio
import contextlib
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import nnx
from jax.typing import DTypeLike
from orbax.checkpoint import type_handlers

from zamba2_jax.checkpoint.accounting import IGNORED_HEAD, NEW_HEAD, faults_error
from zamba2_jax.checkpoint.destination import check_destination, copy_companions, writing
from zamba2_jax.checkpoint.files import ORBAX, generation_settings, settings_directory
from zamba2_jax.checkpoint.names import ARCHITECTURES, HEADS, Index, Path
from zamba2_jax.checkpoint.parameters import ModelParameters, Parameters
from zamba2_jax.checkpoint.progress import byte_bar
from zamba2_jax.config import Zamba2Config

# Arrays are stored in chunks of this size, so that a process of a sharded job reads little more than its slices.
_CHUNK_BYTES = 1 << 26
# Small arrays are written together: each batch costs Orbax some 15 ms, and there are a thousand.
_IN_FLIGHT_BYTES = 1 << 27


class _LazyArray:
    """An array that is read when it is written."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[], np.ndarray]):
        self.shape, self.dtype, self.read = shape, dtype, read

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _LazyArrayHandler(type_handlers.NumpyHandler):
    """Reads and writes lazy arrays, a few at a time; what it writes is what Orbax writes for numpy arrays."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self._failures: list[ValueError] = []

    async def _open_and_write(self, value: np.ndarray, *arguments: Any) -> None:
        # A failure is kept until the whole group is done. Raised here, it would close the event loop of Orbax's thread,
        # and each write still under way would find it closed and print a traceback.
        try:
            await super()._open_and_write(value, *arguments)
        except ValueError as error:
            self._failures.append(error)

    async def serialize(
        self, values: Sequence[_LazyArray], infos: Sequence[Any], args: Sequence[ocp.SaveArgs] | None = None
    ) -> list:
        args = args or [ocp.SaveArgs()] * len(values)
        for group in _groups([value.nbytes for value in values], _IN_FLIGHT_BYTES):
            arrays = [values[position].read() for position in group]
            futures = await super().serialize(arrays, [infos[p] for p in group], [args[p] for p in group])
            for future in futures:
                await asyncio.to_thread(future.result)
            if self._failures:
                raise self._failures[0]
        return []


def _groups(sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Positions in runs whose sizes add up to `limit` at most; a larger one is alone."""
    group: list[int] = []
    for position, size in enumerate(sizes):
        if group and sum(sizes[p] for p in group) + size > limit:
            yield group
            group = []
        group.append(position)
    if group:
        yield group


def save_orbax(
    model: nnx.Module, path: str | os.PathLike[str], *, overwrite: bool = False, progress: bool | None = None
) -> None:
    """Writes `model` as a directory that `from_pretrained` loads, on any number of devices and processes.

    Args:
        model: one of the three model classes.
        path: see `destination.check_destination` for what may stand there.
        overwrite: write even among files that are no part of a checkpoint.
        progress: a bar on stderr; None shows it on a terminal.

    Raises:
        ValueError: `path` is taken. OSError: it cannot be written; nothing is left behind.
    """
    write_orbax(ModelParameters(model), path, overwrite=overwrite, progress=progress)


def write_orbax(
    parameters: Parameters,
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> None:
    """Writes parameters from anywhere in our format, holding one at a time.

    Args:
        dtype: to store them in; None keeps each as it is. A_log, D and dt_bias are stored in float32.
        The others: as in `save_orbax`.
    """
    destination = check_destination(path, overwrite)
    common = parameters.common_dtype() if dtype is None else np.dtype(dtype)
    paths = list(parameters.paths())
    dtypes = {}
    for key in paths:
        _, part = parameters.parts[key]
        kept = parameters.dtype(key) if dtype is None else common
        dtypes[key] = np.dtype(np.float32) if part.float32 else kept
    total = sum(math.prod(parameters.shape(key)) * dtypes[key].itemsize for key in paths)

    with byte_bar(f"Writing {destination.name}", total, progress) as bar, writing(destination) as directory:

        def leaf(key: Path) -> Any:
            shape, stored = parameters.shape(key), dtypes[key]
            if jax.process_count() > 1 and isinstance(parameters, ModelParameters):
                return parameters.value(key)  # every process writes its shards

            def read() -> np.ndarray:
                value = np.ascontiguousarray(parameters.read_as(key, stored))
                bar.update(value.nbytes)
                return value

            return _LazyArray(shape, stored, read)

        tree: dict[str, Any] = {}
        for key in paths:
            node = tree
            for name in key[:-1]:
                node = node.setdefault(str(name), {})
            node[str(key[-1])] = leaf(key)
        with _one_report(), _checkpointer() as checkpointer:
            save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
            checkpointer.save(directory / ORBAX, tree, save_args=save_args)
        if jax.process_index() == 0:
            write_settings(parameters, directory, common)
    parameters.warn_of_nonfinite()


def write_settings(parameters: Parameters, directory: FilePath, dtype: np.dtype) -> None:
    """Writes everything but the weights: tokenizer files, generation_config.json and, last, config.json."""
    copy_companions(parameters.directory, directory)
    config = parameters.config
    generation = parameters.generation_config
    if generation is None:
        generation = {"_from_model_config": True}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name)
            if value is not None:
                generation[name] = list(value) if isinstance(value, tuple) else value
    text = json.dumps(generation, indent=2, sort_keys=True)
    (directory / "generation_config.json").write_text(text + "\n", encoding="utf-8")
    config.replace(dtype=dtype.name, architectures=(parameters.architecture,)).save_pretrained(directory)


def is_thread_report(record: logging.LogRecord) -> bool:
    """Whether one of Orbax's threads logs a failure, with its traceback: the saving thread raises the same one."""
    return "_SignalingThread.run() raised an exception" in record.getMessage()


@contextlib.contextmanager
def _one_report() -> Iterator[None]:
    """Drops what Orbax's threads log of failures."""

    def is_new(record: logging.LogRecord) -> bool:
        return not is_thread_report(record)

    logger = logging.getLogger("absl")
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def _checkpointer() -> ocp.Checkpointer:
    registry = type_handlers.create_type_handler_registry(
        (_LazyArray, _LazyArrayHandler()), (jax.Array, type_handlers.ArrayHandler())
    )
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry))


class OrbaxParameters(Parameters):
    """The parameters in a directory that `save_orbax` or `convert` wrote.

    Args:
        directory: with config.json and `params`; or of a training run's checkpoint, config.json being in the run's.
        architecture: the class to fill; None is the one that was saved.
        config: None is the one in the directory.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: with every fault of the checkpoint.
    """

    def __init__(self, directory: FilePath, architecture: str | None = None, config: Zamba2Config | None = None):
        super().__init__()
        self.directory = settings_directory(directory)
        self.config = config or Zamba2Config.from_pretrained(self.directory)
        self.generation_config = generation_settings(self.directory)
        self._arrays_in = directory
        stored = _stored_names(directory)
        saved = "Zamba2Model" if not any(name.startswith("model.") for name in stored) else None
        known = [name for name in self.config.architectures or () if name in ARCHITECTURES]
        self.architecture = architecture or saved or (known[0] if known else "Zamba2ForCausalLM")
        faults, messages = self._settle(stored)
        if faults:
            raise faults_error(directory, faults)
        for message in messages:
            warnings.warn(f"{directory}: {message}", UserWarning, stacklevel=4)

    def _settle(self, stored: set[str]) -> tuple[list[str], list[str]]:
        """Assigns every stored array to a parameter; returns faults and warnings."""
        prefix, _ = ARCHITECTURES[self.architecture]
        has_prefix = any(name.startswith("model.") for name in stored)
        self._arrays: dict[Path, tensorstore.TensorStore] = {}
        faults, messages, used, new = [], [], set(), set()
        for path, (_, part) in self.parts.items():
            name = part.name
            if path[0] not in HEADS and bool(prefix) != has_prefix:
                name = name.removeprefix("model.") if prefix else f"model.{name}"
            if name not in stored:
                if path[0] == "score":
                    new.add(path)
                    messages.append(NEW_HEAD.format(name=part.name))
                else:
                    faults.append(f"{part.name}: missing; shape {part.shape} is needed.")
                continue
            used.add(name)
            try:
                array = _open_array(self._arrays_in, name)
            except ValueError as error:
                faults.append(f"{name}: cannot be opened ({str(error).splitlines()[0][:200]}).")
                continue
            if array.shape != part.shape:
                faults.append(f"{name}: has shape {array.shape}, but the config asks for {part.shape}.")
            self._arrays[path] = array
        self.new = frozenset(new)
        for name in sorted(stored - used):
            if name.split(".")[0] in HEADS:
                messages.append(IGNORED_HEAD.format(name=name, architecture=self.architecture))
            else:
                faults.append(f"{name}: unexpected; {self.architecture} of this config has no such parameter.")
        return faults, messages

    def dtype(self, path: Path) -> np.dtype:
        return np.dtype(self._arrays[path].dtype.numpy_dtype)

    def read(self, path: Path, index: Index | None = None) -> np.ndarray:
        array = self._arrays[path]
        try:
            value = (array if index is None else array[index]).read().result()
        except ValueError as error:
            raise ValueError(f"{self.directory}: {'.'.join(map(str, path))} cannot be read: {error}") from error
        self._note_nonfinite(self.name(path), value)
        return value


def _stored_names(directory: FilePath) -> set[str]:
    metadata = directory / ORBAX / "_METADATA"
    try:
        entries = json.loads(metadata.read_text(encoding="utf-8"))["tree_metadata"].values()
        return {".".join(str(key["key"]) for key in entry["key_metadata"]) for entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{metadata} is damaged: {error!r}.") from error


def _open_array(directory: FilePath, name: str) -> tensorstore.TensorStore:
    base = {"driver": "file", "path": f"{(directory / ORBAX).resolve()}/"}
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
    }
    return tensorstore.open(spec, read=True, open=True).result()
