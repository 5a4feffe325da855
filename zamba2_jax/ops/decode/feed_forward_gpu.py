"""Kernel for Hopper GPUs: what follows a shared block's attention, for one token of one sequence, in one launch.

Output projection, norm, gated MLP with its adapter, and the use's own matrix are five products and seven launches
(`products_gpu`, `rows_gpu`). Here, as in `layer_gpu`, which says what the order of requests decides, one program per
multiprocessor stays for all of them. The programs wait for one another three times, each product's weight on its way
meanwhile.

A product of `width` columns is cut into strips of 64 columns and pieces along its depth, one for each program, and the
pieces are added up by whoever reads them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from zamba2_jax.ops.decode import hopper
from zamba2_jax.ops.decode.products_gpu import ACTIVATIONS

# Tiles under way or in use. More would fit, and are slower: whatever a wait is followed by stands behind them. On an
# H100 a use took 53.7 us with 5, 55.9 with 6 and 60.8 with 8, and 66.1 in seven launches.
SLOTS = 5
ATTENTION = 4096
WIDTH = 2048
INTERMEDIATE = 8192
RANK = 128
PIECES = 4
PROGRAMS = PIECES * WIDTH // hopper.COLUMNS
# How many of the next product's tiles are asked for before a wait.
DURING_FIRST_WAIT = 3
DURING_SECOND_WAIT = 3
# The programs that make the adapter's low rank: a tile each.
_OF_LOW = (WIDTH // hopper.DEPTH) * (RANK // hopper.COLUMNS)
# The tiles of a program, in the order in which they are used.
_O = ATTENTION // PIECES // hopper.DEPTH
_WIDE = WIDTH // hopper.DEPTH
_LOW = _O
_GATE = _LOW + 1
_UP = _GATE + _WIDE
_ADDED = _UP + _WIDE
_DOWN = _ADDED + 2
_DOWN_STEPS = INTERMEDIATE // PIECES // hopper.DEPTH
_LINEAR = _DOWN + _DOWN_STEPS
_LINEAR_STEPS = WIDTH // PIECES // hopper.DEPTH


def shape_obstacle(attention: int, width: int, intermediate: int, rank: int) -> str | None:
    """Why `feed_forward` cannot serve a block of these sizes, or None where it can: it is cut to Zamba2 1.2B's."""
    if (attention, width, intermediate, rank) != (ATTENTION, WIDTH, INTERMEDIATE, RANK):
        return (
            f"the block takes {attention} features of attention to {width}, {intermediate} between and an adapter of "
            f"rank {rank}; it takes {ATTENTION}, {WIDTH}, {INTERMEDIATE} and {RANK}"
        )
    return None


@functools.partial(jax.jit, static_argnames=("eps", "activation"))
def feed_forward(
    waits: jax.Array, mixed: jax.Array, weights: dict[str, jax.Array], *, eps: float, activation: str
) -> tuple[jax.Array, jax.Array]:
    """mixed o, normed; act(gate) · up with the adapter's addition; down; linear, in pieces.

    Needs `PROGRAMS` free multiprocessors: the programs wait for one another.

    Args:
      waits: (w,) int32, as a mamba layer leaves them: the last ones, zeros, are this kernel's to count with.
      mixed: (A,), what attention gave.
      weights: o (A, d), norm (d,), gate_up (d, 2 F), low (d, r), added (r, 2 F), down (F, d), linear (d, d).
      activation: a key of `products_gpu.ACTIVATIONS`.

    Returns:
      The pieces (p, d) float32, whose sum is the result, and `waits`, counted up.
    """
    outputs = {name: jax.ShapeDtypeStruct(*output) for name, output in outputs_of(mixed.dtype).items()}
    counts = jax.new_ref(waits)
    kernel = pl.kernel(
        functools.partial(_program, list(outputs), eps, ACTIVATIONS[activation]),
        out_type=list(outputs.values()),
        mesh=plgpu.Mesh(grid=(PROGRAMS,), grid_names=("program",)),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        name="feed_forward",
    )
    pieces, *_ = kernel(counts, mixed, weights)
    return pieces, jax.freeze(counts)


def outputs_of(dtype) -> dict[str, tuple[tuple[int, ...], jax.typing.DTypeLike]]:
    """Shapes and dtypes: the result, and what programs hand to one another."""
    return {
        "pieces": ((PIECES, WIDTH), jnp.float32),
        "attended": ((PIECES, WIDTH), jnp.float32),
        "low": ((WIDTH // hopper.DEPTH, RANK), jnp.float32),
        "active": ((INTERMEDIATE,), dtype),
        "down": ((PIECES, WIDTH), jnp.float32),
    }


def _program(names, eps, activate, waits, mixed_in, weights, *outputs):
    out = dict(zip(names, outputs, strict=True))
    me = jax.lax.axis_index("program")
    dtype, wide = mixed_in.dtype, jnp.float32
    strips = WIDTH // hopper.COLUMNS
    piece, strip = me // strips, jax.lax.rem(me, strips)
    columns = pl.ds(strip * hopper.COLUMNS, hopper.COLUMNS)
    counts = [waits.at[hopper.LAYER_WAITS + wait] for wait in range(hopper.FEED_FORWARD_WAITS)]
    makes_low = me < _OF_LOW
    low_part, low_strip = jax.lax.rem(me, WIDTH // hopper.DEPTH), me // (WIDTH // hopper.DEPTH)

    def scoped(x_tiles, low_tiles, w_tiles, arrived):
        def fetch(name, tile, row, column):
            slot = jax.lax.rem(tile, SLOTS)
            source = weights[name].at[pl.ds(row, hopper.DEPTH), pl.ds(column, hopper.COLUMNS)]
            plgpu.copy_gmem_to_smem(source, w_tiles.at[slot], arrived.at[slot])

        def fetch_gate_up(index):
            """The gate's tiles and, from the `_WIDE`-th on, those of up."""
            half, step = index // _WIDE, jax.lax.rem(index, _WIDE)
            fetch("gate_up", _GATE + index, step * hopper.DEPTH, half * INTERMEDIATE + me * hopper.COLUMNS)

        def fetch_down(index):
            depth = INTERMEDIATE // PIECES
            fetch("down", _DOWN + index, piece * depth + index * hopper.DEPTH, strip * hopper.COLUMNS)

        def fetch_one(tile):
            """A tile whose number is known here."""
            number = jnp.int32(tile)
            if tile < _LOW:
                fetch("o", number, piece * (ATTENTION // PIECES) + tile * hopper.DEPTH, strip * hopper.COLUMNS)
            elif tile < _GATE:

                @pl.when(makes_low)
                def _():
                    fetch("low", number, low_part * hopper.DEPTH, low_strip * hopper.COLUMNS)

            elif tile < _ADDED:
                fetch_gate_up(jnp.int32(tile - _GATE))
            elif tile < _DOWN:
                fetch("added", number, 0, (tile - _ADDED) * INTERMEDIATE + me * hopper.COLUMNS)
            elif tile < _LINEAR:
                fetch_down(jnp.int32(tile - _DOWN))
            else:
                first = piece * (WIDTH // PIECES)
                fetch("linear", number, first + (tile - _LINEAR) * hopper.DEPTH, strip * hopper.COLUMNS)

        def multiply(total, tile, operand, step):
            slot = jax.lax.rem(tile, SLOTS)
            plgpu.barrier_wait(arrived.at[slot])
            plgpu.wgmma(
                total,
                hopper.turned(w_tiles.at[slot]),
                hopper.turned(operand.at[:, pl.ds(step * hopper.DEPTH, hopper.DEPTH)]),
            )
            plgpu.wgmma_wait(0)

        def known(total, first, count, limit, step=0):
            """`count` tiles from the first on; as many ahead are asked for, but none from `limit` on."""
            for index in range(count):
                multiply(total, jnp.int32(first + index), x_tiles, jnp.int32(step + index))
                if first + index + SLOTS < limit:
                    hopper.barrier()  # all warps have read the slot
                    fetch_one(first + index + SLOTS)

        def loop(total, first, count, fetch_following):
            """As `known`, where one function fetches all that follows."""

            def turn(index, carry):
                multiply(total, first + index, x_tiles, index)
                hopper.barrier()
                fetch_following(index)
                return carry

            jax.lax.fori_loop(0, count, turn, jnp.int32(0))

        def put(tiles, values):
            hopper.store_operand(tiles.ref, values.astype(dtype))
            plgpu.commit_smem()

        def parts_of(ref, place):
            layout = hopper.vector(place.size)
            return [plgpu.load(ref.at[part, place], layout=layout) for part in range(PIECES)]

        # The output projection.
        of_piece = pl.ds(piece * (ATTENTION // PIECES), ATTENTION // PIECES)
        mixed = plgpu.load(mixed_in.at[of_piece], layout=hopper.vector(ATTENTION // PIECES))
        scale = plgpu.load(weights["norm"], layout=hopper.vector(WIDTH))
        for tile in range(SLOTS):
            fetch_one(tile)
        for tiles in (x_tiles, low_tiles):
            memory = tiles.ref
            memory[...] = jnp.zeros(memory.shape, dtype)
        hopper.barrier()  # another thread writes the first row
        put(x_tiles, mixed)
        first = _LOW + DURING_FIRST_WAIT
        out["attended"][piece, columns] = hopper.product(lambda total: known(total, 0, _O, first))
        hopper.arrive(counts[0])
        hopper.wait(counts[0], PROGRAMS)

        # The norm, by every program; the adapter's low rank; gate and up.
        parts = parts_of(out["attended"], pl.ds(0, WIDTH))
        for tile in range(first, _LOW + SLOTS):
            fetch_one(tile)
        attended = sum(parts[1:], parts[0]).astype(dtype).astype(wide)
        mean = jnp.sum(attended * attended) / WIDTH
        put(x_tiles, attended * jax.lax.rsqrt(mean + eps) * scale.astype(wide))

        @pl.when(makes_low)
        def _():
            low = hopper.product(lambda total: multiply(total, jnp.int32(_LOW), x_tiles, low_part))
            out["low"][low_part, pl.ds(low_strip * hopper.COLUMNS, hopper.COLUMNS)] = low
            hopper.arrive(counts[1])

        hopper.barrier()
        fetch_one(_LOW + SLOTS)
        gate = hopper.product(lambda total: loop(total, _GATE, _WIDE, lambda index: fetch_gate_up(index + SLOTS)))
        second = _DOWN + DURING_SECOND_WAIT

        def project_up(total):
            early = _WIDE - SLOTS
            loop(total, _UP, early, lambda index: fetch_gate_up(index + _WIDE + SLOTS))
            # Long there; asked for now, it has come when the last tiles have.
            hopper.wait(counts[1], _OF_LOW)
            lows = [
                plgpu.load(out["low"].at[part], layout=hopper.vector(RANK)) for part in range(WIDTH // hopper.DEPTH)
            ]
            known(total, _UP + early, SLOTS, second, step=early)
            put(low_tiles, sum(lows[1:], lows[0]))

        up = hopper.product(project_up)

        def finished(value, half):
            added = hopper.product(lambda total: multiply(total, jnp.int32(_ADDED + half), low_tiles, jnp.int32(0)))
            return (value.astype(dtype) + added.astype(dtype)).astype(wide)

        active = activate(finished(gate, 0)) * finished(up, 1)
        out["active"][pl.ds(me * hopper.COLUMNS, hopper.COLUMNS)] = active.astype(dtype)
        hopper.arrive(counts[2])
        hopper.wait(counts[2], PROGRAMS)

        # Down.
        of_piece = pl.ds(piece * (INTERMEDIATE // PIECES), INTERMEDIATE // PIECES)
        active = plgpu.load(out["active"].at[of_piece], layout=hopper.vector(INTERMEDIATE // PIECES))
        for tile in range(second, _DOWN + SLOTS):
            fetch_one(tile)
        put(x_tiles, active)

        def project_down(total):
            early = _DOWN_STEPS - SLOTS
            loop(total, _DOWN, early, lambda index: fetch_down(index + SLOTS))
            known(total, _DOWN + early, SLOTS, _LINEAR + _LINEAR_STEPS, step=early)

        out["down"][piece, columns] = hopper.product(project_down)
        hopper.arrive(counts[3])
        hopper.wait(counts[3], PROGRAMS)

        # The use's own matrix.
        parts = parts_of(out["down"], pl.ds(piece * (WIDTH // PIECES), WIDTH // PIECES))
        put(x_tiles, sum(parts[1:], parts[0]))
        out["pieces"][piece, columns] = hopper.product(lambda total: known(total, _LINEAR, _LINEAR_STEPS, 0))

    pl.run_scoped(
        scoped,
        plgpu.SMEM((8, WIDTH), dtype, transforms=hopper.TILED),
        plgpu.SMEM((8, RANK), dtype, transforms=hopper.TILED),
        plgpu.SMEM((SLOTS, hopper.DEPTH, hopper.COLUMNS), dtype, transforms=hopper.TILED),
        plgpu.Barrier(num_barriers=SLOTS),
    )
