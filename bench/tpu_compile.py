"""Compiles one program for TPU chips and prints what came of it as a line of JSON; `bench.tpu` starts it.

`python -m bench.tpu_compile SIZE TOPOLOGY PROGRAM CHIPS HBM_BYTES`
"""

from __future__ import annotations

import json
import sys
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.sizes import config_of
from zamba2_jax import Zamba2ForCausalLM
from zamba2_jax.compiled_program import kernels, program_bytes, refusal
from zamba2_jax.sharding import param_shardings
from zamba2_jax.tpu_slices import devices

_SLOTS = 4096
_PROMPT = 2048
_TRAINED = 4096


def main() -> None:
    size, topology, program, chips, hbm = sys.argv[1:]
    mesh = Mesh(np.array(devices(topology)[: int(chips)]), ("fsdp",))
    print(json.dumps(compile_program(size, program, mesh, float(hbm))))


def compile_program(size: str, program: str, mesh: Mesh, hbm: float) -> dict[str, Any]:
    """Compiles; returns "status" ("ok", "does not fit" or "error"), "seconds", "bytes" per chip, "kernels", "error"."""
    training = program == "train"
    key = jax.random.key(0)
    rngs = types.SimpleNamespace(params=lambda: key)  # shapes do not depend on it
    model = nnx.eval_shape(lambda: _model(size, program, rngs))
    if training:
        model.gradient_checkpointing_enable()
        model.scan_layers_enable()
    graph, state = nnx.split(model)
    state = _on_mesh(state, model, mesh)

    def logits_and_cache(state: nnx.State, ids: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        outputs = nnx.merge(graph, state)(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return outputs.logits, outputs.past_key_values

    def prompt(state: nnx.State, ids: jax.Array) -> tuple[jax.Array, Any]:
        outputs = nnx.merge(graph, state)(ids, use_cache=True, cache_length=_PROMPT, logits_to_keep=1)
        return outputs.logits, outputs.past_key_values

    def loss(state: nnx.State, ids: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(ids, labels=ids).loss

    replicated, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("fsdp"))
    if training:
        gradient_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        function = jax.jit(jax.value_and_grad(loss), out_shardings=(replicated, gradient_shardings))
        arguments = (state, jax.ShapeDtypeStruct((mesh.size, _TRAINED), jnp.int32, sharding=rows))
        resident = 2 * _bytes_per_chip(state)
    elif program == "prefill":
        function = jax.jit(prompt)
        arguments = (state, jax.ShapeDtypeStruct((1, _PROMPT), jnp.int32, sharding=replicated))
        resident = _bytes_per_chip(state)
    else:
        cache = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
            jax.eval_shape(lambda: model.init_cache(1, _SLOTS)),
        )
        function = jax.jit(logits_and_cache, donate_argnums=2)
        arguments = (state, jax.ShapeDtypeStruct((1, 1), jnp.int32, sharding=replicated), cache)
        resident = _bytes_per_chip(state)

    nothing = {"seconds": None, "bytes": None, "kernels": {}, "error": None}
    if resident > hbm:
        error = "parameters" + (" and gradients" if training else "") + " alone are more; not compiled"
        return nothing | {"status": "does not fit", "bytes": resident, "error": error}
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = function.lower(*arguments).compile()
    except Exception as error:  # whatever the compiler says is the result
        seconds, text = time.perf_counter() - start, " ".join(str(error).split())
        if (refused := refusal(text)) is not None:
            bytes_and_error = {"bytes": refused.needed_bytes, "error": refused.text}
            return nothing | {"status": "does not fit", "seconds": seconds} | bytes_and_error
        return nothing | {"status": "error", "seconds": seconds, "error": f"{type(error).__name__}: {text[:600]}"}
    return nothing | {
        "status": "ok",
        "seconds": time.perf_counter() - start,
        "bytes": program_bytes(compiled.memory_analysis()),
        "kernels": kernels(compiled.as_text()),
    }


def _model(size: str, program: str, rngs: Any) -> Zamba2ForCausalLM:
    param_dtype = jnp.float32 if program == "train" else jnp.bfloat16
    model = Zamba2ForCausalLM(config_of(size), dtype=jnp.bfloat16, param_dtype=param_dtype, rngs=rngs)
    if program == "decode-int8":
        from zamba2_jax.quantization import quantize

        model = quantize(model, "int8")
    return model


def _on_mesh(state: nnx.State, model: Zamba2ForCausalLM, mesh: Mesh) -> nnx.State:
    """The abstract state with the shardings of `zamba2_jax.sharding`; what is no parameter goes to every chip."""
    shardings = dict(nnx.to_flat_state(param_shardings(nnx.state(model, nnx.Param), mesh)))
    leaves = dict(nnx.to_flat_state(state))
    for path, leaf in leaves.items():
        sharding = shardings.get(path, NamedSharding(mesh, PartitionSpec()))
        if isinstance(sharding, nnx.Variable):
            sharding = sharding.get_value()
        leaf.set_value(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding))
    return nnx.from_flat_state(leaves.items())


def _bytes_per_chip(tree: Any) -> int:
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


if __name__ == "__main__":
    main()
