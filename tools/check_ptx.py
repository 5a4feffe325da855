"""Compiles products of the decode kernels, with weights of every kind, and an adapter's for an H100; runs their PTX on
this machine (`ptx.py`); and compares with NumPy: what a GPU would compute, to the last instruction but ptxas's, without
one.

    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python tools/check_ptx.py

It needs JAX 0.11 with its plugin for CUDA, and so Python 3.12: `pip install 'jax[cuda13]==0.11.*'` and this package.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read when JAX makes its first backend.
os.environ["XLA_FLAGS"] = f"--xla_dump_to={tempfile.mkdtemp()} --xla_dump_emitter_re=.*"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from compile_for_hopper import compile_for_hopper
from jax._src.pallas.triton import gpu_info
from ptx import Kernel

from zamba2_jax.layers import decoding
from zamba2_jax.ops.decode import attention_gpu, products_gpu
from zamba2_jax.ops.decode.strips_gpu import Tiling
from zamba2_jax.ops.quantized import Integers, dequantize_int4, dequantize_int8, quantize_int4, quantize_int8

_DUMP = Path(re.search(r"--xla_dump_to=(\S+)", os.environ["XLA_FLAGS"])[1])
# Of the largest value: a bfloat16 result is rounded by 2^-9 of its own size.
CLOSE = 2**-7
ATTEMPTS = 4
H100 = gpu_info.GpuInfo(gpu_version=gpu_info.GpuVersion.H100, arch_name="sm_90a", compute_capability=90)


def ptx_of(function: Callable[..., Any], *arguments: Any) -> Kernel:
    """The only Triton kernel of `function`."""
    before = set(_DUMP.glob("*.ptx"))
    compile_for_hopper(function, *jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), arguments))
    [path] = [path for path in set(_DUMP.glob("*.ptx")) - before if ".entry" in path.read_text()]
    return Kernel(path.read_text())


def product(bits: int, rows: int, depth: int, columns: int, tiling: Tiling, splits: int | None = None) -> float:
    """How far x W is off, in parts of its largest value."""
    random = np.random.default_rng([bits, rows, depth, columns])
    x = random.normal(size=(rows, depth)).astype(jnp.bfloat16)
    weight, dense = _weight(bits, random.normal(size=(depth, columns)).astype(np.float32))
    inputs = [x, *map(np.asarray, jax.tree.leaves(weight))]
    if splits is None:
        kernel = ptx_of(lambda x, w: products_gpu.skinny_matmul(x, [w], tiling=tiling), x, weight)
        width = tiling.columns if columns >= 1024 else 16
        *_, got = kernel.run([*inputs, np.zeros((rows, columns), jnp.bfloat16)], (-(-columns // width), 1, 1))
    else:
        kernel = ptx_of(lambda x, w: products_gpu.split_matmul(x, w, splits=splits, tiling=tiling), x, weight)
        grid = (-(-columns // tiling.columns), splits, 1)
        *_, pieces = kernel.run([*inputs, np.zeros((splits, rows, columns), np.float32)], grid)
        got = pieces.sum(axis=0)
    return _off(got, x.astype(np.float64) @ dense)


def adapter(rank: int, rows: int) -> float:
    """How far query, key and value are off at most after `rotate_and_store` without a rotation."""
    random = np.random.default_rng([rank, rows])
    heads, head_dim, slots, slot = 4, 16, 12, 7

    def draw(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(jnp.bfloat16)

    width = heads * head_dim
    projected, low, up = ([draw(*s) for _ in range(3)] for s in ((rows, width), (rows, rank), (rank, width)))
    caches = [draw(rows, slots, heads, head_dim) for _ in range(2)]
    parts = (tuple(projected), tuple(low), tuple(up))
    kernel = ptx_of(
        lambda parts, caches, slot: attention_gpu.rotate_and_store(*parts, None, *caches, slot, interpret=False),
        parts,
        caches,
        np.int32(slot),
    )
    inputs = [np.array([slot], np.int32), *projected, *caches, *low, *up]
    *_, query, keys, values = kernel.run([*inputs, projected[0], *caches], (3 * heads, 1, 1))
    whole = [p.astype(np.float64) + a.astype(np.float64) @ b for p, a, b in zip(projected, low, up, strict=True)]
    got = [query, keys[:, slot].reshape(rows, width), values[:, slot].reshape(rows, width)]
    return max(map(_off, got, whole))


def _weight(bits: int, weight: np.ndarray) -> tuple[Any, np.ndarray]:
    if bits == 16:
        half = weight.astype(jnp.bfloat16)
        return half, half.astype(np.float64)
    quantize, dequantize = ((quantize_int8, dequantize_int8), (quantize_int4, dequantize_int4))[bits == 4]
    values, scale = quantize(weight, axis=0)
    return Integers(values, scale), np.asarray(dequantize(values, scale), np.float64).T


def _off(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got.astype(np.float64) - wanted).max() / np.abs(wanted).max())


def cases() -> dict[str, Callable[[], float]]:
    """Checks by name; each says how far its result is off."""
    found = {}
    for bits, tiling in ((16, decoding.TILING), (16, decoding.WIDE), (8, decoding.INT8), (4, decoding.INT4)):
        for shape in ((1, 256, 1100), (3, 512, 100), (16, 320, 1056)):
            found[f"{bits} bits, {shape}, {tiling}"] = functools.partial(product, bits, *shape, tiling)
    for bits, tiling in ((16, decoding.DEEP), (8, decoding.INT8), (4, decoding.INT4)):
        found[f"{bits} bits, in 2 pieces, {tiling}"] = functools.partial(product, bits, 5, 1024, 72, tiling, 2)
    for rank in (4, 12, 128):
        found[f"adapter of rank {rank}, 3 rows"] = functools.partial(adapter, rank, 3)
    return found


def main() -> int:
    if len(sys.argv) > 1:
        gpu_info.get_gpu_info = lambda: H100  # there is none to ask
        print(cases()[sys.argv[1]](), flush=True)
        return 0
    failed = 0
    for name in cases():
        # A process each: without a GPU the plugin's compiler was seen to crash, now and then, at its end.
        for _ in range(ATTEMPTS):
            done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True)
            if done.stdout or done.returncode > 0:
                break
        off = float(done.stdout or "nan")
        print(f"{off:9.2e} off: {name}{'' if off < CLOSE else '  WRONG ' + done.stderr[-2000:]}", flush=True)
        failed += not off < CLOSE
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
