"""A cache as one safetensors file that knows which model it is of.

Tensors: `mamba.I.conv_x`, `mamba.I.conv_bc` and `mamba.I.ssm` of layer I, `attention.J.key` and `attention.J.value` of
hybrid layer J, as in `Zamba2Cache`, with as many slots as the longest row has tokens. Texts in the header: the format,
each row's tokens and next position, the model's identity, and notes of whoever wrote the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zamba2_jax.cache import KeyValue, MambaState, Zamba2Cache, init_cache
from zamba2_jax.checkpoint import safetensors

if TYPE_CHECKING:
    from zamba2_jax.pretrained import PretrainedModel

FORMAT = "zamba2_jax cache 1"
# Fields of a config that do not change what a model computes from given weights.
_IRRELEVANT = {
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "chunk_size",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "max_position_embeddings",
    "num_logits_to_keep",
    "pad_token_id",
    "problem_type",
    "tie_word_embeddings",
    "time_step_floor",
    "time_step_max",
    "time_step_min",
    "torch_dtype",
    "use_cache",
    "use_mamba_kernels",
    "use_mem_eff_path",
}
# Elements that are looked at in each array of a model.
_SAMPLES = 64


def write(
    path: str | os.PathLike[str], cache: Zamba2Cache, model: PretrainedModel, notes: Mapping[str, str] | None = None
) -> None:
    """`Zamba2Cache.save`; `notes` are more texts for the header."""
    path = Path(path).expanduser()
    # Before anything is computed: a cache of another shape would be refused by every later load.
    _check_shapes(cache, model)
    tokens = np.asarray(cache.slot_mask.sum(axis=1))
    arrays = dict(_arrays(cache.resize(max(int(tokens.max()), 1))))
    for name, array in arrays.items():
        if array.dtype not in safetensors.DTYPE_NAMES:
            raise ValueError(f"{name} is {array.dtype}, which the file has no name for; caches are of floating dtypes.")
    header = {
        **(notes or {}),
        "format": FORMAT,
        "rows": json.dumps({"tokens": tokens.tolist(), "next_position": np.asarray(cache.next_position).tolist()}),
        "model": json.dumps(identity(model)),
    }
    layout = {name: (np.dtype(array.dtype), array.shape) for name, array in arrays.items()}
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        safetensors.write_file(Path(temporary), layout, lambda name: np.asarray(arrays[name]), header)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(
    path: str | os.PathLike[str], model: PretrainedModel, max_length: int | None = None
) -> tuple[Zamba2Cache, dict[str, str]]:
    """`Zamba2Cache.load`; also returns the texts in the file's header."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; Zamba2Cache.save writes one.")
    tensors, faults = safetensors.read_header(path)
    if faults:
        raise ValueError(f"{path} cannot be read: {' '.join(faults)}")
    header = safetensors.read_metadata(path)
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no saved cache of this version: its format is {header.get('format')!r}, not {FORMAT!r}."
        )
    try:
        rows, theirs = json.loads(header["rows"]), json.loads(header["model"])
        tokens = np.asarray(rows["tokens"], np.int32)
        next_position = np.asarray(rows["next_position"], np.int32)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its header does not describe the cache ({error!r}).") from error
    difference = _difference(theirs, identity(model))
    if difference:
        raise ValueError(f"{path} is the cache of another model: {difference}.")

    filled = max(int(tokens.max()), 1)
    expected = jax.eval_shape(lambda: init_cache(model.config, len(tokens), filled, jnp.float32))
    for name, like in _arrays(expected):
        if name not in tensors or tensors[name].shape != like.shape or tensors[name].dtype is None:
            found = f"{tensors[name].dtype_name} {tensors[name].shape}" if name in tensors else "missing"
            raise ValueError(f"{path} is damaged: {name} is {found}, where {like.shape} floats belong.")

    def array(name: str) -> jax.Array:
        return jnp.asarray(tensors[name].read_rows(0, None))

    cache = Zamba2Cache(
        mamba=tuple(
            MambaState(**{field.name: array(f"mamba.{index}.{field.name}") for field in dataclasses.fields(MambaState)})
            for index in range(len(expected.mamba))
        ),
        attention=tuple(
            KeyValue(key=array(f"attention.{index}.key"), value=array(f"attention.{index}.value"))
            for index in range(len(expected.attention))
        ),
        slot_mask=jnp.asarray(np.arange(filled) < tokens[:, None]),
        length=jnp.asarray(tokens.max(), jnp.int32),
        next_position=jnp.asarray(next_position),
    )
    if max_length is not None and max_length != filled:
        cache = cache.resize(max_length)
    return cache, header


def identity(model: PretrainedModel) -> dict[str, Any]:
    """What tells a model from others that its caches would not fit: config and samples of the weights.

    The samples are rounded to bfloat16 first: a checkpoint of bfloat16 weights is the same model in float32. The head
    is left out, as no cache depends on it.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _IRRELEVANT}
    base = getattr(model, "model", model)
    flat = sorted((str(path), variable.get_value()) for path, variable in nnx.to_flat_state(nnx.state(base)))
    digest = hashlib.sha256()
    for (path, leaf), sample in zip(flat, _samples([leaf for _, leaf in flat]), strict=True):
        digest.update(f"{path} {leaf.shape}".encode())
        digest.update(np.asarray(sample).tobytes())
    return {"config": json.loads(json.dumps(config)), "weights": digest.hexdigest()[:16]}


@jax.jit
def _samples(leaves: list[jax.Array]) -> list[jax.Array]:
    """Some elements of every array, evenly spread; floating ones as bfloat16."""

    def sample(leaf: jax.Array) -> jax.Array:
        count = min(_SAMPLES, leaf.size)
        places = np.unravel_index(np.linspace(0, max(leaf.size - 1, 0), count).astype(np.int64), leaf.shape)
        values = leaf[places]
        return values.astype(jnp.bfloat16) if jnp.issubdtype(leaf.dtype, jnp.floating) else values

    return [sample(leaf) for leaf in leaves]


def _difference(theirs: Any, ours: dict[str, Any]) -> str | None:
    config, own = theirs.get("config", {}), ours["config"]
    fields = [
        f"{name} is {config.get(name)!r} there and {own.get(name)!r} here"
        for name in sorted(config.keys() | own.keys())
        if config.get(name) != own.get(name)
    ]
    if fields:
        return "; ".join(fields)
    if theirs.get("weights") != ours["weights"]:
        return f"the shape is the same, the weights are not (fingerprints {theirs.get('weights')}, {ours['weights']})"
    return None


def _arrays(cache: Zamba2Cache) -> list[tuple[str, Any]]:
    """The floating arrays under their names in the file."""
    parts = [(f"mamba.{index}", state) for index, state in enumerate(cache.mamba)]
    parts += [(f"attention.{index}", entry) for index, entry in enumerate(cache.attention)]
    return [
        (f"{name}.{field.name}", getattr(part, field.name))
        for name, part in parts
        for field in dataclasses.fields(part)
    ]


def _check_shapes(cache: Zamba2Cache, model: PretrainedModel) -> None:
    expected = jax.eval_shape(lambda: init_cache(model.config, cache.batch_size, cache.max_length, jnp.float32))
    ours, theirs = _arrays(expected), _arrays(cache)
    if [(name, array.shape) for name, array in ours] != [(name, array.shape) for name, array in theirs]:
        raise ValueError(
            f"the cache is not of this model: it has {len(cache.mamba)} layers and {len(cache.attention)} hybrid ones, "
            f"the model {len(expected.mamba)} and {len(expected.attention)}, or their sizes differ."
        )
