"""Writing a directory so that it is complete or not there."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import jax

from zamba2_jax.checkpoint.files import COMPANIONS, ORBAX

# What a save replaces. Weights of another form must go too, or a reader would find the old ones first.
_REPLACED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    ORBAX,
)
_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk is full: the quota is used up",
    errno.EFBIG: "the disk is full, or a file is larger than the file system or this process may write",
}
_HARMLESS = (*COMPANIONS, "additional_chat_templates", ".gitattributes", ".cache")


def check_destination(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """`path` as a directory that may be written.

    Allowed are a path that does not exist, an empty directory, and a directory that holds nothing but a checkpoint
    and its tokenizer, whose weights are then replaced. With `overwrite`, other files in it are no obstacle; they
    stay.

    Raises:
        ValueError: what stands in the way.
    """
    destination = Path(path).expanduser().resolve()
    if not destination.exists():
        return destination
    if not destination.is_dir():
        raise ValueError(f"{path} is a file; give a directory to write into.")
    foreign = sorted(
        entry.name
        for entry in destination.iterdir()
        if not any(fnmatch(entry.name, pattern) for pattern in (*_REPLACED, *_HARMLESS))
    )
    if foreign and not overwrite:
        shown = ", ".join(foreign[:5]) + (" ..." if len(foreign) > 5 else "")
        raise ValueError(
            f"{path} holds files that are no part of a checkpoint ({shown}); give another directory, or "
            "overwrite=True to write among them."
        )
    return destination


@contextlib.contextmanager
def writing(destination: Path) -> Iterator[Path]:
    """A new directory beside `destination` that takes its place when the block ends, or is removed when it fails.

    What a save does not replace (tokenizer files, a README) is kept. In a job of several processes all enter and
    leave together, and the first one makes and moves the directories.

    Raises:
        OSError: the disk is full or cannot be written; says where.
    """
    first = jax.process_index() == 0
    temporary = destination.with_name(f".{destination.name}.writing")
    if first:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir(parents=True)
    _wait_for_all("zamba2_jax: directory made")
    try:
        yield temporary
        _wait_for_all("zamba2_jax: checkpoint written")
        if first:
            _move_into_place(temporary, destination)
    except BaseException as error:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        reason = no_room(error)
        if reason is not None:
            raise OSError(
                _error_number(error), f"{reason}; nothing was left behind of the checkpoint for {destination}"
            ) from error
        raise
    _wait_for_all("zamba2_jax: checkpoint in place")


def no_room(error: BaseException) -> str | None:
    """Why there was no room for what was written, in words; None if the failure is another one."""
    return _NO_ROOM.get(_error_number(error))


def _error_number(error: BaseException) -> int | None:
    """The system's number of a failure to write; tensorstore has it in the text of a ValueError."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"os_error_code='(\d+)'", str(error)) if isinstance(error, ValueError) else None
    return int(match[1]) if match else None


def _move_into_place(temporary: Path, destination: Path) -> None:
    old = destination.with_name(f".{destination.name}.replaced")
    if destination.exists():
        for entry in destination.iterdir():
            if any(fnmatch(entry.name, pattern) for pattern in _REPLACED) or (temporary / entry.name).exists():
                continue
            if entry.is_dir():
                shutil.copytree(entry, temporary / entry.name, symlinks=True, copy_function=_link)
            else:
                _link(entry, temporary / entry.name)
        shutil.rmtree(old, ignore_errors=True)
        destination.rename(old)
        try:
            temporary.rename(destination)
        except OSError:
            old.rename(destination)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(destination)


def _link(source: str | Path, target: str | Path) -> None:
    """A second name for the same file, or a copy where the file system has no such thing."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def copy_companions(source: Path | None, target: Path) -> None:
    """Copies tokenizer files and the like, where `source` has them."""
    if source is None:
        return
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                copy = target / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)  # through links: the hub's cache is made of them


def _wait_for_all(stage: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(stage)
