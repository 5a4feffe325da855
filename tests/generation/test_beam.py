"""When beam search may stop, against transformers' rule: whole searches seldom tell its cases apart."""

import types

import numpy as np
import pytest
import torch
from transformers.generation import GenerationMixin

from zamba2_jax.generation import beam
from zamba2_jax.generation.processors import EARLY_STOPPING


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.5])
def test_whether_running_beams_may_still_win(early_stopping, length_penalty):
    rng = np.random.default_rng(0)
    rows, beams, length, longest, prompt_length = 64, 3, 5, 12, 7
    running = -np.sort(np.exp(rng.uniform(0, 7, (rows, beams))).astype(np.float32), axis=1)
    finished = -np.exp(rng.uniform(-2, 3, (rows, beams))).astype(np.float32)
    is_finished = rng.uniform(size=(rows, beams)) < 0.9

    expected = GenerationMixin._check_early_stop_heuristic(
        is_early_stop_heuristic_unsatisfied=torch.ones((rows, 1), dtype=torch.bool),
        running_beam_scores=torch.from_numpy(running),
        beam_scores=torch.from_numpy(finished),
        is_sent_finished=torch.from_numpy(is_finished),
        cur_len=prompt_length + length,
        max_length=prompt_length + longest,
        decoder_prompt_len=prompt_length,
        early_stopping=early_stopping,
        length_penalty=length_penalty,
    )[:, 0].numpy()
    actual = beam._may_improve(
        types.SimpleNamespace(scores=running),
        types.SimpleNamespace(scores=finished),
        is_finished,
        np.float32(length),
        np.int32(longest),
        types.SimpleNamespace(
            early_stopping=np.int32(EARLY_STOPPING[early_stopping]), length_penalty=np.float32(length_penalty)
        ),
    )
    assert expected.any()
    assert not expected.all()
    np.testing.assert_array_equal(actual, expected)
