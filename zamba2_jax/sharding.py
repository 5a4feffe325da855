"""Where arrays live: the logical axes of this model, and the one table that maps them to the axes of a device mesh.

Layers name logical axes only (`nnx.Param(..., out_sharding=("embed", "mlp"))`); this module alone knows mesh axes.
Changing the strategy means changing `RULES`.
"""

from collections.abc import Mapping

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

# The rows of a batch are split over both: `fsdp` differs from `data` in what it does to parameters only.
BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axis. Heads, widths and vocabulary are split over `tensor`; the model width, which every matrix
# has on one side, over `fsdp`. What is not listed, or listed as None, is replicated.
RULES: Mapping[str, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "concat_embed": "fsdp",  # the shared block's input, [hidden, embedding]: twice the model width
    "mamba_inner": "tensor",
    "mamba_heads": "tensor",
    "mamba_groups": None,  # B and C of a group serve all its heads, on whatever device they are
    "q_heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "adapter_rank": None,
    "labels": None,
    "conv": None,
    "norm": None,
}


def partition_spec(axes: tuple[str | None, ...], mesh: Mesh) -> PartitionSpec:
    """The mesh axes of an array whose dimensions carry the logical names `axes`.

    Mesh axes that `mesh` does not have are left out: a mesh of `data` alone replicates every parameter.

    Raises:
        ValueError: a name that `RULES` does not know, or two dimensions that fall on the same mesh axis.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise ValueError(f"axes {axes} hold unknown logical names {unknown}; known: {', '.join(RULES)}.")
    physical = [None if axis is None else RULES[axis] for axis in axes]
    physical = [axis if axis in mesh.axis_names else None for axis in physical]
    used = [axis for axis in physical if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} map two dimensions to the same mesh axis {used}; change RULES.")
    return PartitionSpec(*physical)


def param_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    """A `NamedSharding` for each parameter of an (abstract) state, in the same tree.

    Args:
        state: `nnx.state(model, nnx.Param)` of a model, concrete or from `nnx.eval_shape`.
        mesh: its axes are a subset of `MESH_AXES`.

    Raises:
        ValueError: an axis of the mesh that is not ours, or a parameter dimension that the mesh does not divide (all
            are listed).
    """
    foreign = [axis for axis in mesh.axis_names if axis not in MESH_AXES]
    if foreign:
        raise ValueError(f"mesh has axes {foreign}; zamba2_jax knows {MESH_AXES}.")
    faults = []

    def sharding(path, param):
        spec = partition_spec(param.get_metadata("out_sharding"), mesh)
        shape = param.get_value().shape
        for size, logical, axis in zip(shape, param.get_metadata("out_sharding"), spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                name = ".".join(str(getattr(key, "key", key)) for key in path)
                faults.append(f"{name} {shape}: {logical}={size} does not divide by {axis}={mesh.shape[axis]}")
        return NamedSharding(mesh, spec)

    shardings = jax.tree_util.tree_map_with_path(sharding, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    if faults:
        raise ValueError("the mesh does not divide the model:\n  " + "\n  ".join(faults))
    return shardings
