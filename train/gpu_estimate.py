"""How much memory a training step takes on GPUs, by a formula: nothing is compiled, so it is an estimate.

    parameters, optimiser   as they are stored: 4 bytes and 8 for each trained one on the device
    gradient                4 bytes for each trained one: all are there when their norm is taken
    weights in use          copies in the dtype of computation of one layer's, or, when layers are scanned, of all
    kept activations        what the backward pass finds of the forward one, by the policy of gradient checkpointing
    working activations     of one layer, and as many gradients, in the backward pass
    loss                    the scores of one block of tokens; of a head that is trained its gradient, of one that is
                            integers a copy in the dtype of computation

Letters: d hidden, E the width inside a mamba layer, g groups, n state, h heads, a and c the widths of queries and keys,
i the MLP's width, v vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from zamba2_jax import Zamba2Config

# Bytes of memory, and what JAX calls them (for `train.metrics.peak_operations`).
GPUS = {
    "a100": (80e9, "NVIDIA A100"),
    "a100-40gb": (40e9, "NVIDIA A100"),
    "h100": (80e9, "NVIDIA H100"),
    "h200": (141e9, "NVIDIA H200"),
    "b200": (180e9, "NVIDIA B200"),
    "l4": (24e9, "NVIDIA L4"),
    "l40s": (48e9, "NVIDIA L40S"),
    "rtx3090": (24e9, "NVIDIA GeForce RTX 3090"),
    "rtx4090": (24e9, "NVIDIA GeForce RTX 4090"),
}
PREALLOCATED = 0.75  # of a GPU's memory, JAX's default; XLA_PYTHON_CLIENT_MEM_FRACTION changes it
_SCORES = 1 << 26  # in a block of the loss, see zamba2_jax.ops.blocked_cross_entropy
_FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a device has of a part of a batch, and how it computes.

    Attributes:
        tokens: number of tokens on the device.
        itemsize: bytes of a number in the dtype of computation.
        policy: of gradient checkpointing.
        scan: whether layers are scanned.
        tensor: over how many devices heads, widths and vocabulary are split.
        trains_head: whether embedding and head are trained.
        widens_head: whether the head is of integers.
    """

    tokens: int
    itemsize: int
    policy: str
    scan: bool
    tensor: int
    trains_head: bool
    widens_head: bool


def working_bytes(config: Zamba2Config, rows: Rows, *, weights: Mapping[str, int]) -> dict[str, float]:
    """Bytes on a device beside parameters, optimiser and batch, by kind.

    Args:
        weights: bytes on the device of the trained parameters in float32, "trained", and of all in the dtype of
            computation, or as integers, "cast".
    """
    layer, use = _layer(config, rows), _use(config, rows)
    layers, uses, d = config.num_hidden_layers, config.num_hybrid_layers, config.hidden_size
    # The input of each layer, which is its use's too; what attention, MLP and matrix of a use result in; the embedding,
    # and the last layer's result. (All that is kept of the last layer is among its own working activations.)
    kept = (layers + 3 * uses + 2) * d * rows.itemsize
    if rows.policy in ("attention", "projections"):
        kept += uses * use["attention"]
    if rows.policy == "projections":
        kept += layers * layer["products"] + uses * use["products"]
    elif rows.policy == "none":
        kept += layers * layer["all"] + uses * (use["attend"] + use["feed forward"])
    working = 2 * max(layer["all"], *((use["attend"], use["feed forward"]) if uses else ()))
    block = min(rows.tokens * config.vocab_size, _SCORES) / rows.tensor
    head = config.vocab_size * d / rows.tensor * (_FLOAT32 * rows.trains_head + rows.itemsize * rows.widens_head)
    gathered = rows.itemsize * max(_layer_weights(config), _use_weights(config) if uses else 0) / rows.tensor
    return {
        "gradient": weights["trained"],
        "weights in use": weights["cast"] + gathered if rows.scan else 2 * gathered,
        "kept activations": kept * rows.tokens,
        "working activations": working * rows.tokens,
        # Scores and their exponentials in float32, the slope in the dtype of computation; the slope of the states.
        "loss": block * (2 * _FLOAT32 + rows.itemsize) + head + rows.tokens * d * rows.itemsize,
    }


def _layer(config: Zamba2Config, rows: Rows) -> dict[str, float]:
    """Bytes a token of what a mamba layer makes: the "products" that the policy keeps, and "all"."""
    s, t = rows.itemsize, rows.tensor
    d, E, h = config.hidden_size, config.mamba_intermediate_size / t, config.n_mamba_heads / t
    bc = 2 * config.mamba_ngroups * config.mamba_d_state
    states = E * config.mamba_d_state / config.chunk_size * _FLOAT32
    products = s * (2 * E + bc + h)
    # The normed input; x, B and C convolved; dt; the recurrence's result; the gated norm's.
    return {"products": products, "all": products + s * (d + E + bc + 2 * E) + _FLOAT32 * h + states}


def _use(config: Zamba2Config, rows: Rows) -> dict[str, float]:
    """The same of a use of a shared block, by its halves "attend" and "feed forward", and what the policy "attention"
    keeps."""
    s, t = rows.itemsize, rows.tensor
    d, i = config.hidden_size, config.intermediate_size / t
    a = config.num_attention_heads * config.attention_head_dim / t
    c = config.num_key_value_heads * config.attention_head_dim / t
    rotated = (a + c) if config.use_mem_rope else 0
    # The result, the normalisers of its softmax, and the queries.
    attention = s * 2 * a + _FLOAT32 * config.num_attention_heads / t
    return {
        "attention": attention,
        # Beside the queries, which "attention" counts.
        "products": s * (2 * c + d + 2 * i + d),
        # The normed concatenation, keys, values, what is rotated, the result.
        "attend": s * (2 * d + 2 * c + rotated + d) + attention,
        # The normed input, gate and up, their product, the result, the use's output.
        "feed forward": s * (d + 2 * i + i + d + d),
    }


def _layer_weights(config: Zamba2Config) -> float:
    d, E = config.hidden_size, config.mamba_intermediate_size
    return d * (3 * E + 2 * config.mamba_ngroups * config.mamba_d_state + config.n_mamba_heads)


def _use_weights(config: Zamba2Config) -> float:
    d = config.hidden_size
    a = config.num_attention_heads * config.attention_head_dim
    c = config.num_key_value_heads * config.attention_head_dim
    return 2 * d * (a + 2 * c) + a * d + 3 * d * config.intermediate_size + d * d


def usable(name: str) -> tuple[float, float]:
    """Bytes of memory of the GPU `name`, and those that JAX takes by default.

    Raises:
        ValueError: it is not in the table.
    """
    if name not in GPUS:
        raise ValueError(f"there is no GPU {name!r} in the table; there are {', '.join(GPUS)}.")
    return GPUS[name][0], math.floor(PREALLOCATED * GPUS[name][0])
