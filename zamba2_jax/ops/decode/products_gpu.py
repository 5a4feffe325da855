"""Kernels for GPUs: products of up to `MAX_ROWS` rows that stream each weight once.

A weight of few columns (an output projection) is cut along its depth too, or it would occupy a quarter of the card. Its
products then are sums that `rows_gpu.join` adds up, together with what else happens to them.

The functions are jitted so that a model that calls one of them for each of its layers compiles one kernel, not one per
layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from zamba2_jax.ops.decode.launch_gpu import launch
from zamba2_jax.ops.decode.strips_gpu import ROWS, Tiling, Weight, columns_of, product, rows_of
from zamba2_jax.ops.quantized import Integers

# More rows are XLA's.
MAX_ROWS = ROWS
# Of int4: half a group is one product of the matrix units, which take 16 features or more.
SMALLEST_INT4_GROUP = 32
# The head's kernel multiplies by hand: for several rows XLA's product was measured to be as fast as it is for one.
MAX_HEAD_ROWS = 1
# Strips that occupy a large card once.
_PROGRAMS = 256
TILING = Tiling()
# Weights of fewer columns are a small part of a launch: narrow strips, so that they are done when the others are.
_NARROW = 1024


def depth_splits(weight: Weight, tiling: Tiling, multiple_of: int = 1) -> int:
    """Into how many pieces a weight (depth, columns) is cut along its depth: a power of two times `multiple_of`."""
    depth, columns = weight.shape
    shortest = tiling.depth
    if isinstance(weight, Integers) and weight.group is not None:
        shortest = max(shortest, weight.group)
    splits = multiple_of
    while splits * pl.cdiv(columns, tiling.columns) < _PROGRAMS and depth % (2 * splits * shortest) == 0:
        splits *= 2
    return splits


def _narrow(tiling: Tiling) -> Tiling:
    return dataclasses.replace(tiling, columns=16)


@functools.partial(jax.jit, static_argnames=("tiling", "interpret"))
def skinny_matmul(
    x: jax.Array, weights: Sequence[Weight], *, tiling: Tiling = TILING, interpret: bool = False
) -> tuple[jax.Array, ...]:
    """x W for each of the weights; one launch.

    Args:
      x: (b, K). weights: (K, N_j) each, of x's dtype or of integers.

    Returns:
      (b, N_j) each, in x's dtype.
    """
    rows, dtype = x.shape[0], x.dtype
    widths = [weight.shape[1] for weight in weights]
    tilings = [tiling if width >= _NARROW else _narrow(tiling) for width in widths]
    programs = [pl.cdiv(width, tiling.columns) for width, tiling in zip(widths, tilings, strict=True)]

    def kernel(x_in, *refs):
        outputs = refs[len(weights) :]
        program = pl.program_id(0)
        before = 0
        for weight, output, count, tiling in zip(refs, outputs, programs, tilings, strict=False):

            def strip(weight=weight, output=output, before=before, tiling=tiling):
                first = (program - before) * tiling.columns
                store_rows(output, first, product(x_in, weight, first, tiling, interpret=interpret))

            if len(weights) == 1:
                strip()
            else:
                pl.when((program >= before) & (program < before + count))(strip)
            before += count

    outputs = [jax.ShapeDtypeStruct((rows, width), dtype) for width in widths]
    return tuple(
        launch(
            kernel, "skinny_matmul", (sum(programs),), [x, *weights], outputs, **tiling.programs(), interpret=interpret
        )
    )


@functools.partial(jax.jit, static_argnames=("splits", "tiling", "interpret"))
def split_matmul(
    x: jax.Array, weight: Weight, *, splits: int, tiling: Tiling = TILING, interpret: bool = False
) -> jax.Array:
    """The product x W in `splits` pieces along its depth, to be added by `rows_gpu.join`: (splits, b, N) float32.

    Args:
      x: (b, K). weight: (K, N), of x's dtype or of integers. splits divides K.
    """
    rows, depth = x.shape
    width = weight.shape[1]
    length = depth // splits

    def kernel(x_in, weight_in, output):
        first, piece = pl.program_id(0) * tiling.columns, pl.program_id(1)
        values = product(x_in, weight_in, first, tiling, start=piece * length, length=length, interpret=interpret)
        store_rows(output, first, values, piece)

    outputs = [jax.ShapeDtypeStruct((splits, rows, width), jnp.float32)]
    grid = (pl.cdiv(width, tiling.columns), splits)
    return launch(kernel, "split_matmul", grid, [x, weight], outputs, **tiling.programs(), interpret=interpret)[0]


@functools.partial(jax.jit, static_argnames=("limit", "tiling", "interpret"))
def mamba_projections(
    x: jax.Array,
    zx: Weight,
    bc: Weight,
    dt: Weight,
    conv_x: tuple[jax.Array, jax.Array | None],
    conv_bc: tuple[jax.Array, jax.Array | None],
    window_x: jax.Array,
    window_bc: jax.Array,
    dt_bias: jax.Array,
    keep: jax.Array | None,
    *,
    limit: tuple[float, float] | None,
    tiling: Tiling = TILING,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Projections, convolution and time step of one token; one launch.

    Programs for z, x, B and C, and dt. Those of convolved columns own them in the window too, for all rows, and move it
    on in place.

    Args:
      x: (b, d).
      zx: (d, 2 E). bc: (d, 2 G N). dt: (d, h). Each of x's dtype or of integers.
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

        def projected(weight, first, tiling):
            # Rounded as the plain product is.
            values = product(given["x"], weight, first, tiling, interpret=interpret)
            return values.astype(x.dtype).astype(jnp.float32)

        def convolve(weight, at, first, tiling, name, output, window_out):
            # What the convolution reads is under way while the product is made.
            of_columns = _Convolved.read(
                first, tiling.columns, given[f"window_{name}"], given[f"kernel_{name}"], given.get(f"bias_{name}")
            )
            values = of_columns.step(projected(weight, at, tiling), window_out, given.get("keep"))
            store_rows(output, first, values)

        @pl.when(program < of_half)
        def _():
            store_rows(z_out, program * columns, projected(given["zx"], program * columns, tiling))

        @pl.when((program >= of_half) & (program < of_zx))
        def _():
            first = (program - of_half) * columns
            # The same number either way; but only a plain multiple tells the compiler how wide it may load.
            of_weight = program * columns if inner % columns == 0 else first + inner
            convolve(given["zx"], of_weight, first, tiling, "x", x_out, window_x_out)

        @pl.when((program >= of_zx) & (program < of_zx + of_bc))
        def _():
            first = (program - of_zx) * narrow.columns
            convolve(given["bc"], first, first, narrow, "bc", bc_out, window_bc_out)

        @pl.when(program >= of_zx + of_bc)
        def _():
            first = (program - of_zx - of_bc) * narrow.columns
            column, _ = columns_of(first, narrow.columns, heads)
            bias = plgpu.load(given["dt_bias"].at[column]).astype(jnp.float32)
            step = _softplus(projected(given["dt"], first, narrow) + bias[None, :])
            if limit is not None:
                step = jnp.clip(step, *limit)
            if "keep" in given:
                step = jnp.where((plgpu.load(given["keep"].at[rows_of(rows)]) != 0)[:, None], step, 0.0)
            store_rows(dt_out, first, step)

    names = list(named)
    outputs = [
        jax.ShapeDtypeStruct((rows, inner), x.dtype),
        jax.ShapeDtypeStruct((rows, inner), x.dtype),
        jax.ShapeDtypeStruct((rows, both), x.dtype),
        jax.ShapeDtypeStruct((rows, heads), jnp.float32),
        jax.ShapeDtypeStruct(window_x.shape, window_x.dtype),
        jax.ShapeDtypeStruct(window_bc.shape, window_bc.dtype),
    ]
    return tuple(
        launch(
            kernel,
            "mamba_projections",
            (of_zx + of_bc + of_dt,),
            list(named.values()),
            outputs,
            **tiling.programs(),
            in_place={names.index("window_x"): 4, names.index("window_bc"): 5},
            interpret=interpret,
        )
    )


def _softplus(x):
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@dataclasses.dataclass(frozen=True)
class _Convolved:
    """What one step of the convolution reads for some columns.

    Attributes:
        first: of the columns. inside: (columns,), which are real; None for all.
        past: the window, oldest first, (ROWS, columns) each. weights: of the taps, (columns,) each.
        bias: (columns,) or None. All as they are stored: to convert them would be to wait for them.
    """

    first: Any
    inside: jax.Array | None
    past: list[jax.Array]
    weights: list[jax.Array]
    bias: jax.Array | None

    @classmethod
    def read(cls, first: Any, columns: int, window: Any, kernel: Any, bias: Any) -> _Convolved:
        rows, taps, width = window.shape
        row, (column, inside) = rows_of(rows), columns_of(first, columns, width)
        past = [plgpu.load(window.at[row[:, None], tap, column[None, :]]) for tap in range(taps)]
        weights = [plgpu.load(kernel.at[tap, column]) for tap in range(taps + 1)]
        return cls(first, inside, past, weights, None if bias is None else plgpu.load(bias.at[column]))

    def step(self, values: jax.Array, window_out: Any, keep: Any) -> jax.Array:
        """(ROWS, columns) after SiLU; the window moves on, but for rows that `keep` has 0 for."""
        rows, taps, _ = window_out.shape
        inputs = [*self.past, values.astype(window_out.dtype)]
        total = jnp.zeros(values.shape, jnp.float32)
        if self.bias is not None:
            total += self.bias.astype(jnp.float32)[None, :]
        for weight, reached in zip(self.weights, inputs, strict=True):
            total += weight.astype(jnp.float32)[None, :] * reached.astype(jnp.float32)
        row, column = jnp.arange(ROWS, dtype=jnp.int32), self.first + jnp.arange(values.shape[1], dtype=jnp.int32)
        moves = row < rows
        if keep is not None:
            moves &= plgpu.load(keep.at[rows_of(rows)]) != 0
        moves = jnp.broadcast_to(moves[:, None], values.shape)
        if self.inside is not None:
            moves &= self.inside[None, :]
        for tap in range(taps):
            plgpu.store(window_out.at[row[:, None], tap, column[None, :]], inputs[tap + 1], mask=moves)
        return total * jax.nn.sigmoid(total)


def store_rows(output, first, values, *leading) -> None:
    """Writes (ROWS, columns); rows and columns beyond the output's are dropped."""
    rows, width = output.shape[-2:]
    row, column = jnp.arange(ROWS, dtype=jnp.int32)[:, None], first + jnp.arange(values.shape[1], dtype=jnp.int32)
    inside = (row < rows) & (column < width)[None, :]
    plgpu.store(output.at[(*leading, row, column[None, :])], values.astype(output.dtype), mask=inside)


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
    return launch(kernel, "head_matmul", grid, [x, embedding], outputs, warps=warps, interpret=interpret)[0]


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
            base = plgpu.load(gate_up_in.at[rows_of(rows)[:, None], offset + column[None, :]])
            added = product(low_in, up_in, offset + first, tiling, interpret=interpret)
            return (base + added.astype(dtype)).astype(jnp.float32)

        store_rows(output, first, ACTIVATIONS[activation](finished(0)) * finished(half))

    outputs = [jax.ShapeDtypeStruct((rows, half), dtype)]
    grid = (pl.cdiv(half, tiling.columns),)
    return launch(
        kernel, "gated_activation", grid, [gate_up, low, up], outputs, **tiling.programs(), interpret=interpret
    )[0]


def _erf(x):
    # Abramowitz and Stegun, 7.1.26: within 1.5e-7. Triton has no erf.
    t = 1.0 / (1.0 + 0.3275911 * jnp.abs(x))
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    value = 1.0 - series * jnp.exp(-x * x)
    return jnp.where(x < 0, -value, value)


def _gelu(x):
    return 0.5 * x * (1.0 + _erf(x * 0.7071067811865476))


def _silu(x):
    return x * jax.nn.sigmoid(x)


def _relu(x):
    return jnp.maximum(x, 0.0)


ACTIVATIONS = {"gelu": _gelu, "silu": _silu, "swish": _silu, "relu": _relu}
