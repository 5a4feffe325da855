"""Kernel for GPUs: one token's convolution and time step, for as many rows as there are."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from zamba2_jax.ops.decode.launch_gpu import launch

# Channels, or heads, of one program.
CHANNELS = 256


@functools.partial(jax.jit, static_argnames=("offset", "limit", "interpret"))
def conv_step(
    x: jax.Array,
    bc: jax.Array,
    dt: jax.Array,
    conv_x: tuple[jax.Array, jax.Array | None],
    conv_bc: tuple[jax.Array, jax.Array | None],
    window_x: jax.Array,
    window_bc: jax.Array,
    dt_bias: jax.Array,
    keep: jax.Array | None,
    *,
    offset: int,
    limit: tuple[float, float] | None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """The convolutions of one token with SiLU, its time step, and the windows moved on in place; one launch.

    A program serves some channels of one row, or the row's time steps.

    Args:
      x: (b, offset + E or more), from `offset` on what is convolved. bc: (b, 2 G N). dt: (b, h).
      conv_x, conv_bc: kernels (k, E), (k, 2 G N), and biases or None.
      window_x, window_bc: (b, k-1, E), (b, k-1, 2 G N).
      dt_bias: (h,).
      keep: (b,) int32, 0 where a row's token is masked: its windows stay and its time step is 0. None: none is.
      limit: None, or the bounds of a time step.

    Returns:
      x (b, E) and B and C (b, 2 G N) in their dtypes, dt (b, h) float32, and the two windows.
    """
    rows, inner = window_x.shape[0], window_x.shape[2]
    both, heads = bc.shape[1], dt.shape[1]
    of_x, of_bc, of_dt = (pl.cdiv(width, CHANNELS) for width in (inner, both, heads))
    named = {
        "x": x,
        "bc": bc,
        "dt": dt,
        "kernel_x": conv_x[0],
        "kernel_bc": conv_bc[0],
        "window_x": window_x,
        "window_bc": window_bc,
        "dt_bias": dt_bias,
        "bias_x": conv_x[1],
        "bias_bc": conv_bc[1],
        "keep": keep,
    }
    named = {name: array for name, array in named.items() if array is not None}

    def mamba_conv_step(*refs):
        given = dict(zip(named, refs, strict=False))
        x_out, bc_out, dt_out, window_x_out, window_bc_out = refs[len(named) :]
        row, program = pl.program_id(0), pl.program_id(1)
        kept = plgpu.load(given["keep"].at[row]) != 0 if "keep" in given else None

        def columns(first, width):
            column = first * CHANNELS + jnp.arange(CHANNELS, dtype=jnp.int32)
            return column, column < width, jnp.minimum(column, width - 1)

        def convolve(first, name, offset, out, window_out):
            window, kernel = given[f"window_{name}"], given[f"kernel_{name}"]
            taps, width = window.shape[1:]
            column, inside, place = columns(first, width)
            inputs = [plgpu.load(window.at[row, tap, place]) for tap in range(taps)]
            inputs.append(plgpu.load(given[name].at[row, offset + place]).astype(window.dtype))
            total = jnp.zeros((CHANNELS,), jnp.float32)
            if f"bias_{name}" in given:
                total += plgpu.load(given[f"bias_{name}"].at[place]).astype(jnp.float32)
            for tap, reached in enumerate(inputs):
                weight = plgpu.load(kernel.at[tap, place]).astype(jnp.float32)
                total += weight * reached.astype(jnp.float32)
            plgpu.store(out.at[row, column], (total * jax.nn.sigmoid(total)).astype(out.dtype), mask=inside)
            moves = inside if kept is None else inside & kept
            for tap in range(taps):
                plgpu.store(window_out.at[row, tap, column], inputs[tap + 1], mask=moves)

        @pl.when(program < of_x)
        def _():
            convolve(program, "x", offset, x_out, window_x_out)

        @pl.when((program >= of_x) & (program < of_x + of_bc))
        def _():
            convolve(program - of_x, "bc", 0, bc_out, window_bc_out)

        @pl.when(program >= of_x + of_bc)
        def _():
            column, inside, place = columns(program - of_x - of_bc, heads)
            raw = plgpu.load(given["dt"].at[row, place]).astype(jnp.float32)
            raw += plgpu.load(given["dt_bias"].at[place]).astype(jnp.float32)
            step = jnp.maximum(raw, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(raw)))
            if limit is not None:
                step = jnp.clip(step, *limit)
            if kept is not None:
                step = jnp.where(kept, step, 0.0)
            plgpu.store(dt_out.at[row, column], step, mask=inside)

    outputs = [
        jax.ShapeDtypeStruct((rows, inner), x.dtype),
        jax.ShapeDtypeStruct((rows, both), bc.dtype),
        jax.ShapeDtypeStruct((rows, heads), jnp.float32),
        jax.ShapeDtypeStruct(window_x.shape, window_x.dtype),
        jax.ShapeDtypeStruct(window_bc.shape, window_bc.dtype),
    ]
    names = list(named)
    return tuple(
        launch(
            mamba_conv_step,
            "mamba_conv_step",
            (rows, of_x + of_bc + of_dt),
            list(named.values()),
            outputs,
            warps=2,
            in_place={names.index("window_x"): 3, names.index("window_bc"): 4},
            interpret=interpret,
        )
    )
