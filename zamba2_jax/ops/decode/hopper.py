"""What the kernels of a decoding step have in common that are written for Hopper GPUs in Pallas' Mosaic backend.

Their programs stay on their multiprocessors for several products and wait for one another in between. A product is of a
weight's tiles, turned, with 8 rows, of which the first is the token's and the others are zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

# Of a weight, one copy of 16 KB: features, columns. The matrix units take 64 columns of a weight, turned, against 8
# rows. Of int8, as it is stored, a copy has twice the features.
DEPTH = 128
INT8_DEPTH = 256
COLUMNS = 64
# Counters with which the programs of a mamba layer, and of the feed-forward that may come before it, wait.
LAYER_WAITS = 2
FEED_FORWARD_WAITS = 4
WAITS = LAYER_WAITS + FEED_FORWARD_WAITS
# How tiles and operands lie in shared memory.
TILED = (plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(128))
TILED_INT8 = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of a weight: of numbers (K, N), or of int8 (N, K).

    Attributes:
        int8: the latter. What they are multiplied with is then stored by `store_operand` as of int8.
    """

    int8: bool

    @property
    def depth(self) -> int:
        return INT8_DEPTH if self.int8 else DEPTH

    def memory(self, slots: int, dtype: Any) -> Any:
        """Shared memory for so many."""
        if self.int8:
            return plgpu.SMEM((slots, COLUMNS, INT8_DEPTH), jnp.int8, transforms=TILED_INT8)
        return plgpu.SMEM((slots, DEPTH, COLUMNS), dtype, transforms=TILED)

    def source(self, weight: Any, row: Any, column: Any) -> Any:
        """The weight's tile that begins at this feature and this column."""
        rows, columns = pl.ds(row, self.depth), pl.ds(column, COLUMNS)
        return weight.values.at[columns, rows] if self.int8 else weight.at[rows, columns]

    def multiply(self, total: Any, tiles: Any, slot: Any, operand: Any, step: Any) -> None:
        """Adds the product of a tile and the step-th features of an operand; of int8, without its scale."""
        if not self.int8:
            plgpu.wgmma(total, turned(tiles.at[slot]), turned(operand.at[:, pl.ds(step * DEPTH, DEPTH)]))
            return
        wide = widened(tiles, slot, 0)
        for half in range(2):
            of_half = pl.ds(step * INT8_DEPTH + half * DEPTH, DEPTH)
            plgpu.wgmma(total, wide, turned(operand.at[:, of_half]))
            if half == 0:
                wide = widened(tiles, slot, 1)  # while the first is multiplied
            plgpu.wgmma_wait(0)


def product(body: Callable[[Any], object]) -> jax.Array:
    """(64,) float32: what `body` adds to the accumulator that it is given."""

    def accumulate(total):
        body(total)
        return total[...]

    return pl.run_scoped(accumulate, plgpu.ACC((COLUMNS, 8), jnp.float32)).sum(axis=1)


def turned(ref: Any) -> Any:
    return ref.transpose((1, 0))


def vector(size: int) -> Any:
    """The layout of a vector that all threads share, neighbours each: four, or fewer of a short one."""
    return plgpu.Layout.WG_STRIDED((size,), vec_size=_neighbours(size))


def _neighbours(size: int) -> int:
    return min(4, size // 128)


def store_operand(memory: Any, values: jax.Array, *, int8: bool = False) -> None:
    """values (K,) into the first row of the matrix units' operand, tiles (1, K / 64, 8, 64): swizzling leaves it be.

    Args:
        int8: to be multiplied with tiles of int8, and so in the order of features in which `widened` has them.
    """
    size, each = values.shape[0], _neighbours(values.shape[0])
    if int8 and each != 4:
        raise ValueError(f"an operand of {size} features; to be multiplied with int8 it has a multiple of 512")

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), vector(size)))
    def store(_, ref, array):
        base = mgpu.utils.memref_ptr(ref)
        thread = arith.remui(mgpu.thread_idx(), _int(128))
        for index, register in enumerate(array.registers.flat):
            place = arith.addi(arith.muli(thread, _int(each)), _int(128 * each * index))
            parts = [(place, register)]
            if int8:
                # Of 32 features a thread has numbers 4 i to 4 i + 3: two pairs, 8 places apart.
                of_thread = arith.remui(thread, _int(8))
                first = arith.subi(place, arith.muli(of_thread, _int(4)))
                odd, pair = arith.remui(of_thread, _int(2)), arith.divui(of_thread, _int(2))
                first = arith.addi(first, arith.addi(arith.muli(odd, _int(16)), arith.muli(pair, _int(2))))
                halves = [mgpu.utils.vector_slice(register, slice(start, start + 2)) for start in (0, 2)]
                parts = [(first, halves[0]), (arith.addi(first, _int(8)), halves[1])]
            for at, numbers in parts:
                tile, within = arith.divui(at, _int(COLUMNS)), arith.remui(at, _int(COLUMNS))
                offset = arith.addi(arith.muli(tile, _int(8 * COLUMNS)), within)
                llvm.store(numbers, _offset(base, offset, ir.VectorType(numbers.type).element_type))

    store(memory, values)


def widened(tiles: Any, slot: Any, half: int) -> jax.Array:
    """Half of the features of a tile of int8, (64, 128) bfloat16, as the matrix units take their left operand.

    Of 32 features each thread reads 8 neighbours of two columns and has with them what it needs for two products of 16
    features, in an order that it chooses: place 16 s + 8 j + 2 i + e is feature 8 i + 4 s + 2 j + e, with s, j and e 0
    or 1. `store_operand` puts the other operand in the same order.
    """
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((COLUMNS, DEPTH), jnp.bfloat16, layout=layout),
    )
    def widen(_, ref):
        i32, byte = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8)
        base = mgpu.utils.memref_ptr(ref)
        thread = arith.remui(mgpu.thread_idx(), _int(128))
        warp, lane = arith.divui(thread, _int(32)), arith.remui(thread, _int(32))
        row, quarter = arith.divui(lane, _int(4)), arith.remui(lane, _int(4))
        # Tiles of 8 columns and 128 features; in them 16 bytes stand in the place of their number xor the column.
        of_row = arith.addi(
            arith.addi(arith.muli(warp, _int(4 * 1024)), arith.muli(row, _int(128))),
            arith.muli(arith.remui(quarter, _int(2)), _int(8)),
        )
        registers = np.empty(layout.to_mgpu().registers_shape((COLUMNS, DEPTH)), dtype=object)
        by_column = registers.reshape(DEPTH // 8, 2)  # of 8 features; of the upper and the lower 8 columns
        for turn in range(DEPTH // 32):
            chunk = arith.xori(arith.addi(arith.divui(quarter, _int(2)), _int(2 * turn)), row)
            place = arith.addi(of_row, arith.muli(chunk, _int(16)))
            for lower in range(2):
                at = _offset(base, arith.addi(place, _int(lower * 2 * 1024 + half * 1024)), byte)
                words = llvm.load(ir.VectorType.get((2,), i32), at, alignment=8)
                for step in range(2):
                    word = llvm.extractelement(words, _int(step))
                    for j, pair in enumerate(_widen_four(word)):
                        by_column[4 * turn + 2 * step + j, lower] = pair
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

    return widen(tiles.ref.at[slot])


# Four int8 as two pairs of bfloat16. Seven bits under the exponent of 128 are 128 more than they say; the sign makes
# -256 of the -128 that is to be added.
WIDEN_FOUR = (
    "{ .reg .b32 a, b; "
    "prmt.b32 a, $2, 0, 0x4140; lop3.b32 b, a, 0x7F007F, 0x43004300, 0xEA; "
    "lop3.b32 a, a, 0x800080, 0xC300C300, 0xEA; add.rn.bf16x2 $0, a, b; "
    "prmt.b32 a, $2, 0, 0x4342; lop3.b32 b, a, 0x7F007F, 0x43004300, 0xEA; "
    "lop3.b32 a, a, 0x800080, 0xC300C300, 0xEA; add.rn.bf16x2 $1, a, b; }"
)


def _widen_four(word: ir.Value) -> list[ir.Value]:
    i32 = ir.IntegerType.get_signless(32)
    pair = ir.Type.parse("!llvm.struct<(i32, i32)>")
    result = llvm.inline_asm(pair, [word], WIDEN_FOUR, "=r,=r,r")
    numbers = ir.VectorType.get((2,), ir.BF16Type.get())
    return [llvm.bitcast(numbers, llvm.extractvalue(i32, result, [index])) for index in range(2)]


def _offset(base: ir.Value, elements: ir.Value, element: ir.Type) -> ir.Value:
    dynamic = -(2**31)  # the dialect's mark of an index that is given at run time
    return llvm.getelementptr(base.type, base, [elements], [dynamic], element, llvm.GEPNoWrapFlags.none)


def _int(value: int) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, value))


def barrier() -> None:
    """All threads of the program."""

    @plgpu.inline_mgpu()
    def barrier(_):
        mgpu.utils.warpgroup_barrier()

    barrier()


def arrive(count: Any) -> None:
    """This program has written what it had to."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def arrive(_, ref):
        mgpu.utils.warpgroup_barrier()
        _by_one_thread("red.release.gpu.global.add.u32 [$0], 1;", ref)

    arrive(count)


def wait(count: Any, programs: int) -> None:
    """Until so many programs have arrived; what they wrote before can be read then."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def wait(_, ref):
        _by_one_thread(
            "{ .reg .pred few; .reg .u32 count; again: ld.acquire.gpu.global.u32 count, [$0]; "
            f"setp.lt.u32 few, count, {programs}; @few bra again; }}",
            ref,
        )
        mgpu.utils.warpgroup_barrier()

    wait(count)


def _by_one_thread(ptx: str, ref: ir.Value) -> None:
    with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [mgpu.utils.memref_ptr(ref)], ptx, "l,~{memory}", has_side_effects=True)
