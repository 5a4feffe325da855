"""An adapter's directory: what is refused, and what a failed write leaves."""

import errno
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from tests.lora.test_lora import make, with_lora
from zamba2_jax import Zamba2Model, load_lora, save_lora
from zamba2_jax.lora import files

Q = "base_model.model.model.layers.1.shared_transformer.self_attn.q_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """q_proj of two blocks, under layers 1, 2 and 4; 1 and 4 are of one block."""
    directory = tmp_path_factory.mktemp("adapter")
    save_lora(with_lora(target_modules=["q_proj"]), directory)
    return directory


@pytest.fixture
def adapter(saved, tmp_path):
    """A copy of it to spoil: its settings and tensors, and how to write them."""

    class Adapter:
        path = tmp_path
        settings = json.loads((saved / files.CONFIG).read_text())
        tensors = safetensors.numpy.load_file(saved / files.WEIGHTS)
        metadata = None

        def write(self):
            (tmp_path / files.CONFIG).write_text(json.dumps(self.settings))
            safetensors.numpy.save_file(self.tensors, tmp_path / files.WEIGHTS, self.metadata)

        def refused(self, match, **options):
            self.write()
            model = make()
            with pytest.raises(ValueError, match=match):
                load_lora(model, tmp_path, **options)
            assert model.lora_config is None
            assert not jax.tree.leaves(nnx.state(model, nnx.LoRAParam))

    return Adapter()


def test_what_is_written_says_what_it_is(saved, adapter):
    assert sorted(path.name for path in saved.iterdir()) == [files.CONFIG, files.WEIGHTS]
    assert adapter.settings["target_modules"] == ["q_proj"]
    assert adapter.settings["task_type"] == "CAUSAL_LM"
    assert (adapter.settings["r"], adapter.settings["lora_alpha"]) == (3, 6)
    assert len(adapter.tensors) == 6
    assert adapter.tensors[f"{Q}.lora_A.weight"].shape == (3, 64)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("peft_type", "IA3", "is of a 'IA3' adapter; only peft_type LORA"),
        ("use_dora", True, "asks for use_dora=True, which this library does not have"),
        ("bias", "all", 'bias must be "none"'),
        ("init_lora_weights", "pissa", "asks for init_lora_weights='pissa'"),
        ("modules_to_save", ["embed_tokens"], r"asks for modules_to_save=\['embed_tokens'\]"),
        ("a_field_of_the_future", 7, "asks for a_field_of_the_future=7"),
        ("r", 2, r"lora_A.weight: has shape \(3, 64\), but \(2, 64\) is needed"),
    ],
)
def test_adapters_of_another_kind_are_refused(adapter, field, value, match):
    adapter.settings[field] = value
    adapter.refused(match)


def test_every_fault_of_the_tensors_is_named(adapter):
    adapter.tensors |= {
        f"{Q}.lora_A.weight": np.zeros((3, 65), np.float32),
        "base_model.model.model.layers.0.mamba.x_proj.lora_A.weight": np.zeros((3, 32), np.float32),
        "base_model.model.lm_head.lora_A.weight": np.zeros((3, 32), np.float32),
    }
    del adapter.tensors[f"{Q.replace('.1.', '.2.')}.lora_B.weight"]
    adapter.refused(
        r"(?s)lm_head.lora_A.weight: unexpected.*x_proj: the model has no such module.*"
        r"layers.1.*has shape \(3, 65\), but \(3, 64\).*layers.2.*has no lora_B.weight"
    )


def test_a_lora_of_a_block_must_be_the_same_under_all_its_uses(adapter):
    adapter.tensors[f"{Q}.lora_B.weight"] = adapter.tensors[f"{Q}.lora_B.weight"] + 1
    adapter.refused(r'layers.4.*differs from .*layers.1.*shared="block".*shared="use" takes it', shared="block")
    load_lora(make(), adapter.path)  # PEFT's own have no mark: one per use
    for letter in "AB":
        del adapter.tensors[f"{Q}.lora_{letter}.weight"]
    adapter.refused(r'layers.1.*missing, and with shared="block" as in .*layers.4', shared="block")


def test_the_base_model_takes_an_adapter_of_the_whole_one(saved):
    model = make(Zamba2Model)
    covered = load_lora(model, saved)
    assert sum(row.adapted for row in covered.rows) == 2


def test_no_adapter_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config.json"):
        load_lora(make(), tmp_path)
    (tmp_path / files.CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_model.safetensors. adapter_model.bin is a pickle"):
        load_lora(make(), tmp_path)
    (tmp_path / files.CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        load_lora(make(), tmp_path)


def test_a_truncated_file_is_refused(saved, adapter):
    adapter.write()
    content = (saved / files.WEIGHTS).read_bytes()
    (adapter.path / files.WEIGHTS).write_bytes(content[:-8])
    with pytest.raises(ValueError, match="truncated"):
        load_lora(make(), adapter.path)


def test_a_failed_write_leaves_the_adapter_that_was_there(tmp_path, monkeypatch):
    model = with_lora(target_modules=["linear"])
    save_lora(model, tmp_path)
    before = (tmp_path / files.WEIGHTS).read_bytes()

    def full(path, *rest):
        path.write_bytes(b"begun")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_file", full)
    with pytest.raises(OSError, match=f"the disk is full; no adapter was written to {tmp_path}"):
        save_lora(model, tmp_path)
    assert (tmp_path / files.WEIGHTS).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [files.CONFIG, files.WEIGHTS]

    with pytest.raises(ValueError, match="is a file; give a directory"):
        save_lora(model, tmp_path / files.WEIGHTS)
