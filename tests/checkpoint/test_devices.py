"""Loading onto several devices and from several processes, and saving from there: in processes of their own."""

import filecmp
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.files import saved

PROJECT = Path(__file__).parents[2]

_EIGHT = """
import filecmp, pathlib, sys
import jax, numpy as np
from flax import nnx
from zamba2_jax import Zamba2ForCausalLM
from zamba2_jax.checkpoint import save_orbax
from zamba2_jax.checkpoint.parameters import Parameters

source, out = map(pathlib.Path, sys.argv[1:])
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
plain = Zamba2ForCausalLM.from_pretrained(source)
save_orbax(plain, out / "orbax")
expected = dict(nnx.to_flat_state(nnx.state(plain)))
for directory in (source, out / "orbax"):
    model = Zamba2ForCausalLM.from_pretrained(directory, mesh=mesh)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        np.testing.assert_array_equal(leaf[...], expected[path][...])
    kernel = model.model.layers[1].mamba.zx_proj.kernel[...]
    assert kernel.sharding.shard_shape(kernel.shape) == (16, 2, 32), kernel.sharding
model.save_pretrained(out / "back")
assert filecmp.cmp(source / "model.safetensors", out / "back" / "model.safetensors", shallow=False)
save_orbax(model, out / "sharded-orbax")
Zamba2ForCausalLM.from_pretrained(out / "sharded-orbax").save_pretrained(out / "back-again")
assert filecmp.cmp(source / "model.safetensors", out / "back-again" / "model.safetensors", shallow=False)
"""

_TWO_PROCESSES = """
import pathlib, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[4]}", 2, int(sys.argv[3]))
from zamba2_jax import Zamba2ForCausalLM
from zamba2_jax.checkpoint import save_orbax

source, out = map(pathlib.Path, sys.argv[1:3])
assert jax.process_count() == 2
assert jax.device_count() == 4
mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
model = Zamba2ForCausalLM.from_pretrained(source, mesh=mesh)
assert not model.model.embed_tokens.embedding[...].is_fully_addressable
model.save_pretrained(out / "hf")
save_orbax(model, out / "orbax")
again = Zamba2ForCausalLM.from_pretrained(out / "orbax", mesh=mesh)
again.save_pretrained(out / "again", max_shard_size="100KB")
"""


def run(program, *arguments, devices):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(PROJECT),
    }
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_eight_devices(root, tmp_path):
    process = run(_EIGHT, saved(root, "7B", vocab_size=128), tmp_path, devices=8)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


@pytest.mark.slow
def test_two_processes(root, tmp_path):
    source = saved(root, "7B", vocab_size=128)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [run(_TWO_PROCESSES, source, tmp_path, rank, port, devices=2) for rank in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert filecmp.cmp(source / "model.safetensors", tmp_path / "hf" / "model.safetensors", shallow=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "hf", "orbax"]
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
