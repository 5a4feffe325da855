"""The models that are timed, and at which batches and lengths."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the peer's process reads this module and is to have no JAX in it
    from zamba2_jax import Zamba2Config

# The 1.2B shape made smaller, for CPUs: one shared block used twice, attention adapters, RoPE, heads of 64.
SMALL = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "num_hidden_layers": 16,
    "mamba_d_state": 128,
    "n_mamba_heads": 24,
    "num_attention_heads": 12,
    "adapter_rank": 64,
    "use_mem_rope": True,
    "use_shared_attention_adapter": True,
    "layers_block_type": ["hybrid" if index in (5, 11) else "mamba" for index in range(16)],
}
# As small as it can be with every part there: for tests of the bench itself.
TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "layers_block_type": ["mamba", "hybrid"],
    "mamba_d_state": 16,
    "n_mamba_heads": 4,
    "num_attention_heads": 4,
    "adapter_rank": 4,
    "use_mem_rope": True,
}
PUBLISHED = {"1.2b": "zamba2_1_2b", "2.7b": "zamba2_2_7b", "7b": "zamba2_7b"}
SIZES = (*PUBLISHED, "small", "tiny")

Shape = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Scale:
    """Batches and lengths of every group of cases, as (b, l).

    Attributes:
        dtype: of weights and computation.
        decode: b rows that continue a prompt of l tokens.
        prefill: one call that fills a cache.
        train: forward and backward, plain and by each policy of gradient checkpointing.
        ssd_batch, ssd_lengths: the recurrence and the convolution alone; each length at least twice an earlier one.
        contexts: tokens in the cache before the steps that are timed, one row.
        growth: twice the batch or the length of a case above, by kind.
        first_token: tokens of the prompt.
        new_tokens: (ours, peer's) by which the longer of two `generate` calls is longer. The peer's step is long, so
            that fewer of them are as exact.
        copy_bytes, matmul_size: of the measured ceilings.
    """

    dtype: str
    decode: tuple[Shape, ...]
    prefill: tuple[Shape, ...]
    train: tuple[Shape, ...]
    ssd_batch: int
    ssd_lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    growth: tuple[tuple[str, int, int], ...]
    first_token: int
    new_tokens: tuple[int, int]
    copy_bytes: int
    matmul_size: int


FULL = Scale(
    dtype="bfloat16",
    decode=((1, 128), (8, 2048), (64, 512)),
    prefill=((1, 2048), (1, 8192), (8, 2048), (1, 32768)),
    train=((1, 4096), (4, 4096)),
    ssd_batch=4,
    ssd_lengths=(1024, 2048, 4096, 8192),
    contexts=tuple(1024 << step for step in range(8)),
    growth=(("decode", 16, 2048), ("prefill", 1, 16384), ("train", 2, 4096)),
    first_token=128,
    new_tokens=(128, 16),
    copy_bytes=1 << 30,
    matmul_size=8192,
)
ON_CPU = Scale(
    dtype="float32",
    decode=((1, 128), (4, 128)),
    prefill=((1, 128), (1, 512), (1, 2048)),
    train=((1, 256), (2, 256)),
    ssd_batch=1,
    ssd_lengths=(256, 512, 1024, 2048),
    contexts=(1024, 2048, 4096, 8192),
    growth=(("decode", 8, 128), ("prefill", 1, 1024), ("train", 1, 512)),
    first_token=128,
    new_tokens=(32, 32),
    copy_bytes=1 << 28,
    matmul_size=2048,
)
QUICK = Scale(
    dtype="float32",
    decode=((1, 16),),
    prefill=((1, 64),),
    train=((1, 32),),
    ssd_batch=1,
    ssd_lengths=(64, 128),
    contexts=(64, 128),
    growth=(("prefill", 1, 128),),
    first_token=16,
    new_tokens=(64, 16),
    copy_bytes=1 << 24,
    matmul_size=256,
)


def config_of(size: str) -> Zamba2Config:
    """The config of one of `SIZES`."""
    from zamba2_jax import Zamba2Config

    if size in PUBLISHED:
        return getattr(Zamba2Config, PUBLISHED[size])()
    return Zamba2Config(**{"small": SMALL, "tiny": TINY}[size])


def scale_of(size: str) -> Scale:
    """What is timed with a model of this size."""
    return {"small": ON_CPU, "tiny": QUICK}.get(size, FULL)


def torch_config(size: str) -> dict[str, Any]:
    """Arguments of `transformers.Zamba2Config` for the same model."""
    values = config_of(size).to_dict()
    return {name: value for name, value in values.items() if name not in ("dtype", "torch_dtype", "model_type")}
