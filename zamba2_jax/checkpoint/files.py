"""Finding a checkpoint's files: a directory or a hub repository, one file or many, safetensors or pickles."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from zamba2_jax.checkpoint.pickles import read_pickle
from zamba2_jax.checkpoint.safetensors import TensorInfo, read_header
from zamba2_jax.hub import as_path, hub_id

# Files that belong to a checkpoint besides its weights, carried along when one is converted.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*",
    "README*",
    "LICENSE*",
)
ORBAX = "params"
# A training run's directory (`train.run_directory`): what marks it, and where its checkpoints are.
RUN = "run.json"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
_SETTINGS = ("config.json", "generation_config.json")
_SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
_PICKLES = ("pytorch_model*.bin", "pytorch_model*.bin.index.json", "*.pt", "*.pth")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


def find_checkpoint(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The directory of a checkpoint, downloaded from the hub if it is not one on this machine; "demo" is shipped.

    Of a training run's directory it is the one of its last checkpoint, or of step N for RUN@N; config and tokenizer
    are in the run's own (`settings_directory`).

    Pickles are downloaded only from a repository without safetensors.

    Raises:
        FileNotFoundError: neither a directory nor a repository that can be reached; says which was tried.
        OSError: the download failed for another reason, such as a full disk.
        ValueError: a file instead of a directory.
    """
    path = as_path(name_or_path)
    if path.is_dir():
        return _step_of_run(path, None) if is_run(path) else path
    run, at, step = str(path).rpartition("@")
    if at and is_run(Path(run)):
        return _step_of_run(Path(run), step)
    if path.exists():
        raise ValueError(f"{name_or_path} is a file; give the directory with config.json and the weights.")
    name = hub_id(name_or_path)
    if name is None:
        raise FileNotFoundError(
            f"There is no directory {name_or_path}, and it is no hub id such as Zyphra/Zamba2-1.2B."
        )

    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    def download(patterns: tuple[str, ...]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=[*_SETTINGS, *COMPANIONS, *patterns],
            )
        )

    at = f" at revision {revision}" if revision else ""
    try:
        directory = download((*_SAFETENSORS, f"{ORBAX}/*"))
        if not any(directory.glob("*.safetensors")) and not is_orbax(directory):
            directory = download(_PICKLES)
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, ConnectionError) as error:
        where = "in the local cache" if local_files_only else "on the Hugging Face hub"
        raise FileNotFoundError(f"{name}{at} is neither a directory here nor to be had {where}: {error}") from error
    except OSError:
        raise  # this machine's: its own message says that, for one, the disk is full
    except Exception as error:  # those of the libraries that transfer the files have no common class
        raise OSError(f"{name}{at} could not be downloaded: {error}") from error
    return directory


def is_run(directory: Path) -> bool:
    """Whether `directory` is that of a training run of `python -m train`."""
    return (directory / RUN).is_file()


def settings_directory(directory: Path) -> Path:
    """Where config.json and the tokenizer of a checkpoint in `directory` are: there, or in the directory of its run."""
    run = directory.parent.parent
    return run if directory.parent.name == CHECKPOINTS and is_run(run) else directory


def _step_of_run(run: Path, step: str | None) -> Path:
    """The directory of a complete checkpoint: an unfinished one has no plain number for a name."""
    steps = sorted(int(path.name) for path in (run / CHECKPOINTS).glob("*") if path.name.isdigit())
    if not steps:
        raise FileNotFoundError(f"The run in {run} has not saved a checkpoint yet.")
    if step is None:
        return _whole_model(run / CHECKPOINTS / str(steps[-1]))
    if not step.isdigit() or int(step) not in steps:
        raise FileNotFoundError(
            f"{run}@{step}: the run has no such checkpoint; its steps: {', '.join(map(str, steps))}."
        )
    return _whole_model(run / CHECKPOINTS / str(int(step)))


def _whole_model(directory: Path) -> Path:
    """`directory`, if it holds a model and not a LoRA alone."""
    if not is_orbax(directory):
        run = directory.parent.parent
        raise ValueError(
            f"The run in {run} trained a LoRA: load the model that it began with and then its {ADAPTER} directory, "
            "with load_lora; python -m convert to-hf merges the two."
        )
    return directory


def is_orbax(directory: Path) -> bool:
    """Whether `directory` is a checkpoint that `save_orbax` finished."""
    return (directory / ORBAX / "_METADATA").is_file()


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.name} in {path.parent}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where an object belongs.")
    return content


def generation_settings(directory: Path) -> dict | None:
    """generation_config.json, or None if there is none."""
    path = directory / "generation_config.json"
    return read_json(path) if path.is_file() else None


@dataclass
class TensorFiles:
    """The tensors of a Hugging Face checkpoint, as its files' headers describe them; no tensor has been read.

    Attributes:
        directory: of the files.
        tensors: by name.
        faults: everything wrong with the files themselves.
        lost: names that an index puts into files that are absent or unreadable; the fault of the file says so once
            for all of them.
    """

    directory: Path
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)


def open_tensors(directory: Path) -> TensorFiles:
    """Opens the weights in `directory`: transformers' names first, then whatever safetensors, then pickles there are.

    Raises:
        FileNotFoundError: there are no weights.
        ImportError: they are pickles and torch is not installed.
    """
    for single, read in (("model.safetensors", read_header), ("pytorch_model.bin", read_pickle)):
        if (directory / single).is_file():
            return _open(directory, [single], read)
        index = directory / f"{single}.index.json"
        if index.is_file():
            return _open_indexed(directory, index, read)
    for patterns, read in ((("*.safetensors",), read_header), (("*.bin", "*.pt", "*.pth"), read_pickle)):
        names = sorted(path.name for pattern in patterns for path in directory.glob(pattern))
        if names:
            found = _open(directory, names, read)
            found.faults += _missing_shards(names)
            return found
    raise FileNotFoundError(
        f"There are no weights in {directory}: neither *.safetensors, nor PyTorch's *.bin or *.pt, nor {ORBAX}/ "
        "of zamba2_jax."
    )


Reader = Callable[[Path], tuple[dict[str, TensorInfo], list[str]]]


def _open(directory: Path, names: list[str], read: Reader) -> TensorFiles:
    found = TensorFiles(directory)
    for name in names:
        tensors, faults = read(directory / name)
        found.faults += faults
        for tensor, info in tensors.items():
            if tensor in found.tensors:
                found.faults.append(f"{tensor}: is in two files, {found.tensors[tensor].file} and {name}.")
            else:
                found.tensors[tensor] = info
    return found


def _open_indexed(directory: Path, index: Path, read: Reader) -> TensorFiles:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map.")
    faults, present = [], []
    lost = {tensor for tensor, name in weight_map.items() if not isinstance(name, str)}
    if lost:
        shown = ", ".join(sorted(lost)[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        faults.append(f"{index.name}: its weight_map has no file name for {shown}.")
    names = sorted({name for name in weight_map.values() if isinstance(name, str)})
    for name in names:
        # An index comes from elsewhere; it may only name files beside it.
        if Path(name).name != name:
            faults.append(f"{index.name}: names {name}, which is not a file beside it.")
        elif not (directory / name).is_file():
            count = sum(file == name for file in weight_map.values())
            faults.append(f"{index.name}: names {name}, which is not there ({count} of its tensors are missing).")
        else:
            present.append(name)
    found = _open(directory, present, read)
    readable = {info.file for info in found.tensors.values()}
    for tensor, name in weight_map.items():
        if tensor in found.tensors:
            continue
        if tensor not in lost and name in readable:
            faults.append(f"{tensor}: {index.name} puts it into {name}, which does not hold it.")
        found.lost.add(tensor)
    for tensor, info in found.tensors.items():
        if tensor not in weight_map:
            faults.append(f"{tensor}: is in {info.file}, but not in {index.name}.")
    found.faults = faults + found.faults
    return found


def _missing_shards(names: list[str]) -> list[str]:
    """Of files numbered 00001-of-00003 without an index, those that are not there."""
    faults = []
    for name in names:
        match = _SHARD.fullmatch(name)
        if match is None:
            continue
        stem, _, count, suffix = match.groups()
        wanted = [f"{stem}-{number:05d}-of-{count}{suffix}" for number in range(1, int(count) + 1)]
        faults += [f"{other}: is not there, though {name} is." for other in wanted if other not in names]
    return sorted(set(faults))
