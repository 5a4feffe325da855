"""What the kernels of a decoding step have in common that are written for Hopper GPUs in Pallas' Mosaic backend.

Their programs stay on their multiprocessors for several products and wait for one another in between. A product is of a
weight's tiles, turned, with 8 rows, of which the first is the token's and the others are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

# Of a weight, one copy: features, columns. The matrix units take 64 columns of a weight, turned, against 8 rows.
DEPTH = 128
COLUMNS = 64
# Counters with which the programs of a mamba layer, and of the feed-forward that may come before it, wait.
LAYER_WAITS = 2
FEED_FORWARD_WAITS = 4
WAITS = LAYER_WAITS + FEED_FORWARD_WAITS
# How tiles and operands lie in shared memory.
TILED = (plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(128))


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


def store_operand(memory: Any, values: jax.Array) -> None:
    """values (K,) into the first row of the matrix units' operand, tiles (1, K / 64, 8, 64): swizzling leaves it be."""
    size, each = values.shape[0], _neighbours(values.shape[0])

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), vector(size)))
    def store(_, ref, array):
        base = mgpu.utils.memref_ptr(ref)
        thread = arith.remui(mgpu.thread_idx(), _int(128))
        for index, register in enumerate(array.registers.flat):
            place = arith.addi(arith.muli(thread, _int(each)), _int(128 * each * index))
            tile, within = arith.divui(place, _int(COLUMNS)), arith.remui(place, _int(COLUMNS))
            offset = arith.addi(arith.muli(tile, _int(8 * COLUMNS)), within)
            # The dialect's mark of an index that is given at run time.
            dynamic = -(2**31)
            element = ir.VectorType(register.type).element_type
            at = llvm.getelementptr(base.type, base, [offset], [dynamic], element, llvm.GEPNoWrapFlags.none)
            llvm.store(register, at)

    store(memory, values)


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
