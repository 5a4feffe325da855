"""The parameters of a model, wherever they are: in Hugging Face files, in an Orbax directory, or in memory.

Loading, both ways of saving and comparing are written once, over this interface, and hold one parameter at a time.
"""

import abc
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path as FilePath
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from zamba2_jax.checkpoint.accounting import Account, compare_copies, faults_error, guess_architecture, settle_accounts
from zamba2_jax.checkpoint.files import generation_settings, open_tensors
from zamba2_jax.checkpoint.names import Index, Part, Path, Tensor, table
from zamba2_jax.checkpoint.safetensors import TensorInfo
from zamba2_jax.config import Zamba2Config
from zamba2_jax.quantization import quantization

# Exponent bits of which all are set in NaN and infinity, by width of the number.
_EXPONENTS = {
    "float64": (np.uint64, 0x7FF0_0000_0000_0000),
    "float32": (np.uint32, 0x7F80_0000),
    "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00),
}


class Parameters(abc.ABC):
    """Named arrays of one model.

    Attributes:
        config: of the model.
        architecture: its class name.
        generation_config: content of generation_config.json, or None.
        directory: where they come from, or None; tokenizer files are carried along from there.
        new: paths without a value, to be initialised.
    """

    config: Zamba2Config
    architecture: str
    generation_config: dict[str, Any] | None = None
    directory: FilePath | None = None
    new: frozenset[Path] = frozenset()

    def __init__(self):
        self._parts: dict[Path, tuple[Tensor, Part]] | None = None
        self._nonfinite: set[str] = set()
        self._overflowed: dict[str, str] = {}

    @property
    def parts(self) -> dict[Path, tuple[Tensor, Part]]:
        """Path -> where transformers keeps it, for every parameter of the model."""
        if self._parts is None:
            tensors = table(self.config, self.architecture)
            self._parts = {part.path: (tensor, part) for tensor in tensors for part in tensor.parts}
        return self._parts

    def paths(self) -> Iterator[Path]:
        """The parameters that have a value."""
        return (path for path in self.parts if path not in self.new)

    def shape(self, path: Path) -> tuple[int, ...]:
        return self.parts[path][1].shape

    @abc.abstractmethod
    def dtype(self, path: Path) -> np.dtype:
        """The dtype in which the parameter is stored."""

    @abc.abstractmethod
    def read(self, path: Path, index: Index | None = None) -> np.ndarray:
        """The parameter, or the slice `index` (a slice per dimension) of it. Every process of a job must ask for the
        same paths in turn."""

    def common_dtype(self) -> np.dtype:
        """The model's dtype: the embedding's."""
        return self.dtype(next(iter(self.parts)))

    def name(self, path: Path) -> str:
        """The parameter as its files name it."""
        return ".".join(map(str, path))

    def read_as(self, path: Path, dtype: np.dtype, index: Index | None = None) -> np.ndarray:
        """`read` in another dtype; numbers that are too large for it become infinite, which is noted for
        `warn_of_nonfinite`."""
        values = self.read(path, index)
        with np.errstate(over="ignore", invalid="ignore"):
            cast = values.astype(dtype, copy=False)
        narrower = float(ml_dtypes.finfo(dtype).max) < float(ml_dtypes.finfo(values.dtype).max)
        if narrower and not _is_finite(cast) and np.any(np.isfinite(values) & ~np.isfinite(cast)):
            self._overflowed[self.name(path)] = np.dtype(dtype).name
        return cast

    def _note_nonfinite(self, name: str, values: np.ndarray) -> None:
        if name not in self._nonfinite and not _is_finite(values):
            self._nonfinite.add(name)

    def warn_of_nonfinite(self) -> None:
        """Warns of the tensors read so far that hold NaN or infinity, or did once they were cast."""
        where = f" in {self.directory}" if self.directory else ""
        if self._nonfinite:
            warnings.warn(f"NaN or infinite weights{where}: {_listed(self._nonfinite)}.", UserWarning, stacklevel=3)
        if self._overflowed:
            dtypes = ", ".join(sorted(set(self._overflowed.values())))
            warnings.warn(
                f"Weights{where} that are too large for {dtypes} became infinite: {_listed(self._overflowed)}.",
                UserWarning,
                stacklevel=3,
            )


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _is_finite(values: np.ndarray) -> bool:
    # By bits: arithmetic on bfloat16 in numpy would go element by element through float32. In blocks: the mask of a
    # large matrix would be as large as the matrix.
    if values.dtype.name not in _EXPONENTS:
        return bool(np.isfinite(values).all())
    unsigned, exponent = _EXPONENTS[values.dtype.name]
    flat = np.ascontiguousarray(values).reshape(-1).view(unsigned)
    step = 1 << 22
    return not any(
        np.any((flat[start : start + step] & unsigned(exponent)) == exponent) for start in range(0, flat.size, step)
    )


class HuggingFaceParameters(Parameters):
    """The parameters in a directory as transformers writes it.

    Args:
        directory: with config.json and weights.
        architecture: the class to fill; None is the one that was saved.
        config: None is the one in the directory.

    Raises:
        FileNotFoundError: no config.json, or no weights.
        ValueError: with every fault of the checkpoint.
    """

    def __init__(self, directory: FilePath, architecture: str | None = None, config: Zamba2Config | None = None):
        super().__init__()
        config = config or Zamba2Config.from_pretrained(directory)
        self.files = open_tensors(directory)
        self.account: Account = settle_accounts(
            config, architecture or guess_architecture(config, self.files.tensors), self.files
        )
        faults = self.account.faults + compare_copies(self.account, self.files)
        if faults:
            raise faults_error(directory, faults)
        self.config, self.architecture, self.directory = self.account.config, self.account.architecture, directory
        self.generation_config = generation_settings(directory)
        new = set(self.account.new)
        self.new = frozenset(path for path, (tensor, _) in self.parts.items() if tensor.name in new)
        for message in self.account.warnings:
            warnings.warn(f"{directory}: {message}", UserWarning, stacklevel=4)

    def _info(self, tensor: Tensor) -> TensorInfo:
        return self.files.tensors[self.account.source[tensor.name]]

    def name(self, path: Path) -> str:
        tensor, _ = self.parts[path]
        return self.account.source[tensor.name]

    def dtype(self, path: Path) -> np.dtype:
        tensor, _ = self.parts[path]
        return self._info(tensor).dtype

    def read(self, path: Path, index: Index | None = None) -> np.ndarray:
        tensor, part = self.parts[path]
        info = self._info(tensor)

        def read_rows(start: int, stop: int) -> np.ndarray:
            rows = info.read_rows(start, stop)
            self._note_nonfinite(self.name(path), rows)
            return rows

        return part.read(read_rows, index)


class ModelParameters(Parameters):
    """The parameters of a model in memory, on whatever devices they are spread.

    Raises:
        ValueError: the model is quantised, or has LoRAs.
    """

    def __init__(self, model: nnx.Module):
        super().__init__()
        quantized = quantization(model)
        if quantized is not None:
            raise ValueError(
                f"the model is quantized to {quantized}, which checkpoints do not hold; load it without quantize= and "
                "save that, and quantize where it is loaded."
            )
        if jax.tree.leaves(nnx.state(model, nnx.LoRAParam)):
            raise ValueError(
                "the model has LoRAs, which checkpoints do not hold: merge them into its weights (merge_lora) and save "
                "the result, or save them alone (save_lora)."
            )
        self.config, self.architecture = model.config, type(model).__name__
        self.generation_config = model.generation_config
        self._values = {path: param.get_value() for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
        missing = [".".join(map(str, path)) for path in self.parts if path not in self._values]
        extra = [".".join(map(str, path)) for path in self._values if path not in self.parts]
        if missing or extra:
            raise ValueError(
                f"the model's parameters are not those of {self.architecture} with its config: missing {missing}, "
                f"unexpected {extra}."
            )

    def dtype(self, path: Path) -> np.dtype:
        return np.dtype(self._values[path].dtype)

    def read(self, path: Path, index: Index | None = None) -> np.ndarray:
        value = self._values[path]
        array = to_host(value)
        if array.shape != self.shape(path):
            raise ValueError(
                f"{'.'.join(map(str, path))} has shape {array.shape}, but the config asks for {self.shape(path)}."
            )
        return array if index is None else array[index]

    def value(self, path: Path) -> jax.Array:
        """The array itself, where it is."""
        return self._values[path]


def to_host(value: jax.Array) -> np.ndarray:
    """The whole array, whatever devices it is spread over. Every process of a job must ask for the same arrays in
    turn."""
    if not value.is_fully_addressable:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(value, tiled=True)
    # Not np.asarray(value): a jax.Array keeps the host copy that it once made, and a saved model would stay in host
    # memory as well.
    host = np.empty(value.shape, value.dtype)
    for position, shard in enumerate(value.addressable_shards):
        if shard.replica_id == 0:
            host[shard.index] = np.asarray(value.addressable_data(position))
    return host
