"""Compiles the kernels of the recurrence for an H100 on a machine without one, and shows what ptxas says of each:
registers, and what is spilled of them. 400 bytes a thread, where shared memory left them no cache, made one of them
half as slow again.

    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python tools/compile_for_hopper.py [--states 64]

It needs JAX 0.11 with its plugin for CUDA, and so Python 3.12: `pip install 'jax[cuda13]==0.11.*'` and this package.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

# Read when Mosaic is imported; ptxas writes to standard output.
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from zamba2_jax.ops.ssd import hopper_backward, hopper_forward

# What XLA asks of a GPU that is not there: an H100 SXM5.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072 clock_rate_ghz: 1.98
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "sm_90"
"""


def compile_for_hopper(function, *shapes):
    """`function`, compiled for arguments of these `jax.ShapeDtypeStruct`s."""
    [device, *_] = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices
    place = SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place), shapes)
    return jax.jit(function).lower(*arguments).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=128, help="state size (%(default)s)")
    n = parser.parse_args().states
    b, length, h, p = 4, 4096, 64, 64
    half = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    whole = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    x, steps, shared, D = half((b, length, h, p)), whole((b, h, length)), half((b, length, 1, n)), whole((h,))
    state, states = whole((b, h, p, n)), half((b, h, length // 64, p, n))
    compile_for_hopper(hopper_forward.forward, x, steps, (steps,), shared, shared, D, state)
    backward = functools.partial(hopper_backward.backward, heads=32)
    compile_for_hopper(backward, x, steps, (steps,), shared, shared, D, states, x, states)


if __name__ == "__main__":
    main()
