"""Zamba2Cache by itself: copies of rows, another number of slots, and the file it can be kept in."""

import dataclasses
import json
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zamba2_jax import Zamba2Cache, Zamba2Config, Zamba2ForCausalLM, quantize
from zamba2_jax.checkpoint import safetensors

TINY = {
    "vocab_size": 53,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    "num_mem_blocks": 2,
    "n_mamba_heads": 2,
    "mamba_d_state": 4,
    "num_attention_heads": 2,
    "adapter_rank": 2,
    "use_mem_rope": True,
    "use_shared_attention_adapter": True,
    "chunk_size": 16,
}
LEFT, RIGHT = (3, 5), (4, 2)  # padding of the two rows; real tokens are 13 and 13, of 20 columns


def make(seed=0, dtype=jnp.float32, **changes):
    return Zamba2ForCausalLM(Zamba2Config(**TINY | changes), dtype=dtype, rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def call(model):
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda ids, mask, cache: nnx.merge(graphdef, state)(ids, mask, past_key_values=cache))
    return lambda ids, mask, cache: forward(np.asarray(ids), np.asarray(mask), cache)


@pytest.fixture(scope="module")
def cache(model, call):
    """Two rows padded on both sides: 13 and 13 real tokens of 20, in 24 slots."""
    ids = np.random.default_rng(0).integers(1, 53, (2, 20))
    mask = np.zeros((2, 20), int)
    for row, (left, right) in enumerate(zip(LEFT, RIGHT, strict=True)):
        mask[row, left : 20 - right] = 1
    return call(ids, mask, model.init_cache(2, 24)).past_key_values


@pytest.fixture(scope="module")
def next_logits(call):
    more = np.random.default_rng(1).integers(1, 53, (2, 4))

    def run(cache):
        rows = np.resize(more, (cache.batch_size, 4)) if cache.batch_size == 2 else np.repeat(more, 2, axis=0)
        return np.asarray(call(rows, np.ones(rows.shape, int), cache).logits)

    return run


def equal(one, other):
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(leaves, others, strict=True))


def test_repeat_is_numpys_repeat(cache, next_logits):
    twice = cache.repeat(2)
    assert (twice.batch_size, twice.get_seq_length()) == (4, 20)
    np.testing.assert_array_equal(twice.next_position, [13, 13, 13, 13])
    np.testing.assert_array_equal(twice.mamba[0].ssm, np.repeat(cache.mamba[0].ssm, 2, axis=0))
    np.testing.assert_allclose(next_logits(twice), np.repeat(next_logits(cache), 2, axis=0), atol=1e-6)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        cache.repeat(0)


@pytest.mark.parametrize("slots", [17, 24, 40])
def test_resize_drops_padding_and_changes_no_result(cache, next_logits, slots):
    resized = cache.resize(slots)
    assert (resized.max_length, resized.get_seq_length()) == (slots, 13)
    assert not resized.slot_mask[:, 13:].any()
    np.testing.assert_allclose(next_logits(resized), next_logits(cache), atol=2e-6)


def test_resize_refuses_to_forget(cache):
    with pytest.raises(ValueError, match="max_length must be at least 13, the tokens in the cache, got 12"):
        cache.resize(12)


# ---- the file ----


def test_a_file_round_trip_is_exact(cache, model, next_logits, tmp_path):
    path = tmp_path / "prefix.safetensors"
    cache.save(path, model)
    assert equal(Zamba2Cache.load(path, model), cache.resize(13))
    larger = Zamba2Cache.load(path, model, max_length=24)
    assert equal(larger, cache.resize(24))
    np.testing.assert_allclose(next_logits(larger), next_logits(cache), atol=2e-6)
    assert os.listdir(tmp_path) == ["prefix.safetensors"]


def test_the_size_of_a_file_is_known(cache, model, tmp_path):
    """States, and keys and values of 13 tokens; slots and padding cost nothing."""
    sizes = {}
    for slots in (24, 1000):
        cache.resize(slots).save(tmp_path / f"{slots}", model)
        sizes[slots] = os.path.getsize(tmp_path / f"{slots}")
    kept = cache.resize(13)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves((kept.mamba, kept.attention)))
    assert sizes[24] == sizes[1000]
    assert nbytes < sizes[24] < nbytes + 5000


def test_dtypes_are_kept(tmp_path):
    half = make(dtype=jnp.bfloat16)
    empty = half.init_cache(1, 8, ssm_dtype=jnp.bfloat16)
    filled = jax.tree.map(
        lambda leaf: (leaf + np.linspace(0, 1, leaf.size).reshape(leaf.shape)).astype(leaf.dtype), empty
    )
    cache = dataclasses.replace(
        filled, slot_mask=jnp.arange(8)[None] < 3, length=jnp.int32(3), next_position=jnp.array([3])
    )
    cache.save(tmp_path / "half", half)
    loaded = Zamba2Cache.load(tmp_path / "half", half)
    assert equal(loaded, cache.resize(3))
    assert {leaf.dtype for leaf in jax.tree.leaves((loaded.mamba, loaded.attention))} == {jnp.dtype(jnp.bfloat16)}


def test_the_same_weights_in_another_dtype_are_the_same_model(cache, model, tmp_path):
    cache.save(tmp_path / "file", model)
    half = make(dtype=jnp.bfloat16)
    nnx.update(half, jax.tree.map(lambda to, value: value.astype(to.dtype), nnx.state(half), nnx.state(model)))
    assert equal(Zamba2Cache.load(tmp_path / "file", half), Zamba2Cache.load(tmp_path / "file", model))


def test_another_model_is_refused(cache, model, tmp_path):
    path = tmp_path / "file"
    cache.save(path, model)
    with pytest.raises(ValueError, match="another model: the shape is the same, the weights are not"):
        Zamba2Cache.load(path, make(seed=1))
    with pytest.raises(ValueError, match=r"another model: rope_parameters is .* there and .*500.* here"):
        Zamba2Cache.load(path, make(rope_theta=500.0))
    with pytest.raises(ValueError, match="num_hidden_layers is 4 there and 3 here"):
        Zamba2Cache.load(path, make(num_hidden_layers=3, layers_block_type=["mamba", "hybrid", "mamba"]))
    with pytest.raises(ValueError, match="the weights are not"):
        Zamba2Cache.load(path, quantize(model, "int8"))
    tuned = make()
    kernel = tuned.model.shared_blocks[1].self_attn.q_proj.kernel
    kernel.set_value(kernel.get_value() * 1.1)  # one matrix of many
    with pytest.raises(ValueError, match="the weights are not"):
        Zamba2Cache.load(path, tuned)
    with pytest.raises(
        ValueError, match="the cache is not of this model: it has 4 layers and 2 hybrid ones, the model 3"
    ):
        cache.save(path, make(num_hidden_layers=3, layers_block_type=["mamba", "hybrid", "mamba"]))
    Zamba2Cache.load(path, model)  # what was there stayed


def test_what_changes_no_result_does_not_matter(cache, model, tmp_path):
    cache.save(tmp_path / "file", model)
    Zamba2Cache.load(tmp_path / "file", make(max_position_embeddings=99, eos_token_id=7, chunk_size=8))


def test_files_that_are_no_cache(cache, model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*nowhere"):
        Zamba2Cache.load(tmp_path / "nowhere", model)
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        Zamba2Cache.load(path, model)
    safetensors.write_file(path, {}, lambda name: None, {})
    with pytest.raises(ValueError, match="is no saved cache of this version: its format is None"):
        Zamba2Cache.load(path, model)
    cache.save(path, model)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="truncated"):
        Zamba2Cache.load(path, model)
    path.write_bytes(_without(whole, "attention.1.key"))
    with pytest.raises(ValueError, match=r"damaged: attention.1.key is missing, where \(2, 13, 2, 16\) floats belong"):
        Zamba2Cache.load(path, model)
    cache.save(path, model)
    with pytest.raises(ValueError, match="max_length must be at least 13"):
        Zamba2Cache.load(path, model, max_length=5)
    with pytest.raises(OSError, match="absent"):
        cache.save(tmp_path / "absent" / "file", model)


def _without(file, name):
    """A safetensors file whose header no longer mentions a tensor."""
    (length,) = struct.unpack("<Q", file[:8])
    header = json.loads(file[8 : 8 + length])
    del header[name]
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + file[8 + length :]


def test_a_write_that_fails_leaves_the_old_file(cache, model, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def no_room(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors, "write_file", no_room)
    with pytest.raises(OSError, match="No space left"):
        cache.save(path, model)
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_text() == "old"
