"""The published 1.2B weights against the figures of transformers' own integration test; only where they are cached."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from huggingface_hub import try_to_load_from_cache

from zamba2_jax import Zamba2ForCausalLM

NAME = "Zyphra/Zamba2-1.2B"
FIRST = "Hey how are you doing on this lovely evening?"
SECOND = "When did the Roman empire "
FIRST_LOGITS = [
    *(-5.9587, 10.5152, 7.0382, -2.8728, -4.8143, -4.8142, -4.8142, -4.8144),
    *(-4.8143, -4.8143, -4.8142, -4.8142, 6.0185, 18.0037, -4.8142, -4.8144),
]
SECOND_LOGITS = [0.1966, 6.3449, 3.8350, -5.7291]

pytestmark = [
    pytest.mark.hub,
    pytest.mark.slow,
    pytest.mark.skipif(
        not isinstance(try_to_load_from_cache(NAME, "model.safetensors"), str),
        reason=f"the weights of {NAME} are not in the local Hugging Face cache",
    ),
]


@pytest.fixture(scope="module")
def model():
    return Zamba2ForCausalLM.from_pretrained(NAME, dtype=jnp.float32, local_files_only=True)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = transformers.AutoTokenizer.from_pretrained(NAME, local_files_only=True)
    tokenizer.padding_side = "left"
    return tokenizer


def last_logits(model, inputs):
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state, ids, mask: nnx.merge(graphdef, state)(ids, attention_mask=mask, logits_to_keep=1))
    return np.asarray(call(state, inputs["input_ids"], inputs["attention_mask"]).logits[:, -1])


def test_one_prompt(model, tokenizer):
    inputs = tokenizer(FIRST, return_tensors="np")
    np.testing.assert_allclose(last_logits(model, inputs)[0, :16], FIRST_LOGITS, atol=1e-3)
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=10)[0], skip_special_tokens=True)
    assert text == FIRST + "\n\nI'm doing well, thanks for"


def test_left_padded_batch(model, tokenizer):
    inputs = tokenizer([FIRST, SECOND], padding=True, return_tensors="np")
    np.testing.assert_allclose(last_logits(model, inputs)[1, :4], SECOND_LOGITS, atol=1e-3)
    texts = tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=10), skip_special_tokens=True)
    assert texts == [FIRST + "\n\nI'm doing well, thanks for", SECOND + "1st fall?\nThe Roman Empire fell in"]
