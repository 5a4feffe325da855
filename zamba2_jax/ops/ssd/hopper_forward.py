"""Kernel for Hopper GPUs: what `pallas_gpu_kernels.forward` makes, for two heads of a group in a program.

Written in Pallas' Mosaic backend, where the warpgroups of a program have jobs of their own. One asks for the chunks'
tiles ahead of time; one mixes, G∘L∘dt_j for both heads, which share G; one for each head walks the chunks with the
state in registers. In Triton every head reads B and C for itself and makes G anew. Of 4 x 4096 tokens, 64 heads of 64
and a state of 128, it took 0.21 ms on an H200, and this one 0.14. Who mixes is the one that the others wait for: each
head doing all of its own took 0.19, what flows into the state made by who mixes 0.15. (A warpgroup that mixes for each
head leaves the others too few registers; tiles asked into the cache ahead of that change nothing.)

In the letters of `pallas_gpu_kernels`, of each chunk:

    y = (G∘L∘dt_j) x + exp(s_i) (C Sᵀ) + D x,    S <- exp(s_q) S + (exp(s_q - s_j) dt_j x)ᵀ B.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from zamba2_jax.ops.ssd import hopper_tiles as tiles
from zamba2_jax.ops.ssd.hopper_tiles import SIDE

# Chunks whose tiles are under way or in use.
STAGES = 2
# Heads of a program. More would take more registers than there are.
TOGETHER = 2
# The warpgroups' jobs; the first ones walk, a head each.
_MIX, _FETCH = TOGETHER, TOGETHER + 1


def forward(x, dt, s, B, C, D, state, *, before=None, keep_states=False) -> tuple[jax.Array, ...]:
    """Arguments and results as in `pallas_gpu_kernels.forward`. x, B and C are of bfloat16, l is a multiple of 64, p is
    64, n 64 or 128, and groups have an even number of heads.

    With `keep_states`, a third result: the state that each chunk starts with, (b,h,c,p,n) of x.dtype, as
    `pallas_gpu_kernels.states` makes them. It lies in shared memory at that time, as an operand; to write it takes this
    kernel less than that one takes, which reads x and B again.
    """
    # Mosaic's kernels have no rule for `jax.vmap`.
    run = jax.custom_batching.sequential_vmap(functools.partial(_forward, keep_states))
    return run(x, dt, *s, B, C, D, state, before)


def _forward(keep_states, x, dt, s, B, C, D, state, before):
    batch, length, heads, headdim = x.shape
    groups, size = B.shape[2:]
    parts = batch // state.shape[0]

    def flat(array):
        return array.reshape(batch, length, -1)

    operands = {"x": flat(x), "dt": dt, "s": s, "B": flat(B), "C": flat(C), "state": state}
    if D is not None:
        operands["D"] = D
    if before is not None:
        operands["gains"], operands["kept"] = before
    results = [
        jax.ShapeDtypeStruct((batch, length, heads * headdim), x.dtype),
        jax.ShapeDtypeStruct(state.shape, jnp.float32),
    ]
    if keep_states:
        results.append(jax.ShapeDtypeStruct((batch // parts, heads, parts * length // SIDE, headdim, size), x.dtype))
    kernel = pl.kernel(
        functools.partial(_program, length // SIDE, parts, heads // groups, size),
        out_type=results,
        mesh=plgpu.Mesh(
            grid=(heads // TOGETHER, batch),
            grid_names=("heads", "row"),
            num_threads=TOGETHER + 2,
            thread_name="warpgroup",
        ),
        compiler_params=tiles.compiler_params(),
        name="ssd_forward",
    )
    y, *states = kernel(operands)
    return y.reshape(x.shape), *states


@dataclasses.dataclass(frozen=True)
class _Program:
    """One program: two heads of a group in one row. `operands` and outputs are in the GPU's memory, the tiles in shared
    memory, where `mine` has a place for each head's warpgroup."""

    operands: dict[str, Any]
    y_out: Any
    final_out: Any
    states_out: Any  # or None
    chunks: int
    parts: int
    group_heads: int
    size: int
    heads: jax.Array
    row: jax.Array
    of_chunk: dict[str, Any]  # STAGES of B, C, and for each head x, dt, s
    mixing: Any  # STAGES, for each head
    mine: dict[str, Any]  # state, inflow, y
    mixed: Any
    ring: tiles.Ring

    def fetch(self):
        first = self.heads * TOGETHER
        group = pl.ds(first // self.group_heads * self.size, self.size)

        def fetch_chunk(index, slot):
            tokens = pl.ds(index * SIDE, SIDE)

            def copy(name, place, *of_head):
                target = self.of_chunk[name].at[(slot, *of_head)]
                plgpu.copy_gmem_to_smem(self.operands[name].at[(self.row, *place)], target, self.ring.arrived.at[slot])

            copy("B", (tokens, group))
            copy("C", (tokens, group))
            for head in range(TOGETHER):
                copy("x", (tokens, pl.ds((first + head) * SIDE, SIDE)), head)
                copy("dt", (first + head, tokens), head)
                copy("s", (first + head, tokens), head)

        self.ring.fetch(self.chunks, fetch_chunk)

    def mix(self):
        """(G∘L∘dt_j) of each head."""
        lower = tiles.iota(0) >= tiles.iota(1)

        def mix_chunk(index, slot, carry):
            B, C = (self.of_chunk[name].at[slot] for name in "BC")
            pairs = jnp.where(lower, tiles.product(C, tiles.turned(B)), 0.0)
            for head in range(TOGETHER):
                dt_of, s_of = (self.of_chunk[name].at[slot, head] for name in ("dt", "s"))
                rows, columns = tiles.along_rows(tiles.of_rows(s_of)), tiles.along_columns(tiles.of_columns(s_of))
                weight = pairs * tiles.decay(rows, columns) * tiles.along_columns(tiles.of_columns(dt_of))
                self.mixing[slot, head] = weight.astype(self.mixing.dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(self.mixed.at[slot * TOGETHER + head])
            return carry

        self.ring.each(self.chunks, mix_chunk, jnp.int32(0))

    def walk(self, me):
        """The me-th head."""
        head = self.heads * TOGETHER + me
        skip = self.operands["D"][head] if "D" in self.operands else None
        state_tile, inflow_tile, y_tile = (self.mine[name].at[me] for name in ("state", "inflow", "y"))
        dtype = y_tile.dtype

        def walk_chunk(index, slot, state):
            B, C = (self.of_chunk[name].at[slot] for name in "BC")
            x, dt_of, s_of = (self.of_chunk[name].at[slot, me] for name in ("x", "dt", "s"))
            if self.states_out is not None:
                plgpu.copy_smem_to_gmem(state_tile, self.states_out.at[row, head, part * self.chunks + index])

            def without_mixing(carried):
                plgpu.wgmma(carried, C, tiles.turned(state_tile))
                wide = x[...].astype(jnp.float32)
                s, last = tiles.of_rows(s_of), s_of[SIDE - 1]
                gain = tiles.of_rows(dt_of) * jnp.exp2(last - s)
                inflow_tile[...] = (wide * tiles.along_rows(gain)).astype(dtype)
                plgpu.commit_smem()
                y = carried[...] * tiles.along_rows(jnp.exp2(s))
                return y if skip is None else y + skip * wide, jnp.exp2(last)

            def multiply(totals):
                y, state = totals
                plgpu.wgmma(y, self.mixing.at[slot, me], x)
                plgpu.wgmma(state, tiles.turned(inflow_tile), B)

            y, kept = pl.run_scoped(without_mixing, tiles.accumulator())
            state = state * kept
            plgpu.barrier_wait(self.mixed.at[slot * TOGETHER + me])
            y, state = pl.run_state(multiply)((plgpu.ACC.init(y), plgpu.ACC.init(state)))
            self.ring.free(slot)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            y_tile[...] = y.astype(dtype)
            state_tile[...] = state.astype(dtype)
            plgpu.commit_smem()
            tokens, features = pl.ds(index * SIDE, SIDE), pl.ds(head * SIDE, SIDE)
            plgpu.copy_smem_to_gmem(y_tile, self.y_out.at[self.row, tokens, features])
            return state

        state, row, part = self._start(head)
        state_tile[...] = state.astype(dtype)
        plgpu.commit_smem()
        state = self.ring.each(self.chunks, walk_chunk, state)

        @pl.when(part == self.parts - 1)
        def _():
            self.final_out[row, head] = state

        plgpu.wait_smem_to_gmem(0)

    def _start(self, head):
        """The state that the head begins with, the row that this is a part of, and which part."""
        row, part = self.row // self.parts, jax.lax.rem(self.row, self.parts)
        state = tiles.of_state(self.operands["state"].at[row, head])
        if "gains" not in self.operands:
            return state, row, part

        def through(earlier, state):
            gain = tiles.of_state(self.operands["gains"].at[row, earlier, head])
            return self.operands["kept"][row, earlier, head] * state + gain

        return jax.lax.fori_loop(0, part, through, state), row, part


def _program(chunks, parts, group_heads, size, operands, y_out, final_out, states_out=None):
    heads, row = (jax.lax.axis_index(name) for name in ("heads", "row"))
    me = jax.lax.axis_index("warpgroup")

    def scoped(shared, ring):
        program = _Program(
            operands=operands,
            y_out=y_out,
            final_out=final_out,
            states_out=states_out,
            chunks=chunks,
            parts=parts,
            group_heads=group_heads,
            size=size,
            heads=heads,
            row=row,
            ring=tiles.Ring(STAGES, **ring),
            **shared,
        )

        @pl.when(me == _MIX)
        def _():
            plgpu.set_max_registers(168, action="increase")
            program.mix()

        @pl.when(me == _FETCH)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            program.fetch()

        @pl.when(me < TOGETHER)
        def _():
            plgpu.set_max_registers(160, action="increase")
            program.walk(me)

    of_chunk = {
        **{name: tiles.tile(STAGES, SIDE, size) for name in "BC"},
        "x": tiles.tile(STAGES, TOGETHER, SIDE, SIDE),
        **{name: tiles.vector(STAGES, TOGETHER, SIDE) for name in ("dt", "s")},
    }
    mine = {
        "state": tiles.tile(TOGETHER, SIDE, size),
        **{name: tiles.tile(TOGETHER, SIDE, SIDE) for name in ("inflow", "y")},
    }
    pl.run_scoped(
        scoped,
        {
            "of_chunk": of_chunk,
            "mixing": tiles.tile(STAGES, TOGETHER, SIDE, SIDE),
            "mine": mine,
            "mixed": plgpu.Barrier(num_barriers=STAGES * TOGETHER),
        },
        tiles.Ring.barriers(STAGES, copies=2 + 3 * TOGETHER, users=TOGETHER),
        collective_axes="warpgroup",
    )
