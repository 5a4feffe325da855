"""RMSNorm over the last axis."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from zamba2_jax.ops._checks import check_choice, check_floating, check_shape
from zamba2_jax.ops._mesh import on_each_device
from zamba2_jax.ops._platform import fused_gpu_obstacle
from zamba2_jax.sharding import BATCH_AXES, automatic_axes, dividing, length_axis

Implementation = Literal["xla", "pallas_gpu"]
IMPLEMENTATIONS = ("xla", "pallas_gpu")


@functools.partial(jax.jit, static_argnames=("eps", "dtype", "hand_on", "implementation", "interpret"))
def rms_norm(
    x: jax.Array,
    scale: jax.Array,
    *,
    eps: float,
    dtype: jax.typing.DTypeLike | None = None,
    beside: jax.Array | None = None,
    hand_on: bool = False,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """x / rms(x) · scale (arXiv 1910.07467), in float32 and rounded before the scale, as the checkpoints were trained.

    Args:
      x: (..., d), floating; (b, l, d) for the kernel.
      scale: (d,), or as many as x and `beside` have together.
      eps: added to the mean square.
      dtype: of the result; None is x's.
      beside: (..., d') or None: more features, behind those of x, as if both were one array. Where the kernel serves,
        nobody puts them together.
      hand_on: return x too, for where it goes on beside its norm, as a residual stream does: the gradient of whoever
        reads it from here is then added to the norm's in the pass that makes that. Not with `beside`.
      implementation: of the backward pass: "xla", two passes over the data, or "pallas_gpu", one kernel. None takes the
        kernel on GPUs of compute capability 9.0 and newer where it can serve, else xla. The forward pass is XLA's, one
        kernel, in either case, but with `beside` on such a GPU.
      interpret: for tests: run the kernel's body in plain JAX, on any device, slowly.

    Returns:
      x's shape in dtype, with the features of `beside`; with `hand_on`, a pair of that and x.

    Raises:
      ValueError: a shape, dtype or name that does not fit, naming the argument; or a kernel that cannot serve.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if x.ndim == 0:
        raise ValueError("x has shape (); it must be (..., d)")
    parts = [x] if beside is None else [x, beside]
    features = sum(part.shape[-1] for part in parts)
    if beside is not None:
        check_shape("beside", beside, (*x.shape[:-1], *beside.shape[-1:]), "x's but for the last axis")
        check_floating("beside", beside)
        if hand_on:
            raise ValueError("hand_on is True with beside; x is handed on by itself")
    check_shape("scale", scale, (features,), "(d,)")
    for name, array in {"x": x, "scale": scale}.items():
        check_floating(name, array)
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    of_tokens, obstacle = PartitionSpec(), f"x has shape {x.shape}; it takes (b, l, d)"
    if x.ndim == 3:
        of_tokens = PartitionSpec(dividing(BATCH_AXES, automatic_axes(), x.shape[0]), length_axis(x.shape[1]))
        obstacle = _kernel_obstacle(features, of_tokens, interpret)
    if implementation == "pallas_gpu" and obstacle is not None:
        raise ValueError(f"implementation 'pallas_gpu' cannot serve: {obstacle}")
    if implementation == "xla" or obstacle is not None:
        out = _forward(jnp.concatenate(parts, axis=-1), scale, eps, dtype)
        return (out, x) if hand_on else out

    def local(scale, *parts):
        return _with_kernel(parts, scale, eps, dtype, hand_on, interpret)

    out_specs = (of_tokens, of_tokens) if hand_on else of_tokens
    return on_each_device(local, (scale, *parts), (PartitionSpec(), *(of_tokens for _ in parts)), out_specs)


def _forward(x: jax.Array, scale: jax.Array, eps: float, dtype: jnp.dtype) -> jax.Array:
    wide = x.astype(jnp.float32)
    normalised = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return normalised.astype(dtype) * scale.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _with_kernel(parts, scale, eps, dtype, hand_on, interpret):
    if len(parts) > 1:
        from zamba2_jax.ops import rms_norm_gpu

        rows = [part.reshape(-1, part.shape[-1]) for part in parts]
        out = rms_norm_gpu.forward(rows, scale, eps=eps, dtype=dtype, interpret=interpret)
        return out.reshape(*parts[0].shape[:-1], -1)
    out = _forward(parts[0], scale, eps, dtype)
    return (out, parts[0]) if hand_on else out


def _with_kernel_forward(parts, scale, eps, dtype, hand_on, interpret):
    return _with_kernel(parts, scale, eps, dtype, hand_on, interpret), (parts, scale)


def _with_kernel_backward(eps, dtype, hand_on, interpret, residuals, gradients):
    from zamba2_jax.ops import rms_norm_gpu

    parts, scale = residuals
    rows = [part.reshape(-1, part.shape[-1]) for part in parts]
    dout, *passed = (array.reshape(len(rows[0]), -1) for array in (gradients if hand_on else [gradients]))
    dparts, dscale = rms_norm_gpu.backward(rows, scale, dout, *passed, eps=eps, interpret=interpret)
    dparts = tuple(gradient.reshape(part.shape) for gradient, part in zip(dparts, parts, strict=True))
    return dparts, dscale.sum(axis=0).astype(scale.dtype)


_with_kernel.defvjp(_with_kernel_forward, _with_kernel_backward)


def _kernel_obstacle(features: int, of_tokens: PartitionSpec, interpret: bool) -> str | None:
    from zamba2_jax.ops.gated_norm_gpu import LARGEST_GROUP

    if not interpret and (reason := fused_gpu_obstacle()) is not None:
        return reason
    if features > LARGEST_GROUP:
        return f"x has {features} features; it takes up to {LARGEST_GROUP}"
    used = {axis for axes in of_tokens if axes for axis in ((axes,) if isinstance(axes, str) else axes)}
    if idle := [axis for axis, size in automatic_axes().items() if size > 1 and axis not in used]:
        # They would add up what each of them has whole.
        return f"devices along {', '.join(idle)} hold the same tokens"
    return None
