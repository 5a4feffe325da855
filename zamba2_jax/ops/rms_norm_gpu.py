"""RMSNorm in kernels for NVIDIA GPUs (Pallas, Triton backend): its backward pass, and both passes for vectors that lie
in several arrays, which XLA would put together first.

A program holds one token in registers, as in `gated_norm_gpu`; backward it walks some.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from zamba2_jax.ops.gated_norm_gpu import AHEAD, Group, warps_for
from zamba2_jax.ops.gpu_arithmetic import Arithmetic

# A backward program walks between these many tokens, as many as let this many programs, which a large card has room
# for, take them all: in a second round of a few most of it would idle.
_FEWEST_TOKENS, _MOST_TOKENS, _PROGRAMS = 16, 48, 396


class _Token:
    """A token's vector, of one array's features after another's."""

    def __init__(self, parts: Sequence[jax.Array], eps: float):
        sizes = [part.shape[1] for part in parts]
        self.total, self._eps = sum(sizes), eps
        self.groups = [Group(size, eps) for size in sizes]
        self.offsets = list(itertools.accumulate([0, *sizes[:-1]]))

    def load_scale(self, ref) -> list[jax.Array]:
        return [group.load(ref, offset=offset) for group, offset in zip(self.groups, self.offsets, strict=True)]

    def mean_of_products(self, ones: list[jax.Array], others: list[jax.Array]) -> jax.Array:
        return sum(jnp.sum(one * other) for one, other in zip(ones, others, strict=True)) / self.total

    def inverse_rms(self, parts: list[jax.Array]) -> jax.Array:
        return jax.lax.rsqrt(self.mean_of_products(parts, parts) + self._eps)


def forward(
    parts: Sequence[jax.Array], scale: jax.Array, *, eps: float, dtype: jax.typing.DTypeLike, interpret: bool
) -> jax.Array:
    """The norm of vectors whose features lie in several arrays, (t,d_1), (t,d_2), ...: (t,d) of dtype."""
    tokens, features = parts[0].shape[0], scale.shape[0]

    def body(scale_ref, *refs):
        part_refs, out_ref = refs[:-1], refs[-1]
        token = _Token(parts, eps)
        values = [group.load(ref) for group, ref in zip(token.groups, part_refs, strict=True)]
        inverse = token.inverse_rms(values)
        places = zip(token.groups, token.offsets, values, token.load_scale(scale_ref), strict=True)
        for group, offset, value, scale in places:
            # Rounded before the scale, and both in the result's dtype, as the checkpoints were trained.
            rounded = (value * inverse).astype(dtype).astype(jnp.float32)
            group.store(out_ref, rounded * scale.astype(dtype).astype(jnp.float32), offset=offset)

    def row(features):
        return pl.BlockSpec((None, features), lambda t, g: (t, 0))

    return pl.pallas_call(
        body,
        grid=(tokens, 1),
        in_specs=[pl.BlockSpec(scale.shape, lambda t, g: (0,)), *(row(part.shape[1]) for part in parts)],
        out_specs=row(features),
        out_shape=jax.ShapeDtypeStruct((tokens, features), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=warps_for(features, 16), num_stages=1),
        interpret=interpret,
        name="rms_norm_of_parts",
    )(scale, *parts)


def backward(
    parts: Sequence[jax.Array],
    scale: jax.Array,
    dout: jax.Array,
    passed: jax.Array | None = None,
    *,
    eps: float,
    interpret: bool,
) -> tuple[list[jax.Array], jax.Array]:
    """The gradients of `parts`, in their dtypes, to the first of which `passed` (t,d_1) is added; and that of scale
    (d,), in float32, to be added over blocks of tokens: (blocks,d)."""
    tokens, features = dout.shape
    stretch = _tokens_per_program(tokens)
    blocks = pl.cdiv(tokens, stretch)
    rows = [*parts, dout, *([] if passed is None else [passed])]
    dout_dtype = dout.dtype
    arithmetic = Arithmetic.of(dout_dtype, interpret=interpret)

    def body(scale_ref, *refs):
        row_refs, dx_refs, dscale_ref = refs[: len(rows)], refs[len(rows) : -1], refs[-1]
        vector = _Token(parts, eps)
        scale = vector.load_scale(scale_ref)
        first = pl.program_id(0) * stretch
        last = jnp.minimum(first + stretch, tokens)

        def read(token):
            token = jnp.minimum(token, last - 1)
            xs = [group.read(ref, token) for group, ref in zip(vector.groups, row_refs, strict=False)]
            douts = [
                group.read(row_refs[len(parts)], token, offset=offset)
                for group, offset in zip(vector.groups, vector.offsets, strict=True)
            ]
            return xs, douts, [vector.groups[0].read(ref, token) for ref in row_refs[len(parts) + 1 :]]

        def one(token, carry):
            dscale, under_way = carry
            [now, *under_way] = [*under_way, read(token + AHEAD)]
            xs, douts, passed = jax.tree.map(lambda value: value.astype(jnp.float32), now)
            inverse = vector.inverse_rms(xs)
            normed = [x * inverse for x in xs]
            dnormed = [dout * part for dout, part in zip(douts, scale, strict=True)]
            mean = vector.mean_of_products(dnormed, normed)
            for index, (group, ref) in enumerate(zip(vector.groups, dx_refs, strict=True)):
                dx = inverse * (dnormed[index] - normed[index] * mean)
                group.store(ref, sum(passed, dx) if index == 0 else dx, token)
            dscale = [
                arithmetic.multiply_add(dout, arithmetic.rounded_to(dout_dtype, value), total)
                for total, dout, value in zip(dscale, douts, normed, strict=True)
            ]
            return dscale, under_way

        start = [jnp.zeros_like(part) for part in scale], [read(first + ahead) for ahead in range(AHEAD)]
        dscale, _ = jax.lax.fori_loop(first, last, one, start)
        for group, offset, total in zip(vector.groups, vector.offsets, dscale, strict=True):
            group.store(dscale_ref, total, offset=offset)

    def whole(array):
        return pl.BlockSpec(array.shape, lambda t, g: (0,) * array.ndim)

    *dparts, dscale = pl.pallas_call(
        body,
        grid=(blocks, 1),
        in_specs=[whole(scale), *map(whole, rows)],
        out_specs=[*map(whole, parts), pl.BlockSpec((None, features), lambda t, g: (t, 0))],
        out_shape=[
            *(jax.ShapeDtypeStruct(part.shape, part.dtype) for part in parts),
            jax.ShapeDtypeStruct((blocks, features), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=warps_for(max(part.shape[1] for part in parts), 8), num_stages=1
        ),
        interpret=interpret,
        name="rms_norm_backward",
    )(scale, *rows)
    return dparts, dscale


def _tokens_per_program(tokens: int) -> int:
    rounds = pl.cdiv(tokens, _PROGRAMS * _MOST_TOKENS)
    return max(_FEWEST_TOKENS, pl.cdiv(tokens, _PROGRAMS * rounds))
