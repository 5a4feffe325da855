"""Downloading, with the hub played by a directory: which files are asked for, and when pickles are."""

import shutil
import types
from fnmatch import fnmatch

import huggingface_hub
import pytest

import zamba2_jax
from tests.checkpoint.files import read, saved, write
from zamba2_jax.checkpoint.files import find_checkpoint


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository (fill `hub.files`) and what was asked of it (`hub.calls`)."""

    hub = types.SimpleNamespace(files=tmp_path / "repository", local=tmp_path / "snapshot", calls=[])
    hub.files.mkdir()

    def snapshot_download(repo_id, *, allow_patterns, **options):
        hub.calls.append((repo_id, options))
        hub.local.mkdir(exist_ok=True)
        for file in hub.files.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, hub.local)
        return str(hub.local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return hub


def test_safetensors_are_taken_and_nothing_else(hub, root):
    for file in saved(root, "2.7B").iterdir():
        shutil.copy(file, hub.files)
    for name in ("pytorch_model.bin", "training_args.bin", "figure.png", "tokenizer.json", "original.pt"):
        (hub.files / name).write_text("x")
    model = zamba2_jax.Zamba2ForCausalLM.from_pretrained("Zyphra/Zamba2-2.7B", revision="abc", token="t", cache_dir="c")
    assert model.config.hidden_size == 32
    assert {file.name for file in hub.local.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    options = {"revision": "abc", "token": "t", "cache_dir": "c", "local_files_only": False}
    assert hub.calls == [("Zyphra/Zamba2-2.7B", options)]


def test_pickles_where_there_is_nothing_else(hub, root, tmp_path):
    source = write(tmp_path / "source", saved(root, "2.7B"), read(saved(root, "2.7B")))
    shutil.copy(source / "config.json", hub.files)
    (hub.files / "pytorch_model.bin").write_text("x")
    (hub.files / "training_args.bin").write_text("x")
    assert {file.name for file in find_checkpoint("gpt2").iterdir()} == {"config.json", "pytorch_model.bin"}
    assert len(hub.calls) == 2


@pytest.mark.parametrize("error", [ConnectionError("no route"), RuntimeError("the proxy says no")])
def test_a_hub_that_cannot_be_reached(monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=f"a/b at revision r is neither a directory here nor .* hub: {error}"):
        find_checkpoint("a/b", revision="r")
