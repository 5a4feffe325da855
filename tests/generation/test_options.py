"""Where options come from, and every message about one that cannot be served. No model runs here."""

import types

import pytest
from transformers import GenerationConfig

from zamba2_jax.generation import options

CONFIG = types.SimpleNamespace(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def resolve(generation_config=None, of_model=None, seed=None, prompt_length=5, **arguments):
    values = options.merge(generation_config, of_model, CONFIG, arguments)
    return options.check(
        values,
        prompt_length=prompt_length,
        vocab_size=100,
        max_position_embeddings=64,
        explicit=list(arguments),
        seed=seed,
    )


def test_order_of_precedence():
    of_model = {"max_new_tokens": 3, "eos_token_id": [4, 5], "repetition_penalty": 1.5, "transformers_version": "5"}
    assert resolve(of_model=of_model).max_new_tokens == 3
    assert resolve(GenerationConfig(max_new_tokens=7), of_model).max_new_tokens == 7
    assert resolve({"max_new_tokens": 7}, of_model, max_new_tokens=9).max_new_tokens == 9
    assert resolve(GenerationConfig(max_new_tokens=7), of_model).eos_token_ids == (4, 5)
    assert resolve(GenerationConfig(max_new_tokens=7), of_model).repetition_penalty == 1.5
    # The model's config names special tokens only for a model without a generation config.
    assert resolve(max_new_tokens=1).eos_token_ids == (2,)
    assert resolve(of_model={"do_sample": False}, max_new_tokens=1).eos_token_ids == ()


def test_none_switches_an_option_off():
    drawn = resolve(max_new_tokens=1, do_sample=True, top_k=None, temperature=None, top_p=None, eos_token_id=None)
    assert (drawn.top_k, drawn.temperature, drawn.top_p, drawn.eos_token_ids) == (None, None, None, ())
    assert resolve(max_new_tokens=1, do_sample=True).top_k == 50
    assert resolve(max_new_tokens=1, do_sample=True, top_k=0).top_k is None


def test_values_without_effect_cost_no_program():
    drawn = resolve(max_new_tokens=1, do_sample=True, temperature=1.0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    assert (drawn.temperature, drawn.top_p, drawn.min_p, drawn.repetition_penalty) == (None, None, None, None)


def test_pad_falls_back_to_the_first_end():
    assert resolve(of_model={"eos_token_id": [7, 8]}, max_new_tokens=1).pad_token_id == 7


def test_length_defaults():
    with pytest.warns(UserWarning, match="generating at most 20 tokens"):
        assert resolve().max_new_tokens == 20
    with pytest.warns(UserWarning, match="generating at most 20 tokens"):
        assert resolve(prompt_length=60).max_new_tokens == 4
    assert resolve(max_length=9).max_new_tokens == 4
    assert resolve(max_length=9, max_new_tokens=7).max_new_tokens == 7
    assert resolve(max_new_tokens=9, min_length=8).min_new_tokens == 3
    assert resolve(max_new_tokens=9, min_length=8, min_new_tokens=2).min_new_tokens == 2


def test_seeds():
    assert resolve(max_new_tokens=1, seed=2**32 - 1).seed == 2**32 - 1
    assert resolve(max_new_tokens=1).seed != resolve(max_new_tokens=1).seed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 60}, "5 columns and 60 new tokens exceed max_position_embeddings=64"),
        ({"max_new_tokens": 4, "min_new_tokens": 6}, "min_new_tokens=6 cannot be reached: generation ends after 4"),
        ({"max_new_tokens": 4, "temperature": 0.5}, "temperature=0.5 has no effect without do_sample=True"),
        ({"max_new_tokens": 4, "length_penalty": 2.0}, "length_penalty=2.0 has no effect without num_beams above 1"),
        (
            {"max_new_tokens": 4, "output_scores": True},
            "output_scores=True has no effect without return_dict_in_generate",
        ),
    ],
)
def test_warnings(arguments, message):
    with pytest.warns(UserWarning, match=message):
        resolve(**arguments)


def test_values_from_a_config_warn_of_nothing():
    resolve(of_model={"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 4})
    resolve(of_model={"temperature": 0.0, "max_new_tokens": 4})


def test_what_the_models_own_config_asks_in_vain_is_warned_of_once():
    """A checkpoint's file must not stop its model: what transformers wrote into it is not the caller's doing."""
    neutral = {"forced_decoder_ids": None, "stop_strings": None, "use_cache": True, "max_new_tokens": 4}
    assert resolve(of_model=neutral).max_new_tokens == 4
    foreign = {"return_legacy_cache": True, "use_cache": False, "suppress_tokens": [4]}
    message = r"ignored: use_cache=False, suppress_tokens=\[4\], return_legacy_cache=True\."
    with pytest.warns(UserWarning, match=message) as caught:
        assert resolve(of_model=neutral | foreign).max_new_tokens == 4
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ({"max_new_tokens": -3}, "max_new_tokens must be an integer of at least 1, got -3"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be an integer of at least 1, got 2.0"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer of at least 1, got True"),
        ({"max_new_tokens": None, "max_length": 5}, "max_length must be larger than the prompt's 5 columns.*got 5"),
        ({"min_new_tokens": -1}, "min_new_tokens must be an integer of at least 0, got -1"),
        ({"min_length": "a"}, "min_length must be an integer of at least 0, got 'a'"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be a finite number above 0.*got 0.0; for greedy"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature must be a finite number above 0.*got nan"),
        ({"do_sample": True, "top_k": -1}, "top_k must be an integer of at least 0, got -1; 0 or None switches it off"),
        ({"do_sample": True, "top_p": 0.0}, "top_p must be above 0 and at most 1.*got 0.0"),
        ({"do_sample": True, "top_p": 1.1}, "top_p must be above 0 and at most 1.*got 1.1"),
        ({"do_sample": True, "min_p": -0.1}, "min_p must be from 0 to 1.*got -0.1"),
        ({"do_sample": True, "min_p": 1.5}, "min_p must be from 0 to 1.*got 1.5"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0; for greedy decoding"),
        ({"temperature": -1}, "temperature must be a finite number above 0, got -1"),
        ({"top_k": -1}, "top_k must be an integer of at least 0, got -1; 0 or None switches it off"),
        ({"top_k": 2.5}, "top_k must be an integer of at least 0, got 2.5"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1.*got 1.1"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1.*got 0"),
        ({"min_p": 1.5, "num_beams": 2}, "min_p must be from 0 to 1.*got 1.5"),
        ({"do_sample": "yes"}, "do_sample must be True or False, got 'yes'"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a finite number above 0, got 0.0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be an integer of at least 0, got -1"),
        ({"num_beams": 0}, "num_beams must be an integer of at least 1, got 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences must be at most num_beams=2, got 3"),
        ({"num_return_sequences": 2}, "num_return_sequences must be 1 for greedy decoding.*got 2; set do_sample=True"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping must be True, False or 'never', got 'soon'"),
        ({"num_beams": 2, "length_penalty": float("inf")}, "length_penalty must be a finite number, got inf"),
        ({"eos_token_id": 100}, "eos_token_id must be in the vocabulary, from 0 to 99, got 100"),
        ({"eos_token_id": [3, -1]}, "eos_token_id must be in the vocabulary, from 0 to 99, got -1"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list of them, got '</s>'"),
        ({"pad_token_id": [1, 2]}, r"pad_token_id must be one token id, got \[1, 2\]"),
        ({"prefill_chunk": 0}, "prefill_chunk must be an integer of at least 1, got 0"),
        ({"seed": -1}, "seed must be an integer from 0 to"),
        ({"max_tokens": 5}, "max_tokens in the arguments of generate is not an option of generate; known are"),
        (
            {"bad_words_ids": [[5]]},
            r"bad_words_ids=\[\[5\]\] in the arguments of generate is not supported; leave it out",
        ),
        (
            {"stop_strings": ["a", ""]},
            r"stop_strings must be a text or a list of them, none of them empty, got \['a', ''\]",
        ),
        ({"stop_strings": 5}, "stop_strings must be a text or a list of them, none of them empty, got 5"),
        ({"stop_strings": "a", "num_beams": 2}, "stop_strings='a' do not go with beam search, got num_beams=2"),
        ({"use_cache": False}, "use_cache=False in the arguments of generate is not supported"),
        ({"generation_config": {"typical_p": 0.9}}, "typical_p=0.9 in generation_config is not supported"),
        ({"generation_config": {"max_tokens": None}}, "max_tokens in generation_config is not an option of generate"),
        (
            {"of_model": 3},
            "the model's generation_config must be a transformers GenerationConfig, a dict or None, got int",
        ),
        (
            {"generation_config": 3},
            "generation_config must be a transformers GenerationConfig, a dict or None, got int",
        ),
    ],
    ids=str,
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve(**({"max_new_tokens": 4} | arguments))


def test_neutral_values_of_what_is_not_implemented_pass():
    resolve(GenerationConfig(use_cache=True, typical_p=1.0, guidance_scale=1.0, num_beam_groups=1), max_new_tokens=1)
    resolve(max_new_tokens=1, token_type_ids=None, stop_strings=None)
