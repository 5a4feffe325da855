"""Bad checkpoints: each is refused with a message that says what is wrong, and several faults are told together."""

import json
import os
import pickle
import sys

import pytest
import safetensors.torch
import torch

import zamba2_jax
from tests.checkpoint.files import read, saved, shard, write
from zamba2_jax.checkpoint import open_parameters

CausalLM = zamba2_jax.Zamba2ForCausalLM


@pytest.fixture
def bent(root, tmp_path):
    """Writes a checkpoint of the 2.7B shape after `change` was applied to its tensors."""

    def bend(change, **config_changes):
        source = saved(root, "2.7B")
        tensors = read(source)
        change(tensors)
        return write(tmp_path / "bent", source, tensors, **config_changes)

    return bend


def test_all_faults_are_told_at_once(bent):
    def change(tensors):
        del tensors["model.layers.0.mamba.in_proj.weight"]
        tensors["model.layers.9.mamba.D"] = torch.ones(8)
        tensors["model.layers.2.mamba.dt_bias"] = torch.ones(9)
        tensors["model.layers.4.mamba.D"] = torch.ones(8, dtype=torch.int8)

    with pytest.raises(ValueError, match="has 4 faults") as error:
        CausalLM.from_pretrained(bent(change))
    message = str(error.value)
    assert "model.layers.0.mamba.in_proj.weight: missing; shape (168, 32) is needed." in message
    assert "model.layers.9.mamba.D: unexpected; Zamba2ForCausalLM of this config has no such tensor." in message
    assert "model.layers.2.mamba.dt_bias: has shape (9,) in model.safetensors, but the config asks for (8,)." in message
    assert "model.layers.4.mamba.D: is I8 in model.safetensors; only F32, BF16, F16 and F64 can be loaded" in message
    assert message.count("\n") == 4


def test_missing_shared_tensor_names_the_other_places(bent):
    name = "model.layers.1.shared_transformer.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match="1 fault:\n") as error:
        CausalLM.from_pretrained(bent(lambda tensors: tensors.pop(name)))
    assert f"{name}: missing; shape (64, 64) is needed, nor under another layer that shares it (layer 5)." in str(
        error.value
    )


def test_copies_that_differ(bent):
    first = "model.layers.1.shared_transformer.feed_forward.down_proj.weight"
    copy = first.replace("layers.1", "layers.5")

    def change(tensors):
        tensors[copy] = tensors[first].clone()
        tensors[copy][2, 3] += 0.25

    with pytest.raises(ValueError, match="1 fault:\n") as error:
        CausalLM.from_pretrained(bent(change))
    message = str(error.value)
    assert f"{copy} (in model.safetensors): differs from {first} (in model.safetensors) by up to 0.25" in message
    assert "both are the same shared block" in message


def test_tied_head_that_differs(bent):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1.0

    with pytest.raises(ValueError, match=r"lm_head.weight: differs from model.embed_tokens.weight .* by up to 1, but"):
        CausalLM.from_pretrained(bent(change))


def test_untied_head_that_is_missing(root, tmp_path):
    source = saved(root, "2.7B")
    directory = write(tmp_path / "untied", source, read(source), tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lm_head.weight: missing; shape \(131, 32\) is needed"):
        CausalLM.from_pretrained(directory)


def test_attention_adapters_that_the_config_denies(root, tmp_path):
    source = saved(root, "1.2B")
    directory = write(tmp_path / "denied", source, read(source), use_shared_attention_adapter=False)
    with pytest.raises(ValueError, match="has 12 faults") as error:
        CausalLM.from_pretrained(directory)
    assert "linear_q_adapter_list.0.0.weight: unexpected" in str(error.value)


def test_truncated_file(bent):
    directory = bent(lambda tensors: None)
    file = directory / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1000)
    with pytest.raises(ValueError, match=f"truncated: {size - 1000} bytes, but its header describes {size}"):
        CausalLM.from_pretrained(directory)
    os.truncate(file, 100)
    with pytest.raises(ValueError, match=r"1 fault:\n  model.safetensors: truncated or no safetensors file: 100 bytes"):
        CausalLM.from_pretrained(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or no safetensors file: 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        ((8).to_bytes(8, "little") + b'{"a": 1}', "its safetensors header is damaged"),
        ((8).to_bytes(8, "little") + b"notjson!", "its safetensors header is damaged"),
        (
            (64).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}'.ljust(64) + b"0" * 8,
            "a F32 .4,. does not take the 8 bytes of its header",
        ),
    ],
)
def test_damaged_headers(bent, content, message):
    directory = bent(lambda tensors: None)
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        CausalLM.from_pretrained(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_offsets": [0]}, "has data_offsets [0], which are no start and end"),
        ({"data_offsets": "ab"}, 'has data_offsets "ab", which are no start and end'),
        ({"data_offsets": ["0", "32"]}, 'has data_offsets ["0", "32"], which are no start and end'),
        ({"data_offsets": [-32, 0]}, "has data_offsets [-32, 0], which are no start and end"),
        ({"data_offsets": [32, 0]}, "has data_offsets [32, 0], which are no start and end"),
        ({"data_offsets": [0, 1 << 64]}, "has data_offsets [0, 18446744073709551616], which are no start and end"),
        ({"data_offsets": None}, "has data_offsets null, which are no start and end"),
        ({"shape": [8.0]}, "has shape [8.0], which is no list of sizes"),
        ({"shape": [True]}, "has shape [true], which is no list of sizes"),
        ({"shape": [-8]}, "has shape [-8], which is no list of sizes"),
        ({"shape": 8}, "has shape 8, which is no list of sizes"),
        ({"dtype": ["F32"]}, 'has dtype ["F32"], which is no name'),
        (3, "has 3 for its description"),
        ({"dtype": "F33"}, "model.layers.0.mamba.D: is F33 in model.safetensors; only F32, BF16, F16 and F64 can be"),
        ({"data_offsets": [0, 32]}, "header is damaged: model.layers.0.mamba.D and model.embed_tokens.weight overlap."),
    ],
)
def test_a_damaged_entry_is_one_of_the_faults(bent, change, message):
    directory = bent(lambda tensors: tensors.pop("model.layers.2.mamba.dt_bias"))
    _edit_header(directory / "model.safetensors", change)
    with pytest.raises(ValueError, match=r"model.layers.2.mamba.dt_bias: missing") as error:
        CausalLM.from_pretrained(directory)
    assert message in str(error.value)


def _edit_header(file, change):
    """Changes what the header says of one tensor, or replaces it; `[0, 32]` are bytes of another tensor."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = "model.layers.0.mamba.D"
    header[name] = header[name] | change if isinstance(change, dict) else change
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])


def test_damaged_values_are_not_read(bent):
    """Copies and convolution biases are read while accounts are settled; a truncated file must not end that."""
    first = "model.layers.1.shared_transformer.feed_forward.down_proj.weight"

    def change(tensors):
        tensors[first.replace("layers.1", "layers.5")] = tensors[first].clone()

    directory = bent(change, use_conv_bias=False)
    os.truncate(directory / "model.safetensors", 20_000)
    with pytest.raises(ValueError, match=r"1 fault:\n  model.safetensors: truncated: 20000 bytes, but"):
        CausalLM.from_pretrained(directory)


def test_json_without_an_end(bent):
    directory = bent(lambda tensors: None)
    (directory / "model.safetensors").write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
    with pytest.raises(ValueError, match="its safetensors header is damaged"):
        CausalLM.from_pretrained(directory)


def test_weight_map_of_other_things(root, tmp_path):
    directory, index = shard(saved(root, "2.7B"), tmp_path / "shards")
    names = list(index["weight_map"])
    for name, value in zip(names, (3, None, ["model-00001-of-00003.safetensors"], {}), strict=False):
        index["weight_map"][name] = value
    os.remove(directory / "model-00002-of-00003.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has 2 faults") as error:
        CausalLM.from_pretrained(directory)
    shown = ", ".join(sorted(names[:4]))
    assert f"model.safetensors.index.json: its weight_map has no file name for {shown}." in str(error.value)
    assert "names model-00002-of-00003.safetensors, which is not there" in str(error.value)


def test_a_file_that_shrinks_while_it_is_read(bent):
    directory = bent(lambda tensors: None)
    parameters = open_parameters(directory)
    os.truncate(directory / "model.safetensors", 20_000)
    with pytest.raises(ValueError, match="the file has changed"):
        parameters.read(("model", "layers", 6, "mamba", "D"))


def test_index_and_shards(root, tmp_path):
    directory, index = shard(saved(root, "2.7B"), tmp_path / "shards")
    names = list(index["weight_map"])
    path = directory / "model.safetensors.index.json"

    def faults():
        with pytest.raises(ValueError, match="the checkpoint in") as error:
            CausalLM.from_pretrained(directory)
        return str(error.value).split("\n  ")[1:]

    absent = directory / "model-00002-of-00003.safetensors"
    absent.rename(directory / "elsewhere")
    count = sum(file == absent.name for file in index["weight_map"].values())
    (fault,) = faults()
    assert fault == (
        f"model.safetensors.index.json: names {absent.name}, which is not there ({count} of its tensors are missing)."
    )
    path.rename(directory / "no-index")
    assert "model-00002-of-00003.safetensors: is not there, though model-00001-of-00003.safetensors is." in faults()
    (directory / "no-index").rename(path)
    (directory / "elsewhere").rename(absent)

    # A tensor in two shards; one in another shard than the index says; one that the index does not list.
    tensors = safetensors.torch.load_file(absent)
    tensors[names[0]] = torch.zeros(3)
    safetensors.torch.save_file(tensors, absent)
    (fault,) = faults()
    assert fault == (
        f"{names[0]}: is in two files, model-00001-of-00003.safetensors and model-00002-of-00003.safetensors."
    )
    del tensors[names[0]], tensors[names[1]]
    safetensors.torch.save_file(tensors, absent)
    assert faults() == [f"{names[1]}: model.safetensors.index.json puts it into {absent.name}, which does not hold it."]
    del index["weight_map"][names[2]]
    path.write_text(json.dumps(index))
    assert f"{names[2]}: is in model-00003-of-00003.safetensors, but not in model.safetensors.index.json." in faults()

    index["weight_map"][names[2]] = "../secrets.safetensors"
    path.write_text(json.dumps(index))
    assert any("names ../secrets.safetensors, which is not a file beside it" in fault for fault in faults())
    path.write_text("{")
    with pytest.raises(ValueError, match=r"model.safetensors.index.json is not valid JSON"):
        CausalLM.from_pretrained(directory)
    path.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        CausalLM.from_pretrained(directory)


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused(bent, tmp_path, legacy):
    directory = bent(lambda tensors: None)
    (directory / "model.safetensors").unlink()
    target = str(tmp_path / "executed")
    if legacy:
        (directory / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(target), protocol=2))
    else:
        torch.save({"model.embed_tokens.weight": _Bomb(target)}, directory / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin: cannot be read as PyTorch weights.*Nothing in it was executed"
    ):
        CausalLM.from_pretrained(directory)
    assert not os.path.exists(target)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["a", "list"], "holds a list, not a dictionary of tensors"),
        ({"model.embed_tokens.weight": 3}, "model.embed_tokens.weight is a int, not a tensor"),
    ],
)
def test_pickles_of_other_things(bent, content, message):
    directory = bent(lambda tensors: None)
    (directory / "model.safetensors").unlink()
    torch.save(content, directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        CausalLM.from_pretrained(directory)


def test_a_damaged_pickle(bent):
    directory = bent(lambda tensors: None)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: cannot be read as PyTorch weights"):
        CausalLM.from_pretrained(directory)


def test_pickles_without_torch(bent, monkeypatch):
    directory = bent(lambda tensors: None)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="is a PyTorch pickle, which only torch can read safely: `pip install torch`"):
        CausalLM.from_pretrained(directory)


def test_places_without_a_checkpoint(bent, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no directory .*nowhere, and it is no hub id"):
        CausalLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match="some-one/some-model is neither a directory here nor to be had in the local"
    ):
        CausalLM.from_pretrained("some-one/some-model", local_files_only=True, cache_dir=tmp_path / "cache")
    directory = bent(lambda tensors: None)
    with pytest.raises(ValueError, match="is a file; give the directory"):
        CausalLM.from_pretrained(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="There are no weights in"):
        CausalLM.from_pretrained(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        CausalLM.from_pretrained(directory)


def test_another_class_is_refused(root):
    from zamba2_jax.checkpoint import load_pretrained

    with pytest.raises(ValueError, match="model_class must be one of Zamba2Model"):
        load_pretrained(dict, saved(root, "2.7B"))
