"""The published 1.2B shape with random weights: transformers writes it, we load it; logits compared, memory measured.

Each step is a process of its own, so that its peak resident memory is its own too.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LENGTH = 64


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        _step("write", directory)
        torch_run = _step("torch", directory)
        exact = _step("float32", directory)
        half = _step("bfloat16", directory)
        theirs, ours, ours_half = (np.load(directory / f"{side}.npy") for side in ("torch", "float32", "bfloat16"))
    scale = np.abs(theirs).max()
    print(f"file: {half['file_bytes'] / 1e9:.2f} GB, bfloat16, {half['parameters']:,} parameters")
    print(
        f"float32 logits of {LENGTH} tokens: largest difference "
        f"{np.abs(theirs - ours).max():.2e} on values up to {scale:.2f} ({np.abs(theirs - ours).max() / scale:.1e})"
    )
    print(
        f"bfloat16 logits against PyTorch's float32: root mean square {np.sqrt(np.mean((theirs - ours_half) ** 2)):.2e}"
    )
    for title, figures in (("load as bfloat16", half), ("load as float32", exact)):
        print(
            f"{title}: {figures['load_seconds']:.1f} s, peak resident {figures['peak_bytes'] / 1e9:.2f} GB, "
            f"{(figures['peak_bytes'] - figures['model_bytes']) / 1e9:.2f} GB above the model's own "
            f"{figures['model_bytes'] / 1e9:.2f} GB"
        )
    print(
        f"PyTorch, load as float32: {torch_run['load_seconds']:.1f} s, peak resident "
        f"{torch_run['peak_bytes'] / 1e9:.2f} GB"
    )


def _step(step: str, directory: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.full_shape", step, str(directory)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _ids() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 32000, (1, LENGTH))


def _write(directory: Path) -> dict[str, float]:
    import torch
    import transformers

    from zamba2_jax import Zamba2Config

    torch.manual_seed(0)
    config = transformers.Zamba2Config(
        **{k: v for k, v in Zamba2Config.zamba2_1_2b().to_dict().items() if k != "dtype"}
    )
    config.dtype = torch.bfloat16
    transformers.Zamba2ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return {}


def _torch(directory: Path) -> dict[str, float]:
    import torch
    import transformers

    from bench.oracle import without_dt_clamp

    start = time.perf_counter()
    model = transformers.Zamba2ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    figures = {"load_seconds": time.perf_counter() - start, "peak_bytes": _peak_bytes()}
    without_dt_clamp(model)
    with torch.no_grad():
        np.save(directory / "torch.npy", model(torch.from_numpy(_ids()), use_cache=False).logits.numpy())
    return figures


def _jax(directory: Path, dtype: str) -> dict[str, float]:
    import jax
    from flax import nnx

    from zamba2_jax import Zamba2ForCausalLM

    start = time.perf_counter()
    model = Zamba2ForCausalLM.from_pretrained(directory, dtype=dtype)
    leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model, nnx.Param)))
    figures = {
        "load_seconds": time.perf_counter() - start,
        "peak_bytes": _peak_bytes(),
        "model_bytes": sum(leaf.nbytes for leaf in leaves),
        "parameters": sum(leaf.size for leaf in leaves),
        "file_bytes": sum(path.stat().st_size for path in directory.glob("*.safetensors")),
    }
    graphdef, state = nnx.split(model)
    logits = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids).logits)(state, _ids())
    np.save(directory / f"{dtype}.npy", np.asarray(logits, np.float32))
    return figures


if __name__ == "__main__":
    step, place = sys.argv[1], Path(sys.argv[2])
    result = {"write": _write, "torch": _torch}[step](place) if step in ("write", "torch") else _jax(place, step)
    print(json.dumps(result))
