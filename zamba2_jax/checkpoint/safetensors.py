"""The safetensors format: eight bytes of header length, a JSON header, then the tensors' bytes.

Written out here instead of through the safetensors package for two reasons. Its reader maps files into memory, so
that every page read stays in the process' resident set until the file is closed, while reads into a buffer cost one
tensor. Its writer wants all tensors of a file at once, while ours are produced one at a time.
https://github.com/huggingface/safetensors describes the format.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

# In the order in which the safetensors package lays tensors out: widest first.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000
Layout = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of a tensor.

    Attributes:
        shape: of the tensor.
        dtype: its numpy dtype, or None if it is no floating type that we know.
        dtype_name: as the file names it.
        file: name of the file.
        read_rows: rows start:stop of the first axis; (0, None) is the whole tensor.
    """

    shape: tuple[int, ...]
    dtype: np.dtype | None
    dtype_name: str
    file: str
    read_rows: Callable[[int, int | None], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (self.dtype.itemsize if self.dtype else 1)

    def row_blocks(self, max_bytes: int) -> Iterator[tuple[int, int]]:
        """Consecutive runs of rows (start, stop) of about `max_bytes` each that cover the tensor, which has at least
        one axis."""
        step = max(1, max_bytes * self.shape[0] // max(self.nbytes, 1))
        for start in range(0, self.shape[0], step):
            yield start, min(start + step, self.shape[0])


def read_header(path: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors of a file, and what is wrong with it (truncated, another format, damaged)."""
    faults = []
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or length > min(size - 8, _MAX_HEADER):
            if start.startswith(b"version "):
                return {}, [f"{path.name}: is a Git LFS pointer, not the file itself; run `git lfs pull`."]
            return {}, [f"{path.name}: truncated or no safetensors file: {size} bytes do not hold the header."]
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            return {}, [f"{path.name}: its safetensors header is damaged ({error})."]
    if not isinstance(header, dict):
        return {}, [f"{path.name}: its safetensors header is damaged (it is no object)."]
    header.pop("__metadata__", None)

    tensors, entries = {}, {}
    for name, entry in header.items():
        fault = _entry_fault(entry)
        if fault is None:
            entries[name] = (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
        else:
            faults.append(f"{path.name}: its safetensors header is damaged: {name} has {fault}.")
    data = 8 + length
    end = max((entry[3] for entry in entries.values()), default=0)
    if data + end > size:
        faults.append(f"{path.name}: truncated: {size} bytes, but its header describes {data + end}.")
    faults += _overlaps(path.name, {name: (begin, stop) for name, (_, _, begin, stop) in entries.items()})
    for name, (dtype_name, shape, begin, stop) in entries.items():
        dtype = DTYPES.get(dtype_name)
        if dtype is not None and stop - begin != math.prod(shape) * dtype.itemsize:
            faults.append(
                f"{path.name}: {name} {dtype_name} {shape} does not take the {stop - begin} bytes of its header."
            )
            continue
        tensors[name] = TensorInfo(shape, dtype, dtype_name, path.name, _reader(path, dtype, shape, data + begin))
    return tensors, faults


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a file in which `read_header` found no fault."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(length)).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _entry_fault(entry: object) -> str | None:
    """What is wrong with a header's description of a tensor, as the object of "has"."""
    if not isinstance(entry, dict):
        return f"{_shown(entry)} for its description"
    dtype, shape, offsets = (entry.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        return f"dtype {_shown(dtype)}, which is no name"
    if not _are_sizes(shape):
        return f"shape {_shown(shape)}, which is no list of sizes"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {_shown(offsets)}, which are no start and end"
    return None


def _are_sizes(values: object) -> bool:
    # Nothing has 2**63 elements or bytes; and True is an int to Python.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _overlaps(file: str, ranges: Mapping[str, tuple[int, int]]) -> list[str]:
    """Tensors that claim bytes of another."""
    faults = []
    last, reached = "", 0
    for name, (begin, stop) in sorted(ranges.items(), key=lambda item: item[1]):
        if begin < min(reached, stop):
            faults.append(f"{file}: its safetensors header is damaged: {last} and {name} overlap.")
        if stop > reached:
            last, reached = name, stop
    return faults


def _reader(
    path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int
) -> Callable[[int, int | None], np.ndarray]:
    def read_rows(start: int, stop: int | None) -> np.ndarray:
        if not shape:
            return np.fromfile(path, dtype, 1, offset=offset).reshape(())
        stop = shape[0] if stop is None else stop
        row = math.prod(shape[1:])
        count = (stop - start) * row
        array = np.fromfile(path, dtype, count, offset=offset + start * row * dtype.itemsize)
        if array.size != count:
            raise ValueError(
                f"{path}: ended while rows {start}:{stop} of a {shape} tensor were read; the file has changed."
            )
        return array.reshape(stop - start, *shape[1:])

    return read_rows


def file_order(tensors: Layout) -> list[str]:
    """The names in the order in which `write_file` asks for them: widest dtype first, then by name."""
    order = list(DTYPES.values())
    return sorted(tensors, key=lambda name: (order.index(tensors[name][0]), name))


def write_file(
    path: Path,
    tensors: Layout,
    produce: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
    on_written: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes a file whose bytes are those that the safetensors package would write, one tensor at a time.

    Args:
        path: the file.
        tensors: name -> (dtype, shape).
        produce: name -> the array.
        metadata: texts for the header.
        on_written: is told the number of bytes of each tensor written.
    """
    names = file_order(tensors)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in names:
        dtype, shape = tensors[name]
        stop = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for name in names:
            dtype, shape = tensors[name]
            array = np.ascontiguousarray(produce(name)).reshape(shape)
            if array.dtype != dtype:
                raise TypeError(f"{name} was announced as {dtype} and came as {array.dtype}.")
            # Through uint8: Python's buffer protocol does not know bfloat16.
            file.write(array.reshape(-1).view(np.uint8).data)
            on_written(array.nbytes)
        file.flush()
        os.fsync(file.fileno())
