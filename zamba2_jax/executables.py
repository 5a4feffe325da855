"""Compiled programs kept on disk, and found there without being traced.

JAX's own compilation cache is asked after a program has been traced and lowered, which for tens of layers and their
kernels takes longer than all that follows. Where that cache is switched on (`jax_compilation_cache_dir`), the programs
of generation are also kept beside it, in a folder `zamba2_jax`, under a key of what determines them
(`zamba2_jax.program_key`), and the next process loads them. Where it is not, `jit_kept` is `jax.jit`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import logging
import os
import pickle
import stat
import sys
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from zamba2_jax import program_key
from zamba2_jax.program_key import NoKeyError

FOLDER = "zamba2_jax"

_FORMAT = b"zamba2_jax executable 2"
# Modules that, when they are imported, tell a backend in its environment how to set up their kernels. A program that
# was compiled with one of them is loaded with it.
_SETTING_UP = ("jax.experimental.mosaic.gpu",)
_log = logging.getLogger(__name__)


def jit_kept(
    function: Callable[..., Any],
    *,
    static_argnames: Sequence[str],
    jit: Callable[..., Any] = jax.jit,
    **options: Any,
) -> KeptProgram:
    """`jit(function, static_argnames=static_argnames, **options)`, whose programs are kept on disk if JAX's are.

    Results are the same, as is what becomes of donated arguments. Left to `jit`: calls inside a trace, programs of
    several processes, and whatever `program_key` cannot describe, such as a model with modules of somebody else's.

    Args:
        function: one of this package's, at the top level of its module.
        static_argnames: of arguments that make a program. Values that are not literals are described by
            `program_key.digest`.
        jit: `jax.jit` or one that takes what it takes.
    """
    if function.__module__.partition(".")[0] != __name__.partition(".")[0]:
        raise ValueError(f"jit_kept knows this package's sources alone, got {function}; use jax.jit.")
    return KeptProgram(function, functools.partial(jit, static_argnames=static_argnames, **options), static_argnames)


class KeptProgram:
    """What `jit_kept` makes: to be called as the function is."""

    def __init__(self, function: Callable[..., Any], jit: Callable[..., Any], static_argnames: Sequence[str]):
        functools.update_wrapper(self, function)
        self._jit = jit
        self._jitted = jit(function)
        self._static = tuple(static_argnames)
        self._places = [
            place for place, name in enumerate(inspect.signature(function).parameters) if name in self._static
        ]
        # By what calls have of types and static values: the program, None where it is left to jit. It holds no arrays.
        self._of_call: dict[Any, Callable[..., Any] | None] = {}
        self._latest: tuple[Any, Callable[..., Any] | None] = None, None
        self._of_key: dict[str, Callable[..., Any]] = {}
        program_key.clear_with_jax(self)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
            return self._jitted(*arguments, **named)
        traced = tuple([value for place, value in enumerate(arguments) if place not in self._places])
        traced_named = {name: value for name, value in named.items() if name not in self._static}
        static = (
            tuple([arguments[place] for place in self._places if place < len(arguments)]),
            tuple([(name, named[name]) for name in self._static if name in named]),
        )
        leaves, tree = jax.tree.flatten((traced, traced_named))
        call = static, tree, program_key.call_types(leaves), program_key.trace_context()
        latest, program = self._latest
        if call != latest:  # to compare is faster than to hash
            if call not in self._of_call:
                self._of_call[call] = self._find(arguments, named, static, tree, leaves)
            program = self._of_call[call]
            self._latest = call, program
        if program is None:
            return self._jitted(*arguments, **named)
        try:
            return program(*traced, **traced_named)
        except (TypeError, ValueError):
            # Raised before anything runs, where arguments lie otherwise than those that the program was found for.
            other = self._find(arguments, named, static, tree, leaves)
            if other is program:
                raise
        return self._jitted(*arguments, **named) if other is None else other(*traced, **traced_named)

    def lower(self, *arguments: Any, **named: Any) -> jax.stages.Lowered:
        """As of `jax.jit`."""
        return self._jitted.lower(*arguments, **named)

    def cache_clear(self) -> None:
        """Forgets the programs in memory, as `jax.clear_caches()` asks of everyone."""
        self._of_call.clear()
        self._latest = None, None
        self._of_key.clear()

    def _cache_size(self) -> int:
        """Programs in memory, as of `jax.jit`."""
        return self._jitted._cache_size() + len(self._of_key)

    def _find(
        self,
        arguments: tuple[Any, ...],
        named: dict[str, Any],
        static: Any,
        tree: jax.tree_util.PyTreeDef,
        leaves: list[Any],
    ) -> Callable[..., Any] | None:
        """The program for a call: from memory, from disk, or compiled and then kept. None: it is left to jit."""
        try:
            folder = _folder()
            devices = program_key.devices_of(leaves)
            key = program_key.program_key(f"{self.__module__}.{self.__qualname__}", static, tree, leaves, devices)
            if key not in self._of_key:
                path = folder / f"{self.__name__}-{key}"
                self._of_key[key] = _read(path, key, devices) or self._compile(arguments, named, path, key)
        except NoKeyError as reason:
            _log.info("%s is left to jit: %s", self.__qualname__, reason)
            return None
        return self._of_key[key]

    def _compile(self, arguments: tuple[Any, ...], named: dict[str, Any], path: Path, key: str) -> jax.stages.Compiled:
        with _writing(path) as write:
            began = time.perf_counter()
            # JAX's own cache is not to serve this program: what was once loaded from there is not to be serialised
            # again (on CPUs it then lacks its functions). Nor is it to keep it too.
            lowered = self._jit(_renamed(self.__wrapped__, uuid.uuid4().hex[:8])).lower(*arguments, **named)
            with program_key.not_kept_by_jax():
                program = lowered.compile()
            if time.perf_counter() - began >= jax.config.jax_persistent_cache_min_compile_time_secs:
                write(_packed(program, key))
        return program


def _renamed(function: Callable[..., Any], suffix: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def renamed(*arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    renamed.__name__ += f"_{suffix}"
    return renamed


def _folder() -> Path:
    """
    Raises:
        NoKeyError: JAX's cache is no directory of this machine, or is to hold nothing, or others may write to ours.
    """
    directory = jax.config.jax_compilation_cache_dir
    if "://" in directory:
        raise NoKeyError(f"{directory} is no local directory")
    if jax.config.jax_compilation_cache_max_size == 0:
        raise NoKeyError("jax_compilation_cache_max_size is 0")
    folder = Path(directory) / FOLDER
    if hasattr(os, "getuid") and folder.exists():
        state = folder.stat()
        if state.st_uid != os.getuid() or state.st_mode & stat.S_IWOTH:
            # To load a program is to run it.
            raise NoKeyError(f"{folder} is another user's, or anyone may write to it")
    return folder


def _packed(program: jax.stages.Compiled, key: str) -> bytes:
    """A file's content. Where a backend cannot serialise the program it says so, for later processes not to try."""
    try:
        imported = [name for name in _SETTING_UP if name in sys.modules]
        body = zlib.compress(pickle.dumps((imported, serialize_executable.serialize(program))), level=1)
    except Exception as error:  # each backend has its own
        body = b""
        _complain(f"Compiled programs cannot be kept on {jax.devices()[0].device_kind}: {error}", error)
    return _header(key, body) + b"\n" + body


def _header(key: str, body: bytes) -> bytes:
    return b" ".join([_FORMAT, key.encode(), hashlib.sha256(body).hexdigest().encode()])


def _read(path: Path, key: str, devices: Sequence[jax.Device]) -> jax.stages.Compiled | None:
    """The program of a file, loaded onto the devices; None where there is none, or (with a warning) where it is of no
    use.

    Raises:
        NoKeyError: it cannot be serialised.
    """
    began = time.perf_counter()
    try:
        header, _, body = path.read_bytes().partition(b"\n")
        if header != _header(key, body):
            raise ValueError("it is damaged, or another program's")
        if body:
            imported, parts = pickle.loads(zlib.decompress(body))
            for name in imported:
                importlib.import_module(name)
            program = serialize_executable.deserialize_and_load(
                *parts, backend=devices[0].client, execution_devices=devices
            )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # whatever is wrong with a file: a program can be compiled
        _complain(f"The compiled program {path} cannot be used, and is compiled anew: {error}", error)
        return None
    if not body:
        raise NoKeyError(f"it could not be serialised ({path})")
    if jax.config.jax_compilation_cache_max_size > 0:
        with contextlib.suppress(OSError):
            os.utime(path)
    _log.info("loaded %s in %.2f s", path, time.perf_counter() - began)
    return program


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A function that makes a file, which is there whole or not at all.

    Raises:
        NoKeyError: it cannot be made; with a warning.
    """
    partial = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    limit = jax.config.jax_compilation_cache_max_size

    def write(content: bytes) -> None:
        try:
            partial.write_bytes(content)
            partial.replace(path)
            if limit > 0:
                _make_room(path.parent, limit)
        except OSError as error:
            _complain(f"Compiled programs cannot be kept in {path.parent}: {error.strerror}", error)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        _complain(f"Compiled programs cannot be kept in {path.parent}: {error.strerror}", error)
        raise NoKeyError(f"{path.parent} cannot be written") from error
    try:
        yield write
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _make_room(folder: Path, limit: int) -> None:
    """Removes the programs that were longest not used, until the folder holds at most `limit` bytes."""
    states = {}
    for path in folder.iterdir():
        if not path.name.startswith("."):  # nor what is being written
            with contextlib.suppress(FileNotFoundError):
                states[path] = path.stat()
    held = sum(state.st_size for state in states.values())
    for path, state in sorted(states.items(), key=lambda item: item[1].st_mtime_ns):
        if held <= limit:
            return
        path.unlink(missing_ok=True)
        held -= state.st_size


_COMPLAINTS: set[str] = set()


def _complain(text: str, error: Exception) -> None:
    """Warns once of each thing; raises where JAX is told to for its own cache."""
    if jax.config.jax_raise_persistent_cache_errors:
        raise error
    if text not in _COMPLAINTS:
        _COMPLAINTS.add(text)
        warnings.warn(text, stacklevel=2)
