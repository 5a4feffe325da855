"""RMSNorm of a gated value, by groups of channels: what follows the state-space recurrence in Mamba2."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from zamba2_jax.ops._checks import check_choice, check_floating, check_shape
from zamba2_jax.ops._mesh import on_each_device
from zamba2_jax.ops._platform import fused_gpu_obstacle
from zamba2_jax.ops.gate import Gate
from zamba2_jax.sharding import BATCH_AXES, RULES, automatic_axes, dividing

Implementation = Literal["xla", "pallas_gpu"]
IMPLEMENTATIONS = ("xla", "pallas_gpu")


@functools.partial(jax.jit, static_argnames=("groups", "eps", "implementation", "interpret"))
def gated_rms_norm(
    y: jax.Array,
    gate: jax.Array | Gate,
    scale: jax.Array,
    *,
    groups: int = 1,
    eps: float = 1e-5,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> jax.Array:
    """u = y · silu(gate), each group of channels divided by its root mean square, times scale.

    Mamba2: arXiv 2405.21060, section 7. Float32 inside; rounded to y.dtype before the scale, as the checkpoints were
    trained.

    Args:
      y: (b, l, e), floating.
      gate: (b, l, e), floating; or a `Gate`, whose z the kernel reads where it lies.
      scale: (e,).
      groups: number of groups, a divisor of e.
      eps: added to the mean square.
      implementation: "xla", or "pallas_gpu", one kernel each way. None takes the kernel on GPUs of compute capability
        9.0 and newer where it can serve, else xla.
      interpret: for tests: run the kernel's body in plain JAX, on any device, slowly.

    Returns:
      (b, l, e) in y.dtype.

    Raises:
      ValueError: a shape, dtype or name that does not fit, naming the argument; or a kernel that cannot serve.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if y.ndim != 3:
        raise ValueError(f"y has shape {y.shape}; it must be (b, l, e)")
    batch, _, channels = y.shape
    if isinstance(gate, Gate):
        check_shape("gate.zx", gate.zx, (*y.shape[:2], 2, channels), "(b, l, 2, e)")
    else:
        check_shape("gate", gate, y.shape, "the shape of y, (b, l, e)")
    check_shape("scale", scale, (channels,), "(e,)")
    for name, array in {"y": y, "gate": gate.zx if isinstance(gate, Gate) else gate, "scale": scale}.items():
        check_floating(name, array)
    if groups < 1 or channels % groups:
        raise ValueError(f"groups is {groups}; it must divide the {channels} channels of y")

    obstacle = _kernel_obstacle(channels, groups, interpret)
    if implementation == "pallas_gpu" and obstacle is not None:
        raise ValueError(f"implementation 'pallas_gpu' cannot serve: {obstacle}")
    if implementation == "xla" or obstacle is not None:
        return _xla(y, gate.z if isinstance(gate, Gate) else gate, scale, groups, eps)

    # Imported here: of use on a GPU only.
    from zamba2_jax.ops import gated_norm_gpu

    rows = dividing(BATCH_AXES, automatic_axes(), batch)
    split = _split(channels, groups)
    options = gated_norm_gpu.Options(
        groups=groups // (automatic_axes()[split] if split else 1),
        eps=eps,
        fills_gradient=not (isinstance(gate, Gate) and gate.shares_gradient),
        interpret=interpret,
    )
    spec = gate_spec = PartitionSpec(rows, None, split)
    if isinstance(gate, Gate):
        gate, gate_spec = gate.zx, PartitionSpec(rows, None, None, split)

    def local(y, gate, scale):
        tokens = y.shape[0] * y.shape[1]
        out = gated_norm_gpu.normalise(y.reshape(tokens, -1), gate.reshape(tokens, *gate.shape[2:]), scale, options)
        return out.reshape(y.shape)

    return on_each_device(local, (y, gate, scale), (spec, gate_spec, PartitionSpec(split)), spec)


def _kernel_obstacle(channels: int, groups: int, interpret: bool) -> str | None:
    from zamba2_jax.ops.gated_norm_gpu import LARGEST_GROUP

    if not interpret and (reason := fused_gpu_obstacle()) is not None:
        return reason
    if channels // groups > LARGEST_GROUP:
        return f"a group has {channels // groups} channels; it takes up to {LARGEST_GROUP}"
    parts = automatic_axes().get(RULES["mamba_inner"], 1)
    if parts > 1 and _split(channels, groups) is None:
        return f"{parts} devices share {groups} group(s), whose mean the kernel takes on one"
    return None


def _split(channels: int, groups: int) -> str | None:
    """The mesh axis that channels are split over: groups stay whole."""
    axis = RULES["mamba_inner"]
    parts = automatic_axes().get(axis, 1)
    return axis if parts > 1 and groups % parts == 0 else None


def _xla(y: jax.Array, gate: jax.Array, scale: jax.Array, groups: int, eps: float) -> jax.Array:
    gated = y.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
    grouped = gated.reshape(*gated.shape[:-1], groups, -1)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(grouped), axis=-1, keepdims=True) + eps)
    return (grouped * inverse).reshape(gated.shape).astype(y.dtype) * scale.astype(y.dtype)
