"""Kernel for Hopper GPUs: one token of one sequence through a whole mamba layer, in one launch.

Four launches a layer (`products_gpu`, `state_gpu`, `rows_gpu`) leave the memory idle between one weight and the next.
Here one program per multiprocessor stays for the whole layer, and the programs wait for one another twice in it: for
what was projected, and for what goes to the output projection. Meanwhile the output projection's weight is on its way
into shared memory.

What is asked for when decides the speed. A multiprocessor's requests are served in their order: a load that is issued
behind eleven tiles of 16 KB was measured to take 11,000 cycles, not 320. So the few small loads that a phase begins
with are issued before the tiles that may come behind them, and nothing is asked for early on the eve of a wait.

Pallas' Mosaic GPU backend: shared memory that lives on across a wait, and copies that no thread waits for, are what
Triton's has not. Its interface is JAX 0.11's.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from zamba2_jax.ops.decode import hopper
from zamba2_jax.ops.quantized import Integers

# Tiles that a multiprocessor's shared memory holds beside the rest.
SLOTS = 8
# How many tiles of the output projection are asked for by the end of the first wait, and by that of the state's phase:
# as many as arrive meanwhile.
DURING_WAIT = 3
DURING_STATE = 6
WIDTH = 2048
HEADS = 64
HEADDIM = 64
STATE = 128
TAPS = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unsummed:
    """The stream after a layer, whose sum the next one makes.

    Attributes:
        hidden: (d,), the stream before the layer.
        pieces: (p, d) float32, the output projection's pieces along its depth.
        squares: (1,) float32, the sum of squares that completes the gated norm.
        waits: (w,) int32 zeros, for the programs of what follows to count themselves with: the next layer's with the
            first ones, a feed-forward's, if one comes before it, with the last.
    """

    hidden: jax.Array
    pieces: jax.Array
    squares: jax.Array
    waits: jax.Array

    @classmethod
    def of(cls, hidden: jax.Array, inner: int) -> Unsummed:
        """A stream that nothing is to be added to."""
        pieces = jnp.zeros((_pieces(hidden.shape[0], inner), hidden.shape[0]), jnp.float32)
        return cls(hidden, pieces, jnp.zeros((1,), jnp.float32), jnp.zeros((hopper.WAITS,), jnp.int32))


def _pieces(width: int, inner: int) -> int:
    return 2 * inner // width


# How many multiprocessors a layer takes: each serves 64 columns of z, x, B or C.
PROGRAMS = (2 * HEADS * HEADDIM + 2 * STATE) // hopper.COLUMNS


def shape_obstacle(width: int, heads: int, headdim: int, state: int, groups: int) -> str | None:
    """Why `mamba_layer` cannot serve a layer of these sizes, or None where it can: it is cut to Zamba2 1.2B's."""
    if (heads, headdim, state, groups) != (HEADS, HEADDIM, STATE, 1):
        return (
            f"the layer has {heads} heads of {headdim}, a state of {state} and {groups} groups; it takes {HEADS} heads "
            f"of {HEADDIM}, a state of {STATE} and one group"
        )
    if width != WIDTH:
        return f"the hidden size is {width}; it takes {WIDTH}"
    return None


@functools.partial(jax.jit, static_argnames=("eps", "gate_eps", "limit"))
def mamba_layer(
    before: Unsummed,
    added: jax.Array,
    weights: dict[str, jax.Array | Integers],
    window_x: jax.Array,
    window_bc: jax.Array,
    ssm: jax.Array,
    *,
    eps: float,
    gate_eps: float,
    limit: tuple[float, float] | None,
) -> tuple[Unsummed, jax.Array, jax.Array, jax.Array]:
    """norm(stream + added); projections, convolution, state, gate; output projection, unsummed. States in place.

    Needs `PROGRAMS` free multiprocessors: the programs wait for one another.

    Args:
      added: (d,), what joins the layer's input but not the stream.
      weights: norm (d,), zx (d, 2 E), bc (d, 2 N), dt (d, h), kernel_x (4, E), bias_x (E,), kernel_bc (4, 2 N),
        bias_bc (2 N,), dt_bias, A_log, D (h,), gate_norm (E,), out (E, d). zx, bc and out may be of int8.
      window_x, window_bc: (3, E), (3, 2 N). ssm: (h, p, N) float32.

    Returns:
      The stream and the three states.
    """
    inner, width = weights["out"].shape
    sizes = sizes_of(width, inner, int8=isinstance(weights["out"], Integers))
    outputs = {name: jax.ShapeDtypeStruct(*output) for name, output in outputs_of(sizes, before.hidden.dtype).items()}
    states = [jax.new_ref(array) for array in (window_x, window_bc, ssm)]
    waits = jax.new_ref(before.waits)
    kernel = pl.kernel(
        functools.partial(_program, sizes, list(outputs), eps, gate_eps, limit),
        out_type=list(outputs.values()),
        mesh=plgpu.Mesh(grid=(sizes.programs,), grid_names=("program",)),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        name="mamba_layer",
    )
    hidden, parts, squares, next_waits, *_ = kernel(
        waits, before.hidden, before.pieces, before.squares, added, weights, *states
    )
    return Unsummed(hidden, parts, squares, next_waits), *(jax.freeze(state) for state in states)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a layer's work: `steps` tiles in a strip of the first product, `strips` of z and x, `depth` features of the
    output projection for each program of one of its `pieces`, and `dt_parts` of that of the time steps."""

    tiles: hopper.Tiles
    width: int
    inner: int
    steps: int
    dt_parts: int
    strips: int
    programs: int
    pieces: int
    depth: int


def sizes_of(width: int, inner: int, *, int8: bool = False) -> Sizes:
    pieces, tiles = _pieces(width, inner), hopper.Tiles(int8)
    return Sizes(
        tiles=tiles,
        width=width,
        inner=inner,
        steps=width // tiles.depth,
        dt_parts=width // hopper.DEPTH,
        strips=2 * inner // hopper.COLUMNS,
        programs=PROGRAMS,
        pieces=pieces,
        depth=inner // pieces,
    )


def outputs_of(sizes: Sizes, dtype: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes: what the next layer reads, and what programs hand to one another."""
    return {
        "hidden": ((sizes.width,), dtype),
        "pieces": ((sizes.pieces, sizes.width), jnp.float32),
        "squares": ((1,), jnp.float32),
        "waits": ((hopper.WAITS,), jnp.int32),
        "raw": ((sizes.programs * hopper.COLUMNS,), jnp.float32),
        "dt": ((sizes.dt_parts, HEADS), jnp.float32),
        "gated": ((sizes.inner,), dtype),
        "squared": ((sizes.inner,), jnp.float32),
    }


def _program(sizes, names, eps, gate_eps, limit, waits, hidden_in, pieces_in, squares_in, added_in, weights, *refs):
    window_x, window_bc, ssm, *outputs = refs
    out = dict(zip(names, outputs, strict=True))
    me = jax.lax.axis_index("program")
    wide = jnp.float32
    dtype = hidden_in.dtype
    of_out = sizes.width // hopper.COLUMNS
    tiles = sizes.tiles

    def scoped(x_tiles, w_tiles, bc, arrived, *of_dt):
        x_memory = x_tiles.ref

        # The sum of the layer before and its norm, by every program. Loaded before the first tile is asked for.
        layout = hopper.vector(sizes.width)
        hidden, added, scale = (plgpu.load(ref, layout=layout) for ref in (hidden_in, added_in, weights["norm"]))
        parts = [plgpu.load(pieces_in.at[piece], layout=layout) for piece in range(pieces_in.shape[0])]
        factor = jax.lax.rsqrt(squares_in[0] / sizes.inner + gate_eps)

        def fetch(weight, tile, row, column):
            """The tile-th copy of this program, of the weight's rows and columns from here on."""
            slot = jax.lax.rem(tile, SLOTS)
            plgpu.copy_gmem_to_smem(tiles.source(weight, row, column), w_tiles.at[slot], arrived.at[slot])

        def fetch_first(tile):
            @pl.when(me < sizes.strips)
            def _():
                fetch(weights["zx"], tile, tile * tiles.depth, me * hopper.COLUMNS)

            @pl.when(me >= sizes.strips)
            def _():
                fetch(weights["bc"], tile, tile * tiles.depth, (me - sizes.strips) * hopper.COLUMNS)

        for tile in range(SLOTS):
            fetch_first(jnp.int32(tile))
        # The time steps' weight is one strip; the first programs take a tile of it each. It is of numbers: beside tiles
        # of int8 it has its place, and its operand, to itself.
        has_dt = (me < sizes.dt_parts).astype(jnp.int32)
        behind = 0 if tiles.int8 else has_dt
        if tiles.int8:
            x_of_dt, dt_tile, dt_arrived = of_dt

            @pl.when(has_dt == 1)
            def _():
                tile = weights["dt"].at[pl.ds(me * hopper.DEPTH, hopper.DEPTH), pl.ds(0, hopper.COLUMNS)]
                plgpu.copy_gmem_to_smem(tile, dt_tile.at[0], dt_arrived.at[0])
                x_of_dt.ref[...] = jnp.zeros(x_of_dt.ref.shape, dtype)

        # Of the operand's rows the first alone is someone's.
        x_memory[...] = jnp.zeros(x_memory.shape, dtype)
        hopper.barrier()  # another thread writes the first

        stream = sum(parts[1:], parts[0])
        stream = (stream * factor).astype(dtype) + hidden
        total = (stream + added).astype(wide)
        mean = jnp.sum(total * total) / sizes.width
        normed = (total * jax.lax.rsqrt(mean + eps) * scale.astype(wide)).astype(dtype)
        hopper.store_operand(x_memory, normed, int8=tiles.int8)
        if tiles.int8:
            pl.when(has_dt == 1)(lambda: hopper.store_operand(x_of_dt.ref, normed))
        plgpu.commit_smem()

        # What the state's phase needs from far, behind the tiles: it is there before they are used up.
        head = jnp.minimum(me, HEADS - 1)
        channels = pl.ds(head * HEADDIM, HEADDIM)
        state = plgpu.load(ssm.at[head], layout=plgpu.Layout.WGMMA, optimized=False)
        taps_x, kernel_x = [[_row(ref.at[i, channels]) for i in range(n)] for ref, n in _both(window_x, weights, "x")]
        taps_bc, kernel_bc = [[_pair(ref.at[i]) for i in range(n)] for ref, n in _both(window_bc, weights, "bc")]
        bias_x, gate_norm = _row(weights["bias_x"].at[channels]), _row(weights["gate_norm"].at[channels])
        bias_bc = _pair(weights["bias_bc"])
        dt_bias, A_log, D = (weights[name][head].astype(wide) for name in ("dt_bias", "A_log", "D"))

        out_piece, out_strip = me // of_out, jax.lax.rem(me, of_out)
        if tiles.int8:
            of_zx, of_bc = jnp.minimum(me, sizes.strips - 1), jnp.maximum(me - sizes.strips, 0)
            scales = [
                _row(weights[name].scale.at[pl.ds(strip * hopper.COLUMNS, hopper.COLUMNS)])
                for name, strip in (("zx", of_zx), ("bc", of_bc), ("out", out_strip))
            ]
            is_zx = (me < sizes.strips).astype(wide)
            scale_in, scale_out = is_zx * scales[0] + (1.0 - is_zx) * scales[1], scales[2]

        def multiply(total, tile, x_tile):
            slot = jax.lax.rem(tile, SLOTS)
            plgpu.barrier_wait(arrived.at[slot])
            tiles.multiply(total, w_tiles, slot, x_tiles, x_tile)

        def project(total):
            def turn(tile, carry):
                multiply(total, tile, tile)
                plgpu.wgmma_wait(0)
                following = tile + SLOTS

                @pl.when(following < sizes.steps + behind)
                def _():
                    hopper.barrier()  # all warps have read the slot

                    @pl.when(following < sizes.steps)
                    def _():
                        fetch_first(following)

                    if not tiles.int8:

                        @pl.when(following >= sizes.steps)
                        def _():
                            fetch(weights["dt"], following, me * hopper.DEPTH, 0)

                return carry

            jax.lax.fori_loop(0, sizes.steps, turn, jnp.int32(0))

        projected = hopper.product(project)
        if tiles.int8:
            projected = projected * scale_in
        out["raw"][pl.ds(me * hopper.COLUMNS, hopper.COLUMNS)] = projected.astype(dtype).astype(wide)

        def project_dt(total):
            if tiles.int8:
                plgpu.barrier_wait(dt_arrived.at[0])
                hopper.Tiles(int8=False).multiply(total, dt_tile, 0, x_of_dt, me)
            else:
                multiply(total, jnp.int32(sizes.steps), me)

        @pl.when(has_dt == 1)
        def _():
            out["dt"][me, :] = hopper.product(project_dt)

        hopper.arrive(waits.at[0])
        out_steps = sizes.depth // tiles.depth
        during_wait, during_state = (min(count, out_steps) for count in (DURING_WAIT, DURING_STATE))

        def fetch_out(first, last):
            @pl.when(me < sizes.strips)
            def _():
                for index in range(first, last):
                    fetch(
                        weights["out"],
                        sizes.steps + behind + index,
                        out_piece * sizes.depth + index * tiles.depth,
                        out_strip * hopper.COLUMNS,
                    )

        fetch_out(0, during_wait)
        hopper.wait(waits.at[0], sizes.programs)

        @pl.when(me >= HEADS)
        def _():
            fetch_out(during_wait, during_state)

        @pl.when(me < HEADS)
        def _():
            x_now = _row(out["raw"].at[pl.ds(sizes.inner + me * HEADDIM, HEADDIM)])
            z = _row(out["raw"].at[channels])
            bc_now = _pair(out["raw"].at[pl.ds(2 * sizes.inner, 2 * STATE)])
            dt_parts = [out["dt"][part, me] for part in range(sizes.dt_parts)]
            fetch_out(during_wait, during_state)
            bc[...] = _convolved(taps_bc, bc_now, kernel_bc, bias_bc).astype(dtype).astype(wide)
            plgpu.commit_smem()
            value = _convolved(taps_x, x_now, kernel_x, bias_x).astype(dtype).astype(wide)
            step = _softplus(sum(dt_parts[1:], dt_parts[0]).astype(dtype).astype(wide) + dt_bias)
            if limit is not None:
                step = jnp.minimum(jnp.maximum(step, limit[0]), limit[1])
            column = plgpu.Layout.WGMMA.reduce(0)
            key, query = (
                plgpu.load(bc.at[pl.ds(first, STATE)], layout=column, optimized=False) for first in (0, STATE)
            )
            new = jnp.exp(-step * jnp.exp(A_log)) * state + _spread(step * value, 0) * _spread(key, 1)
            y = (new * _spread(query, 1)).sum(axis=1) + D * value
            y = y * z * jax.nn.sigmoid(z)
            out["squared"][channels] = y * y
            out["gated"][channels] = (y * gate_norm.astype(wide)).astype(dtype)
            ssm[me] = new
            for tap, moved in enumerate((*taps_x[1:], x_now.astype(dtype))):
                window_x[tap, channels] = moved

        hopper.arrive(waits.at[1])
        fetch_out(during_state, out_steps)
        hopper.wait(waits.at[1], sizes.programs)

        @pl.when(me < sizes.strips)
        def _():
            gated = plgpu.load(
                out["gated"].at[pl.ds(out_piece * sizes.depth, sizes.depth)], layout=hopper.vector(sizes.depth)
            )
            hopper.store_operand(x_memory, gated, int8=tiles.int8)
            plgpu.commit_smem()

            def project_out(total):
                for index in range(out_steps):
                    multiply(total, sizes.steps + behind + index, index)

            projected = hopper.product(project_out)
            if tiles.int8:
                projected = projected * scale_out
            out["pieces"][out_piece, pl.ds(out_strip * hopper.COLUMNS, hopper.COLUMNS)] = projected

        # The programs of B and C have no part in that.
        @pl.when(me == sizes.strips)
        def _():
            out["squares"][0] = jnp.sum(plgpu.load(out["squared"], layout=hopper.vector(sizes.inner)))

        @pl.when(me == sizes.strips + 1)
        def _():
            bc_now = _pair(out["raw"].at[pl.ds(2 * sizes.inner, 2 * STATE)])
            for tap, moved in enumerate((*taps_bc[1:], bc_now.astype(dtype))):
                window_bc[tap] = moved

        @pl.when(me == sizes.strips + 2)
        def _():
            out["hidden"][...] = stream
            for place in range(hopper.WAITS):
                out["waits"][place] = jnp.int32(0)

    of_dt = []
    if tiles.int8:
        operand = plgpu.SMEM((8, sizes.width), dtype, transforms=hopper.TILED)
        of_dt = [operand, hopper.Tiles(int8=False).memory(1, dtype), plgpu.Barrier(num_barriers=1)]
    pl.run_scoped(
        scoped,
        plgpu.SMEM((8, sizes.width), dtype, transforms=hopper.TILED),
        tiles.memory(SLOTS, dtype),
        plgpu.SMEM((2 * STATE,), wide),
        plgpu.Barrier(num_barriers=SLOTS),
        *of_dt,
    )


def _row(ref: Any) -> jax.Array:
    """(64,), as the rows of the matrix units' results lie."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _pair(ref: Any) -> jax.Array:
    """(256,), two neighbours for each thread."""
    return plgpu.load(ref, layout=plgpu.Layout.WG_STRIDED((2 * STATE,), vec_size=2))


def _both(window: Any, weights: dict[str, Any], name: str) -> tuple[tuple[Any, int], tuple[Any, int]]:
    return (window, TAPS), (weights[f"kernel_{name}"], TAPS + 1)


def _spread(values: jax.Array, axis: int) -> jax.Array:
    """Along `axis` of (64, 128)."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(values, (HEADDIM, STATE), (axis,)), plgpu.Layout.WGMMA)


def _convolved(taps: list[jax.Array], now: jax.Array, kernel: list[jax.Array], bias: jax.Array) -> jax.Array:
    total = bias.astype(jnp.float32)
    for weight, reached in zip(kernel, [*taps, now], strict=True):
        total = total + weight.astype(jnp.float32) * reached.astype(jnp.float32)
    return total * jax.nn.sigmoid(total)


def _softplus(x: jax.Array) -> jax.Array:
    # max(x, 0) + log1p(exp(-|x|)); of the logarithm's forms the backend has but log.
    small = jnp.exp(-jnp.abs(x))
    above = 1.0 + small
    lost = above == 1.0
    log1p = jnp.where(lost, small, jnp.log(above) * small / jnp.where(lost, 1.0, above - 1.0))
    return jnp.maximum(x, 0.0) + log1p
