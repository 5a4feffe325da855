"""Directories appear complete or not at all; what stands in the way is refused; our Orbax format round trips."""

import errno
import filecmp
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import transformers
from flax import nnx

import zamba2_jax
from tests.checkpoint.files import read, saved, write
from tests.checkpoint.test_roundtrip import same
from zamba2_jax.checkpoint import (
    destination,
    open_parameters,
    orbax,
    save,
    save_orbax,
    save_pretrained,
    write_hugging_face,
    write_orbax,
)

CausalLM = zamba2_jax.Zamba2ForCausalLM
WRITERS = {"hugging-face": save_pretrained, "orbax": save_orbax}


@pytest.fixture(scope="module")
def model(root):
    return CausalLM.from_pretrained(saved(root, "2.7B"))


def contents(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


# ---- Orbax
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["1.2B", "7B", "unusual", "no-hybrid"])
def test_orbax_and_back_byte_for_byte(root, tmp_path, shape):
    source = saved(root, shape, dtype="bfloat16")
    write_orbax(open_parameters(source), tmp_path / "orbax")
    model, expected = CausalLM.from_pretrained(tmp_path / "orbax"), CausalLM.from_pretrained(source)
    assert same(model, expected)
    assert model.config == expected.config.replace(architectures=("Zamba2ForCausalLM",))
    assert model.generation_config == expected.generation_config
    write_hugging_face(open_parameters(tmp_path / "orbax"), tmp_path / "back")
    assert filecmp.cmp(source / "model.safetensors", tmp_path / "back" / "model.safetensors", shallow=False)


def test_save_orbax(model, tmp_path):
    save_orbax(model, tmp_path / "orbax")
    back = CausalLM.from_pretrained(tmp_path / "orbax")
    assert same(back, model)
    assert back.dtype == model.dtype
    half = CausalLM.from_pretrained(tmp_path / "orbax", dtype=jnp.bfloat16)
    assert half.model.embed_tokens.embedding.dtype == jnp.bfloat16
    assert half.model.layers[0].mamba.D.dtype == jnp.float32


def test_any_orbax_reader_can_restore_it(model, tmp_path):
    save_orbax(model, tmp_path / "orbax")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(tmp_path / "orbax" / "params")
    np.testing.assert_array_equal(tree["model"]["layers"]["3"]["mamba"]["D"], model.model.layers[3].mamba.D[...])


def test_orbax_under_another_head(root, model, tmp_path):
    save_orbax(model, tmp_path / "orbax")
    assert same(zamba2_jax.Zamba2Model.from_pretrained(tmp_path / "orbax"), model.model)
    with pytest.warns(UserWarning, match="score.kernel is not in the checkpoint: it is newly initialised"):
        classifier = zamba2_jax.Zamba2ForSequenceClassification.from_pretrained(tmp_path / "orbax")
    save_orbax(classifier, tmp_path / "classifier")
    with pytest.warns(UserWarning, match="score.kernel is ignored: Zamba2ForCausalLM does not have this head"):
        assert same(CausalLM.from_pretrained(tmp_path / "classifier"), model)
    save_orbax(model.model, tmp_path / "base")
    assert same(CausalLM.from_pretrained(tmp_path / "base"), model)


def test_orbax_faults(model, tmp_path):
    directory = tmp_path / "orbax"
    save_orbax(model, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"adapter_rank": 6, "add_bias_linear": True}))
    with pytest.raises(
        ValueError, match=r"shared_block_uses.0.gate_up_adapter.down.kernel: has shape \(32, 5\)"
    ) as error:
        CausalLM.from_pretrained(directory)
    assert "model.layers.0.mamba.zx_proj.bias: missing; shape (2, 64) is needed." in str(error.value)
    (directory / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": 6, "layers_block_type": config["layers_block_type"][:6]})
    )
    with pytest.raises(ValueError, match=r"model.layers.6.mamba.D: unexpected"):
        CausalLM.from_pretrained(directory)
    (directory / "params" / "_METADATA").write_text("{}")
    with pytest.raises(ValueError, match="_METADATA is damaged"):
        CausalLM.from_pretrained(directory)


def test_nonfinite_weights_in_orbax(model, tmp_path):
    broken = nnx.clone(model)
    broken.model.final_layernorm.scale[...] = broken.model.final_layernorm.scale[...].at[3].set(jnp.nan)
    save_orbax(broken, tmp_path / "orbax")
    with pytest.warns(UserWarning, match="NaN or infinite weights in .*: model.final_layernorm.scale"):
        CausalLM.from_pretrained(tmp_path / "orbax")


def test_weights_too_large_for_the_dtype_are_named(root, tmp_path):
    """Wherever weights are cast, and without numpy's own warning, which names nothing."""
    source = saved(root, "2.7B")
    tensors = read(source)
    large, nan = "model.layers.2.mamba.in_proj.weight", "model.final_layernorm.weight"
    tensors[large][3, 4] = 1e6
    tensors["model.layers.0.mamba.D"][1] = 1e6  # float32 always
    tensors[nan][0] = float("nan")
    directory = write(tmp_path / "large", source, tensors)
    converted, kernel = tmp_path / "converted", "model.layers.2.mamba.zx_proj.kernel"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the NaN
        write_orbax(open_parameters(directory), converted)
        model = CausalLM.from_pretrained(directory)
    half = {"dtype": "float16"}
    for number, (where, name, cast) in enumerate(
        (
            (f" in {directory}", large, lambda target: CausalLM.from_pretrained(directory, **half)),
            (f" in {directory}", large, lambda target: write_orbax(open_parameters(directory), target, **half)),
            (f" in {directory}", large, lambda target: write_hugging_face(open_parameters(directory), target, **half)),
            (f" in {converted}", kernel, lambda target: CausalLM.from_pretrained(converted, **half)),
            ("", kernel, lambda target: save_pretrained(model, target, **half)),
        )
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cast(tmp_path / f"out-{number}")
        texts = [str(warning.message) for warning in caught]
        assert f"Weights{where} that are too large for float16 became infinite: {name}." in texts
        assert [text for text in texts if "became" not in text and "NaN or infinite weights in" not in text] == []


def test_companions_travel(root, tmp_path):
    source = write(tmp_path / "source", saved(root, "2.7B"), read(saved(root, "2.7B")))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), eos_token="</s>")
    tokenizer.save_pretrained(source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    write_orbax(open_parameters(source), tmp_path / "orbax")
    write_hugging_face(open_parameters(tmp_path / "orbax"), tmp_path / "back")
    for directory in (tmp_path / "orbax", tmp_path / "back"):
        loaded = transformers.AutoTokenizer.from_pretrained(directory)
        assert loaded("a b")["input_ids"] == tokenizer("a b")["input_ids"]
        assert (directory / "chat_template.jinja").read_text() == "{{ messages }}"


def _tokenizer():
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "</s>": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


# ---- the destination
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
def test_a_failure_leaves_nothing(model, tmp_path, monkeypatch, writer):
    """The disk is full, and an interrupt, halfway through the weights."""
    produced = 0

    def fail(error):
        def read_then_fail(self, path, index=None):
            nonlocal produced
            produced += 1
            if produced > 60:
                raise error
            return original(self, path, index)

        return read_then_fail

    original = orbax.ModelParameters.read
    for error, expected in (
        (
            OSError(errno.ENOSPC, "No space left on device"),
            pytest.raises(OSError, match="disk is full; nothing was left"),
        ),
        (KeyboardInterrupt(), pytest.raises(KeyboardInterrupt)),
    ):
        produced = 0
        monkeypatch.setattr(orbax.ModelParameters, "read", fail(error))
        with expected:
            WRITERS[writer](model, tmp_path / "new")
        assert produced > 60
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "number", "message"),
    [
        (ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']"), errno.ENOSPC, "disk is full;"),
        (ValueError("OUT_OF_RANGE: File too large [os_error_code='27']"), errno.EFBIG, "disk is full, or a file is"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), errno.EDQUOT, "disk is full: the quota is used up;"),
    ],
)
def test_no_room(tmp_path, error, number, message):
    """tensorstore tells the system's error in the text of a ValueError."""
    with pytest.raises(OSError, match=message) as raised, destination.writing(tmp_path / "new"):
        raise error
    assert raised.value.errno == number
    assert raised.value.__cause__ is error
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="os_error_code='5'"), destination.writing(tmp_path / "new"):
        raise ValueError("DATA_LOSS [os_error_code='5']")


def test_a_disk_that_is_full_at_the_end(model, tmp_path, monkeypatch, caplog):
    """Orbax writes its metadata last, in a thread that logs what it also raises."""

    async def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp._src.path.async_path, "write_text", full)
    with pytest.raises(OSError, match="disk is full; nothing was left"):
        save_orbax(model, tmp_path / "new")
    assert caplog.records == []
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_what_was_there(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    before = {name: (tmp_path / "model" / name).read_bytes() for name in contents(tmp_path / "model")}

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save, "write_settings", full)
    with pytest.raises(OSError, match="disk is full"):
        model.save_pretrained(tmp_path / "model")
    assert {name: (tmp_path / "model" / name).read_bytes() for name in contents(tmp_path / "model")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_is_cleared_away(model, tmp_path):
    (tmp_path / ".model.writing").mkdir()
    (tmp_path / ".model.writing" / "model.safetensors").write_text("half")
    model.save_pretrained(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_again_replaces_the_weights_and_keeps_the_tokenizer(model, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "tokenizer.json").write_text("{}")
    (target / "README.md").write_text("mine")
    model.save_pretrained(target, max_shard_size="100KB")
    assert len(list(target.glob("*.safetensors"))) > 2
    model.save_pretrained(target)
    assert contents(target) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    save_orbax(model, target)  # no stale safetensors, or a reader would find them
    assert same(CausalLM.from_pretrained(target), model)
    assert not list(target.glob("*.safetensors"))
    assert (target / "README.md").read_text() == "mine"


def test_foreign_directories_are_refused(model, tmp_path):
    target = tmp_path / "thesis"
    (target / "chapters").mkdir(parents=True)
    (target / "chapters" / "1.tex").write_text("text")
    with pytest.raises(ValueError, match=r"holds files that are no part of a checkpoint \(chapters\)"):
        model.save_pretrained(target)
    assert contents(target) == ["chapters/1.tex"]
    save_pretrained(model, target, overwrite=True)
    assert (target / "chapters" / "1.tex").read_text() == "text"
    assert same(CausalLM.from_pretrained(target), model)
    with pytest.raises(ValueError, match="is a file; give a directory"):
        model.save_pretrained(target / "config.json")


def test_a_link_to_a_directory_is_followed(model, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    model.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert same(CausalLM.from_pretrained(tmp_path / "real"), model)


def test_bad_arguments_write_nothing(model, tmp_path):
    with pytest.raises(ValueError, match="max_shard_size must be"):
        model.save_pretrained(tmp_path / "model", max_shard_size="big")
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16, float16 or float64, got int8"):
        save_pretrained(model, tmp_path / "model", dtype="int8")
    assert list(tmp_path.iterdir()) == []


def test_generation_config_objects_are_written(model, tmp_path):
    changed = nnx.clone(model)
    changed.generation_config = transformers.GenerationConfig(max_new_tokens=7, temperature=0.5, do_sample=True)
    changed.save_pretrained(tmp_path / "model")
    loaded = transformers.GenerationConfig.from_pretrained(tmp_path / "model")
    assert (loaded.max_new_tokens, loaded.temperature) == (7, 0.5)


def test_a_mesh_of_one_device(root, model, tmp_path):
    """The path of a sharded load; tests/checkpoint/test_devices.py runs it on eight devices and on two processes."""
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    loaded = CausalLM.from_pretrained(saved(root, "2.7B"), mesh=mesh)
    assert same(loaded, model)
    assert loaded.model.embed_tokens.embedding.sharding.mesh == mesh
