"""What keeps the decode kernels from serving, whichever of them."""

from __future__ import annotations

from collections.abc import Iterable

import jax

from zamba2_jax.ops._platform import compute_capability, platform

# The first with bfloat16 and the wide asynchronous loads that Triton counts on.
OLDEST_GPU = 8.0


def no_single_gpu(interpret: bool = False, arrays: Iterable[jax.Array] = ()) -> str | None:
    """Set where the program does not run on one GPU that Triton serves; the interpreter runs anywhere.

    The program is on several devices where a mesh is in use, or where one of `arrays` lies on one: the latter shows
    under jit too, and without `jax.set_mesh`.
    """
    for mesh in (jax.sharding.get_abstract_mesh(), *(jax.typeof(array).sharding.mesh for array in arrays)):
        if not mesh.empty and mesh.size > 1:
            return f"the arrays are spread over {mesh.size} devices, and it runs on one"
    if interpret:
        return None
    if platform() != "gpu":
        return f"it needs a GPU, and this runs on {platform()}"
    if compute_capability() < OLDEST_GPU:
        return f"it needs an NVIDIA GPU of compute capability {OLDEST_GPU} or newer, and this is {compute_capability()}"
    return None
