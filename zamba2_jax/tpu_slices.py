"""TPU slices that are not there: their names, and how their compiler is reached from any machine.

The compiler is libtpu. It needs no TPU. One process at a time may use it, unless each has the environment of
`compiler_environment`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from zamba2_jax.compiled_program import refusal


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU chip.

    Attributes:
        device_kind: as JAX calls it.
        accelerator: a name of Google Cloud's that libtpu is content with; any of the same chip does.
        hbm_bytes: as the maker states it. A compiler keeps some of it: `usable_bytes`.
        axes: of a topology, 2 or 3.
        cores: that the names of slices count: "v5p-128" has 64 chips.
    """

    device_kind: str
    accelerator: str
    hbm_bytes: float
    axes: int
    cores: int


CHIPS = {
    "v5e": Chip("TPU v5 lite", "v5litepod-16", 16e9, 2, 1),
    "v5p": Chip("TPU v5", "v5p-32", 95e9, 3, 2),
    "v6e": Chip("TPU v6 lite", "v6e-16", 32e9, 2, 1),
}
# The usual shapes of slices, by their number of chips.
_PLANE = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips of one kind, connected.

    Attributes:
        topology: as libtpu spells it, "v5e:4x4".
        chip: a key of `CHIPS`.
        size: number of chips, which are JAX's devices.
    """

    topology: str
    chip: str
    size: int


def parse_slice(name: str) -> Slice:
    """The slice that `name` stands for: a topology such as "v5e:16x16" or "v5p:4x4x4", or the name that Google Cloud
    gives the slice, such as "v5e-256", "v5litepod-256" or "v5p-128" (which counts cores: 64 chips).

    Raises:
        ValueError: it is neither.
    """
    named = re.fullmatch(r"(v5e|v5litepod|v5p|v6e)-(\d+)", name)
    if named:
        chip = "v5e" if named[1] == "v5litepod" else named[1]
        chips, left = divmod(int(named[2]), CHIPS[chip].cores)
        shapes = _PLANE if CHIPS[chip].axes == 2 else _CUBE
        if left or chips not in shapes:
            sizes = ", ".join(f"{chip}-{count * CHIPS[chip].cores}" for count in shapes)
            raise ValueError(
                f"there is no slice {name}; there are {sizes}, and topologies such as {chip}:{shapes[16]}."
            )
        return Slice(f"{chip}:{shapes[chips]}", chip, chips)
    chip, _, shape = name.partition(":")
    if chip not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(
            f"there is no topology {name!r}; give one of {', '.join(CHIPS)} and its shape, such as v5e:16x16 or "
            "v5p:4x4x4, or a slice's name, such as v5e-256."
        )
    sizes = [int(size) for size in shape.split("x")]
    if len(sizes) != CHIPS[chip].axes:
        example = _PLANE[16] if CHIPS[chip].axes == 2 else _CUBE[16]
        raise ValueError(f"topology {name} has {len(sizes)} axes; those of {chip} have {CHIPS[chip].axes}: {example}.")
    if any(size % 2 for size in sizes[:2]):
        raise ValueError(f"topology {name}: a host has 2x2 chips, so the first two numbers must be even.")
    return Slice(name, chip, math.prod(sizes))


def check_compiler() -> None:
    """Raises ImportError, saying what to install, where libtpu is not."""
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "the compiler for TPUs, libtpu, is not installed here. It needs no TPU: pip install libtpu (Linux only)."
        )


def compiler_environment(chip: str) -> dict[str, str]:
    """What a process that is to compile for `chip` needs in its environment before it imports JAX."""
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": CHIPS[chip].accelerator,
        # libtpu's lock is there for the chips, and only the compiler is used.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


class CompilerBusyError(RuntimeError):
    """Another process uses libtpu."""


def devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a slice that is not there: programs can be compiled for them.

    Raises:
        CompilerBusyError, ImportError; ValueError: libtpu knows no such topology.
    """
    from jax.experimental import topologies

    check_compiler()
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # whatever libtpu says
        text = " ".join(str(error).split())
        if "lockfile" in text or "already in use" in text:
            raise CompilerBusyError(
                f"another process uses libtpu, and one at a time may: wait for it to end. libtpu says: {text}"
            ) from error
        raise ValueError(f"libtpu does not take the topology {topology}: {text}") from error


def usable_bytes(device: jax.Device) -> int | None:
    """How much of a chip's HBM a program may take, which is less than there is: libtpu says so when it refuses one,
    and so it is asked for the impossible. None if the answer is not understood."""
    mesh = Mesh(np.array([device]), ("x",))
    impossible = jax.ShapeDtypeStruct((1 << 40,), jnp.int8, sharding=NamedSharding(mesh, PartitionSpec()))
    try:
        jax.jit(lambda x: x + 1).lower(impossible).compile()
    except Exception as error:  # the answer
        found = refusal(str(error))
        return None if found is None else found.usable_bytes
    return None
