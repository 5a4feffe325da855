"""Alignment of prompts, and the few shapes that they are brought into. Host arithmetic only."""

import jax.numpy as jnp
import numpy as np
import pytest

from zamba2_jax import Zamba2Config
from zamba2_jax.cache import init_cache
from zamba2_jax.generation import prompt

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "layers_block_type": ["mamba", "hybrid"],
    "n_mamba_heads": 2,
    "mamba_d_state": 4,
    "num_attention_heads": 2,
    "adapter_rank": 2,
}


def read(ids, mask=None, vocab_size=50, bos=1, pad=0, eos=(2,)):
    return prompt.read_prompt(ids, mask, vocab_size=vocab_size, bos_token_id=bos, pad_token_id=pad, eos_token_ids=eos)


def plan(batch, max_new_tokens=10, prefill_chunk=None, cache_length=None, cache=None):
    return prompt.plan_prefill(
        batch, max_new_tokens=max_new_tokens, prefill_chunk=prefill_chunk, cache_length=cache_length, cache=cache
    )


def test_rows_are_moved_right_over_trailing_padding():
    batch = read([[5, 6, 7, 0], [0, 8, 0, 0], [0, 0, 9, 9]], [[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1]])
    assert batch.tokens.tolist() == [[0, 5, 6, 7], [0, 0, 0, 8], [0, 0, 9, 9]]
    assert batch.mask.astype(int).tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]]
    device = batch.device_prompt(2)
    assert device.given.tolist() == [1, 1, 2, 2, 0, 0]
    assert device.real.tolist() == [1, 1, 3, 3, 2, 2]
    assert device.tokens.tolist() == [3, 3, 1, 1, 2, 2]


def test_the_plan_ends_with_the_prompt_and_counts_positions():
    laid_out = plan(read([[5, 6, 7], [0, 8, 9]], [[1, 1, 1], [0, 1, 1]]), prefill_chunk=2)
    assert (laid_out.chunk, laid_out.chunks, laid_out.capacity) == (2, 2, 1152)
    assert laid_out.ids[:, :5].tolist() == [[0, 5, 6, 7, 0], [0, 0, 8, 9, 0]]
    assert laid_out.mask[:, :4].astype(int).tolist() == [[0, 1, 1, 1], [0, 0, 1, 1]]
    assert laid_out.positions[:, :4].tolist() == [[0, 0, 1, 2], [0, 0, 0, 1]]


def test_a_pad_token_that_ends_sequences_is_no_padding():
    assert read([[2, 5, 6]], pad=2, eos=(2,)).mask.all()
    assert read([[0, 5, 6]]).mask.tolist() == [[False, True, True]]
    assert read([[0, 5, 6]], pad=None).mask.all()


@pytest.mark.parametrize("new", [1, 20, 100, 384])
@pytest.mark.parametrize("rows", [1, 16])
def test_lengths_to_16000_share_six_programs(new, rows):
    """Per class of texts a program for the prefill and one for the loop."""
    edges = {edge + step - new for edge in (1024, 1152, 4096, 4608, 16384) for step in range(-3, 4)}
    prefill, loop = set(), set()
    for length in sorted({*range(1, 16001, 97), 16000, *edges} - {*range(-400, 1), *range(16001, 17000)}):
        batch = read(np.full((rows, length), 5))
        laid_out = plan(batch, new)
        prefill.add((laid_out.chunk, laid_out.capacity, laid_out.ids.shape))
        loop.add((laid_out.capacity, prompt.buffer_columns(batch, new, laid_out)))
        assert laid_out.chunk * laid_out.chunks + new <= laid_out.capacity
    chunks = (128, 512, 2048 if rows == 1 else 1024)
    assert sorted(prefill) == [
        (chunk, slots, (rows, slots)) for chunk, slots in zip(chunks, (1152, 4608, 18432), strict=True)
    ]
    assert sorted(loop) == [(slots, slots) for slots in (1152, 4608, 18432)]


@pytest.mark.parametrize(("longest", "chunk", "slots"), [(1024, 128, 1152), (4096, 512, 4608), (16384, 2048, 18432)])
@pytest.mark.parametrize("new", [1, 7, 100])
def test_padding_pushes_no_text_out_of_its_class(longest, chunk, slots, new):
    for length in (longest - new, longest - new - 1, longest - new - 200):
        laid_out = plan(read(np.full((1, length), 5)), new)
        assert (laid_out.chunk, laid_out.capacity) == (chunk, slots)
    beyond = plan(read(np.full((1, longest - new + 1), 5)), new)
    assert (beyond.chunk, beyond.capacity) == (min(4 * chunk, 2048), 4 * longest + min(4 * chunk, 2048))


def test_padding_of_a_prompt_is_bounded():
    for length in (1, 64, 128, 129, 1000, 1025, 4096, 5000, 30_000):
        laid_out = plan(read(np.full((1, length), 5)))
        assert laid_out.chunk * laid_out.chunks - length < max(128, length)


def test_many_rows_take_smaller_chunks():
    assert plan(read(np.full((128, 1000), 5))).chunk == 128
    assert plan(read(np.full((256, 1000), 5))).chunk == 64
    assert plan(read(np.full((1000, 1000), 5))).chunk == 64
    assert plan(read(np.full((1, 1000), 5)), 25).chunk == 512


def test_a_chunk_of_ones_own_takes_the_slots_it_needs():
    prompt_of_5 = read(np.full((1, 5), 5))
    assert plan(prompt_of_5, prefill_chunk=1000).capacity == 1152
    assert plan(prompt_of_5, prefill_chunk=1150).capacity == 4608
    assert plan(prompt_of_5, cache_length=137).capacity == 137
    with pytest.raises(ValueError, match="cache_length must be at least 137 for a prompt padded to 128 columns"):
        plan(prompt_of_5, cache_length=136)


def test_a_given_cache_is_padded_little():
    cache = init_cache(Zamba2Config(**TINY), 1, 18432, jnp.float32)
    laid_out = plan(read(np.full((1, 100), 5)), 5000, cache=cache)
    assert (laid_out.chunk, laid_out.chunks, laid_out.capacity, laid_out.ids.shape) == (128, 1, 18432, (1, 1152))


def test_holes_are_read_in_one_call():
    mask = np.ones((2, 300), int)
    mask[1, 256] = 0
    batch = read(np.full((2, 300), 5), mask)
    assert (plan(batch).chunk, plan(batch).chunks) == (512, 1)
    with pytest.raises(ValueError, match="prefill_chunk=256 would cut a prompt with masked tokens between real ones"):
        plan(batch, prefill_chunk=256)
