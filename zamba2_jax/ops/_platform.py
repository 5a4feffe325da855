"""Where the program being traced will run."""

import jax


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu": the platform of the mesh in use, or where there is none, of JAX's default backend.

    The mesh comes first so that a program compiled ahead of time for an absent machine (a TPU topology, from a CPU) is
    given that machine's choices.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def compute_capability() -> float:
    """Returns that of the first GPU, such as 9.0; 0.0 where JAX's default backend is no NVIDIA GPU."""
    return float(getattr(jax.devices()[0], "compute_capability", 0))


def fused_gpu_obstacle() -> str | None:
    """Why the fused kernels for GPUs cannot run here, or None where they can: they are made for Hopper and newer."""
    if platform() != "gpu":
        return f"it needs a GPU, and this runs on {platform()}"
    if compute_capability() < 9.0:
        return f"it needs compute capability 9.0 or newer, and this GPU has {compute_capability()}"
    return None
