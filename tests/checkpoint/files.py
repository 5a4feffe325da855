"""Checkpoints on disk for these tests: written by transformers, then bent into the shapes that the world holds."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from bench.oracle import torch_config, torch_model

Tensors = dict[str, torch.Tensor]
_saved: dict[tuple, Path] = {}


def saved(root: Path, shape: str, kind: str = "Zamba2ForCausalLM", dtype: str = "float32", **changes: Any) -> Path:
    """A random model as transformers saves it; made once, not to be changed."""
    key = (shape, kind, dtype, repr(sorted(changes.items())))
    if key not in _saved:
        path = root / f"saved-{len(_saved)}"
        model = torch_model(torch_config(shape, **changes), kind).to(getattr(torch, dtype))
        share_blocks(model)
        model.save_pretrained(path)
        _saved[key] = path
    return _saved[key]


def share_blocks(model: torch.nn.Module) -> None:
    """Makes repeated blocks equal: transformers 5.23 does not tie them when tie_word_embeddings is false."""
    if model.config.tie_word_embeddings:
        return
    base = getattr(model, "model", model)
    hybrid = [layer for layer in base.layers if hasattr(layer, "shared_transformer")]
    blocks = model.config.num_mem_blocks
    for use, layer in enumerate(hybrid[blocks:], blocks):
        layer.shared_transformer = copy.deepcopy(hybrid[use % blocks].shared_transformer)


def read(directory: Path) -> Tensors:
    """The tensors of a directory, from one file or several."""
    tensors: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(file)
    return tensors


def write(directory: Path, like: Path, tensors: Tensors, **config_changes: Any) -> Path:
    """A directory with the config of `like` (changed; None removes a field) and these tensors."""
    directory.mkdir()
    config = json.loads((like / "config.json").read_text()) | config_changes
    config = {name: value for name, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    shutil.copy(like / "generation_config.json", directory)
    safetensors.torch.save_file({name: t.clone() for name, t in tensors.items()}, directory / "model.safetensors")
    return directory


def shard(source: Path, directory: Path, files: int = 3) -> tuple[Path, dict]:
    """`source` in several files with an index, which is returned."""
    directory.mkdir()
    shutil.copy(source / "config.json", directory)
    tensors = read(source)
    weight_map = {name: f"model-{n % files + 1:05d}-of-{files:05d}.safetensors" for n, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        part = {name: t for name, t in tensors.items() if weight_map[name] == file}
        safetensors.torch.save_file(part, directory / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory, index


def equal(one: Tensors, other: Tensors) -> bool:
    """Bit for bit, dtypes included."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and torch.equal(one[name].contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8))
        for name in one
    )
