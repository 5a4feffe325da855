"""Files of transformers into our models and back, bit for bit; and files as other programs leave them."""

import filecmp
import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import zamba2_jax
from bench.oracle import SHAPES, torch_config
from tests.checkpoint.files import equal, read, saved, shard, share_blocks, write
from zamba2_jax.checkpoint import load_pretrained, open_parameters, save_orbax, save_pretrained, write_hugging_face
from zamba2_jax.checkpoint.save import parse_size

CausalLM = zamba2_jax.Zamba2ForCausalLM
Classifier = zamba2_jax.Zamba2ForSequenceClassification


def same(one, other):
    """Whether two models hold the same values in the same dtypes."""
    one, other = (dict(nnx.to_flat_state(nnx.state(model))) for model in (one, other))
    return one.keys() == other.keys() and all(
        one[path].dtype == other[path].dtype and np.array_equal(one[path][...], other[path][...]) for path in one
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_files_come_back_byte_for_byte(root, tmp_path, shape, dtype):
    source = saved(root, shape, dtype=dtype)
    model = CausalLM.from_pretrained(source)
    assert model.dtype == model.param_dtype == jnp.dtype(dtype)
    model.save_pretrained(tmp_path / "back")
    assert filecmp.cmp(source / "model.safetensors", tmp_path / "back" / "model.safetensors", shallow=False)
    assert zamba2_jax.Zamba2Config.from_pretrained(tmp_path / "back") == model.config
    assert filecmp.cmp(
        source / "generation_config.json", tmp_path / "back" / "generation_config.json", shallow=False
    ) or (CausalLM.from_pretrained(tmp_path / "back").generation_config == model.generation_config)


@pytest.mark.parametrize("kind", ["Zamba2Model", "Zamba2ForSequenceClassification"])
def test_other_heads_come_back_byte_for_byte(root, tmp_path, kind):
    source = saved(root, "7B", kind, num_labels=5)
    model = getattr(zamba2_jax, kind).from_pretrained(source)
    model.save_pretrained(tmp_path / "back")
    assert filecmp.cmp(source / "model.safetensors", tmp_path / "back" / "model.safetensors", shallow=False)
    assert model.config.num_labels == 5


@pytest.mark.parametrize("shape", ["1.2B", "unusual"])
def test_shards_and_index_are_those_of_transformers(tmp_path, shape):
    torch_model = transformers.Zamba2ForCausalLM(torch_config(shape))
    share_blocks(torch_model)
    torch_model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    model = CausalLM.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours", max_shard_size="60KB")
    names = {file.name for file in (tmp_path / "theirs").glob("model*")}
    assert len(names) > 3
    assert names == {file.name for file in (tmp_path / "ours").glob("model*")}
    match, mismatch, errors = filecmp.cmpfiles(tmp_path / "theirs", tmp_path / "ours", names, shallow=False)
    assert (set(match), mismatch, errors) == (names, [], [])


@pytest.mark.parametrize("shape", ["1.2B", "unusual"])
def test_transformers_loads_what_we_save(root, tmp_path, shape):
    """A model with new values, without a generation config. Untied, every repeated block must be there, or PyTorch
    draws it anew."""
    model = CausalLM.from_pretrained(saved(root, shape))
    for _, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        parameter[...] = np.array(parameter[...]) / 3
    model.generation_config = None
    config = model.config
    model.save_pretrained(tmp_path / "ours")
    loaded, info = transformers.Zamba2ForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    hybrid = [layer for layer in loaded.model.layers if hasattr(layer, "shared_transformer")]
    for use, layer in enumerate(hybrid):
        expected = model.model.shared_blocks[use % config.num_mem_blocks].self_attn.q_proj.kernel[...].T
        np.testing.assert_array_equal(layer.shared_transformer.self_attn.q_proj.weight.detach(), expected)
    assert loaded.generation_config.eos_token_id == config.eos_token_id
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").architectures == ["Zamba2ForCausalLM"]
    assert same(CausalLM.from_pretrained(tmp_path / "ours"), model)


def test_conv_without_bias_is_written_as_zeros(root, tmp_path):
    """And zeros are no reason to overrule a config without biases."""
    source = saved(root, "2.7B")
    tensors = {name: torch.zeros_like(t) if name.endswith("conv1d.bias") else t for name, t in read(source).items()}
    model = CausalLM.from_pretrained(write(tmp_path / "without", source, tensors, use_conv_bias=False))
    assert not model.config.use_conv_bias
    assert model.model.layers[0].mamba.conv_x.bias is None
    model.save_pretrained(tmp_path / "ours")
    assert equal(read(tmp_path / "ours"), tensors)
    _, info = transformers.Zamba2ForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]


def test_conv_biases_overrule_a_config_that_denies_them(root, tmp_path):
    source = saved(root, "2.7B")
    directory = write(tmp_path / "denied", source, read(source), use_conv_bias=False)
    with pytest.warns(UserWarning, match="holds 7 convolution biases.*loaded with use_conv_bias=True"):
        model = CausalLM.from_pretrained(directory)
    assert model.config.use_conv_bias
    assert same(model, CausalLM.from_pretrained(source))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.pt"])
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_pickles(root, tmp_path, file, options):
    """A state dict holds every shared block under all its layers, and the tied head: copies that are equal."""
    source = saved(root, "7B", dtype="bfloat16")
    directory = write(tmp_path / "pickle", source, {})
    (directory / "model.safetensors").unlink()
    state = transformers.Zamba2ForCausalLM.from_pretrained(source).state_dict()
    assert "lm_head.weight" in state
    torch.save(state if file.endswith("bin") else {"step": 3, "model": state}, directory / file, **options)
    assert same(CausalLM.from_pretrained(directory), CausalLM.from_pretrained(source))


def test_sharded_pickles(root, tmp_path):
    source = saved(root, "2.7B")
    directory = write(tmp_path / "pickle", source, {})
    (directory / "model.safetensors").unlink()
    tensors = list(read(source).items())
    files = {"pytorch_model-00001-of-00002.bin": tensors[:50], "pytorch_model-00002-of-00002.bin": tensors[50:]}
    for name, part in files.items():
        torch.save(dict(part), directory / name)
    assert same(CausalLM.from_pretrained(directory), CausalLM.from_pretrained(source))  # without an index
    weight_map = {tensor: name for name, part in files.items() for tensor, _ in part}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(CausalLM.from_pretrained(directory), CausalLM.from_pretrained(source))


def test_shared_blocks_may_be_repeated_or_stand_elsewhere(root, tmp_path):
    source = saved(root, "7B")
    expected, tensors = CausalLM.from_pretrained(source), read(source)
    # Layers 1 and 4 are uses of block 0, layers 3 and 6 of block 1.
    repeated = dict(tensors)
    for name, value in tensors.items():
        for first, again in (("1", "4"), ("3", "6")):
            if name.startswith(f"model.layers.{first}.shared_transformer."):
                repeated[name.replace(f"layers.{first}.", f"layers.{again}.")] = value
    assert len(repeated) > len(tensors)
    assert same(CausalLM.from_pretrained(write(tmp_path / "repeated", source, repeated)), expected)

    moved = {name.replace("layers.3.shared", "layers.6.shared"): value for name, value in tensors.items()}
    assert same(CausalLM.from_pretrained(write(tmp_path / "moved", source, moved)), expected)


def test_adapters_in_unused_slots_are_ignored_and_counted(root, tmp_path):
    source = saved(root, "2.7B")
    tensors = read(source)
    name = "model.layers.{}.shared_transformer.feed_forward.gate_up_proj_adapter_list.{}.{}.weight"
    for layer, slot in ((1, 1), (3, 0), (3, 2)):
        for half in (0, 1):
            tensors[name.format(layer, slot, half)] = torch.ones(3, 3)
    directory = write(tmp_path / "slots", source, tensors)
    with pytest.warns(UserWarning, match="6 adapter tensors in slots that their shared block never uses are ignored"):
        model = CausalLM.from_pretrained(directory)
    assert same(model, CausalLM.from_pretrained(source))


def test_tied_head_and_rotary_buffers_in_the_file(root, tmp_path):
    source = saved(root, "1.2B")
    tensors = read(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.rotary_emb.inv_freq"] = torch.ones(4)
    assert same(CausalLM.from_pretrained(write(tmp_path / "tied", source, tensors)), CausalLM.from_pretrained(source))


def test_names_without_the_prefix(root, tmp_path):
    """A checkpoint of Zamba2Model into the model with a head, and the other way."""
    source = saved(root, "2.7B")
    tensors = {name.removeprefix("model."): value for name, value in read(source).items()}
    base = write(tmp_path / "base", source, tensors, architectures=["Zamba2Model"])
    causal = CausalLM.from_pretrained(source)
    assert same(CausalLM.from_pretrained(base), causal)
    assert same(zamba2_jax.Zamba2Model.from_pretrained(base), causal.model)
    assert same(zamba2_jax.Zamba2Model.from_pretrained(source), causal.model)


def test_checkpoints_of_another_head(root, tmp_path):
    classifier = saved(root, "2.7B", "Zamba2ForSequenceClassification", num_labels=3)
    with pytest.warns(UserWarning, match="score.weight is ignored: Zamba2ForCausalLM does not have this head"):
        causal = CausalLM.from_pretrained(classifier)
    assert causal.config.num_labels == 3

    for source in (saved(root, "2.7B"), saved(root, "2.7B", "Zamba2Model")):
        with pytest.warns(UserWarning, match="score.weight is not in the checkpoint: it is newly initialised"):
            model = Classifier.from_pretrained(source)
        assert model.score.kernel.shape == (32, 2)
        assert 0.01 < float(jnp.std(model.score.kernel[...])) < 0.03
        with pytest.warns(UserWarning, match="newly initialised"):
            assert same(Classifier.from_pretrained(source), model)  # seed 0, every time
        model.save_pretrained(tmp_path / "complete")
        assert same(Classifier.from_pretrained(tmp_path / "complete"), model)

    with pytest.warns(UserWarning, match="newly initialised"):
        model = Classifier.from_pretrained(
            saved(root, "2.7B"), id2label={0: "no", 1: "yes", 2: "both"}, attention_dropout=0.1, dtype="auto"
        )
    assert (model.score.kernel.shape, model.config.label2id["both"]) == ((32, 3), 2)
    assert (model.config.attention_dropout, model.dtype) == (0.1, jnp.float32)
    with pytest.raises(ValueError, match=r"score\.weight.*\(3, 32\)"):
        Classifier.from_pretrained(classifier, num_labels=5)

    with pytest.warns(UserWarning, match="lm_head.weight is ignored"):
        zamba2_jax.Zamba2Model.from_pretrained(saved(root, "unusual"))


@pytest.mark.parametrize("orbax", [False, True])
def test_another_config(orbax, root, tmp_path):
    source = saved(root, "2.7B")
    model = CausalLM.from_pretrained(source)
    if orbax:
        source = tmp_path / "orbax"
        save_orbax(model, source)
    config = model.config.replace(chunk_size=8)
    other = CausalLM.from_pretrained(source, config=config)
    assert other.config == config
    assert same(other, model)
    assert CausalLM.from_pretrained(source, config=config, chunk_size=4).config == config.replace(chunk_size=4)
    with pytest.raises(ValueError, match=r"gate_up_proj\.(weight|kernel).*\((14, 32|32, 2, 7)\)"):
        CausalLM.from_pretrained(source, intermediate_size=7)


def test_arguments_of_transformers_that_are_not_taken():
    with pytest.raises(TypeError, match=r"no argument 'device_map': mesh= .* spreads the parameters"):
        CausalLM.from_pretrained("demo", device_map="auto")
    with pytest.raises(TypeError, match=r"no argument 'speed': it takes"):
        CausalLM.from_pretrained("demo", speed=11)


def test_dtypes(root, tmp_path):
    source = saved(root, "2.7B", dtype="bfloat16")
    model = CausalLM.from_pretrained(source, dtype=jnp.float32)
    assert (model.dtype, model.param_dtype) == (jnp.float32, jnp.float32)
    model = CausalLM.from_pretrained(source, dtype="bfloat16", param_dtype="float32")
    assert (model.dtype, model.param_dtype) == (jnp.bfloat16, jnp.float32)
    assert model.model.embed_tokens.embedding.dtype == jnp.float32
    assert CausalLM.from_pretrained(source).model.layers[0].mamba.A_log.dtype == jnp.float32

    # Neither argument nor config: the file decides.
    bare = write(tmp_path / "bare", source, read(source), dtype=None, torch_dtype=None)
    assert CausalLM.from_pretrained(bare).dtype == jnp.bfloat16
    # The config decides over the file.
    half = write(tmp_path / "half", source, read(source), dtype="float16")
    assert CausalLM.from_pretrained(half).model.embed_tokens.embedding.dtype == jnp.float16


def test_saved_dtype(root, tmp_path):
    """A_log, D and dt_bias stay float32 where the storage dtype would round them."""
    source = saved(root, "2.7B")
    model = CausalLM.from_pretrained(source)
    save_pretrained(model, tmp_path / "small", dtype="bfloat16")
    tensors, original = read(tmp_path / "small"), read(source)
    assert tensors["model.layers.0.mamba.A_log"].dtype == torch.float32
    assert torch.equal(tensors["model.layers.0.mamba.A_log"], original["model.layers.0.mamba.A_log"])
    kernel = "model.layers.0.mamba.in_proj.weight"
    assert torch.equal(tensors[kernel], original[kernel].to(torch.bfloat16))
    loaded, info = transformers.Zamba2ForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.dtype == torch.bfloat16


def test_mixed_dtypes_survive(root, tmp_path):
    source = saved(root, "2.7B")
    tensors = {
        name: t if name.endswith(("A_log", "dt_bias", ".D", "norm.weight")) else t.to(torch.float16)
        for name, t in read(source).items()
    }
    mixed = write(tmp_path / "mixed", source, tensors)
    write_hugging_face(open_parameters(mixed), tmp_path / "back")
    assert equal(read(tmp_path / "back"), tensors)


def test_nonfinite_weights_are_named(root, tmp_path):
    source = saved(root, "2.7B", dtype="bfloat16")
    tensors = read(source)
    tensors["model.layers.2.mamba.in_proj.weight"][3, 4] = float("nan")
    tensors["model.final_layernorm.weight"][0] = float("-inf")
    directory = write(tmp_path / "nan", source, tensors)
    names = "model.final_layernorm.weight, model.layers.2.mamba.in_proj.weight"
    with pytest.warns(UserWarning, match=f"NaN or infinite weights in .*: {names}"):
        CausalLM.from_pretrained(directory)


def test_progress_bar_only_when_asked_for(root, capsys):
    source = saved(root, "2.7B")
    load_pretrained(CausalLM, source)
    assert capsys.readouterr().err == ""
    load_pretrained(CausalLM, source, progress=True)
    assert "Loading Zamba2ForCausalLM: 100%" in capsys.readouterr().err


def test_extra_shards_without_an_index(root, tmp_path):
    directory, _ = shard(saved(root, "2.7B"), tmp_path / "shards")
    (directory / "model.safetensors.index.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(CausalLM.from_pretrained(directory), CausalLM.from_pretrained(saved(root, "2.7B")))


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), (17, 17), ("2MiB", 2**21), ("300", 300)]
)
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 parsecs", 0, -3, "1e9GB"])
def test_parse_size_refuses(text):
    with pytest.raises(ValueError, match="max_shard_size must be a positive number of bytes or a text"):
        parse_size(text)
