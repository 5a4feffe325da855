"""Tokenised documents on disk: made once for a content, a tokenizer and options, then mapped into memory."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
from filelock import FileLock
from jaxtyping import Bool, Int, UInt
from transformers import PreTrainedTokenizerBase

from train.data.records import Reading
from train.data.sources import Source
from train.data.tokenizing import encode_records, largest_id, progress_bar, unique_suffix

_VERSION = 1  # of what the files hold: counted up when the same input would give other tokens
_HASH_BYTES = 1 << 22
_ABANDONED = 3600.0  # seconds after which nobody is still writing


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """The documents of a source, end to end.

    Attributes:
        tokens: (all tokens,) uint16 or uint32, mapped from the file.
        counted: (all tokens,), whether each counts in the loss; None: all do.
        lengths: (documents,) int32, at least 1.
        fingerprint: of content, tokenizer and options.
    """

    tokens: UInt[np.ndarray, " tokens"]
    counted: Bool[np.ndarray, " tokens"] | None
    lengths: Int[np.ndarray, " documents"]
    fingerprint: str


def default_cache_dir() -> Path:
    """`zamba2_jax/data` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zamba2_jax" / "data"


def open_tokens(
    source: Source,
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_field: str,
    vocab_size: int,
    cache_dir: Path,
    progress: bool | None,
) -> TokenCache:
    """The tokens of a source, from the cache if they are there.

    Several processes may call this at once on one disk: one tokenises, the others wait for it.

    Raises:
        ValueError: a record that does not do, with its place; no document; an id that is not below `vocab_size`.
        OSError: the cache cannot be written.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    options = {
        "version": _VERSION,
        "kind": source.kind,
        "format": reading.format,
        "text_field": text_field if reading.format == "text" and source.kind != "text" else None,
        "tokenizer": None if reading.format == "tokens" else tokenizer_fingerprint(tokenizer),
        "content": _content_digest(source, cache_dir, progress),
    }
    fingerprint = _digest(json.dumps(options, sort_keys=True).encode())
    directory = cache_dir / fingerprint
    if not directory.exists():
        with FileLock(f"{directory}.lock"):
            if not directory.exists():
                _remove_abandoned(directory)
                _write(source, reading, tokenizer, text_field, directory, progress)
    return _open(directory, source, vocab_size)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of everything that decides what tokens a text becomes."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Set by the last call, not by the tokenizer; the calls here set their own.
    backend.pop("truncation", None)
    backend.pop("padding", None)
    whole = [backend, tokenizer.special_tokens_map, tokenizer.eos_token_id, tokenizer.chat_template]
    return _digest(json.dumps(whole, sort_keys=True, default=str).encode())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


# ---- what the content is


def _content_digest(source: Source, cache_dir: Path, progress: bool | None) -> str:
    """Of the bytes of all files, in their order. Remembered for as long as paths, sizes and times stay the same: a run
    that resumes does not read everything again."""
    stats = []
    for file in source.files:
        stat = file.stat()
        stats.append((str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    memory = cache_dir / "digests" / _digest(json.dumps(stats).encode())
    with contextlib.suppress(FileNotFoundError):
        return memory.read_text()
    whole = hashlib.blake2b(digest_size=16)
    with progress_bar(f"reading {source.name}", sum(size for _, size, *_ in stats), "B", progress) as bar:
        for file, (_, size, *_) in zip(source.files, stats, strict=True):
            whole.update(size.to_bytes(8, "little"))
            with file.open("rb") as content:
                while block := content.read(_HASH_BYTES):
                    whole.update(block)
                    bar.update(len(block))
    digest = whole.hexdigest()
    memory.parent.mkdir(exist_ok=True)
    temporary = memory.with_name(f"{memory.name}.{unique_suffix()}")
    temporary.write_text(digest)
    temporary.replace(memory)
    return digest


# ---- writing


def _write(
    source: Source,
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase,
    text_field: str,
    directory: Path,
    progress: bool | None,
) -> None:
    """Fills a directory beside `directory` and gives it its name when it is complete."""
    temporary = directory.with_name(f"{directory.name}.writing-{unique_suffix()}")
    temporary.mkdir()
    try:
        _write_files(source, reading, tokenizer, text_field, temporary, progress)
        temporary.rename(directory)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and directory.exists():
            return  # another process was there first, on a disk whose locks do not hold
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno, f"the disk is full: {source.name} cannot be tokenised into {directory.parent}"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(
    source: Source,
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase,
    text_field: str,
    directory: Path,
    progress: bool | None,
) -> None:
    documents = tokens = counted_tokens = largest = 0
    # Half the space where every id of the tokenizer fits.
    small = reading.format != "tokens" and largest_id(tokenizer) < 1 << 16
    dtype = "<u2" if small else "<u4"
    may_be_masked = reading.format != "text"
    described = "reading" if reading.format == "tokens" else "tokenising"
    with (
        (directory / "tokens").open("wb") as token_file,
        (directory / "counted").open("wb") as counted_file,
        (directory / "lengths").open("wb") as length_file,
    ):
        for ids, counted in encode_records(
            reading, tokenizer, text_field=text_field, description=f"{described} {source.name}", progress=progress
        ):
            token_file.write(ids.astype(dtype).tobytes())
            length_file.write(np.array(len(ids), "<i4").tobytes())
            if may_be_masked:
                counted_file.write((np.ones(len(ids), bool) if counted is None else counted).tobytes())
            documents += 1
            tokens += len(ids)
            counted_tokens += len(ids) if counted is None else int(counted.sum())
            largest = max(largest, int(ids.max()))
    if not documents:
        raise ValueError(f"{source.name} holds no document with any content.")
    if counted_tokens == tokens:
        (directory / "counted").unlink()
    meta = {
        "documents": documents,
        "tokens": tokens,
        "counted_tokens": counted_tokens,
        "largest_id": largest,
        "dtype": dtype,
    }
    (directory / "meta.json").write_text(json.dumps(meta))


def _remove_abandoned(directory: Path) -> None:
    """Removes what killed processes left. Where locks do not hold, a living one may be writing: it is spared."""
    for leftover in directory.parent.glob(f"{directory.name}.writing-*"):
        with contextlib.suppress(OSError):
            newest = max(entry.stat().st_mtime for entry in (leftover, *leftover.iterdir()))
            if time.time() - newest > _ABANDONED:
                shutil.rmtree(leftover, ignore_errors=True)


# ---- reading


def _open(directory: Path, source: Source, vocab_size: int) -> TokenCache:
    meta = json.loads((directory / "meta.json").read_text())
    if meta["largest_id"] >= vocab_size:
        raise ValueError(
            f"{source.name} holds the token id {meta['largest_id']}, but the model's vocabulary has {vocab_size}: "
            "it was made by a tokenizer whose vocabulary does not fit the model."
        )
    masked = meta["counted_tokens"] < meta["tokens"]
    sizes = {"tokens": np.dtype(meta["dtype"]).itemsize * meta["tokens"], "lengths": 4 * meta["documents"]}
    sizes |= {"counted": meta["tokens"]} if masked else {}
    for name, size in sizes.items():
        if not (directory / name).is_file() or (directory / name).stat().st_size != size:
            raise ValueError(f"the token cache {directory} is damaged ({name}); delete it and start again.")
    return TokenCache(
        tokens=np.memmap(directory / "tokens", meta["dtype"], "r"),
        counted=np.memmap(directory / "counted", bool, "r") if masked else None,
        lengths=np.fromfile(directory / "lengths", "<i4"),
        fingerprint=directory.name,
    )
