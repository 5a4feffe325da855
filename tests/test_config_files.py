"""Zamba2Config written to files and read from them and from the hub."""

import dataclasses
import json
import math

import huggingface_hub
import pytest
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError

from tests.config_cases import EXPECTED, TRANSFORMERS_4, ZYPHRA, changed, small
from zamba2_jax.config import Zamba2Config


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Zamba2Config)])
def test_every_field_is_written(name):
    config = changed(name)
    assert config != small()
    assert config.to_dict() != small().to_dict()
    theirs = transformers.Zamba2Config(**config.to_dict())
    assert Zamba2Config.from_dict(theirs.to_dict()) == config
    assert Zamba2Config.from_dict(json.loads(theirs.to_json_string())) == config


def test_to_dict_is_plain_and_independent():
    config = small(time_step_limit=(0.0, 1.0), eos_token_id=(2, 3), dtype="bfloat16")
    values = config.to_dict()
    assert Zamba2Config.from_dict(json.loads(json.dumps(values))) == config
    assert values["model_type"] == "zamba2"
    assert (values["dtype"], values["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert values["time_step_limit"] == [0.0, 1.0]
    assert "time_step_limit" not in small().to_dict()
    values["id2label"][0] = "changed"
    assert config.id2label[0] == "LABEL_0"


def test_save_and_load(tmp_path):
    config = small(time_step_limit=(0.001, math.inf), id2label={0: "a", 1: "b", 2: "c"})
    config.save_pretrained(tmp_path / "new" / "model")
    assert [path.name for path in (tmp_path / "new" / "model").iterdir()] == ["config.json"]
    assert Zamba2Config.from_pretrained(tmp_path / "new" / "model") == config
    theirs = transformers.Zamba2Config.from_pretrained(tmp_path / "new" / "model")
    assert Zamba2Config.from_dict(theirs.to_dict()) == config
    theirs.save_pretrained(tmp_path / "theirs")
    assert Zamba2Config.from_pretrained(str(tmp_path / "theirs")).replace(architectures=None) == config


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    small().save_pretrained(tmp_path)
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        small(adapter_rank=4).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert Zamba2Config.from_pretrained(tmp_path) == small()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json is not valid JSON"),
        (b"\xff\xfe\xfa", "config.json is not valid JSON"),
        ("[]", "config.json must hold a JSON object, got list"),
        ("{}", "has neither model_type 'zamba2' nor fields of Zamba2"),
        ('{"model_type": "llama"}', "model_type must be 'zamba2', got 'llama'"),
    ],
)
def test_unreadable_files_are_named(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        Zamba2Config.from_pretrained(tmp_path)


def test_a_zyphra_file_without_model_type_is_recognised(tmp_path):
    written = {name: value for name, value in ZYPHRA.items() if name != "model_type"}
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert Zamba2Config.from_pretrained(tmp_path) == EXPECTED


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json in the directory"):
        Zamba2Config.from_pretrained(tmp_path)
    for name in (tmp_path / "absent", str(tmp_path / "absent"), "./absent", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=r"is not a directory; give a model directory or a hub id"):
            Zamba2Config.from_pretrained(name)


def test_hub_names_go_to_the_hub_client(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(TRANSFORMERS_4))
    asked = {}

    def download(repo, filename, **options):
        asked.update(options, repo=repo, filename=filename)
        return str(tmp_path / "config.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    options = {"revision": "abc", "token": "secret", "cache_dir": str(tmp_path), "local_files_only": True}
    assert Zamba2Config.from_pretrained("Zyphra/Zamba2-1.2B", **options) == EXPECTED
    assert asked == options | {"repo": "Zyphra/Zamba2-1.2B", "filename": "config.json"}


def test_hub_names_that_are_not_cached(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'Zyphra/absent' is no directory here, .* \(revision main\)") as error:
        Zamba2Config.from_pretrained("Zyphra/absent", cache_dir=tmp_path, local_files_only=True)
    assert isinstance(error.value.__cause__, LocalEntryNotFoundError)
