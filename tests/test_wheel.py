"""The wheel: what is in it, and that it works where nothing else of this repository is."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECK = """
import zamba2_jax
from transformers import AutoTokenizer

model = zamba2_jax.Zamba2ForCausalLM.from_pretrained("demo")
tokenizer = AutoTokenizer.from_pretrained(zamba2_jax.demo_path())
tokens = model.generate(**tokenizer("import ", return_tensors="np"), max_new_tokens=2)
print(zamba2_jax.__file__, tokens.shape[1] > 2)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(directory), str(ROOT)]
    subprocess.run(command, check=True)
    return next(directory.glob("zamba2_jax-*.whl"))


def test_it_holds_the_library_and_the_small_model_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert folders == {"zamba2_jax", next(name for name in folders if name.endswith(".dist-info"))}
    assert {"zamba2_jax/py.typed", "zamba2_jax/demo/model.safetensors", "zamba2_jax/demo/README.md"} <= set(names)
    assert wheel.stat().st_size < 13e6


def test_it_works_in_an_environment_of_its_own(wheel, tmp_path):
    """An environment in which the wheel is all that is installed; its dependencies are read from this one."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    scheme = "nt_venv" if sys.platform == "win32" else "posix_venv"
    target = sysconfig.get_path("purelib", scheme, {"base": str(environment)})
    zipfile.ZipFile(wheel).extractall(target)
    # On PYTHONPATH, unlike in a site directory, the .pth file that stands for this checkout is not followed.
    variables = {"PATH": "", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": sysconfig.get_path("purelib")}
    done = subprocess.run(
        [environment / "bin" / "python", "-W", "ignore", "-c", CHECK],
        env=variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    file, more_tokens = done.stdout.split()
    assert Path(file).is_relative_to(environment)
    assert more_tokens == "True"
