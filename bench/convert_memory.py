"""Peak memory of loading and converting checkpoints of the published shapes, made of random bits.

    python -m bench.convert_memory 7b          # makes 14.7 GB, converts it both ways; needs 45 GB of disk
    python -m bench.convert_memory 7b --layers 20
    python -m bench.convert_memory 1.2b --load

Each step runs in a process of its own; its peak resident memory is what the kernel counted for it.
"""

import argparse
import filecmp
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from zamba2_jax import Zamba2Config
from zamba2_jax.checkpoint import write_hugging_face
from zamba2_jax.checkpoint.parameters import Parameters

_SHAPES = {"1.2b": Zamba2Config.zamba2_1_2b, "2.7b": Zamba2Config.zamba2_2_7b, "7b": Zamba2Config.zamba2_7b}
_MEASURE = """
import resource, runpy, sys
sys.argv[:] = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
"""
_LOAD = """
import resource, sys
import zamba2_jax
model = zamba2_jax.Zamba2ForCausalLM.from_pretrained(sys.argv[1])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
"""


class RandomParameters(Parameters):
    """bfloat16 values of magnitude 2^-7 to 1, straight from random bits."""

    def __init__(self, config: Zamba2Config):
        super().__init__()
        self.config, self.architecture = config, "Zamba2ForCausalLM"
        self._rng = np.random.default_rng(0)

    def dtype(self, path):
        return np.dtype(ml_dtypes.bfloat16)

    def read(self, path, index=None):
        shape = self.shape(path)
        bits = np.frombuffer(self._rng.bytes(2 * int(np.prod(shape))), np.uint16)
        return ((bits & 0x83FF) | 0x3C00).view(ml_dtypes.bfloat16).reshape(shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=_SHAPES)
    parser.add_argument("--layers", type=int, help="keep only so many layers")
    parser.add_argument("--load", action="store_true", help="also load the model, from both formats")
    parser.add_argument(
        "--directory", help="where to make the files (removed at the end); default: the temporary directory"
    )
    options = parser.parse_args()

    config = _SHAPES[options.shape]()
    if options.layers is not None:
        kinds = config.layers_block_type[: options.layers]
        config = config.replace(num_hidden_layers=len(kinds), layers_block_type=kinds)
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)
        write_hugging_face(RandomParameters(config), directory / "hf")
        size = sum(file.stat().st_size for file in (directory / "hf").glob("*.safetensors"))
        print(f"{options.shape}: {size / 1e9:.2f} GB in safetensors")
        results = {"shape": options.shape, "layers": config.num_hidden_layers, "bytes": size}
        results["from_hf"] = _measure("from-hf", _MEASURE, "convert", "from-hf", directory / "hf", directory / "orbax")
        if options.load:
            results["load_hf"] = _measure("load, Hugging Face", _LOAD, directory / "hf")
            results["load_orbax"] = _measure("load, Orbax", _LOAD, directory / "orbax")
        kept = directory / "hf"
        results["to_hf"] = _measure("to-hf", _MEASURE, "convert", "to-hf", directory / "orbax", directory / "back")
        shutil.rmtree(directory / "orbax")
        names = sorted(file.name for file in kept.glob("*.safetensors"))
        _, differing, missing = filecmp.cmpfiles(kept, directory / "back", names, shallow=False)
        print(
            f"{len(names)} files back, "
            + ("equal byte for byte" if not differing + missing else f"DIFFERENT: {differing + missing}")
        )
        print(json.dumps(results))


def _measure(label: str, program: str, *arguments: object) -> dict[str, float]:
    start = time.perf_counter()
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, check=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    seconds = time.perf_counter() - start
    peak = int(done.stderr.split("peak ")[-1].split()[0])
    print(f"{label}: {seconds:.1f} s, peak resident memory {peak / 1e9:.2f} GB")
    return {"seconds": round(seconds, 1), "peak_bytes": peak}


if __name__ == "__main__":
    main()
