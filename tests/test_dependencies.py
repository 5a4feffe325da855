"""What each part of the repository imports is declared in pyproject.toml, and not just brought along by others."""

import ast
import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
OURS = {"zamba2_jax", "convert", "train", "bench", "tests", "tools"}
# Part -> the extras that it needs. PyTorch is in none (pyproject.toml says why): what needs it says so by itself.
PARTS = {
    "zamba2_jax": ["eval"],
    "convert": [],
    "train": ["train"],
    "bench": ["bench"],
    "tests": ["test", "train", "eval", "bench"],
}
# Peers and accelerators' libraries, which are used where they are found; and jaxlib, of which JAX pins the release.
IF_THERE = {"torch", "triton", "mamba_ssm", "causal_conv1d", "libtpu", "IPython", "jaxlib"}


def imported(part):
    """Names of the packages outside the standard library that a part imports."""
    names = set()
    for path in (ROOT / part).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - OURS - IF_THERE


def declared(extras):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    return {canonicalize_name(Requirement(line).name) for line in lines}


@pytest.fixture(scope="module")
def distributions():
    """Name of a package -> those of the distributions that it comes from."""
    found = importlib.metadata.packages_distributions()
    return lambda name: {canonicalize_name(distribution) for distribution in found.get(name, [name])}


@pytest.mark.parametrize("part", PARTS)
def test_what_is_imported_is_declared(part, distributions):
    names = imported(part)
    assert "jax" in names
    missing = {name for name in names if not distributions(name) & declared(PARTS[part])}
    assert not missing, f"{part} imports {', '.join(sorted(missing))}, which pyproject.toml does not give it"


def test_what_the_library_is_declared_to_need_it_imports(distributions):
    assert declared([]) <= set().union(*map(distributions, imported("zamba2_jax")))
