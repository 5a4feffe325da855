"""Kernels for GPUs: products of up to `MAX_ROWS` rows that stream each weight once.

A weight of few columns (an output projection) is cut along its depth too, or it would occupy a quarter of the card. Its
products then are sums that `join` adds up, together with what else happens to them.

The functions are jitted so that a model that calls one of them for each of its layers compiles one kernel, not one per
layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from zamba2_jax.ops.decode.strips_gpu import Norm, Tiling, columns_of, product

# The code of a kernel grows with the rows, and Triton's time to compile faster still: seconds for one row, minutes for
# eight. More rows are XLA's.
MAX_ROWS = 1
# Strips that occupy a large card once.
_PROGRAMS = 256
TILING = Tiling()
# Weights of fewer columns are a small part of a launch: narrow strips, so that they are done when the others are.
_NARROW = 1024


def depth_splits(depth: int, columns: int, tiling: Tiling, multiple_of: int = 1) -> int:
    """Into how many pieces a weight (depth, columns) is cut along its depth: a power of two times `multiple_of`."""
    splits = multiple_of
    while splits * pl.cdiv(columns, tiling.columns) < _PROGRAMS and depth % (2 * splits * tiling.depth) == 0:
        splits *= 2
    return splits


def _narrow(tiling: Tiling) -> Tiling:
    return dataclasses.replace(tiling, columns=16, fold=2, turns=1)


@functools.partial(jax.jit, static_argnames=("eps", "tiling", "interpret"))
def skinny_matmul(
    x: jax.Array,
    weights: Sequence[jax.Array],
    scale: jax.Array | None = None,
    *,
    eps: float | None = None,
    tiling: Tiling = TILING,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """norm(x) W for each of the weights; one launch.

    Args:
      x: (b, K). weights: (K, N_j) each.
      scale, eps: of the norm; None for none.

    Returns:
      (b, N_j) each, in x's dtype.
    """
    rows, dtype = x.shape[0], x.dtype
    widths = [weight.shape[1] for weight in weights]
    tilings = [tiling if width >= _NARROW else _narrow(tiling) for width in widths]
    programs = [pl.cdiv(width, tiling.columns) for width, tiling in zip(widths, tilings, strict=True)]
    operands = [x, *weights] + ([] if scale is None else [scale])

    def kernel(x_in, *refs):
        outputs = refs[len(operands) - 1 :]
        norm = None if scale is None else Norm(refs[len(weights)], eps)
        program = pl.program_id(0)
        before = 0
        for weight, output, count, tiling in zip(refs, outputs, programs, tilings, strict=False):

            def strip(weight=weight, output=output, before=before, tiling=tiling):
                first = (program - before) * tiling.columns
                store_row_vectors(output, first, product(x_in, weight, first, tiling, norm=norm))

            if len(weights) == 1:
                strip()
            else:
                pl.when((program >= before) & (program < before + count))(strip)
            before += count

    outputs = [jax.ShapeDtypeStruct((rows, width), dtype) for width in widths]
    return tuple(_call(kernel, "skinny_matmul", (sum(programs),), operands, outputs, tiling, interpret))


@functools.partial(jax.jit, static_argnames=("splits", "tiling", "interpret"))
def split_matmul(
    x: jax.Array,
    weight: jax.Array,
    scale: jax.Array | None = None,
    *,
    splits: int,
    tiling: Tiling = TILING,
    interpret: bool = False,
) -> jax.Array:
    """The product (x · scale) W in `splits` pieces along its depth, to be added by `join`: (splits, b, N) float32.

    Args:
      x: (b, K). weight: (K, N). scale: (K,) or None. splits divides K.
    """
    rows, depth = x.shape
    width = weight.shape[1]
    length = depth // splits
    operands = [x, weight] + ([] if scale is None else [scale])

    def kernel(x_in, weight_in, *refs):
        norm = None if scale is None else Norm(refs[0], None)
        first, piece = pl.program_id(0) * tiling.columns, pl.program_id(1)
        values = product(x_in, weight_in, first, tiling, norm=norm, start=piece * length, length=length)
        store_row_vectors(refs[-1], first, values, piece)

    outputs = [jax.ShapeDtypeStruct((splits, rows, width), jnp.float32)]
    grid = (pl.cdiv(width, tiling.columns), splits)
    return _call(kernel, "split_matmul", grid, operands, outputs, tiling, interpret)[0]


@functools.partial(jax.jit, static_argnames=("groups", "eps", "dtype", "interpret"))
def join(
    pieces: jax.Array,
    gated: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    groups: int = 1,
    eps: float = 0.0,
    dtype: jax.typing.DTypeLike,
    interpret: bool = False,
) -> jax.Array:
    """Adds the pieces of `split_matmul`, finishes a norm, adds the residual.

    Args:
      pieces: (splits, b, N) float32.
      gated: (b, K), what was multiplied: its RMSNorm by `groups` equal groups is completed with `eps`; `splits` is a
        multiple of groups. None for no norm.
      residual: (b, N) or None.

    Returns:
      (b, N) in `dtype`. The sum is rounded to it before the residual is added, as the plain form does.
    """
    splits, rows, width = pieces.shape
    columns = min(512, pl.next_power_of_2(width))
    operands = [array for array in (pieces, gated, residual) if array is not None]

    def kernel(*refs):
        row, first = pl.program_id(0), pl.program_id(1) * columns
        column, inside = columns_of(first, columns, width)
        values = [plgpu.load(refs[0].at[piece, row, column]) for piece in range(splits)]
        of_residual = None if residual is None else plgpu.load(refs[len(operands) - 1].at[row, column])
        if gated is not None:
            factors = _norm_factors(refs[1], row, groups, eps)
            values = [value * factors[piece * groups // splits] for piece, value in enumerate(values)]
        total = sum(values[1:], values[0]).astype(dtype)
        if of_residual is not None:
            total = total + of_residual.astype(dtype)
        plgpu.store(refs[-1].at[row, first + jnp.arange(columns, dtype=jnp.int32)], total, mask=inside)

    grid = (rows, pl.cdiv(width, columns))
    outputs = [jax.ShapeDtypeStruct((rows, width), dtype)]
    return _call(kernel, "join", grid, operands, outputs, Tiling(warps=4), interpret)[0]


def _norm_factors(gated, row, groups, eps):
    width = gated.shape[1] // groups
    size = pl.next_power_of_2(width)
    place = jnp.arange(size, dtype=jnp.int32)
    factors = []
    for group in range(groups):
        x = plgpu.load(gated.at[row, group * width + jnp.minimum(place, width - 1)]).astype(jnp.float32)
        squares = jnp.where(place < width, x * x, 0.0)
        factors.append(jax.lax.rsqrt(squares.sum(axis=0) / width + eps))
    return factors


@functools.partial(jax.jit, static_argnames=("eps", "limit", "tiling", "interpret"))
def mamba_projections(
    x: jax.Array,
    scale: jax.Array,
    zx: jax.Array,
    bc: jax.Array,
    dt: jax.Array,
    conv_x: tuple[jax.Array, jax.Array | None],
    conv_bc: tuple[jax.Array, jax.Array | None],
    window_x: jax.Array,
    window_bc: jax.Array,
    dt_bias: jax.Array,
    keep: jax.Array | None,
    *,
    eps: float,
    limit: tuple[float, float] | None,
    tiling: Tiling = TILING,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Norm, projections, convolution and time step of one token; one launch.

    Programs for z, x, B and C, and dt. Those of convolved columns own them in the window too, for all rows, and move it
    on in place.

    Args:
      x: (b, d). scale: (d,), of the norm.
      zx: (d, 2 E). bc: (d, 2 G N). dt: (d, h).
      conv_x, conv_bc: kernels (k, E), (k, 2 G N), and biases or None.
      window_x, window_bc: (b, k-1, E), (b, k-1, 2 G N).
      dt_bias: (h,).
      keep: (b,) int32, 0 where a row's token is masked: its windows stay and its time step is 0. None: none is.

    Returns:
      z (b, E), x (b, E), B and C (b, 2 G N), dt (b, h) float32, and the two windows.
    """
    rows = x.shape[0]
    inner, both, heads = zx.shape[1] // 2, bc.shape[1], dt.shape[1]
    columns, narrow = tiling.columns, _narrow(tiling)
    # z and x are one weight, and a strip must not reach from one into the other.
    of_half, of_bc, of_dt = pl.cdiv(inner, columns), pl.cdiv(both, narrow.columns), pl.cdiv(heads, narrow.columns)
    of_zx = 2 * of_half
    optional = {"bias_x": conv_x[1], "bias_bc": conv_bc[1], "keep": keep}
    named = {
        "x": x,
        "scale": scale,
        "zx": zx,
        "bc": bc,
        "dt": dt,
        "kernel_x": conv_x[0],
        "kernel_bc": conv_bc[0],
        "window_x": window_x,
        "window_bc": window_bc,
        "dt_bias": dt_bias,
        **{name: array for name, array in optional.items() if array is not None},
    }

    def kernel(*refs):
        given = dict(zip(named, refs, strict=False))
        z_out, x_out, bc_out, dt_out, window_x_out, window_bc_out = refs[len(named) :]
        program = pl.program_id(0)
        norm = Norm(given["scale"], eps)

        def projected(weight, first, tiling):
            # Rounded as the plain product is.
            values = product(given["x"], weight, first, tiling, norm=norm)
            return [value.astype(x.dtype).astype(jnp.float32) for value in values]

        def convolve(values, first, name, output, window_out):
            bias = given.get(f"bias_{name}")
            store_row_vectors(
                output,
                first,
                _move_window(
                    values, first, given[f"window_{name}"], window_out, given[f"kernel_{name}"], bias, given.get("keep")
                ),
            )

        @pl.when(program < of_zx)
        def _():
            is_x = program >= of_half
            first = jnp.where(is_x, program - of_half, program) * columns
            # The same number either way; but only a plain multiple tells the compiler how wide it may load.
            of_weight = program * columns if inner % columns == 0 else first + is_x.astype(jnp.int32) * inner
            values = projected(given["zx"], of_weight, tiling)

            @pl.when(program < of_half)
            def _():
                store_row_vectors(z_out, first, values)

            @pl.when(is_x)
            def _():
                convolve(values, first, "x", x_out, window_x_out)

        @pl.when((program >= of_zx) & (program < of_zx + of_bc))
        def _():
            first = (program - of_zx) * narrow.columns
            convolve(projected(given["bc"], first, narrow), first, "bc", bc_out, window_bc_out)

        @pl.when(program >= of_zx + of_bc)
        def _():
            first = (program - of_zx - of_bc) * narrow.columns
            column, _ = columns_of(first, narrow.columns, heads)
            bias = plgpu.load(given["dt_bias"].at[column]).astype(jnp.float32)
            steps = [_softplus(value + bias) for value in projected(given["dt"], first, narrow)]
            if limit is not None:
                steps = [jnp.clip(step, *limit) for step in steps]
            if "keep" in given:
                steps = [jnp.where(given["keep"][row] != 0, step, 0.0) for row, step in enumerate(steps)]
            store_row_vectors(dt_out, first, steps)

    names = list(named)
    outputs = [
        jax.ShapeDtypeStruct((rows, inner), x.dtype),
        jax.ShapeDtypeStruct((rows, inner), x.dtype),
        jax.ShapeDtypeStruct((rows, both), x.dtype),
        jax.ShapeDtypeStruct((rows, heads), jnp.float32),
        jax.ShapeDtypeStruct(window_x.shape, window_x.dtype),
        jax.ShapeDtypeStruct(window_bc.shape, window_bc.dtype),
    ]
    aliases = {names.index("window_x"): 4, names.index("window_bc"): 5}
    grid = (of_zx + of_bc + of_dt,)
    return tuple(
        _call(kernel, "mamba_projections", grid, list(named.values()), outputs, tiling, interpret, aliases=aliases)
    )


def _softplus(x):
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def _move_window(values, first, window, window_out, kernel, bias, keep):
    """One step of the convolution for some columns: per row the value after SiLU, (columns,); the window moves on."""
    rows, taps, width = window.shape
    size = values[0].shape[0]
    column, inside = columns_of(first, size, width)
    weights = [plgpu.load(kernel.at[tap, column]).astype(jnp.float32) for tap in range(taps + 1)]
    # All loads before the first store: they wait for each other once.
    past = [[plgpu.load(window.at[row, tap, column]) for tap in range(taps)] for row in range(rows)]
    start = jnp.zeros((size,), jnp.float32) if bias is None else plgpu.load(bias.at[column]).astype(jnp.float32)
    results = []
    to = first + jnp.arange(size, dtype=jnp.int32)
    for row, value in enumerate(values):
        inputs = [*past[row], value.astype(window.dtype)]
        total = start
        for weight, reached in zip(weights, inputs, strict=True):
            total = total + weight * reached.astype(jnp.float32)
        results.append(total * jax.nn.sigmoid(total))
        mask = inside
        if keep is not None:
            kept = jnp.broadcast_to(keep[row] != 0, (size,))
            mask = kept if mask is None else mask & kept
        for tap in range(taps):
            plgpu.store(window_out.at[row, tap, to], inputs[tap + 1], mask=mask)
    return results


def store_row_vectors(output, first, values, *leading) -> None:
    """Writes one vector (columns,) per row; columns beyond the output's width are dropped."""
    size = values[0].shape[0]
    column = first + jnp.arange(size, dtype=jnp.int32)
    inside = None if output.shape[-1] % size == 0 else column < output.shape[-1]
    for row, value in enumerate(values):
        plgpu.store(output.at[(*leading, row, column)], value.astype(output.dtype), mask=inside)


@functools.partial(jax.jit, static_argnames=("columns", "warps", "interpret"))
def head_matmul(
    x: jax.Array, embedding: jax.Array, *, columns: int = 8, warps: int = 8, interpret: bool = False
) -> jax.Array:
    """x (b, d) against every row of the embedding (v, d): (b, v) in x's dtype."""
    rows, depth = x.shape
    vocab = embedding.shape[0]
    size = pl.next_power_of_2(depth)

    def kernel(x_in, embedding_in, output):
        first = pl.program_id(0) * columns
        line, inside = columns_of(first, columns, vocab)
        place = jnp.arange(size, dtype=jnp.int32)
        column = place if size == depth else jnp.minimum(place, depth - 1)
        tile = plgpu.load(embedding_in.at[line[:, None], column[None, :]]).astype(jnp.float32)
        to = first + jnp.arange(columns, dtype=jnp.int32)
        for row in range(rows):
            vector = plgpu.load(x_in.at[row, column]).astype(jnp.float32)
            if size != depth:
                vector = jnp.where(place < depth, vector, 0.0)
            score = (tile * vector[None, :]).sum(axis=1)
            plgpu.store(output.at[row, to], score.astype(output.dtype), mask=inside)

    outputs = [jax.ShapeDtypeStruct((rows, vocab), x.dtype)]
    grid = (pl.cdiv(vocab, columns),)
    return _call(kernel, "head_matmul", grid, [x, embedding], outputs, Tiling(warps=warps), interpret)[0]


@functools.partial(jax.jit, static_argnames=("activation", "tiling", "interpret"))
def gated_activation(
    gate_up: jax.Array, low: jax.Array, up: jax.Array, *, activation: str, tiling: Tiling, interpret: bool = False
) -> jax.Array:
    """act(gate) · up of gate_up + low · up_weight.

    Args:
      gate_up: (b, 2 F), gate first. low: (b, r). up: (r, 2 F). activation: a key of `ACTIVATIONS`.

    Returns:
      (b, F) in gate_up's dtype.
    """
    rows, width = gate_up.shape
    half, dtype = width // 2, gate_up.dtype

    def kernel(gate_up_in, low_in, up_in, output):
        first = pl.program_id(0) * tiling.columns
        column, _ = columns_of(first, tiling.columns, half)

        def finished(offset):
            base = [plgpu.load(gate_up_in.at[row, offset + column]) for row in range(rows)]
            added = product(low_in, up_in, offset + first, tiling)
            return [(a + b.astype(dtype)).astype(jnp.float32) for a, b in zip(base, added, strict=True)]

        results = [
            ACTIVATIONS[activation](gate).astype(dtype).astype(jnp.float32) * up
            for gate, up in zip(finished(0), finished(half), strict=True)
        ]
        store_row_vectors(output, first, results)

    outputs = [jax.ShapeDtypeStruct((rows, half), dtype)]
    grid = (pl.cdiv(half, tiling.columns),)
    return _call(kernel, "gated_activation", grid, [gate_up, low, up], outputs, tiling, interpret)[0]


def _erf(x):
    # Abramowitz and Stegun, 7.1.26: within 1.5e-7. Triton has no erf.
    t = 1.0 / (1.0 + 0.3275911 * jnp.abs(x))
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    value = 1.0 - series * jnp.exp(-x * x)
    return jnp.where(x < 0, -value, value)


ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1.0 + _erf(x * 0.7071067811865476)),
    "silu": lambda x: x * jax.nn.sigmoid(x),
    "swish": lambda x: x * jax.nn.sigmoid(x),
    "relu": lambda x: jnp.maximum(x, 0.0),
}


def _call(kernel, name, grid, operands, outputs, tiling, interpret, aliases=None):
    def whole(array):
        return pl.BlockSpec(array.shape, lambda *_: (0,) * len(array.shape))

    kernel.__name__ = name  # what a profile shows
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[whole(array) for array in operands],
        out_specs=[whole(array) for array in outputs],
        out_shape=outputs,
        input_output_aliases=aliases or {},
        compiler_params=tiling.compiler_params(),
        interpret=interpret,
        name=name,
    )(*operands)
