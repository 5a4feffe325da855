"""A run's directory: what it says about the run, and whether another command may go on with it.

run.json          the options that decide what is learned, and the model's config: a command that would learn
                  something else is refused
config.json, generation_config.json, tokenizer files: with them and `checkpoints` it loads as a checkpoint
checkpoints/      `train.checkpoints`
metrics.jsonl     a line per step; eval.jsonl and samples.jsonl, one per evaluation and sample
loss.png, tensorboard/, profile/
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from train.options import RunOptions, flag
from zamba2_jax import Zamba2Config
from zamba2_jax.checkpoint.files import RUN

# What may change from one start of a run to the next: how long it is, how it is spread and split, and what is seen of
# it. `decay_steps` belongs to the length.
_FREE = {
    "steps",
    "decay_steps",
    "output",
    "mesh",
    "coordinator_address",
    "num_processes",
    "process_id",
    "join_timeout",
    "accumulate",
    "gradient_checkpointing",
    "scan_layers",
    "max_bad_steps",
    "save_every",
    "keep_last",
    "keep_best",
    "eval_data",
    "eval_every",
    "eval_batches",
    "log_every",
    "progress",
    "tensorboard",
    "profile_steps",
    "sample_every",
    "sample_prompts",
    "sample_tokens",
    "sample_temperature",
    "data_cache",
}


def describe(options: RunOptions, config: Zamba2Config, data: str | None) -> dict[str, Any]:
    """What run.json holds.

    Args:
        data: what tells the content of the data from that of other data, if it is known.
    """
    kept = {
        field.name: _plain(getattr(options, field.name))
        for field in dataclasses.fields(options)
        if field.name not in _FREE
    }
    if options.warmup_steps is None:
        kept["warmup_steps"] = options.resolved_warmup_steps
    return {"command": options.command, "options": kept, "config": config.to_dict(), "data_fingerprint": data}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def check_directory(directory: Path, description: Mapping[str, Any], warmup_is_default: bool) -> bool:
    """Whether `directory` holds this very run, begun before; False if it is new or empty.

    Args:
        warmup_is_default: the number of warmup steps follows from `steps`, and what was settled first stays.

    Raises:
        ValueError: it holds another run, or something else; names the differences.
    """
    if not directory.is_dir() or not any(directory.iterdir()):
        return False
    path = directory / RUN
    if not path.is_file():
        names = ", ".join(sorted(entry.name for entry in directory.iterdir())[:5])
        raise ValueError(f"--output {directory} holds files that are no run ({names}); give a new or empty directory.")
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); give another --output.") from error
    # As JSON, in which a key of a dictionary is a text, for one.
    now = json.loads(json.dumps(description))
    differences = []
    if before["command"] != now["command"]:
        differences.append(f"it is a {before['command']} run, not {now['command']}")
    for name in sorted(before["options"].keys() | now["options"].keys()):
        if name == "warmup_steps" and warmup_is_default:
            continue
        old, new = before["options"].get(name), now["options"].get(name)
        if old != new:
            differences.append(f"{flag(name)} was {_shown(old)} and is now {_shown(new)}")
    for name in sorted(before["config"].keys() | now["config"].keys()):
        old, new = before["config"].get(name), now["config"].get(name)
        if old != new:
            differences.append(f"the model's {name} was {_shown(old)} and is now {_shown(new)}")
    if before["data_fingerprint"] != now["data_fingerprint"]:
        differences.append("the content of --data has changed")
    if differences:
        shown = "\n  ".join(differences)
        raise ValueError(
            f"--output {directory} holds another run:\n  {shown}\nGive another --output, or the options it began with."
        )
    return True


def settled_warmup(directory: Path) -> int:
    """The warmup steps that a run began with."""
    return json.loads((directory / RUN).read_text(encoding="utf-8"))["options"]["warmup_steps"]


def begin(directory: Path, description: Mapping[str, Any], config: Zamba2Config, tokenizer: Any | None) -> None:
    """Makes the directory of a new run: run.json last, whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    temporary = directory / f".{RUN}.writing"
    temporary.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, directory / RUN)


def wait_for_all(stage: str) -> None:
    """Until every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(stage)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 100 else text[:100] + "..."
