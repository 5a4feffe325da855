"""Kernel for Hopper GPUs: what `pallas_gpu_kernels.backward_heads` and `backward_groups` make, in one launch.

Written in Pallas' Mosaic backend, where the warpgroups of a program have jobs of their own: one asks for the heads'
tiles ahead of time, one makes what a head owns, and one adds up in registers what the heads of a group share. So each
tile is read from memory once. In Triton all warps do all of it, for which the registers do not suffice; hence its two
kernels, which read everything twice. Of 4 x 4096 tokens, 64 heads of 64 and a state of 128, they took 0.77 ms on an
H200, and this one 0.32, where the memory's bandwidth would allow 0.22.

In the letters of `pallas_gpu_kernels`. What a head owns is made with tokens j as rows, so that Mᵀ is the matrix units'
left operand as it lies:

    Gᵀ = B Cᵀ (once for all heads),  L^T_ji = exp(s_i - s_j),  Vᵀ = Gᵀ∘Lᵀ∘(x dyᵀ),  dGᵀ = Σ Lᵀ∘(x dyᵀ) dt_j.

Where j > i the exponent is cut at 0, and Gᵀ, or the sum dGᵀ, is zero.
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

# Heads whose tiles are under way or in use. A third is slower: it takes the memory that a thread's local variables are
# cached in.
STAGES = 2
# The warpgroups' jobs.
_OWN, _SHARE, _FETCH = range(3)
# What a head owns: names of outputs with a number for each token.
_OF_STEPS = ("ddt", "ds", "flowed", "felt", "products", "skip")


def backward(x, dt, s, B, C, D, starts, dy, ends, heads: int) -> tuple[Any, ...]:
    """What `backward_heads` and `backward_groups` return, one after the other, some of it in parts.

    Args:
      x, dy: (b,l,h,p) bfloat16, l a multiple of 64, p 64. dt: (b,h,l) float32, s: one such array, as `prepare` makes
        it. B, C: (b,l,g,n) bfloat16, n a multiple of 64. D: (h,) float32 or None. starts, ends: (b,h,c,p,n) bfloat16.
        What they are, says `backward_heads`.
      heads: how many a program adds up, dividing the heads of a group.

    Returns:
      dx. (ddt, and two whose sum is ds) (b,h,l). What is felt at a chunk's end, (b,h,c,64), to be added up. dy·x of
      every token, (b,h,l). dB, dC (k,b,l,g,n), to be added over the k blocks of a group's heads. float32 but dx.
    """
    # Mosaic's kernels have no rule for `jax.vmap`.
    return jax.custom_batching.sequential_vmap(functools.partial(_backward, heads))(
        x, dt, *s, B, C, D, starts, dy, ends
    )


def _backward(heads, x, dt, s, B, C, D, starts, dy, ends):
    batch, length, all_heads, headdim = x.shape
    groups, size = B.shape[2:]
    blocks, chunks = all_heads // groups // heads, length // SIDE
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    outputs = {
        "dx": jax.ShapeDtypeStruct((batch, length, all_heads * headdim), x.dtype),
        **{name: float32(dt.shape) for name in _OF_STEPS},
        **{name: float32((blocks, batch, length, groups * size)) for name in ("dB", "dC")},
    }

    def flat(array):
        return array.reshape(batch, length, -1)

    operands = {
        "x": flat(x),
        "dt": dt,
        "s": s,
        "B": flat(B),
        "C": flat(C),
        "starts": starts,
        "dy": flat(dy),
        "ends": ends,
    }
    if D is not None:
        operands["D"] = D
    kernel = pl.kernel(
        functools.partial(_program, list(outputs), heads, blocks, size),
        out_type=list(outputs.values()),
        mesh=plgpu.Mesh(
            grid=(groups * blocks, chunks, batch),
            grid_names=("block", "chunk", "row"),
            num_threads=3,
            thread_name="warpgroup",
        ),
        compiler_params=tiles.compiler_params(),
        name="ssd_backward",
    )
    made = dict(zip(outputs, kernel(operands), strict=True))
    of_shared = blocks, *B.shape
    return (
        made["dx"].reshape(x.shape),
        (made["ddt"], made["ds"], made["flowed"]),
        (made["felt"] + made["products"]).reshape(batch, all_heads, chunks, SIDE),
        made["skip"],
        made["dB"].reshape(of_shared),
        made["dC"].reshape(of_shared),
    )


@dataclasses.dataclass(frozen=True)
class _Program:
    """One program: some heads of a group in one chunk of one row. `operands` and `outputs` are in the GPU's memory, the
    others in shared memory."""

    operands: dict[str, Any]
    outputs: dict[str, Any]
    heads: int
    block: jax.Array  # among all of the groups'
    blocks: int  # of a group
    size: int
    tokens: Any
    row: jax.Array
    chunk: jax.Array
    of_head: dict[str, Any]  # STAGES of x, dy, starts, ends, dt, s
    B: Any
    C: Any
    d_pairs: Any  # dG turned
    dx: Any  # two heads'
    sums: Any  # of columns, by four warps, of two heads
    arrived_shared: Any
    summed: Any
    ring: tiles.Ring

    @property
    def columns(self):
        """Of B and C, those of the group."""
        return pl.ds(self.block // self.blocks * self.size, self.size)

    def head(self, index):
        return self.block * self.heads + index

    def each_head(self, body, carry):
        """`body(head, its place among the program's, its tiles, carry)`, where the tiles are there."""

        def use(index, slot, carry):
            return body(self.head(index), index, {name: ref.at[slot] for name, ref in self.of_head.items()}, carry)

        return self.ring.each(self.heads, use, carry)

    def free(self, index):
        """The warpgroup needs the head's tiles no more."""
        self.ring.free(jax.lax.rem(index, STAGES))

    def put(self, head, **values):
        for name, value in values.items():
            self.outputs[name][self.row, head, self.tokens] = value

    def fetch(self):
        for name, target in (("B", self.B), ("C", self.C)):
            plgpu.copy_gmem_to_smem(
                self.operands[name].at[self.row, self.tokens, self.columns], target, self.arrived_shared
            )

        def fetch_head(index, slot):
            head = self.head(index)
            for name, target in self.of_head.items():
                match name:
                    case "x" | "dy":
                        place = self.row, self.tokens, pl.ds(head * SIDE, SIDE)
                    case "starts" | "ends":
                        place = self.row, head, self.chunk
                    case _:
                        place = self.row, head, self.tokens
                plgpu.copy_gmem_to_smem(self.operands[name].at[place], target.at[slot], self.ring.arrived.at[slot])

        self.ring.fetch(self.heads, fetch_head)

    def own(self):
        """What a head owns, and dG of all."""
        plgpu.barrier_wait(self.arrived_shared)
        upper = tiles.iota(0) <= tiles.iota(1)
        pairs = jnp.where(upper, tiles.product(self.B, tiles.turned(self.C)), 0.0)
        dtype = self.dx.dtype

        def one_head(head, index, of_head, dG):
            x, dy, place = of_head["x"], of_head["dy"], jax.lax.rem(index, 2)
            skip = self.operands["D"][head] if "D" in self.operands else None
            dt, s = tiles.of_rows(of_head["dt"]), tiles.of_rows(of_head["s"])
            to_end = jnp.exp2(of_head["s"][SIDE - 1] - s)

            def multiply(outer, kept):
                plgpu.wgmma(outer, x, tiles.turned(dy))
                plgpu.wgmma(kept, self.B, tiles.turned(of_head["ends"]))
                decay = tiles.decay(tiles.along_columns(tiles.of_columns(of_head["s"])), tiles.along_rows(s))
                return decay, plgpu.wgmma_accumulator_load(outer, wait_n=1), kept[...]

            decay, outer, kept = pl.run_scoped(multiply, tiles.accumulator(), tiles.accumulator())
            kept = kept * tiles.along_rows(to_end)
            felt = jnp.sum(x[...].astype(jnp.float32) * kept, axis=1)

            def mix(mixed):
                plgpu.wgmma(mixed, (pairs * decay).astype(dtype), dy)
                # Rows and columns of the same products, in float32: see `backward_heads`.
                decayed = decay * outer
                changes = pairs * decayed
                ddt = jnp.sum(changes, axis=1) + felt
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the last but one: its place is taken now
                tiles.store_column_sums(self.sums.at[place], changes * tiles.along_rows(dt))
                return ddt, dG + decayed * tiles.along_rows(dt), mixed[...]

            ddt, dG, mixed = pl.run_scoped(mix, tiles.accumulator())
            dx = (mixed + kept) * tiles.along_rows(dt)
            if skip is not None:
                dx = dx + skip * dy[...].astype(jnp.float32)
            self.free(index)
            self.dx.at[place][...] = dx.astype(dtype)
            plgpu.commit_smem()
            features = pl.ds(head * SIDE, SIDE)
            plgpu.copy_smem_to_gmem(self.dx.at[place], self.outputs["dx"].at[self.row, self.tokens, features])
            of_warps = [tiles.of_rows(self.sums.at[place, warp]) for warp in range(4)]
            self.put(head, ddt=ddt, felt=dt * felt, ds=sum(of_warps[1:], of_warps[0]) - dt * ddt)
            return dG

        dG = self.each_head(one_head, tiles.zeros())
        self.d_pairs[...] = jnp.where(upper, dG, 0.0).astype(dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.summed)
        plgpu.wait_smem_to_gmem(0)

    def share(self):
        """dB, dC, and of the heads what has to do with the states that a chunk starts with."""
        plgpu.barrier_wait(self.arrived_shared)
        dtype = self.dx.dtype

        def add_up(dB, dC):
            def one_head(head, index, of_head, carry):
                starts, ends = of_head["starts"], of_head["ends"]
                last = of_head["s"][SIDE - 1]

                def multiply(carried):
                    plgpu.wgmma(carried, self.C, tiles.turned(starts))
                    x, dy = (of_head[name][...].astype(jnp.float32) for name in ("x", "dy"))
                    s = tiles.of_rows(of_head["s"])
                    from_start = jnp.exp2(s)
                    to_end = tiles.of_rows(of_head["dt"]) * jnp.exp2(last - s)
                    plgpu.wgmma(dC, (dy * tiles.along_rows(from_start)).astype(dtype), starts)
                    plgpu.wgmma(dB, (x * tiles.along_rows(to_end)).astype(dtype), ends)
                    carried = plgpu.wgmma_accumulator_load(carried, wait_n=2)
                    self.put(head, skip=jnp.sum(x * dy, axis=1), flowed=jnp.sum(dy * carried, axis=1) * from_start)

                pl.run_scoped(multiply, tiles.accumulator())
                product = starts[...].astype(jnp.float32) * ends[...].astype(jnp.float32)
                self.put(head, products=jnp.exp2(last) * jnp.sum(product, axis=1))
                plgpu.wgmma_wait(0)
                self.free(index)
                return carry

            self.each_head(one_head, jnp.int32(0))
            plgpu.barrier_wait(self.summed)
            plgpu.wgmma(dC, tiles.turned(self.d_pairs), self.B)
            plgpu.wgmma(dB, self.d_pairs, self.C)
            return dB[...], dC[...]

        dB, dC = pl.run_scoped(add_up, *[tiles.accumulator(self.size)] * 2)
        place = jax.lax.rem(self.block, self.blocks), self.row, self.tokens, self.columns
        self.outputs["dB"][place] = dB
        self.outputs["dC"][place] = dC


def _program(names, heads, blocks, size, operands, *outputs):
    block, chunk, row = (jax.lax.axis_index(name) for name in ("block", "chunk", "row"))
    me = jax.lax.axis_index("warpgroup")

    def scoped(shared, ring):
        program = _Program(
            operands=operands,
            outputs=dict(zip(names, outputs, strict=True)),
            heads=heads,
            block=block,
            blocks=blocks,
            size=size,
            tokens=pl.ds(chunk * SIDE, SIDE),
            row=row,
            chunk=chunk,
            ring=tiles.Ring(STAGES, **ring),
            **shared,
        )

        @pl.when(me == _FETCH)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            program.fetch()

        for mine, job in ((_OWN, program.own), (_SHARE, program.share)):

            @pl.when(me == mine)
            def _(job=job):
                plgpu.set_max_registers(240, action="increase")
                job()

    of_head = {
        **{name: tiles.tile(STAGES, SIDE, SIDE) for name in ("x", "dy")},
        **{name: tiles.tile(STAGES, SIDE, size) for name in ("starts", "ends")},
        **{name: tiles.vector(STAGES, SIDE) for name in ("dt", "s")},
    }
    pl.run_scoped(
        scoped,
        {
            "of_head": of_head,
            "B": tiles.tile(SIDE, size),
            "C": tiles.tile(SIDE, size),
            "d_pairs": tiles.tile(SIDE, SIDE),
            "dx": tiles.tile(2, SIDE, SIDE),
            "sums": tiles.vector(2, 4, SIDE),
            "arrived_shared": plgpu.Barrier(num_arrivals=2),
            "summed": plgpu.Barrier(),
        },
        tiles.Ring.barriers(STAGES, copies=len(of_head), users=2),
        collective_axes="warpgroup",
    )
