"""Options for XLA's compilers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from zamba2_jax.ops._platform import platform


def for_many_tokens() -> dict[str, bool] | None:
    """`compiler_options` of `jax.jit` for a program whose matrix products have hundreds of rows: a prompt's, a training
    step's. None where the compiler's own choices are good.

    On GPUs: products by cuBLAS alone. XLA would generate kernels of its own for them in Triton too, time both and take
    the faster, and merge products for that. On an H100 the programs so made were slower (1.2B shape: 16,384 tokens in
    118.7 ms instead of 112.0) and took twice as long to compile. A decoding step of a few rows is the other way round.
    """
    return {"xla_gpu_enable_triton_gemm": False} if platform() == "gpu" else None


def jit_many_tokens(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit(function, **options)` with `for_many_tokens()`, which is asked at the first call: importing a module
    must not start a backend."""

    @functools.cache
    def jitted(_: str) -> Callable[..., Any]:
        return jax.jit(function, compiler_options=for_many_tokens(), **options)

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return jitted(platform())(*arguments, **named)

    call.lower = lambda *arguments, **named: jitted(platform()).lower(*arguments, **named)
    call._cache_size = lambda: jitted(platform())._cache_size()
    return call
