"""The bench of prompt-lookup decoding: a quick run of each half."""

import jax.numpy as jnp
import pytest

from bench import lookup


def test_a_call_of_several_tokens_is_timed_beside_a_plain_step():
    seconds = lookup.call_seconds(lookup.make("tiny", jnp.float32), 32, guesses=(2,))
    assert list(seconds) == [0, 2]
    assert min(seconds.values()) > 0


def test_prompts_are_of_different_modules():
    prompts = lookup.module_prompts()
    assert {prompt.shape for prompt in prompts} == {(1, 400)}
    assert len({prompt.tobytes() for prompt in prompts}) == len(prompts)


@pytest.mark.slow
def test_the_demo_model_continues_a_module_in_fewer_calls(monkeypatch):
    monkeypatch.setattr(lookup, "MODULES", ("argparse",))
    found = lookup.continue_modules(lookup.make("demo", jnp.float32), guesses=(5,))[5]
    assert found.least == found.most == pytest.approx(found.tokens_per_call)
    assert found.tokens_per_call > 2
