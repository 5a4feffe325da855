"""The gated GELU of the shared blocks' MLP."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from zamba2_jax.ops._checks import check_choice, check_floating
from zamba2_jax.ops._mesh import on_each_device
from zamba2_jax.ops._platform import fused_gpu_obstacle
from zamba2_jax.sharding import BATCH_AXES, RULES, automatic_axes, dividing, length_axis

Implementation = Literal["xla", "pallas_gpu"]
IMPLEMENTATIONS = ("xla", "pallas_gpu")


@functools.partial(jax.jit, static_argnames=("implementation", "interpret"))
def gated_gelu(
    gate_up: jax.Array, *, implementation: Implementation | None = None, interpret: bool = False
) -> jax.Array:
    """gelu(gate) · up with gelu(x) = x Φ(x) (arXiv 1606.08415), in float32 and rounded once.

    The backward pass is left gate_up alone: it reads that anyway, and makes the activation again for less than reading
    it would take.

    Args:
      gate_up: (b, l, 2, f), floating; gate, then up.
      implementation: "xla", or "pallas_gpu", one kernel each way for 16 bits and f a multiple of 256. None takes the
        kernel on GPUs of compute capability 9.0 and newer where it can serve, else xla.
      interpret: for tests: run the kernel's body in plain JAX, on any device, slowly.

    Returns:
      (b, l, f) in gate_up's dtype.

    Raises:
      ValueError: a shape, dtype or name that does not fit, naming the argument; or a kernel that cannot serve.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if gate_up.ndim != 4 or gate_up.shape[2] != 2:
        raise ValueError(f"gate_up has shape {gate_up.shape}; it must be (b, l, 2, f)")
    check_floating("gate_up", gate_up)
    batch, length, _, features = gate_up.shape
    sizes = automatic_axes()
    split = dividing((RULES["mlp"],), sizes, features)
    parts = math.prod(sizes[axis] for axis in split or ())
    obstacle = _kernel_obstacle(gate_up.dtype, features // parts, interpret)
    if implementation == "pallas_gpu" and obstacle is not None:
        raise ValueError(f"implementation 'pallas_gpu' cannot serve: {obstacle}")
    if implementation == "xla" or obstacle is not None:
        return jax.checkpoint(_xla)(gate_up)

    # Imported here: of use on a GPU only.
    from zamba2_jax.ops import gated_gelu_gpu

    def local(gate_up):
        tokens = gate_up.reshape(-1, *gate_up.shape[2:])
        return gated_gelu_gpu.gated_gelu(tokens, interpret).reshape(*gate_up.shape[:2], -1)

    rows = dividing(BATCH_AXES, sizes, batch), length_axis(length)
    return on_each_device(local, (gate_up,), (PartitionSpec(*rows, None, split),), PartitionSpec(*rows, split))


def _kernel_obstacle(dtype: jnp.dtype, features: int, interpret: bool) -> str | None:
    """Of a device's share of the features."""
    from zamba2_jax.ops.gated_gelu_gpu import FEWEST_FEATURES

    if not interpret and (reason := fused_gpu_obstacle()) is not None:
        return reason
    if dtype.itemsize != 2:
        return f"gate_up has dtype {dtype}; it takes 16 bits"
    if features % FEWEST_FEATURES:
        return f"a device has {features} features; it takes multiples of {FEWEST_FEATURES}"
    return None


def split_gate_up(gate_up: jax.Array) -> tuple[jax.Array, jax.Array]:
    """gate and up (b, l, f) in float32. Split, whose gradient joins two halves; that of slices adds two paddings, each
    of whose elements XLA computes for both."""
    gate, up = jax.lax.split(gate_up.astype(jnp.float32), (1, 1), axis=2)
    return gate[:, :, 0], up[:, :, 0]


def _xla(gate_up: jax.Array) -> jax.Array:
    gate, up = split_gate_up(gate_up)
    if gate_up.dtype.itemsize == 2:
        # What does for results of 16 bits. The exact form takes erfc, good where the result is nearly zero, by three
        # series of which each element is given all: on an H100 that took longer than the memory.
        gelu = 0.5 * gate * (1.0 + jax.lax.erf(gate * 0.5**0.5))
    else:
        gelu = jax.nn.gelu(gate, approximate=False)
    return (gelu * up).astype(gate_up.dtype)
