"""The name under which a compiled program is kept: a digest of everything that determines it, equal in every process.

A program is found under it without being traced. So whatever a trace or a compiler looks at must be in it: what cannot
be described is refused (`NoKeyError`), never left out.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import os
import re
import sys
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import config as jax_config
from jax._src import util as jax_util
from jax._src.lib import xla_client
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

_PACKAGE = __name__.partition(".")[0]
_IMPORTED_NS = time.time_ns()

# What is named by its module and name alone must come from the package, whose sources are digested, or from one whose
# version is in the key.
_VERSIONED = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes")
_DESCRIBED_BY_NAME = {_PACKAGE, *_VERSIONED, "builtins", "types", "functools", "collections"}
# Compilers and libraries that come as packages of their own. Backends tell their version, but not those of all parts.
_PLUGINS = (
    *(f"jax-{name}-{part}" for name in ("cuda12", "cuda13", "rocm7") for part in ("plugin", "pjrt")),
    *(f"nvidia-{name}{cuda}" for name in ("cublas", "cuda-nvcc", "cudnn") for cuda in ("", "-cu12", "-cu13")),
    "libtpu",
)
# JAX's own variables are among its settings.
_VARIABLES = ("XLA_", "LIBTPU_", "TF_XLA_", "TF_GPU_", "TF_CUDNN_", "TRITON_", "MOSAIC_", "PALLAS_")
# The last are set by JAX itself where Mosaic is imported, which one process may do before another.
_VARIABLES_OF_NO_EFFECT = (
    *("XLA_PYTHON_CLIENT_", "XLA_CLIENT_MEM_", "TRITON_CACHE_"),
    *("MOSAIC_GPU_CUDA_ROOT", "MOSAIC_GPU_RUNTIME_LIB_PATH", "MOSAIC_GPU_NVSHMEM_"),
)
_SETTINGS_OF_NO_EFFECT = re.compile(
    "jax_(compilation_cache|persistent_cache|raise_persistent_cache|explain_cache|logging|log_|debug_log|distributed"
    "|platforms$|platform_name$|[a-z]*_visible_devices$)"
)
# Set to anything but this, someone wants to see programs being traced or compiled, or that neither happens.
_SETTINGS_TO_OBEY = {
    "jax_check_tracer_leaks": False,
    "jax_compilation_cache_check_contents": False,
    "jax_compilation_cache_expect_pgle": False,
    "jax_debug_infs": False,
    "jax_debug_nans": False,
    "jax_disable_jit": False,
    "jax_dump_ir_to": "",
    "jax_enable_checks": False,
    "jax_enable_pgle": False,
    "jax_no_execution": False,
}


class NoKeyError(Exception):
    """A call whose program is left to jit; says why."""


class Descriptions:
    """Text for values that are static in a trace: equal for equal values, different for different ones, and the same
    in every process, which `hash` and `pickle` are not."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, str]] = {}

    def of(self, value: Any) -> str:
        """
        Raises:
            NoKeyError: a value, or a part of it, of a kind that is not known.
        """
        kind = type(value)
        if kind in _LITERALS:
            return f"{kind.__name__} {value!r}"
        known = self._known.get(id(value))
        if known is None:
            name, parts = _taker_apart(kind)(value)
            text = f"{name} [{', '.join(map(self.of, parts))}]"
            if len(text) > 100:
                text = hashlib.sha256(text.encode()).hexdigest()
            known = self._known[id(value)] = value, text  # with the value: another must not get its id
        return known[1]


_LITERALS = {type(None), bool, int, float, complex, str, bytes}


@functools.cache
def _taker_apart(kind: type) -> Callable[[Any], tuple[str, Iterable[Any]]]:
    """For the values of a type: a function that gives a name for it and a value's parts."""
    if issubclass(kind, type):
        return lambda value: (_importable(value), ())
    parts = next((parts for known, parts in _PARTS.items() if issubclass(kind, known)), None)
    if parts is None and hasattr(kind, "key_parts"):
        parts = kind.key_parts
    if parts is None and dataclasses.is_dataclass(kind):
        parts = _fields
    if parts is not None:
        name = _importable(np.dtype if issubclass(kind, np.dtype) else kind)  # each dtype is of a type of its own
        return lambda value: (name, parts(value))
    if issubclass(kind, Callable):
        return lambda value: (_importable(value), ())
    raise NoKeyError(f"a {kind.__module__}.{kind.__qualname__} is among what is static")


def _fields(value: Any) -> list[Any]:
    return [getattr(value, field.name) for field in dataclasses.fields(value)]


# In this order: an enum's member may be an integer, a named tuple is a tuple.
_PARTS: dict[type, Callable[[Any], Iterable[Any]]] = {
    enum.Enum: lambda value: [value.name],
    tuple: lambda value: value,
    list: lambda value: value,
    Mapping: lambda value: [part for item in value.items() for part in item],
    set: lambda value: sorted(map(Descriptions().of, value)),
    frozenset: lambda value: sorted(map(Descriptions().of, value)),
    jax.tree_util.PyTreeDef: lambda value: [value.node_data(), value.children()],
    np.dtype: lambda value: [value.name, value.str],
    np.generic: lambda value: [value.dtype, value.tobytes()],
    np.ndarray: lambda value: [value.dtype, value.shape, value.tobytes()],
    functools.partial: lambda value: [value.func, value.args, value.keywords],
    jax.Device: lambda value: [_device(value)],
    Mesh: lambda value: [value.axis_names, value.axis_types, value.devices.shape, *value.devices.flat],
    AbstractMesh: lambda value: [
        *(value.axis_names, value.axis_sizes, value.axis_types),
        repr(getattr(value, "abstract_device", None)),
    ],
    NamedSharding: lambda value: [value.mesh, value.spec, value.memory_kind],
    PartitionSpec: lambda value: [repr(value)],
}


def _importable(thing: Any) -> str:
    """Module and name of a type or a function that means the same wherever the versions are the same."""
    module, name = getattr(thing, "__module__", None) or "", getattr(thing, "__qualname__", "")
    if module == "builtins" and isinstance(thing, type):
        return name  # some, such as None's, have no name there
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if module.partition(".")[0] not in _DESCRIBED_BY_NAME or found is not thing:
        raise NoKeyError(f"{module}.{name or repr(thing)} is of no package whose version is known")
    return f"{module}.{name}"


def digest(value: Any) -> str:
    """
    Raises:
        NoKeyError: as of `Descriptions.of`.
    """
    return hashlib.sha256(Descriptions().of(value).encode()).hexdigest()


def program_key(
    name: str, static: Any, tree: jax.tree_util.PyTreeDef, leaves: Sequence[Any], devices: Sequence[jax.Device]
) -> str:
    """The key of a program, in hexadecimal digits.

    Args:
        name: of the function, which is the package's own.
        static: the values of its static arguments.
        tree, leaves: of the others.
        devices: what it will run on.

    Raises:
        NoKeyError: something has no description, or a setting asks for programs to be traced.
    """
    _check_sources()
    return digest(
        {
            "name": name,
            "static": static,
            "tree": tree,
            "arguments": [_argument(leaf) for leaf in leaves],
            "committed": any(isinstance(leaf, jax.Array) and leaf.committed for leaf in leaves),
            "settings": _settings(),
            "devices": [_device(device) for device in devices],
            "machine": _machine(devices[0]),
            "variables": _variables(),
            "versions": _versions(),
            "sources": _sources_digest(),
            "tables": _tables(),
        }
    )


def devices_of(leaves: Iterable[Any]) -> list[jax.Device]:
    """What jit would run a program of these arguments on.

    Raises:
        NoKeyError: they are no arrays, or lie in ways that are left to jit.
    """
    if jax.process_count() > 1:
        raise NoKeyError("there are several processes")
    found: dict[tuple[jax.Device, ...], None] = {}
    for leaf in leaves:
        if isinstance(leaf, jax.core.Tracer):
            raise NoKeyError("it is called inside a trace")
        if isinstance(leaf, jax.Array) and leaf.committed:
            if isinstance(leaf.sharding, NamedSharding):
                found[tuple(leaf.sharding.mesh.devices.flat)] = None
            elif isinstance(leaf.sharding, SingleDeviceSharding):
                found[tuple(leaf.sharding.device_set)] = None
            else:
                raise NoKeyError(f"an argument is laid out as {leaf.sharding}")
    if len(found) > 1:
        raise NoKeyError(f"its arguments lie on {list(found)}")
    if found:
        return list(*found)
    default = jax.config.jax_default_device
    return [default] if isinstance(default, jax.Device) else jax.local_devices(backend=default)[:1]


def call_types(leaves: list[Any]) -> tuple[Any, ...]:
    """Of a call's arguments: what tells its program from others in this process, but for devices and shardings, of
    which it has the first argument's only. Hashable, and made in microseconds for a model's hundreds of arrays."""
    types = tuple([getattr(leaf, "aval", None) for leaf in leaves])
    committed = tuple([getattr(leaf, "_committed", None) for leaf in leaves])
    # No arrays of JAX's:
    others = [leaf for leaf, known in zip(leaves, committed, strict=True) if known is None]
    described = tuple([(type(leaf), np.shape(leaf), getattr(leaf, "dtype", None)) for leaf in others])
    return types, committed, described, getattr(leaves[0], "sharding", None) if leaves else None


def trace_context() -> tuple[Any, ...]:
    """What settings and contexts do to a trace, as JAX's own caches tell. Hashable; means something in this process."""
    return jax_config.trace_context()


def not_kept_by_jax() -> contextlib.AbstractContextManager:
    """In it, this thread's programs are too quickly compiled for JAX's own cache."""
    return jax_config.persistent_cache_min_compile_time_secs(float("inf"))


def clear_with_jax(cache: Any) -> None:
    """Has `jax.clear_caches()` call `cache.cache_clear()` for as long as the cache lives."""
    jax_util.register_cache(cache, cache.__qualname__)


def _argument(leaf: Any) -> tuple[Any, ...]:
    """Of an array: what of it a program is made for, besides the devices."""
    kind = jax.typeof(leaf)
    if jax.dtypes.issubdtype(kind.dtype, jax.dtypes.extended):
        raise NoKeyError(f"an argument is of dtype {kind.dtype}")
    sharding = None
    if isinstance(leaf, jax.Array):
        [memory] = {device.default_memory().kind for device in leaf.sharding.device_set}
        if leaf.sharding.memory_kind not in (None, memory):
            raise NoKeyError(f"an argument lies in {leaf.sharding.memory_kind}")
        layout = leaf.format.layout  # a deleted array has none
        if layout is not None and layout.major_to_minor != tuple(range(leaf.ndim)):
            raise NoKeyError(f"an argument is laid out as {layout}")
        if leaf.committed and isinstance(leaf.sharding, NamedSharding):
            sharding = leaf.sharding
    return kind.shape, kind.dtype, kind.weak_type, sharding


def _settings() -> tuple[Any, ...]:
    settings = jax.config.values
    for name, usual in _SETTINGS_TO_OBEY.items():
        if settings.get(name, usual) != usual:
            raise NoKeyError(f"{name} is {settings[name]!r}")
    settings = {name: value for name, value in settings.items() if not _SETTINGS_OF_NO_EFFECT.match(name)}
    contexts = []
    for context in trace_context():
        if hasattr(context, "spmd_axis_names"):  # the axes of what surrounds the call
            if context.axis_sizes or context.spmd_axis_names:
                raise NoKeyError("a vmap or shard_map surrounds it")
        else:
            contexts.append(context)
    return settings, contexts


def _device(device: jax.Device) -> str:
    capability = getattr(device, "compute_capability", None)
    return f"{device.platform} {device.id} {device.device_kind} {capability}"


@functools.cache
def _machine(device: jax.Device) -> tuple[Any, ...]:
    """Of the device's backend, and of the one that the package asks about kernels (`ops/_platform.py`)."""
    backend, first = device.client, jax.devices()[0]
    try:
        topology = xla_client.get_topology_for_devices([device]).fingerprint()
    except jax.errors.JaxRuntimeError as error:
        if backend.platform == "cpu":  # where it alone says what instructions there are
            raise NoKeyError(f"the CPU does not describe itself ({error})") from error
        topology = None
    return (
        backend.platform,
        backend.platform_version,
        topology,
        jax.default_backend(),
        _device(first),
        sys.byteorder,
        xla_client.CompileOptions().SerializeAsString(),  # with XLA's flags as they were when it read them
    )


def _variables() -> list[tuple[str, str]]:
    variables = [
        (name, value)
        for name, value in os.environ.items()
        if name.startswith(_VARIABLES) and not name.startswith(_VARIABLES_OF_NO_EFFECT)
    ]
    return [*sorted(variables), *(("argument", word) for word in sys.argv if word.startswith("--xla"))]


@functools.cache
def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in (*_VERSIONED, *_PLUGINS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


# ---- the package itself ----


@functools.cache
def _sources() -> dict[str, bytes]:
    folder = Path(__file__).parent
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.py"))}


@functools.cache
def _sources_digest() -> str:
    return _digest_of(_sources())


def _digest_of(sources: Mapping[str, bytes]) -> str:
    text = hashlib.sha256()
    for path, source in sources.items():
        text.update(f"{path} {len(source)}\n".encode() + source)
    return text.hexdigest()


def _check_sources() -> None:
    """
    Raises:
        NoKeyError: the package is not, in this process, what its files say.
    """
    folder = Path(__file__).parent
    try:
        for path in _sources():
            state = (folder / path).stat()
            if max(state.st_mtime_ns, state.st_ctime_ns) > _IMPORTED_NS:
                raise NoKeyError(f"{folder / path} was written after it was imported")
    except OSError as error:
        raise NoKeyError(f"the package's files cannot be read ({error})") from error
    if Path(__file__).name not in _sources():
        raise NoKeyError(f"the package is no folder of sources ({folder})")
    replaced = _replaced()
    if replaced is not None:
        raise NoKeyError(f"{replaced} is not what its file says")


def _replaced() -> str | None:
    """A function or a constant of a loaded module that its file does not know: somebody set it at run time."""
    folder = Path(__file__).parent
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != _PACKAGE or not getattr(module, "__file__", None):
            continue
        for attribute, value in list(vars(module).items()):
            if _is_foreign(value):
                return f"{name}.{attribute}"
            if isinstance(value, type) and value.__module__ == name:
                for inner, method in list(vars(value).items()):
                    if _is_foreign(method):
                        return f"{name}.{attribute}.{inner}"
        path = Path(module.__file__)
        if not path.is_relative_to(folder) or path.relative_to(folder).as_posix() not in _sources():
            return f"the module {name}"
        for attribute, value in _constants(path.relative_to(folder).as_posix()).items():
            if getattr(module, attribute, None) != value:
                return f"{name}.{attribute}"
    return None


# What the package imports functions from, besides the standard library, of which one part makes stand-ins.
_IMPORTED_FROM = {*_DESCRIBED_BY_NAME, *sys.stdlib_module_names} - {"unittest"} | {
    *("huggingface_hub", "jaxtyping", "jinja2", "lm_eval", "optax", "orbax", "safetensors", "tensorstore"),
    *("tokenizers", "torch", "tqdm", "transformers"),
}


def _is_foreign(value: Any) -> bool:
    """Whether it is a callable, or wraps one, that neither the package nor what it imports from has made."""
    for _ in range(_MOST_WRAPPINGS):
        value = getattr(value, "__func__", getattr(value, "fget", value))
        if isinstance(value, types.FunctionType):
            home = value.__globals__.get("__name__") or ""
            if home.partition(".")[0] not in _IMPORTED_FROM and not home.startswith("namedtuple_"):
                return True
        elif callable(value) and type(value).__module__.partition(".")[0] not in _IMPORTED_FROM:
            return not isinstance(value, type)
        inner = getattr(value, "__wrapped__", None)
        if inner is None and isinstance(value, _WRAPPERS):
            inner = value.func
        if inner is None:
            return False
        value = inner
    return True


_MOST_WRAPPINGS = 8
_WRAPPERS = (functools.partial, functools.partialmethod, functools.cached_property)


def _tables() -> list[Any]:
    """Tables of the package that a trace reads and that a program may change, as they are now."""
    from zamba2_jax import layer_stack, sharding
    from zamba2_jax.layers import activations, decoding
    from zamba2_jax.ops.decode import products_gpu
    from zamba2_jax.ops.ssd import api

    return [
        sharding.RULES,
        activations.ACTIVATIONS,
        products_gpu.ACTIVATIONS,
        api.FUSED,
        layer_stack.CHECKPOINT_POLICIES,
        [decoding.TILING, decoding.WIDE, decoding.DEEP, decoding.INT8, decoding.INT4, decoding.SHALLOW],
    ]


_CONSTANT = re.compile(r"^([A-Z_][A-Z0-9_]*)(?:: [^=\n]+)? = ([^#\n]+)", re.MULTILINE)


@functools.cache
def _constants(path: str) -> dict[str, Any]:
    """Those of a file's constants that are numbers, texts or tuples and written on one line. What may be changed on
    purpose, a table that fills, say, is none."""
    constants = {}
    for name, text in _CONSTANT.findall(_sources()[path].decode()):
        with contextlib.suppress(ValueError, SyntaxError):
            constants[name] = ast.literal_eval(text.strip())
    return {name: value for name, value in constants.items() if isinstance(value, int | float | str | tuple)}
