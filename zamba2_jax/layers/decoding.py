"""One decoding step of whole layers in few launches, for a GPU. The plain form is the layer itself.

With few rows a step is one pass over the weights. Dozens of small operations per layer, each a launch, then cost more
than the pass: here a mamba layer is four launches (five after a shared block) and a use of a shared block twelve, and
one to join attention's parts. Weights are numbers of the compute dtype, int8 or int4. More rows leave the products to
XLA; what lies between a mixer's projections and its norm is two launches then.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from zamba2_jax.cache import KeyValue, MambaState
from zamba2_jax.layers.linear import DepthwiseConv, Embed, Linear
from zamba2_jax.layers.quantized import QuantizedEmbed, QuantizedLinear
from zamba2_jax.ops.decode import attention_gpu, products_gpu, rows_gpu, state_gpu, window_gpu
from zamba2_jax.ops.decode.cached_attention import cached_attention
from zamba2_jax.ops.decode.obstacles import no_single_gpu
from zamba2_jax.ops.decode.strips_gpu import Tiling, Weight
from zamba2_jax.ops.quantized import Integers
from zamba2_jax.tokens import TokenLayout

if TYPE_CHECKING:
    from zamba2_jax.layers.mamba2 import Mamba2Mixer, MambaLayer
    from zamba2_jax.layers.norms import RMSNorm
    from zamba2_jax.layers.shared_block import AttentionContext, SharedAttention, SharedBlockUse, SharedTransformerBlock

Matrix = Linear | QuantizedLinear

# Single products measured on an H200, of the 1.2B and the 7B shape: one row, and with int8 eight.
TILING = Tiling()
# Of weights that are large together.
WIDE = Tiling(columns=128, depth=64, warps=4, stages=5)
# Of weights that are cut along their depth.
DEEP = Tiling(columns=64, depth=128, warps=4, stages=3)
# Of integers, whichever.
INT8 = Tiling(columns=64, depth=256, warps=4, stages=3)
INT4 = Tiling(columns=32, depth=128, warps=2, stages=4)
# Fewer strips of int8 than this are cut in two: a strip takes half as long to read as one of other weights.
_FEW_STRIPS = 200
# Of an adapter, one tile deep: nothing to keep under way, so many small programs (4.3 us instead of 5.1).
SHALLOW = Tiling(columns=32, depth=128, warps=4, stages=2)
_HALF_PRECISION = (jnp.bfloat16, jnp.float16)
_INTEGERS = (jnp.int8, jnp.uint8)


def mamba_obstacle(layer: MambaLayer, rows: int, interpret: bool = False) -> str | None:
    """Why `mamba_layer_step` cannot serve, or None where it can."""
    mixer = layer.mamba
    if mixer.lora is not None:
        return "the mixer has a LoRA"
    if mixer.dtype == jnp.float16:
        return "the compute dtype is float16, which what goes to the output projection before its norm may exceed"
    weights = (mixer.zx_proj, mixer.bc_proj, mixer.dt_proj, mixer.out_proj)
    if (reason := _products_obstacle(weights, rows, interpret)) is not None:
        return reason
    group = _group(mixer.out_proj)
    if group is not None and (mixer.out_proj.shape[0] // mixer.config.mamba_ngroups) % group:
        return "groups of int4 reach from one group of the mixer's norm into the next"
    return recurrence_obstacle(mixer, interpret)


def mamba_layer_step(
    layer: MambaLayer,
    hidden: Float[Array, "b 1 d"],
    layout: TokenLayout,
    state: MambaState,
    transformer_output: Float[Array, "b 1 d"] | None,
    normed: Float[Array, "b d"] | None = None,
    following: RMSNorm | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b 1 d"], MambaState, Float[Array, "b d"] | None]:
    """`layer` for one token: norm; projections and convolution; state; output projection; sum.

    Args:
        normed: the layer's norm of `hidden`, where the layer before has made it.
        following: the norm that the next layer begins with, where it reads nothing but this one's output.

    Returns:
        The stream, the layer's next state, and `following` of the stream.
    """
    mixer = layer.mamba
    config = mixer.config
    rows = hidden.shape[0]
    both = 2 * config.mamba_ngroups * config.mamba_d_state
    residual = hidden[:, 0]
    if normed is None:
        norm = layer.input_layernorm
        added = [] if transformer_output is None else [transformer_output[:, 0]]
        normed = rows_gpu.rms_norm([[residual, *added]], norm.scale[...], eps=norm.eps, interpret=interpret)
    z, x, bc, dt, window_x, window_bc = products_gpu.mamba_projections(
        normed,
        operand(mixer.zx_proj),
        operand(mixer.bc_proj),
        operand(mixer.dt_proj),
        _convolution(mixer.conv_x, config.mamba_intermediate_size),
        _convolution(mixer.conv_bc, both),
        state.conv_x,
        state.conv_bc.reshape(rows, -1, both),
        mixer.dt_bias[...],
        _kept(layout),
        limit=config.time_step_limit,
        tiling=_tiling([mixer.zx_proj], TILING),
        interpret=interpret,
    )
    gated, ssm, squares = state_gpu.state_step(
        state.ssm,
        x,
        z,
        bc,
        dt,
        mixer.A_log[...],
        mixer.D[...],
        mixer.norm.scale[...],
        groups=config.mamba_ngroups,
        interpret=interpret,
    )
    out, normed = _deep_product(
        gated,
        mixer.out_proj,
        following,
        squares=squares,
        residual=residual,
        groups=config.mamba_ngroups,
        width=config.mamba_intermediate_size // config.mamba_ngroups,
        gate_eps=mixer.norm.eps,
        interpret=interpret,
    )
    return out[:, None], MambaState(window_x, window_bc.reshape(state.conv_bc.shape), ssm), normed


def recurrence_obstacle(mixer: Mamba2Mixer, interpret: bool = False) -> str | None:
    """Why `recurrence_step` cannot serve, or None where it can."""
    config = mixer.config
    for name, size in (("head dim", config.mamba_headdim), ("state size", config.mamba_d_state)):
        if size & (size - 1):
            return f"the {name} is {size}; it takes powers of two"
    return no_single_gpu(interpret, [mixer.A_log[...], mixer.conv_x.kernel[...]])


def recurrence_step(
    mixer: Mamba2Mixer,
    zx: Float[Array, "b 2 inner"],
    bc: Float[Array, "b 2 groups_state"],
    dt: Float[Array, "b h"],
    layout: TokenLayout,
    state: MambaState,
    interpret: bool = False,
) -> tuple[Float[Array, "b inner"], MambaState]:
    """What lies between a mixer's projections and its norm, for one token of any number of rows: two launches.

    Args:
        zx, bc, dt: of the projections; the gate is left to the norm.
    """
    config = mixer.config
    rows, inner = zx.shape[0], zx.shape[2]
    both = bc.shape[1] * bc.shape[2]
    x, bc, dt, window_x, window_bc = window_gpu.conv_step(
        zx.reshape(rows, 2 * inner),
        bc.reshape(rows, both),
        dt,
        _convolution(mixer.conv_x, inner),
        _convolution(mixer.conv_bc, both),
        state.conv_x,
        state.conv_bc.reshape(rows, -1, both),
        mixer.dt_bias[...],
        _kept(layout),
        offset=inner,
        limit=config.time_step_limit,
        interpret=interpret,
    )
    y, ssm = state_gpu.state_step(
        state.ssm,
        x,
        None,
        bc,
        dt,
        mixer.A_log[...],
        mixer.D[...],
        groups=config.mamba_ngroups,
        interpret=interpret,
    )
    return y, MambaState(window_x, window_bc.reshape(state.conv_bc.shape), ssm)


def _convolution(conv: DepthwiseConv, channels: int) -> tuple[jax.Array, jax.Array | None]:
    bias = None if conv.bias is None else conv.bias[...].reshape(channels)
    return conv.kernel[...].reshape(-1, channels), bias


def _kept(layout: TokenLayout) -> jax.Array | None:
    return None if layout.token_mask is None else layout.token_mask[:, 0].astype(jnp.int32)


def shared_block_obstacle(
    block: SharedTransformerBlock, use: SharedBlockUse, rows: int, interpret: bool = False
) -> str | None:
    """Why `shared_block_step` cannot serve, or None where it can."""
    attention, mlp = block.self_attn, block.feed_forward
    if mlp.activation not in products_gpu.ACTIVATIONS:
        return f"hidden_act is {mlp.activation!r}; it has {', '.join(products_gpu.ACTIVATIONS)}"
    adapters = (use.gate_up_adapter, use.q_adapter, use.k_adapter, use.v_adapter)
    if any(part is not None and part.lora is not None for part in (attention, mlp, use, *adapters)):
        return "the shared block or its use has a LoRA"
    weights = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    weights += [mlp.gate_up_proj, mlp.down_proj, use.linear, use.gate_up_adapter.down, use.gate_up_adapter.up]
    if use.q_adapter is not None:
        for adapter in (use.q_adapter, use.k_adapter, use.v_adapter):
            weights += [adapter.down, adapter.up]
    return _products_obstacle(weights, rows, interpret)


def shared_block_step(
    block: SharedTransformerBlock,
    hidden: Float[Array, "b 1 d"],
    embedded: Float[Array, "b 1 d"],
    use: SharedBlockUse,
    context: AttentionContext,
    past: KeyValue,
    normed: Float[Array, "b 2*d"] | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b 1 d"], KeyValue]:
    """`block` for one token of rows that continue from a cache.

    Args:
        normed: the block's norm of `hidden` beside `embedded`, where the layer before has made it.
    """
    rows = hidden.shape[0]
    if normed is None:
        norm, parts = block.input_layernorm, [[hidden[:, 0]], [embedded[:, 0]]]
        normed = rows_gpu.rms_norm(parts, norm.scale[...], eps=norm.eps, interpret=interpret)
    mixed, past = shared_attention_step(block.self_attn, normed, use, context, past, interpret)
    _, x = _deep_product(mixed, block.self_attn.o_proj, block.pre_ff_layernorm, interpret=interpret)
    mlp = block.feed_forward
    gate_up, low = products_gpu.skinny_matmul(
        x,
        [operand(mlp.gate_up_proj), operand(use.gate_up_adapter.down)],
        tiling=_tiling([mlp.gate_up_proj], WIDE),
        interpret=interpret,
    )
    x = products_gpu.gated_activation(
        gate_up,
        low,
        operand(use.gate_up_adapter.up),
        activation=mlp.activation,
        tiling=SHALLOW,
        interpret=interpret,
    )
    x, _ = _deep_product(x, mlp.down_proj, interpret=interpret)
    x, _ = _deep_product(x, use.linear, interpret=interpret)
    return x.reshape(rows, 1, -1), past


def shared_attention_step(
    attention: SharedAttention,
    normed: Float[Array, "b 2*d"],
    use: SharedBlockUse,
    context: AttentionContext,
    past: KeyValue,
    interpret: bool = False,
) -> tuple[Float[Array, "b a"], KeyValue]:
    """A shared block's attention for one token, from its norm on, without the output projection."""
    rows = normed.shape[0]
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    weights = [operand(projection) for projection in projections]
    up = None
    if use.q_adapter is not None:
        adapters = (use.q_adapter, use.k_adapter, use.v_adapter)
        weights += [operand(adapter.down) for adapter in adapters]
        up = tuple(operand(adapter.up) for adapter in adapters)
    tiling = _tiling(projections, WIDE)
    projected = products_gpu.skinny_matmul(normed, weights, tiling=tiling, interpret=interpret)
    query, key, value = attention_gpu.rotate_and_store(
        projected[:3],
        None if up is None else projected[3:],
        up,
        None if context.rotation is None else tuple(part[:, 0] for part in context.rotation),
        past.key,
        past.value,
        context.first_slot,
        interpret=interpret,
    )
    mixed = cached_attention(
        query.reshape(rows, -1, attention.config.attention_head_dim),
        key,
        value,
        context.slot_mask,
        context.first_slot + 1,
        scale=attention.scale,
        implementation="pallas_gpu" if interpret else None,
        interpret=interpret,
    )
    return mixed.reshape(rows, -1), KeyValue(key, value)


def head_obstacle(embedding: Embed | QuantizedEmbed, rows: int, interpret: bool = False) -> str | None:
    """Why `head_scores` cannot serve, or None where it can."""
    if type(embedding) not in (Embed, QuantizedEmbed):
        return f"the embedding is a {type(embedding).__name__}"
    integers = isinstance(embedding, QuantizedEmbed)
    most = products_gpu.MAX_ROWS if integers else products_gpu.MAX_HEAD_ROWS
    if rows > most:
        return f"there are {rows} rows; its kernel takes {most}"
    return _arrays_obstacle([embedding.values if integers else embedding.embedding], embedding.dtype, interpret)


def head_scores(
    embedding: Embed | QuantizedEmbed, hidden: Float[Array, "b 1 d"], interpret: bool = False
) -> Float[Array, "b 1 v"]:
    """`embedding.attend` for one token."""
    if isinstance(embedding, QuantizedEmbed):
        weight = Integers(embedding.values[...], embedding.scale[...])
        [scores] = products_gpu.skinny_matmul(hidden[:, 0], [weight], tiling=INT8, interpret=interpret)
    else:
        scores = products_gpu.head_matmul(hidden[:, 0], embedding.embedding[...], interpret=interpret)
    return scores[:, None]


def _deep_product(
    x: Float[Array, "b k"],
    weight: Matrix,
    norm: RMSNorm | None = None,
    *,
    groups: int = 1,
    interpret: bool,
    **finish: Any,
) -> tuple[Float[Array, "b n"], Float[Array, "b n"] | None]:
    """x W, W cut along its depth, what `rows_gpu.join` makes of the pieces with `finish`, and the norm of that."""
    matrix, tiling = operand(weight), _tiling([weight], DEEP, cut_along_depth=True)
    splits = products_gpu.depth_splits(matrix, tiling, groups)
    pieces = products_gpu.split_matmul(x, matrix, splits=splits, tiling=tiling, interpret=interpret)
    if norm is not None:
        finish |= {"scale": norm.scale[...], "eps": norm.eps}
    return rows_gpu.join(pieces, groups=groups, dtype=x.dtype, interpret=interpret, **finish)


def operand(weight: Matrix) -> Weight:
    """(in, out), as the kernels take it."""
    if isinstance(weight, QuantizedLinear):
        values, scale = weight.values[...], weight.scale[...]
        outputs = math.prod(weight.shape[1:])
        return Integers(values.reshape(outputs, -1), scale.reshape(outputs, *scale.shape[values.ndim - 1 :]))
    return weight.kernel[...].reshape(weight.shape[0], -1)


def _tiling(weights: Sequence[Matrix], plain: Tiling, *, cut_along_depth: bool = False) -> Tiling:
    """For the weights of one launch; `plain` where they are no integers."""
    if isinstance(weights[0], Linear):
        return plain
    if weights[0].bits == 4:
        return INT4
    outputs = sum(math.prod(weight.shape[1:]) for weight in weights)
    if cut_along_depth or outputs >= _FEW_STRIPS * INT8.columns:
        return INT8
    return dataclasses.replace(INT8, columns=INT8.columns // 2)


def _group(weight: Matrix) -> int | None:
    return weight.group if isinstance(weight, QuantizedLinear) else None


def _products_obstacle(weights: Sequence[Matrix], rows: int, interpret: bool) -> str | None:
    if others := {type(weight) for weight in weights} - {Linear, QuantizedLinear}:
        return f"a weight is a {others.pop().__name__}; it takes Linear and QuantizedLinear"
    groups = [group for group in map(_group, weights) if group is not None]
    if groups and min(groups) < products_gpu.SMALLEST_INT4_GROUP:
        return f"int4 in groups of {min(groups)}; it takes {products_gpu.SMALLEST_INT4_GROUP} and more"
    if any(weight.bias is not None for weight in weights):
        return "the projections have biases"
    if rows > products_gpu.MAX_ROWS:
        return f"there are {rows} rows; its products take up to {products_gpu.MAX_ROWS}"
    return _arrays_obstacle([weight.stored for weight in weights], weights[0].dtype, interpret)


def _arrays_obstacle(arrays: Sequence[nnx.Variable], dtype: jnp.dtype, interpret: bool) -> str | None:
    if dtype not in _HALF_PRECISION:
        return f"the compute dtype is {jnp.dtype(dtype).name}; it takes bfloat16 and float16"
    if any(array.dtype not in (dtype, *_INTEGERS) for array in arrays):
        return f"weights are not stored in the compute dtype, {jnp.dtype(dtype).name}"
    return no_single_gpu(interpret, [array[...] for array in arrays])
