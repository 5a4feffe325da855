"""Tiles of 64 x 64 and what the kernels of the recurrence for Hopper GPUs do with them, in Pallas' Mosaic backend.

"Rows" and "columns" are those of a result of the matrix units as the threads of a warpgroup hold it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

# Tokens of a chunk, and features of a head: the rows of the matrix units' results.
SIDE = 64


@dataclasses.dataclass(frozen=True)
class Ring:
    """Places for tiles, taken in turn: a warpgroup asks for the tiles ahead of time, others use them.

    Attributes:
        places: how many.
        arrived, freed: of each place, barriers that the copies into it and those who use it arrive at.
    """

    places: int
    arrived: Any
    freed: Any

    @staticmethod
    def barriers(places: int, *, copies: int, users: int) -> dict[str, Any]:
        """`arrived` and `freed`, as `run_scoped` makes them."""
        return {
            "arrived": plgpu.Barrier(num_arrivals=copies, num_barriers=places),
            "freed": plgpu.Barrier(num_arrivals=users, num_barriers=places),
        }

    def fetch(self, count: int, copy: Callable[[Any, Any], None]) -> None:
        """`copy(index, place)` for each of `count`, where the place is free."""

        def turn(index, carry):
            place = jax.lax.rem(index, self.places)

            @pl.when(index >= self.places)
            def _():
                plgpu.barrier_wait(self.freed.at[place])

            copy(index, place)
            return carry

        jax.lax.fori_loop(0, count, turn, jnp.int32(0))

    def each(self, count: int, use: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
        """`carry = use(index, place, carry)` for each of `count`, where its tiles are there; `use` frees the place."""

        def turn(index, carry):
            place = jax.lax.rem(index, self.places)
            plgpu.barrier_wait(self.arrived.at[place])
            return use(index, place, carry)

        return jax.lax.fori_loop(0, count, turn, carry)

    def free(self, place: Any) -> None:
        """This warpgroup needs the tiles there no more."""
        plgpu.barrier_arrive(self.freed.at[place])


def tile(*shape: int) -> Any:
    """Shared memory for operands of the matrix units, bfloat16."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def vector(*shape: int) -> Any:
    """Shared memory for numbers, float32."""
    return plgpu.SMEM(shape, jnp.float32)


def accumulator(columns: int = SIDE) -> Any:
    return plgpu.ACC((SIDE, columns), jnp.float32)


def compiler_params() -> plgpu.CompilerParams:
    """No barriers but those that are written: no warpgroup reads what it has itself written to memory without one."""
    return plgpu.CompilerParams(
        approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    )


def zeros() -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((SIDE, SIDE), jnp.float32), plgpu.Layout.WGMMA)


def product(left, right) -> jax.Array:
    def multiply(total):
        plgpu.wgmma(total, left, right)
        return total[...]

    return pl.run_scoped(multiply, accumulator())


def decay(later: jax.Array, earlier: jax.Array) -> jax.Array:
    """In the layout of the matrix units' results, of sums in units of log 2."""
    return jnp.exp2(jnp.minimum(later - earlier, 0.0))


def turned(ref):
    return ref.transpose((1, 0))


def iota(axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (SIDE, SIDE), axis, layout=plgpu.Layout.WGMMA)


def of_rows(ref) -> jax.Array:
    """A number for each row of a (64, 64)."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def of_columns(ref) -> jax.Array:
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)


def of_state(ref) -> jax.Array:
    """A state (64, n) from the GPU's memory."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)


def along_rows(values) -> jax.Array:
    """(64, 64) with a number in all of its row."""
    return _spread(values, 0)


def along_columns(values) -> jax.Array:
    return _spread(values, 1)


def _spread(values, axis) -> jax.Array:
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(values, (SIDE, SIDE), (axis,)), plgpu.Layout.WGMMA)


def store_column_sums(ref, values) -> None:
    """The sums over each warp's rows of `values` (64, 64), in the layout of the matrix units' results, to ref (4, 64).

    A thread has two neighbouring columns of each eight, in two of a warp's rows. Eight threads have the same columns:
    each time that two of them add up, each goes on with half of the columns."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def store(_, ref, array):
        i32 = ir.IntegerType.get_signless(32)

        def number(value):
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        thread = arith.remui(mgpu.thread_idx(), number(128))
        lane, warp = arith.remui(thread, number(32)), arith.divui(thread, number(32))
        registers = array.registers.reshape(SIDE // 8, 2)
        sums = [arith.addf(low, high) for low, high in registers]
        for bit in (16, 8, 4):
            upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, number(bit)), number(0))
            half = len(sums) // 2
            kept, sent = [], []
            for low, high in zip(sums[:half], sums[half:], strict=True):
                kept.append(arith.select(upper, high, low))
                sent.append(arith.select(upper, low, high))
            sums = [arith.addf(a, mgpu.utils.shfl_bfly(b, bit)) for a, b in zip(kept, sent, strict=True)]
        place = arith.addi(arith.muli(warp, number(SIDE)), arith.muli(lane, number(2)))
        base = mgpu.utils.memref_ptr(ref)
        # The dialect's mark of an index that is given at run time.
        at = llvm.getelementptr(base.type, base, [place], [-(2**31)], ir.F32Type.get(), llvm.GEPNoWrapFlags.none)
        llvm.store(sums[0], at)

    store(ref, values)
