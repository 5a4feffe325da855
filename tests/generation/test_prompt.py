"""Alignment of prompts, and the few shapes that they are brought into. Host arithmetic only."""

import numpy as np
import pytest

from zamba2_jax.generation import prompt


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
    assert (laid_out.chunk, laid_out.chunks, laid_out.capacity) == (2, 2, 1024)
    assert laid_out.ids[:, :5].tolist() == [[0, 5, 6, 7, 0], [0, 0, 8, 9, 0]]
    assert laid_out.mask[:, :4].astype(int).tolist() == [[0, 1, 1, 1], [0, 0, 1, 1]]
    assert laid_out.positions[:, :4].tolist() == [[0, 0, 1, 2], [0, 0, 0, 1]]


def test_a_pad_token_that_ends_sequences_is_no_padding():
    assert read([[2, 5, 6]], pad=2, eos=(2,)).mask.all()
    assert read([[0, 5, 6]]).mask.tolist() == [[False, True, True]]
    assert read([[0, 5, 6]], pad=None).mask.all()


@pytest.mark.parametrize("new", [1, 20, 100, 500, 1000])
def test_lengths_to_2000_share_five_or_six_programs(new):
    """A program per chunk size and capacity for the prefill, and one per capacity for the loop."""
    plans = [plan(read(np.full((1, length), 5)), new) for length in range(1, 2001)]
    prefill = {(p.chunk, p.capacity, p.ids.shape) for p in plans}
    loop = {(p.capacity, prompt.buffer_columns(read([[5]]), new, p)) for p in plans}
    assert len(prefill) + len(loop) <= 6


def test_padding_of_a_prompt_is_bounded():
    for length in (1, 64, 65, 256, 257, 1000, 4096, 5000, 30_000):
        laid_out = plan(read(np.full((1, length), 5)))
        assert laid_out.chunk * laid_out.chunks - length < max(64, length)


def test_many_rows_take_smaller_chunks():
    assert plan(read(np.full((128, 1000), 5))).chunk == 64
    assert plan(read(np.full((1, 1000), 5))).chunk == 512


def test_holes_are_read_in_one_call():
    mask = np.ones((2, 300), int)
    mask[1, 256] = 0
    batch = read(np.full((2, 300), 5), mask)
    assert (plan(batch).chunk, plan(batch).chunks) == (512, 1)
    with pytest.raises(ValueError, match="prefill_chunk=256 would cut a prompt with masked tokens between real ones"):
        plan(batch, prefill_chunk=256)
