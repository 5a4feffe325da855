"""The backward pass of RMSNorm in one kernel, for NVIDIA GPUs (Pallas, Triton backend).

A program walks some tokens and holds one of them in registers, as in `gated_norm_gpu`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from zamba2_jax.ops.gated_norm_gpu import AHEAD, TOKENS, Group, warps_for


def backward(
    x: jax.Array,
    scale: jax.Array,
    dout: jax.Array,
    passed: jax.Array | None = None,
    *,
    eps: float,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """The gradient of x (t,d), to which `passed` (t,d) is added, in x.dtype; and that of scale (d,), in float32, to be
    added over blocks of tokens: (blocks,d)."""
    tokens, features = x.shape
    blocks = pl.cdiv(tokens, TOKENS)
    rows = [x, dout] if passed is None else [x, dout, passed]

    def body(scale_ref, *refs):
        row_refs, (dx_ref, dscale_ref) = refs[: len(rows)], refs[len(rows) :]
        group = Group(features, eps)
        scale = group.load(scale_ref)
        first = pl.program_id(0) * TOKENS
        last = jnp.minimum(first + TOKENS, tokens)

        def read(token):
            token = jnp.minimum(token, last - 1)
            return [group.read(ref, token) for ref in row_refs]

        def one(token, carry):
            dscale, under_way = carry
            [now, *under_way] = [*under_way, read(token + AHEAD)]
            x, dout, *passed = (value.astype(jnp.float32) for value in now)
            inverse = group.inverse_rms(x)
            normed = x * inverse
            dnormed = dout * scale
            dx = inverse * (dnormed - normed * group.mean(dnormed * normed))
            group.store(dx_ref, sum(passed, dx), token)
            return dscale + dout * normed.astype(dout_dtype).astype(jnp.float32), under_way

        start = jnp.zeros_like(scale), [read(first + ahead) for ahead in range(AHEAD)]
        dscale, _ = jax.lax.fori_loop(first, last, one, start)
        group.store(dscale_ref, dscale)

    def whole(array):
        return pl.BlockSpec(array.shape, lambda t, g: (0,) * array.ndim)

    dout_dtype = dout.dtype
    return pl.pallas_call(
        body,
        grid=(blocks, 1),
        in_specs=[whole(scale), *map(whole, rows)],
        out_specs=[whole(x), pl.BlockSpec((None, features), lambda t, g: (t, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((blocks, features), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=warps_for(features, 8), num_stages=1),
        interpret=interpret,
        name="rms_norm_backward",
    )(scale, *rows)
