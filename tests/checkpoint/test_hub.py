"""Downloading, with the hub played by a directory: which files are asked for, and when pickles are."""

import errno
import shutil
import types
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

import zamba2_jax
from tests.checkpoint.files import read, saved, write
from zamba2_jax.checkpoint.files import find_checkpoint
from zamba2_jax.config import Zamba2Config
from zamba2_jax.hub import hub_id


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


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            ConnectionError("no route"),
            FileNotFoundError,
            "a/b at revision r is neither a directory here nor .* no route",
        ),
        (
            LocalEntryNotFoundError("absent"),
            FileNotFoundError,
            "a/b at revision r is neither a directory here .* absent",
        ),
        (RuntimeError("the proxy says no"), OSError, "^a/b at revision r could not be downloaded: the proxy says no"),
        (OSError(errno.ENOSPC, "No space left on device"), OSError, r"^\[Errno 28\] No space left on device$"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), PermissionError, "Permission denied: '/cache'"),
    ],
)
def test_a_download_that_fails(monkeypatch, error, kind, message):
    """Only what the hub does not have is not found; a full disk is a full disk."""

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match=message) as raised:
        find_checkpoint("a/b", revision="r")
    assert type(raised.value) is kind
    assert error in (raised.value, raised.value.__cause__)


@pytest.mark.parametrize("name", ["gpt2", "Zyphra/Zamba2-1.2B", "a_b/c.d"])
def test_hub_ids(name):
    assert hub_id(name) == name


@pytest.mark.parametrize("name", ["", "./a", "../a", "~/a", "/a", "a/b/c", "a b", "a/", ".", Path("a/b"), "tests"])
def test_paths_are_no_hub_ids(name, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert hub_id(name) is None
    if name not in ("", ".", "tests"):  # directories
        for find in (find_checkpoint, Zamba2Config.from_pretrained):
            with pytest.raises(FileNotFoundError, match="hub id such as Zyphra"):
                find(name)


def test_the_shipped_model_has_a_name_that_a_directory_takes_over(tmp_path, monkeypatch):
    assert find_checkpoint("demo") == zamba2_jax.demo_path()
    assert Zamba2Config.from_pretrained("demo").num_hidden_layers == 10
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert find_checkpoint("demo").resolve() == tmp_path / "demo"
