"""Where arrays live: the logical axes of this model, and the one table that maps them to the axes of a device mesh.

Layers name logical axes only (`nnx.Param(..., out_sharding=("embed", "mlp"))`, `constrain(x, "batch", "length",
None)`); this module alone knows mesh axes. Changing the strategy means changing `RULES`.

What the four axes do:

    data      rows of a batch are split over it, parameters are not
    fsdp      rows are split over it, and parameters: each matrix is gathered where it is used, its gradient
              scattered again
    tensor    heads, widths and vocabulary are split over it, of parameters and of what they make
    sequence  the tokens of a row are split over it; parameters as over fsdp
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from zamba2_jax.config import Zamba2Config

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

# Parameters are stored in parts over these and used whole: a product gathers its matrix first.
STORAGE_AXES = ("fsdp", "sequence")

# Logical axis -> mesh axes. What is None is replicated.
RULES: Mapping[str, str | tuple[str, ...] | None] = {
    # Of parameters and of activations. The model width, which every matrix has on one side, is what is stored in parts.
    "vocab": "tensor",
    "embed": STORAGE_AXES,
    "concat_embed": STORAGE_AXES,  # the shared block's input, [hidden, embedding]: twice the model width
    "mamba_inner": "tensor",
    "mamba_heads": "tensor",
    "mamba_groups": None,  # B and C of a group serve all its heads, on whatever device they are
    "q_heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "adapter_rank": None,
    # An adapter's second matrix has no side of the model's width.
    "q_heads_of_adapter": ("tensor", *STORAGE_AXES),
    "kv_heads_of_adapter": ("tensor", *STORAGE_AXES),
    "mlp_of_adapter": ("tensor", *STORAGE_AXES),
    "labels": None,
    "conv": None,
    "norm": None,
    # Of activations alone.
    "batch": ("data", "fsdp"),  # fsdp differs from data in what it does to parameters only
    "length": "sequence",
    # Of the vectors that a look-up in the embedding makes, while they lie where the embedding's columns do.
    "lookup_batch": "data",
    "lookup_width": "fsdp",
}

BATCH_AXES = RULES["batch"]
LENGTH_AXIS = RULES["length"]


def make_mesh(axes: str | Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with all of `MESH_AXES`.

    Args:
        axes: "auto", all devices on fsdp; or sizes by name, such as "data=2,fsdp=4": what is not named has size 1. A
            `Mesh` is taken as it is, but for axis types: the compiler is to choose shardings (`AxisType.Auto`).
        devices: None is all of `jax.devices()`.

    Raises:
        ValueError: an axis that there is not, a size that is none, or sizes that do not multiply to the number of
            devices.
    """
    if isinstance(axes, Mesh):
        _check_axis_names(axes)
        return Mesh(axes.devices, axes.axis_names, axis_types=(AxisType.Auto,) * len(axes.axis_names))
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(axes, len(devices))
    return jax.make_mesh(
        tuple(sizes.values()), MESH_AXES, devices=devices, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def mesh_sizes(axes: str, count: int) -> dict[str, int]:
    """The sizes of all `MESH_AXES` that `axes` means for `count` devices; errors as of `make_mesh`."""
    sizes = dict.fromkeys(MESH_AXES, 1)
    if axes.strip() == "auto":
        sizes["fsdp"] = count
    else:
        sizes |= _parse_axes(axes)
    if math.prod(sizes.values()) != count:
        product = " * ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "1"
        raise ValueError(
            f"mesh {axes!r} is for {math.prod(sizes.values())} devices ({product}), and there are {count}; make "
            f'the sizes multiply to {count}, or use "auto".'
        )
    return sizes


def _parse_axes(axes: str) -> dict[str, int]:
    example = 'such as "data=2,fsdp=4"'
    sizes = {}
    for part in filter(None, (part.strip() for part in axes.split(","))):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        if name not in MESH_AXES:
            raise ValueError(
                f'mesh {axes!r} names an axis {name!r}; there are {", ".join(MESH_AXES)}, {example}, and "auto".'
            )
        if name in sizes:
            raise ValueError(f"mesh {axes!r} names the axis {name} twice.")
        if not equals or not size.isascii() or not size.lstrip("-").isdigit():
            raise ValueError(f"mesh {axes!r} gives {name} the size {size!r}; it must be an integer, {example}.")
        if int(size) < 1:
            raise ValueError(f"mesh {axes!r} gives {name} the size {size}; it must be at least 1.")
        sizes[name] = int(size)
    return sizes


def check_mesh(config: Zamba2Config, mesh: Mesh, *, batch_size: int | None = None, seq_len: int | None = None) -> None:
    """Refuses a mesh that does not divide the model, or the batches that it is to be trained with.

    Args:
        config: the model's.
        mesh: its axes are a subset of `MESH_AXES`.
        batch_size: rows of all devices together; None leaves them out.
        seq_len: tokens of a row; None leaves them out.

    Raises:
        ValueError: naming each axis and what it does not divide.
    """
    _check_axis_names(mesh)
    faults = []

    def divide(logical: str, size: int, what: str) -> None:
        axes = [axis for axis in _mesh_axes(logical) if mesh.shape.get(axis, 1) > 1]
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            named = " * ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
            faults.append(f"{named} does not divide {what}, {size}")

    divide("mamba_heads", config.n_mamba_heads, "n_mamba_heads")
    if config.num_hybrid_layers:
        divide("q_heads", config.num_attention_heads, "num_attention_heads")
        divide("kv_heads", config.num_key_value_heads, "num_key_value_heads")
        divide("mlp", config.intermediate_size, "intermediate_size")
        if config.use_shared_attention_adapter:
            divide("q_heads_of_adapter", config.attention_hidden_size, "the width of attention")
        divide("mlp_of_adapter", config.intermediate_size, "intermediate_size")
    divide("vocab", config.vocab_size, "vocab_size")
    divide("embed", config.hidden_size, "hidden_size")
    if batch_size is not None:
        divide("batch", batch_size, "the rows of a batch")
    if seq_len is not None:
        divide("length", seq_len, "the tokens of a row")
        parts = mesh.shape.get(LENGTH_AXIS, 1)
        if parts > 1 and seq_len // parts < config.mamba_d_conv - 1:
            faults.append(
                f"{LENGTH_AXIS}={parts} leaves {seq_len // parts} of a row's {seq_len} tokens to a device; the "
                f"convolution reaches back {config.mamba_d_conv - 1}, which one neighbour must hold"
            )
    if faults:
        raise ValueError("the mesh does not fit:\n  " + "\n  ".join(faults))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of (b, l) arrays, such as token ids: rows over data and fsdp, a row's tokens over sequence."""
    return NamedSharding(mesh, partition_spec(("batch", "length"), mesh))


def partition_spec(axes: tuple[str | None, ...], mesh: Mesh) -> PartitionSpec:
    """The mesh axes of an array whose dimensions carry the logical names `axes`.

    Mesh axes that `mesh` does not have are left out: a mesh of `data` alone replicates every parameter.

    Raises:
        ValueError: a name that `RULES` does not know, or two dimensions that fall on the same mesh axis.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise ValueError(f"axes {axes} hold unknown logical names {unknown}; known: {', '.join(RULES)}.")
    physical = [tuple(axis for axis in _mesh_axes(name) if axis in mesh.axis_names) for name in axes]
    used = [axis for dimension in physical for axis in dimension]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} map two dimensions to the same mesh axis {used}; change RULES.")
    return PartitionSpec(*map(_entry, physical))


def param_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    """A `NamedSharding` for each parameter of an (abstract) state, in the same tree.

    Args:
        state: `nnx.state(model, nnx.Param)` of a model, concrete or from `nnx.eval_shape`.
        mesh: its axes are a subset of `MESH_AXES`.

    Raises:
        ValueError: an axis of the mesh that is not ours, or a parameter dimension that the mesh does not divide (all
            are listed).
    """
    _check_axis_names(mesh)
    faults = []

    def sharding(path, param):
        spec = partition_spec(param.get_metadata("out_sharding"), mesh)
        shape = param.get_value().shape
        for size, logical, entry in zip(shape, param.get_metadata("out_sharding"), spec, strict=True):
            axes = _axes_of(entry)
            if size % math.prod(mesh.shape[axis] for axis in axes):
                name = ".".join(str(getattr(key, "key", key)) for key in path)
                named = " * ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
                faults.append(f"{name} {shape}: {logical}={size} does not divide by {named}")
        return NamedSharding(mesh, spec)

    shardings = jax.tree_util.tree_map_with_path(sharding, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    if faults:
        raise ValueError("the mesh does not divide the model:\n  " + "\n  ".join(faults))
    return shardings


def abstract_params(state: nnx.State, mesh: Mesh) -> nnx.State:
    """The state with a `jax.ShapeDtypeStruct` that says where it lies for each parameter: what a program is compiled
    for ahead of time. Arguments and errors as of `param_shardings`."""

    def abstract(sharding, param):
        value = param.get_value()
        return param.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))

    return jax.tree.map(abstract, param_shardings(state, mesh), state)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` itself, which on the mesh in use (`jax.set_mesh`) is to lie where its logical axes say.

    Without a mesh of several devices this is nothing. A mesh axis that does not divide a dimension is left out of it,
    as is one that a surrounding `shard_map` has taken.
    """
    sizes = automatic_axes()
    if all(size == 1 for size in sizes.values()):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec_in_use(x.shape, axes)))


def constrain_whole(tree: Any) -> Any:
    """The arrays of `tree`, each of which every device of the mesh in use is to have all of."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), tree)


def constrain_gathered(weight: jax.Array, *axes: str | None) -> jax.Array:
    """The same for a parameter, or a cast of one, about to be used: whole along the axes that it is stored in parts
    of."""
    if stored_whole():
        return weight
    stored = spec_in_use(weight.shape, axes)
    whole = (tuple(axis for axis in entry if axis not in STORAGE_AXES) for entry in stored)
    return jax.lax.with_sharding_constraint(weight, PartitionSpec(*whole))


def storage_axes() -> tuple[str, ...]:
    """The axes of the mesh in use over which parameters are stored in parts."""
    sizes = automatic_axes()
    return tuple(axis for axis in STORAGE_AXES if sizes.get(axis, 1) > 1)


def stored_whole() -> bool:
    """Whether on the mesh in use every device has all of a parameter, or all of its part by heads, widths and
    vocabulary."""
    return not storage_axes()


def spec_in_use(shape: Sequence[int], axes: Sequence[str | None]) -> list[tuple[str, ...]]:
    """For each dimension of an array, the axes of the mesh in use that split it: those of its logical axis, as far as
    they divide it and are larger than 1."""
    sizes = {axis: size for axis, size in automatic_axes().items() if size > 1}
    return [dividing(_mesh_axes(name), sizes, size) or () for size, name in zip(shape, axes, strict=True)]


def length_axis(length: int) -> str | None:
    """The mesh axis that the `length` tokens of a row are spread over; None where each device has all of them."""
    parts = automatic_axes().get(LENGTH_AXIS, 1)
    return LENGTH_AXIS if parts > 1 and length % parts == 0 else None


def length_parts(length: int) -> int:
    """Over how many devices the `length` tokens of a row are spread."""
    axis = length_axis(length)
    return 1 if axis is None else automatic_axes()[axis]


def mesh_of(arrays: Iterable[jax.Array]) -> Mesh | None:
    """The mesh of several devices that arrays, such as a model's, are spread over; None where there is none.

    Raises:
        ValueError: there are two.
    """
    found = [array.sharding.mesh for array in arrays if isinstance(array.sharding, NamedSharding)]
    meshes = dict.fromkeys(mesh for mesh in found if mesh.size > 1)
    if len(meshes) > 1:
        raise ValueError(f"the model's arrays lie on {len(meshes)} meshes, {list(meshes)}; put them on one.")
    return next(iter(meshes), None)


def generation_mesh(mesh: Mesh) -> Mesh:
    """The same devices with no axis for a row's tokens, which are made one after the other: those that would share a
    row do the same."""
    names = tuple("repeated" if name == LENGTH_AXIS else name for name in mesh.axis_names)
    return Mesh(mesh.devices, names, axis_types=(AxisType.Auto,) * len(names))


def automatic_axes() -> dict[str, int]:
    """Sizes of the axes of the mesh in use (`jax.set_mesh`) that the compiler partitions over; {} without a mesh.

    Inside somebody else's shard_map the axes it took are gone, and arrays are a device's own already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    }


def dividing(axes: Iterable[str], sizes: Mapping[str, int], length: int) -> tuple[str, ...] | None:
    """Those of `axes`, in order, whose product divides `length`. The others' devices repeat each other's work."""
    chosen, product = [], 1
    for axis in axes:
        if axis in sizes and length % (product * sizes[axis]) == 0:
            chosen.append(axis)
            product *= sizes[axis]
    return tuple(chosen) or None


def _mesh_axes(logical: str | None) -> tuple[str, ...]:
    return () if logical is None else _axes_of(RULES[logical])


def _axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """An entry of a PartitionSpec, in its plainest form."""
    if len(axes) > 1:
        return axes
    return axes[0] if axes else None


def _check_axis_names(mesh: Mesh) -> None:
    foreign = [axis for axis in mesh.axis_names if axis not in MESH_AXES]
    if foreign:
        raise ValueError(f"mesh has axes {foreign}; zamba2_jax knows {MESH_AXES}.")
