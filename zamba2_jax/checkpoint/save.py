"""To Hugging Face files, one tensor at a time."""

import functools
import json
import math
import os
import re
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from zamba2_jax.checkpoint.destination import check_destination, writing
from zamba2_jax.checkpoint.names import Tensor, table, written_names
from zamba2_jax.checkpoint.orbax import write_settings
from zamba2_jax.checkpoint.parameters import ModelParameters, Parameters
from zamba2_jax.checkpoint.progress import byte_bar
from zamba2_jax.checkpoint.safetensors import DTYPES, file_order, write_file

_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def save_pretrained(
    model: nnx.Module,
    path: str | os.PathLike[str],
    *,
    max_shard_size: str | int = "5GB",
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> None:
    """Writes `model` as transformers would: `from_pretrained` there loads it with nothing missing and nothing
    unexpected.

    A model that was loaded from such files and not changed is written back bit for bit.

    Args:
        model: one of the three model classes, on any devices.
        path: a directory: new, empty, or holding nothing but a checkpoint, whose weights are replaced.
        max_shard_size: of a file, such as "5GB" or a number of bytes. Models that fit are one model.safetensors.
        dtype: to store weights in; None keeps the model's. A_log, D and dt_bias are stored in this dtype if that is
            exact, else in float32.
        overwrite: write even among files that are no part of a checkpoint; they stay.
        progress: a bar on stderr; None shows it on a terminal.

    Raises:
        ValueError: `path` is taken, or an argument makes no sense. OSError: it cannot be written; nothing is left
            behind.
    """
    write_hugging_face(
        ModelParameters(model), path, max_shard_size=max_shard_size, dtype=dtype, overwrite=overwrite, progress=progress
    )


@dataclass(frozen=True)
class _Entry:
    name: str
    tensor: Tensor
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return self.tensor.size * self.dtype.itemsize


def write_hugging_face(
    parameters: Parameters,
    path: str | os.PathLike[str],
    *,
    max_shard_size: str | int = "5GB",
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> None:
    """Writes parameters from anywhere as transformers would, holding one tensor at a time. Arguments as in
    `save_pretrained`."""
    limit = parse_size(max_shard_size)
    storage = None if dtype is None else np.dtype(dtype)
    if storage is not None and storage not in DTYPES.values():
        raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, got {storage}.")
    destination = check_destination(path, overwrite)
    common = parameters.common_dtype() if storage is None else storage

    missing = sorted(".".join(map(str, path)) for path in parameters.new)
    if missing:
        raise ValueError(f"{', '.join(missing)} has no values to write; load the model and save it instead.")
    tensors = table(parameters.config, parameters.architecture)
    dtypes = {tensor.name: _stored_dtype(parameters, tensor, common, storage) for tensor in tensors}
    entries = [_Entry(name, tensor, dtypes[tensor.name]) for name, tensor in written_names(tensors, parameters.config)]
    shards = _split(entries, limit)
    total = sum(entry.nbytes for entry in entries)
    with byte_bar(f"Writing {destination.name}", total, progress) as bar, writing(destination) as directory:
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            by_name = {entry.name: entry for entry in shard}
            weight_map |= dict.fromkeys(by_name, name)
            produce = functools.partial(_produce, parameters, by_name)
            layout = {key: (entry.dtype, entry.tensor.shape) for key, entry in by_name.items()}
            if jax.process_index() == 0:
                write_file(directory / name, layout, produce, {"format": "pt"}, bar.update)
            else:  # gathering an array takes every process, in the same order; only the first one writes
                for key in file_order(layout):
                    produce(key)
        if jax.process_index() == 0:
            if len(shards) > 1:
                parameter_count = sum(entry.tensor.size for entry in entries)
                index = {
                    "metadata": {"total_parameters": parameter_count, "total_size": total},
                    "weight_map": dict(sorted(weight_map.items())),
                }
                text = json.dumps(index, indent=2) + "\n"
                (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
            write_settings(parameters, directory, common)
    parameters.warn_of_nonfinite()


def parse_size(size: str | int) -> int:
    """Bytes of "5GB", "300 MB", "2GiB" or a number.

    Raises:
        ValueError: anything else, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    factor = _UNITS.get(match[2].upper()) if match else None
    if factor is None or not 1 <= float(match[1]) * factor < math.inf:
        raise ValueError(
            f'max_shard_size must be a positive number of bytes or a text such as "5GB" or "300MB", got {size!r}.'
        )
    return int(float(match[1]) * factor)


def _stored_dtype(parameters: Parameters, tensor: Tensor, common: np.dtype, storage: np.dtype | None) -> np.dtype:
    if tensor.stands_for_zero:
        return common
    if tensor.float32:
        values = parameters.read(tensor.parts[0].path)
        with np.errstate(over="ignore"):
            exact = np.array_equal(values.astype(common).astype(np.float64), values.astype(np.float64), equal_nan=True)
        return common if exact else np.dtype(np.float32)
    if storage is not None:
        return storage
    return functools.reduce(np.promote_types, (parameters.dtype(part.path) for part in tensor.parts))


def _produce(parameters: Parameters, entries: dict[str, _Entry], name: str) -> np.ndarray:
    """The values of a Hugging Face tensor."""
    entry = entries[name]
    tensor = entry.tensor
    array = np.zeros(tensor.shape, entry.dtype)
    for part in tensor.parts:
        array[part.start : part.stop] = part.to_rows(parameters.read_as(part.path, entry.dtype), tensor.shape[1:])
    return array


def _split(entries: list[_Entry], limit: int) -> list[list[_Entry]]:
    """Tensors in order, as many to a file as fit; one that is larger than a file has its own, as in transformers."""
    shards: list[list[_Entry]] = []
    current: list[_Entry] = []
    size = 0
    for entry in entries:
        if entry.nbytes > limit:
            shards.append([entry])
            continue
        if size + entry.nbytes > limit:
            shards.append(current)
            current, size = [], 0
        current.append(entry)
        size += entry.nbytes
    if current:
        shards.append(current)
    return [shard for shard in shards if shard]
