"""A prefix that is read once and continued many times: the same tokens as from scratch, and sooner."""

import time

import jax
import numpy as np
import pytest

from bench.oracle import layer_types, pair
from zamba2_jax import Zamba2Cache
from zamba2_jax.generation import programs

NEW = 6


@pytest.fixture(scope="module")
def model(oracle_dir):
    """Two shared blocks with adapters and RoPE."""
    options = {"use_shared_attention_adapter": True, "max_position_embeddings": 4096}
    return pair(oracle_dir, "7B", num_hidden_layers=2, layers_block_type=layer_types(2, (0, 1)), **options).jax


@pytest.fixture(scope="module")
def texts():
    """A prefix of 40 tokens, and three texts that begin with it, padded on the right: ids and mask."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(3, 131, (1, 40))
    ids, mask = np.zeros((2, 3, 40 + 9), int)
    for row, length in enumerate((3, 9, 1)):
        ids[row, : 40 + length] = np.concatenate([prefix[0], rng.integers(3, 131, length)])
        mask[row, : 40 + length] = 1
    return prefix, ids, mask


@pytest.fixture(scope="module")
def prefix_cache(model, texts):
    """Of the prefix alone: the one new token does not enter it."""
    return model.generate(texts[0], max_new_tokens=1, return_dict_in_generate=True).past_key_values


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2, "seed": 1},
    ],
    ids=str,
)
def test_a_batch_grows_from_one_prefix(model, texts, prefix_cache, options):
    _, ids, mask = texts
    options = {"max_new_tokens": NEW, "eos_token_id": None} | options
    again = model.generate(ids, mask, past_key_values=prefix_cache.repeat(3), **options)
    np.testing.assert_array_equal(again, model.generate(ids, mask, **options))


def test_left_padding_is_as_good(model, texts, prefix_cache):
    """Where a row's padding is now does not matter: its first 40 real tokens are those in the cache."""
    _, ids, mask = texts
    options = {"max_new_tokens": NEW, "eos_token_id": None}
    left, left_mask = np.zeros_like(ids), np.zeros_like(mask)
    for row, count in enumerate(mask.sum(axis=1)):
        left[row, -count:], left_mask[row, -count:] = ids[row, :count], 1
    again = model.generate(left, left_mask, past_key_values=prefix_cache.repeat(3), **options)
    expected = model.generate(ids, mask, **options)
    np.testing.assert_array_equal(again[:, -NEW:], expected[:, -NEW:])


def test_from_a_file(model, texts, prefix_cache, tmp_path):
    _, ids, mask = texts
    prefix_cache.save(tmp_path / "prefix", model)
    loaded = Zamba2Cache.load(tmp_path / "prefix", model)
    assert loaded.max_length == 40  # and generate makes the room that it needs
    options = {"max_new_tokens": NEW, "eos_token_id": None}
    again = model.generate(ids[:1], mask[:1], past_key_values=loaded, **options)
    np.testing.assert_array_equal(again, model.generate(ids[:1], mask[:1], **options))


def test_a_full_cache_grows(model, texts):
    """More slots than were asked for, and room that padding had taken."""
    prefix, ids, mask = texts
    options = {"eos_token_id": None, "return_dict_in_generate": True}
    first = model.generate(prefix, max_new_tokens=1, cache_length=128, **options).past_key_values
    assert (first.max_length, first.get_seq_length()) == (128, 128)  # one chunk, most of it padding
    again = model.generate(ids[1:2], mask[1:2], max_new_tokens=NEW, past_key_values=first, **options)
    assert (again.past_key_values.max_length, again.past_key_values.get_seq_length()) == (1152, 40 + 32 + NEW - 1)
    expected = model.generate(ids[1:2], mask[1:2], max_new_tokens=NEW, eos_token_id=None)
    np.testing.assert_array_equal(again.sequences, expected)
    assert first.max_length == 128  # as it was


def test_rows_that_ended_early_can_go_on(model, texts):
    """The cache of a batch holds each row's own tokens, and not the padding that followed them."""
    _, ids, mask = texts
    free = model.generate(ids, mask, max_new_tokens=NEW, eos_token_id=None)[:, ids.shape[1] :]
    end = int(free[0, 1])
    first = model.generate(ids, mask, max_new_tokens=NEW, eos_token_id=end, return_dict_in_generate=True)
    new = first.sequences[:, ids.shape[1] :]
    lengths = [int(np.argmax(row == end)) + 1 if end in row else NEW for row in new]
    assert lengths[0] <= 2 < max(lengths)
    np.testing.assert_array_equal(first.past_key_values.next_position, mask.sum(axis=1) + np.asarray(lengths) - 1)

    # The next turn: what each row holds, three more tokens, and padding wherever it falls.
    more = np.random.default_rng(5).integers(3, 131, (3, 3))
    rows = [np.concatenate([ids[row][mask[row] == 1], new[row, : lengths[row]], more[row]]) for row in range(3)]
    turn, turn_mask = np.zeros((2, 3, max(map(len, rows))), int)
    for row, text in enumerate(rows):
        turn[row, : len(text)], turn_mask[row, : len(text)] = text, 1
    options = {"max_new_tokens": NEW, "eos_token_id": None}
    again = model.generate(turn, turn_mask, past_key_values=first.past_key_values, **options)
    np.testing.assert_array_equal(again, model.generate(turn, turn_mask, **options))


def test_a_line_is_read_in_one_small_call(model, texts, prefix_cache, monkeypatch):
    calls = []
    prefill = programs.prefill

    def spy(structure, weights, ids, positions, mask, chunks, cache, **static):
        calls.append((int(chunks), static["chunk"], int(mask.sum())))
        return prefill(structure, weights, ids, positions, mask, chunks, cache, **static)

    monkeypatch.setattr(programs, "prefill", spy)
    _, ids, mask = texts
    model.generate(ids, mask, max_new_tokens=1, past_key_values=prefix_cache.repeat(3))
    assert calls == [(1, 32, 3 + 9 + 1)]


def test_a_prefix_from_a_file_starts_sooner(model, tmp_path):
    """The figure itself is `python -m bench prefix`'s: 4096 tokens, and more than 20 times sooner. Here 1000 tokens, so
    that eight chunks of 128 stand against one of 32."""
    rng = np.random.default_rng(0)
    prefix, more = rng.integers(3, 131, (1, 1000)), rng.integers(3, 131, (1, 8))
    text = np.concatenate([prefix, more], axis=1)
    model.generate(prefix, max_new_tokens=1, return_dict_in_generate=True).past_key_values.save(tmp_path / "f", model)

    def continued():
        cache = Zamba2Cache.load(tmp_path / "f", model, max_length=1152)
        return model.generate(text, max_new_tokens=1, past_key_values=cache)

    def from_scratch():
        return model.generate(text, max_new_tokens=1)

    np.testing.assert_array_equal(continued(), from_scratch())  # and both are compiled

    def seconds(run):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - began)
        return min(times)

    assert seconds(continued) < seconds(from_scratch) / 2
