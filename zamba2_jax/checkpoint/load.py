"""From a checkpoint to a model, one parameter at a time."""

import dataclasses
import math
import os
import types
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from zamba2_jax.checkpoint.files import find_checkpoint, is_orbax, settings_directory
from zamba2_jax.checkpoint.names import ARCHITECTURES, Index, Path
from zamba2_jax.checkpoint.orbax import OrbaxParameters
from zamba2_jax.checkpoint.parameters import HuggingFaceParameters, Parameters
from zamba2_jax.checkpoint.progress import byte_bar
from zamba2_jax.config import Zamba2Config
from zamba2_jax.layers.quantized import quantize_weight
from zamba2_jax.quantization import check_quantize, quantized_modules
from zamba2_jax.quantization import quantize as quantize_model
from zamba2_jax.sharding import check_mesh, make_mesh, param_shardings

Model = TypeVar("Model", bound=nnx.Module)

# What transformers' users write, and what they write here.
_ELSEWHERE = {
    "attn_implementation": "the ops choose by device (`implementation=` of `zamba2_jax.ops`)",
    "device_map": 'mesh= ("auto", or sizes such as "tensor=2") spreads the parameters over devices',
    "low_cpu_mem_usage": "loading never holds more than a tensor beyond the model",
    "quantization_config": 'quantize="int8" or "int4" stores the matrices as integers',
    "load_in_8bit": 'quantize="int8" does that',
    "load_in_4bit": 'quantize="int4" does that',
    "torch_dtype": "dtype= takes jnp.bfloat16 and the like",
    "trust_remote_code": "none is run",
}


def open_parameters(
    name_or_path: str | os.PathLike[str],
    architecture: str | None = None,
    *,
    config: Zamba2Config | None = None,
    config_changes: Mapping[str, Any] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Parameters:
    """The parameters of a checkpoint in either format, checked but not loaded.

    Args:
        name_or_path: a directory or a hub id.
        architecture: the class to fill, a key of `names.ARCHITECTURES`; None is the one that was saved.
        config, config_changes: a config in place of the checkpoint's, and fields to set in either
            (`Zamba2Config.replace`).
        revision, token, cache_dir, local_files_only: as in `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: no such directory or repository, no config.json or no weights in it.
        ValueError: with every fault of the checkpoint.
    """
    directory = find_checkpoint(
        name_or_path, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    orbax = is_orbax(directory)
    if config_changes:
        if config is None:
            config = Zamba2Config.from_pretrained(settings_directory(directory) if orbax else directory)
        config = config.replace(**config_changes)
    return (OrbaxParameters if orbax else HuggingFaceParameters)(directory, architecture, config)


def load_pretrained(
    model_class: type[Model],
    name_or_path: str | os.PathLike[str],
    *,
    config: Zamba2Config | None = None,
    config_changes: Mapping[str, Any] | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    mesh: str | Mesh | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    progress: bool | None = None,
) -> Model:
    """Loads a checkpoint of either format into a model; beyond the model itself, memory holds about one tensor.

    Args:
        model_class: Zamba2Model, Zamba2ForCausalLM or Zamba2ForSequenceClassification. It need not be the class that
            was saved: a head that it lacks is ignored, and a classification head that the checkpoint lacks is newly
            initialised, each with a warning.
        name_or_path: a directory or a hub id.
        config, config_changes: as in `open_parameters`.
        dtype: of computation; None and "auto" take the config's, then that of the weights.
        param_dtype: of the parameters; None is `dtype`. A_log, D and dt_bias are float32 always.
        mesh: devices to spread the parameters over, as a `Mesh` or as `make_mesh` reads it; each process reads only
            what its devices hold. None: the default device.
        quantize: "int8" or "int4" turns each matrix into integers as soon as it is read (`zamba2_jax.quantization`).
        revision, token, cache_dir, local_files_only: as in `huggingface_hub.snapshot_download`.
        progress: a bar on stderr; None shows it on a terminal.

    Raises:
        FileNotFoundError: no such directory or repository, no config.json or no weights in it.
        ImportError: the weights are PyTorch pickles and torch is not installed.
        TypeError: `config_changes` that are no fields of a config.
        ValueError: before a file is opened, a `quantize` or a `mesh` that there is not; then with every fault of the
            checkpoint, or of a mesh that does not divide the model.
    """
    for name in sorted((config_changes or {}).keys() - {field.name for field in dataclasses.fields(Zamba2Config)}):
        hint = _ELSEWHERE.get(name, "it takes those in its documentation, and fields of Zamba2Config")
        raise TypeError(f"from_pretrained has no argument {name!r}: {hint}.")
    check_quantize(quantize)
    mesh = None if mesh is None else make_mesh(mesh)
    if model_class.__name__ not in ARCHITECTURES:
        raise ValueError(f"model_class must be one of {', '.join(ARCHITECTURES)}, got {model_class.__name__}.")
    parameters = open_parameters(
        name_or_path,
        model_class.__name__,
        config=config,
        config_changes=config_changes,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    if mesh is not None:
        check_mesh(parameters.config, mesh)
    if dtype is None or dtype == "auto":
        dtype = parameters.config.dtype or parameters.common_dtype()
    dtype = jnp.dtype(dtype)

    # The shapes do not depend on keys, and an nnx.Rngs that is traced costs milliseconds for each: 37 s of the 7B
    # model's 38.
    key = jax.random.key(0)
    rngs = types.SimpleNamespace(params=lambda: key)

    def make() -> Model:
        return model_class(parameters.config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    abstract = nnx.eval_shape(make)
    graph, state = nnx.split(abstract)
    leaves = dict(nnx.to_flat_state(state))
    _check_against_table(parameters, leaves)
    shardings = {} if mesh is None else dict(nnx.to_flat_state(param_shardings(nnx.state(abstract, nnx.Param), mesh)))
    matrices = {}
    filled = leaves
    if quantize is not None:
        matrices = quantized_modules(abstract, quantize)
        graph, state = nnx.split(nnx.eval_shape(lambda: quantize_model(make(), quantize)))
        filled = dict(nnx.to_flat_state(state))
        if mesh is not None:
            param_shardings(state, mesh)  # two int4 to a byte: an axis is half as long, and may not divide

    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in filled.values())
    with byte_bar(f"Loading {model_class.__name__}", total, progress) as bar:
        for path, leaf in leaves.items():
            place = _place_new if path in parameters.new else _place
            bits = matrices.get(path[:-1]) if path[-1] in ("kernel", "embedding") else None
            if bits is None:
                values = {path: place(parameters, path, leaf.dtype, shardings.get(path))}
            else:
                # From the numbers as they are stored: a cast to bfloat16 before would be a second rounding.
                stored = min(parameters.dtype(path), np.dtype(np.float32), key=lambda dtype: dtype.itemsize)
                weight = place(parameters, path, stored, shardings.get(path))
                arrays = quantize_weight(weight, bits, axis=1 if path[-1] == "embedding" else 0)
                values = {(*path[:-1], name): array for name, array in zip(("values", "scale"), arrays, strict=True)}
            for name, value in values.items():
                filled[name].set_value(value.block_until_ready())
                bar.update(value.nbytes)
    parameters.warn_of_nonfinite()
    model = nnx.merge(graph, nnx.from_flat_state(filled.items()))
    model.generation_config = parameters.generation_config
    return model


def _check_against_table(parameters: Parameters, leaves: dict[Path, nnx.Variable]) -> None:
    """The table and the modules must describe the same model; a difference is a mistake in this library."""
    expected = {path: parameters.shape(path) for path in parameters.parts}
    actual = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    if expected != actual:
        differing = sorted({".".join(map(str, path)) for path, _ in expected.items() ^ actual.items()})
        raise AssertionError(f"zamba2_jax.checkpoint.names and the model disagree on {differing}.")


def _place(parameters: Parameters, path: Path, dtype: np.dtype, sharding: Sharding | None) -> jax.Array:
    if sharding is None:
        value = np.ascontiguousarray(parameters.read_as(path, dtype))
        # may_alias=False: the device owns its copy, so that the model may be donated to a jitted function. Waiting
        # keeps one tensor in flight instead of all of them.
        return jax.device_put(value, may_alias=False).block_until_ready()

    read: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def read_slice(index: Index) -> np.ndarray:
        shape = parameters.shape(path)
        key = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        if key not in read:  # devices that hold replicas ask for the same slice
            read[key] = np.ascontiguousarray(parameters.read_as(path, dtype, index))
        return read[key]

    value = jax.make_array_from_callback(parameters.shape(path), sharding, read_slice)
    return value.block_until_ready()


def _place_new(parameters: Parameters, path: Path, dtype: np.dtype, sharding: Sharding | None) -> jax.Array:
    """A new head: normal of the config's standard deviation, from seed 0, the same on every process."""

    def draw() -> jax.Array:
        draws = jax.random.normal(nnx.Rngs(0).params(), parameters.shape(path), jnp.float32)
        return (parameters.config.initializer_range * draws).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)()
