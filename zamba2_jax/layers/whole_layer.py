"""One decoding step of whole mamba layers in one launch each, for one sequence on a Hopper GPU, and of what follows the
attention of a shared block in another.

A layer leaves its sum to the next one, so what passes between them is an `Unsummed`; `summed` makes a stream of it
where something else reads it. The plain form is the layer itself; `decoding` has the one for more rows and other GPUs.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zamba2_jax.cache import KeyValue, MambaState
from zamba2_jax.layers import decoding
from zamba2_jax.layers.quantized import QuantizedLinear
from zamba2_jax.ops._platform import compute_capability
from zamba2_jax.ops.decode import rows_gpu
from zamba2_jax.ops.decode.strips_gpu import Weight
from zamba2_jax.tokens import TokenLayout

if TYPE_CHECKING:
    from zamba2_jax.layers.mamba2 import MambaLayer
    from zamba2_jax.layers.norms import RMSNorm
    from zamba2_jax.layers.shared_block import AttentionContext, SharedBlockUse, SharedTransformerBlock
    from zamba2_jax.ops.decode.layer_gpu import Unsummed

# The first JAX with the interface that the kernel is written for.
OLDEST_JAX = (0, 11, 0)


def obstacle(layer: MambaLayer, layout: TokenLayout, state: MambaState) -> str | None:
    """Why `step` cannot serve, or None where it can."""
    rows = state.ssm.shape[0]
    if rows != 1:
        return f"there are {rows} rows; it takes one"
    if (reason := decoding.mamba_obstacle(layer, rows)) is not None:
        return reason
    if layout.token_mask is not None:
        return "tokens may be masked"
    if jax.__version_info__ < OLDEST_JAX:
        return f"this is JAX {jax.__version__}; it takes {'.'.join(map(str, OLDEST_JAX))} or newer"
    if int(compute_capability()) != 9:
        return f"its matrix instructions are Hopper's, and this GPU has compute capability {compute_capability()}"
    return _layer_obstacle(layer, state)


def _layer_obstacle(layer: MambaLayer, state: MambaState) -> str | None:
    from zamba2_jax.ops.decode import layer_gpu  # takes a fifth of a second to import

    mixer, config = layer.mamba, layer.mamba.config
    kinds = {getattr(weight, "bits", None) for weight in (mixer.zx_proj, mixer.bc_proj, mixer.out_proj)}
    if 4 in kinds:
        return "weights are int4; it takes int8 and those of the compute dtype"
    if len(kinds) > 1 or isinstance(mixer.dt_proj, QuantizedLinear):
        return "some weights are integers; it takes all projections but the time steps', or none"
    if mixer.conv_x.bias is None or mixer.conv_bc.bias is None:
        return "the convolution has no bias"
    if state.conv_x.shape[1] != layer_gpu.TAPS:
        return f"the convolution reaches {state.conv_x.shape[1] + 1} tokens; it takes {layer_gpu.TAPS + 1}"
    dtypes = (state.conv_x.dtype, state.conv_bc.dtype, state.ssm.dtype)
    if dtypes != (mixer.dtype, mixer.dtype, jnp.float32):
        kept = ", ".join(jnp.dtype(dtype).name for dtype in dtypes)
        return f"the cache holds {kept}; it takes windows of the compute dtype and a state of float32"
    sizes = (config.n_mamba_heads, config.mamba_headdim, config.mamba_d_state, config.mamba_ngroups)
    if (reason := layer_gpu.shape_obstacle(config.hidden_size, *sizes)) is not None:
        return reason
    present, wanted = jax.devices()[0].core_count, layer_gpu.PROGRAMS
    if present < wanted:
        return f"it takes {wanted} multiprocessors at once, and this GPU has {present}"
    return None


def begin(layer: MambaLayer, hidden: Float[Array, "1 1 d"], before: Unsummed | None = None) -> Unsummed:
    """`hidden` as what `layer` takes; `before` is what the layer before it, if any, left."""
    from zamba2_jax.ops.decode.layer_gpu import Unsummed

    stream = Unsummed.of(hidden.reshape(-1), layer.mamba.config.mamba_intermediate_size)
    return stream if before is None else dataclasses.replace(stream, waits=before.waits)


def step(
    layer: MambaLayer, stream: Unsummed, transformer_output: Float[Array, "1 1 d"] | None, state: MambaState
) -> tuple[Unsummed, MambaState]:
    """`layer` for one token."""
    from zamba2_jax.ops.decode import layer_gpu

    mixer = layer.mamba
    both = state.conv_bc.shape[2] * state.conv_bc.shape[3]
    added = jnp.zeros_like(stream.hidden) if transformer_output is None else transformer_output.reshape(-1)
    stream, window_x, window_bc, ssm = layer_gpu.mamba_layer(
        stream,
        added,
        weights_of(layer),
        state.conv_x[0],
        state.conv_bc.reshape(-1, both),
        state.ssm[0],
        eps=layer.input_layernorm.eps,
        gate_eps=mixer.norm.eps,
        limit=mixer.config.time_step_limit,
    )
    return stream, MambaState(window_x[None], window_bc.reshape(state.conv_bc.shape), ssm[None])


def weights_of(layer: MambaLayer) -> dict[str, Weight]:
    """The layer's arrays by the names and in the shapes that `layer_gpu.mamba_layer` knows."""
    mixer, config = layer.mamba, layer.mamba.config
    inner = config.mamba_intermediate_size
    both = 2 * config.mamba_ngroups * config.mamba_d_state
    return {
        "norm": layer.input_layernorm.scale[...],
        "zx": decoding.operand(mixer.zx_proj),
        "bc": decoding.operand(mixer.bc_proj),
        "dt": mixer.dt_proj.kernel[...],
        "kernel_x": mixer.conv_x.kernel[...].reshape(-1, inner),
        "bias_x": mixer.conv_x.bias[...].reshape(inner),
        "kernel_bc": mixer.conv_bc.kernel[...].reshape(-1, both),
        "bias_bc": mixer.conv_bc.bias[...].reshape(both),
        "dt_bias": mixer.dt_bias[...],
        "A_log": mixer.A_log[...],
        "D": mixer.D[...],
        "gate_norm": mixer.norm.scale[...],
        "out": decoding.operand(mixer.out_proj),
    }


def shared_block_obstacle(block: SharedTransformerBlock, use: SharedBlockUse) -> str | None:
    """Why `shared_block_step` cannot serve where `step` can, or None where it can."""
    from zamba2_jax.ops.decode import feed_forward_gpu

    if (reason := decoding.shared_block_obstacle(block, use, 1)) is not None:
        return reason
    o_proj, mlp = block.self_attn.o_proj, block.feed_forward
    if any(isinstance(weight, QuantizedLinear) for weight in (o_proj, mlp.gate_up_proj, mlp.down_proj, use.linear)):
        return "weights are integers; it takes those of the compute dtype"
    inner, rank = mlp.down_proj.shape[0], use.gate_up_adapter.down.kernel.shape[1]
    return feed_forward_gpu.shape_obstacle(*o_proj.shape, inner, rank)


def shared_block_step(
    block: SharedTransformerBlock,
    normed: Float[Array, "1 2*d"],
    use: SharedBlockUse,
    context: AttentionContext,
    past: KeyValue,
    stream: Unsummed,
) -> tuple[Float[Array, "1 1 d"], KeyValue, Unsummed]:
    """`block` for one token, from its input norm on; `stream` is what the layer before has left, and lends counters."""
    from zamba2_jax.ops.decode import feed_forward_gpu

    mixed, past = decoding.shared_attention_step(block.self_attn, normed, use, context, past)
    pieces, waits = feed_forward_gpu.feed_forward(
        stream.waits,
        mixed[0],
        feed_forward_weights_of(block, use),
        eps=block.pre_ff_layernorm.eps,
        activation=block.feed_forward.activation,
    )
    output, _ = rows_gpu.join(pieces[:, None], dtype=mixed.dtype)
    return output[None], past, dataclasses.replace(stream, waits=waits)


def feed_forward_weights_of(block: SharedTransformerBlock, use: SharedBlockUse) -> dict[str, jax.Array]:
    """The arrays of block and use by the names and in the shapes that `feed_forward_gpu.feed_forward` knows."""
    mlp, adapter = block.feed_forward, use.gate_up_adapter
    width, rank = adapter.down.kernel.shape
    return {
        "o": block.self_attn.o_proj.kernel[...],
        "norm": block.pre_ff_layernorm.scale[...],
        "gate_up": mlp.gate_up_proj.kernel[...].reshape(width, -1),
        "low": adapter.down.kernel[...],
        "added": adapter.up.kernel[...].reshape(rank, -1),
        "down": mlp.down_proj.kernel[...],
        "linear": use.linear.kernel[...],
    }


def summed(layer: MambaLayer, stream: Unsummed) -> Float[Array, "1 1 d"]:
    """The stream after `layer`, which has left `stream`."""
    return _join(layer, stream)[0][None]


def summed_and_normed(
    layer: MambaLayer, stream: Unsummed, norm: RMSNorm, beside: Float[Array, "1 1 m"]
) -> tuple[Float[Array, "1 1 d"], Float[Array, "1 d+m"]]:
    """`summed`, and `norm` of it with `beside` at its end."""
    total, normed = _join(layer, stream, scale=norm.scale[...], eps=norm.eps, beside=beside[0])
    return total[None], normed


def _join(layer: MambaLayer, stream: Unsummed, **finish: Any) -> tuple[Float[Array, "1 d"], Float[Array, "1 n"] | None]:
    mixer = layer.mamba
    return rows_gpu.join(
        stream.pieces[:, None],
        stream.squares.reshape(1, 1, 1),
        stream.hidden[None],
        width=mixer.config.mamba_intermediate_size,
        gate_eps=mixer.norm.eps,
        dtype=stream.hidden.dtype,
        **finish,
    )
