"""Compiles the 1.2B shape for one v5e chip with libtpu's compiler; no TPU is needed, `pip install libtpu` is."""

from __future__ import annotations

import importlib.util
import os
import sys
import time


def main() -> None:
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("the tpu case needs the TPU compiler: .venv/bin/python -m pip install libtpu")
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from zamba2_jax import Zamba2Config, Zamba2ForCausalLM

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = Mesh(np.array(devices[:1]), ("data",))

    def on_chip(tree: object) -> object:
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    model = nnx.eval_shape(lambda: Zamba2ForCausalLM(Zamba2Config.zamba2_1_2b(), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    cache = on_chip(jax.eval_shape(lambda: model.init_cache(1, 1024)))

    def step(state, ids, cache):
        outputs = nnx.merge(graphdef, state)(ids, past_key_values=cache, logits_to_keep=1)
        return outputs.logits, outputs.past_key_values

    def loss(state, ids, cache):
        return nnx.merge(graphdef, state)(ids, labels=ids).loss

    for name, function, length in (("decode step", step, 1), ("prefill call", step, 512), ("loss", loss, 512)):
        ids = on_chip(jax.ShapeDtypeStruct((1, length), jnp.int32))
        start = time.perf_counter()
        with jax.set_mesh(mesh):
            compiled = jax.jit(function).lower(on_chip(state), ids, cache).compile()
        memory = compiled.memory_analysis()
        print(
            f"{name:12s} {length:4d} tokens: compiled in {time.perf_counter() - start:5.1f} s, arguments "
            f"{memory.argument_size_in_bytes / 1e9:.2f} GB, temporary {memory.temp_size_in_bytes / 1e9:.2f} GB of a "
            f"chip's 16 GB, splash attention: {'splash' in compiled.as_text()}",
            flush=True,
        )
