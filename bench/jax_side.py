"""Our side of every case, as a user would run it: weights on the device, programs jitted over flat weights."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.cases import Case
from bench.models import random_model
from bench.sizes import config_of, scale_of
from bench.timing import Samples, time_runs, time_steps
from bench.worker import HostMemory
from zamba2_jax import Zamba2ForCausalLM
from zamba2_jax.cache import Zamba2Cache
from zamba2_jax.compilation import for_many_tokens
from zamba2_jax.ops.conv import causal_conv
from zamba2_jax.ops.ssd import ssd

# How many tokens both of two `generate` calls make; the longer makes `Scale.new_tokens` more.
FEW = 8
# Steps of one timed run against a long context.
_STEPS = 32


def describe() -> dict[str, Any]:
    """The device that JAX takes and the versions of what runs on it."""
    import flax
    import jaxlib

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "memory_bytes": stats.get("bytes_limit"),
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": flax.__version__},
    }


def ceilings(size: str) -> dict[str, float | str]:
    """Bytes per second of a copy on the device (read and written) and from the host, operations per second of a square
    matrix product."""
    scale = scale_of(size)
    dtype = jnp.dtype(scale.dtype)
    words = jax.jit(lambda: jax.random.bits(jax.random.key(0), (scale.copy_bytes // 4,), jnp.uint32))()
    copy = jax.jit(lambda x: x + jnp.uint32(1))
    copying = time_runs(lambda: copy(words), jax.block_until_ready).summary()["seconds"]

    n = scale.matmul_size
    draw = jax.jit(lambda key: jax.random.normal(key, (n, n), dtype))
    one, other = draw(jax.random.key(1)), draw(jax.random.key(2))
    product = jax.jit(jnp.dot)
    multiplying = time_runs(lambda: product(one, other), jax.block_until_ready).summary()["seconds"]

    host = np.random.default_rng(0).integers(0, 255, scale.copy_bytes, np.uint8)
    sending = time_runs(lambda: jax.device_put(host, may_alias=False), jax.block_until_ready).summary()["seconds"]
    return {
        "copy_bytes_per_second": 2 * words.nbytes / copying,
        "matmul_flops_per_second": 2 * n**3 / multiplying,
        "matmul_dtype": scale.dtype,
        "host_to_device_bytes_per_second": host.nbytes / sending,
    }


def run_case(case: dict[str, Any], new_tokens: int, checkpoint: str | None = None) -> dict[str, Any]:
    """Runs one case.

    Returns:
        `Samples.summary()`, "peak_bytes", and "peak_is_bound": True where the process had needed as much before, so
        that this case's own peak is at most that.

    Raises:
        Whatever the case raises.
    """
    case = Case(**case)
    gc.collect()
    memory = DeviceMemory()
    samples = _RUN[case.kind](case, new_tokens, checkpoint)
    return samples.summary() | memory.peak()


def write_checkpoint(size: str, path: str) -> None:
    """Random weights of a size, as a safetensors checkpoint."""
    _model(size).save_pretrained(path)


class DeviceMemory:
    """Peak of the device's allocator, which cannot be reset; on a CPU, of the process."""

    def __init__(self) -> None:
        self._device = jax.devices()[0]
        self._before = (self._device.memory_stats() or {}).get("peak_bytes_in_use")
        self._host = HostMemory() if self._before is None else None

    def peak(self) -> dict[str, Any]:
        if self._host is not None:
            return {"peak_bytes": self._host.peak_bytes(), "peak_is_bound": not self._host.exact}
        after = self._device.memory_stats()["peak_bytes_in_use"]
        return {"peak_bytes": after, "peak_is_bound": after == self._before}


# ---- the model ----


_MODELS: dict[tuple[str, str | None], Zamba2ForCausalLM] = {}


def _model(size: str, quantize: str | None = None) -> Zamba2ForCausalLM:
    if (size, quantize) not in _MODELS:
        _MODELS.clear()  # one at a time in memory
        _MODELS[size, quantize] = random_model(config_of(size), scale_of(size).dtype, quantize)
    return _MODELS[size, quantize]


def _flat(model: Zamba2ForCausalLM) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Zamba2ForCausalLM]]:
    """The arrays, and the model made of such arrays again: what a jitted function takes and what it calls."""
    graph, state = nnx.split(model)
    leaves, treedef = jax.tree.flatten(state)
    return leaves, lambda leaves: nnx.merge(graph, treedef.unflatten(leaves))


def _ids(case: Case) -> np.ndarray:
    vocab_size = config_of(case.size).vocab_size
    return np.random.default_rng(case.length).integers(3, vocab_size, (case.batch, case.length), np.int32)


# ---- the cases ----


def _decode(case: Case, new_tokens: int, _: str | None) -> Samples:
    model, ids = _model(case.size, case.quantize), _ids(case)
    # Both calls must fall into one class of texts, or two programs would be compared.
    return time_steps(lambda count: model.generate(ids, max_new_tokens=count, min_new_tokens=count), FEW, new_tokens)


def _prefill(case: Case, _: int, __: str | None) -> Samples:
    leaves, build = _flat(_model(case.size))
    ids = jnp.asarray(_ids(case))

    @functools.partial(jax.jit, compiler_options=for_many_tokens())
    def prefill(leaves: list[jax.Array], ids: jax.Array) -> tuple[jax.Array, Zamba2Cache]:
        outputs = build(leaves)(ids, use_cache=True, cache_length=case.length, logits_to_keep=1)
        return outputs.logits, outputs.past_key_values

    return time_runs(lambda: prefill(leaves, ids), jax.block_until_ready)


def _train(case: Case, _: int, __: str | None) -> Samples:
    model = _model(case.size)
    model.gradient_checkpointing_enable(case.remat or "none")
    leaves, build = _flat(model)
    ids = jnp.asarray(_ids(case))
    loss = jax.value_and_grad(lambda leaves, ids: build(leaves)(ids, labels=ids).loss)
    step = jax.jit(loss, compiler_options=for_many_tokens())
    return time_runs(lambda: step(leaves, ids), jax.block_until_ready)


def _context(case: Case, _: int, __: str | None) -> Samples:
    """Steps against a cache whose first slots are full; its size is that of the group's longest context, so that one
    program serves all and only what is filled differs."""
    model = _model(case.size)
    leaves, build = _flat(model)
    step = _context_program(case.size, build)
    slots = max(scale_of(case.size).contexts) + 2 * _STEPS
    cache = _full_cache(model, slots)
    filled = np.int32(case.length)

    def run() -> jax.Array:
        nonlocal cache
        token, cache = step(leaves, cache, filled)
        return token

    return time_runs(run, jax.block_until_ready).per(_STEPS)


_CONTEXT_PROGRAMS: dict[str, Callable[..., Any]] = {}


def _context_program(size: str, build: Callable[..., Any]) -> Callable[..., Any]:
    def steps(leaves: list[jax.Array], cache: Zamba2Cache, filled: jax.Array) -> tuple[jax.Array, Zamba2Cache]:
        model = build(leaves)
        cache = dataclasses.replace(
            cache,
            length=filled,
            slot_mask=jnp.arange(cache.max_length)[None] < filled,
            next_position=jnp.full((1,), filled),
        )

        def step(_: jax.Array, carry: tuple[jax.Array, Zamba2Cache]) -> tuple[jax.Array, Zamba2Cache]:
            token, cache = carry
            outputs = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return jnp.argmax(outputs.logits, -1).astype(jnp.int32), outputs.past_key_values

        return jax.lax.fori_loop(0, _STEPS, step, (jnp.ones((1, 1), jnp.int32), cache))

    if size not in _CONTEXT_PROGRAMS:
        _CONTEXT_PROGRAMS[size] = jax.jit(steps, donate_argnums=1)
    return _CONTEXT_PROGRAMS[size]


def _full_cache(model: Zamba2ForCausalLM, slots: int) -> Zamba2Cache:
    """A cache whose keys and values are random numbers; what was read to get them does not change the time."""

    @jax.jit
    def fill() -> Zamba2Cache:
        cache = model.init_cache(1, slots)
        key = jax.random.key(0)
        attention = jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape, leaf.dtype), cache.attention)
        return dataclasses.replace(cache, attention=attention)

    return fill()


def _ssd(case: Case, _: int, __: str | None) -> Samples:
    config, dtype = config_of(case.size), jnp.dtype(scale_of(case.size).dtype)
    shape = (case.batch, case.length)
    heads, groups, states = config.n_mamba_heads, config.mamba_ngroups, config.mamba_d_state

    @jax.jit
    def inputs(key: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(key, 5)
        wide = (*shape, heads, config.mamba_headdim)
        return [
            jax.random.normal(keys[0], wide, dtype),
            jax.nn.softplus(jax.random.normal(keys[1], (*shape, heads)) - 4.0),
            -jnp.arange(1.0, heads + 1.0),
            jax.random.normal(keys[2], (*shape, groups, states), dtype),
            jax.random.normal(keys[3], (*shape, groups, states), dtype),
            jnp.ones((heads,)),
            jax.random.normal(keys[4], wide, dtype),
        ]

    *arguments, cotangent = inputs(jax.random.key(0))

    def forward(*arguments: jax.Array) -> tuple[jax.Array, jax.Array]:
        return ssd(*arguments, chunk_size=config.chunk_size)

    return _time_op(lambda *arguments: forward(*arguments), arguments, cotangent, case.backward)


def _conv(case: Case, _: int, __: str | None) -> Samples:
    config, dtype = config_of(case.size), jnp.dtype(scale_of(case.size).dtype)
    channels = config.mamba_intermediate_size + 2 * config.mamba_ngroups * config.mamba_d_state

    @jax.jit
    def inputs(key: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(key, 4)
        shape = (case.batch, case.length, channels)
        return [
            jax.random.normal(keys[0], shape, dtype),
            jax.random.normal(keys[1], (config.mamba_d_conv, channels), dtype),
            jax.random.normal(keys[2], (channels,), dtype),
            jax.random.normal(keys[3], shape, dtype),
        ]

    *arguments, cotangent = inputs(jax.random.key(0))
    return _time_op(lambda *arguments: causal_conv(*arguments, activation="silu"), arguments, cotangent, case.backward)


def _time_op(
    op: Callable[..., tuple[jax.Array, jax.Array]], arguments: list[jax.Array], cotangent: jax.Array, backward: bool
) -> Samples:
    """Times an op that returns (y, final state), or that with the gradients of all its arguments."""

    @jax.jit
    def forward(*arguments: jax.Array) -> tuple[jax.Array, jax.Array]:
        return op(*arguments)

    @jax.jit
    def with_gradients(cotangent: jax.Array, *arguments: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        y, pull_back = jax.vjp(lambda *arguments: op(*arguments)[0], *arguments)
        return y, pull_back(cotangent)

    if backward:
        return time_runs(lambda: with_gradients(cotangent, *arguments), jax.block_until_ready)
    return time_runs(lambda: forward(*arguments), jax.block_until_ready)


def _first_token(case: Case, _: int, __: str | None) -> Samples:
    """One sample: it can happen only once in a process."""
    model = _model(case.size)
    jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    ids = _ids(case)
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=1)
    return Samples((time.perf_counter() - start,))


def _load(case: Case, _: int, checkpoint: str | None) -> Samples:
    dtype = scale_of(case.size).dtype
    return time_runs(
        lambda: Zamba2ForCausalLM.from_pretrained(checkpoint, dtype=dtype),
        lambda model: jax.block_until_ready(jax.tree.leaves(nnx.state(model))),
    )


_RUN: dict[str, Callable[[Case, int, str | None], Samples]] = {
    "decode": _decode,
    "prefill": _prefill,
    "train": _train,
    "context": _context,
    "ssd": _ssd,
    "conv": _conv,
    "first-token": _first_token,
    "load": _load,
}
