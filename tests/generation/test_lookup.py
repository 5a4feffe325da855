"""Prompt-lookup decoding: the tokens and the cache of plain decoding, in fewer calls of the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from tests.generation.test_programs import copied_in_loop
from zamba2_jax import Zamba2Config, Zamba2ForCausalLM
from zamba2_jax.generation import lookup, options, processors, programs
from zamba2_jax.generation.processors import Prompt
from zamba2_jax.ops.decode import cached_attention

GUESSES = 5
NEW = 40
VOCABULARY = 29
# Just enough for a prompt of 256 columns: what is added, but for the last token, and the guesses of the last call.
SLOTS = 256 + NEW - 1 + GUESSES
# Of float32 numbers of size 1 that a few tokens' products and sums have gone through in another order.
CLOSE = {"rtol": 2e-5, "atol": 5e-6}


@pytest.fixture(scope="module")
def model():
    """A mamba layer, and two uses of shared blocks with adapters and RoPE. Its texts go in circles, and leave some."""
    config = Zamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "hybrid"],
        num_mem_blocks=2,
        n_mamba_heads=2,
        mamba_d_state=4,
        num_attention_heads=2,
        adapter_rank=2,
        use_mem_rope=True,
        use_shared_attention_adapter=True,
        initializer_range=0.1,
    )
    return Zamba2ForCausalLM(config, rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def plain(model):
    options = {"eos_token_id": None, "pad_token_id": None, "max_new_tokens": NEW, "cache_length": SLOTS}
    return functools.partial(model.generate, **options)


@pytest.fixture(scope="module")
def looked_up(plain):
    return functools.partial(plain, prompt_lookup_num_tokens=GUESSES)


def prompt(length, seed=0):
    """A text with a phrase that comes again and again."""
    rng = np.random.default_rng(seed)
    phrase = rng.integers(3, VOCABULARY, 6)
    text = np.concatenate([part for _ in range(length) for part in (phrase, rng.integers(3, VOCABULARY, 3))])
    return text[None, :length]


class Deliveries:
    """A streamer that notes how many tokens there were whenever the host looked: of each call of the model, since it
    asks for one more token at a time."""

    def __init__(self):
        self.tokens, self.seen = 0, [0]

    def put(self, value):
        self.tokens += value.ndim == 1

    def end(self):
        pass

    def should_stop(self):
        self.seen.append(self.tokens)
        return False

    @property
    def added(self):
        return np.diff(self.seen)[1:].tolist()  # the first token is the prefill's


def assert_same_cache(one, other):
    for name in ("slot_mask", "length", "next_position"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for ours, theirs in zip(jax.tree.leaves(one.mamba), jax.tree.leaves(other.mamba), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, **CLOSE)
    real = np.asarray(one.slot_mask)[..., None, None]
    for ours, theirs in zip(jax.tree.leaves(one.attention), jax.tree.leaves(other.attention), strict=True):
        np.testing.assert_allclose(np.where(real, ours, 0), np.where(real, theirs, 0), **CLOSE)


@pytest.mark.parametrize("length", [1, 2, 30, 200])
def test_tokens_and_cache_are_those_of_plain_decoding(plain, looked_up, length):
    expected = plain(prompt(length), return_dict_in_generate=True)
    actual = looked_up(prompt(length), return_dict_in_generate=True)
    np.testing.assert_array_equal(actual.sequences, expected.sequences)
    assert_same_cache(actual.past_key_values, expected.past_key_values)


def test_guesses_are_taken_whole_in_part_and_not_at_all(plain, looked_up):
    """A call of the model adds 1 to GUESSES + 1 tokens, whatever the host asks for."""
    added = []
    for length in (1, 30, 200):
        watch = Deliveries()
        streamed = looked_up(prompt(length), streamer=watch, stream_block=1, should_stop=watch.should_stop)
        np.testing.assert_array_equal(streamed, plain(prompt(length)))
        output = looked_up(prompt(length), return_dict_in_generate=True)
        assert output.model_calls == len(watch.added)  # of one program run, as of one for every call
        added += watch.added
    assert {1, GUESSES + 1} < set(added) <= set(range(1, GUESSES + 2))
    assert len(added) < 0.8 * sum(added) == 0.8 * 3 * (NEW - 1)


def test_processors_and_draws_are_those_of_each_token(plain, looked_up):
    choices = {"do_sample": True, "temperature": 0.1, "top_k": 9, "seed": 1}
    choices |= {"repetition_penalty": 1.05, "min_new_tokens": 25, "eos_token_id": [3, 4]}
    expected = plain(prompt(30), **choices)
    actual = looked_up(prompt(30), return_dict_in_generate=True, **choices)
    np.testing.assert_array_equal(actual.sequences, expected)
    assert actual.model_calls < expected.shape[1] - 30 - 1  # some guesses were right


def test_an_end_of_sequence_within_the_guesses_ends_the_row(plain, looked_up):
    """A token of the prompt that is new in the answer, with more right guesses after it: they are not there, nor in the
    cache."""
    watch = Deliveries()
    tokens = looked_up(prompt(200), streamer=watch, stream_block=1, should_stop=watch.should_stop)[0, 200:]
    starts = np.cumsum([1, *watch.added])[:-1]
    inside = [
        start + place
        for start, count in zip(starts, watch.added, strict=True)
        for place in range(count - 1)
        if tokens[start + place] not in tokens[: start + place]
    ]
    options = {"eos_token_id": int(tokens[inside[-1]]), "return_dict_in_generate": True}
    expected, actual = plain(prompt(200), **options), looked_up(prompt(200), **options)
    np.testing.assert_array_equal(actual.sequences, expected.sequences)
    assert actual.sequences.shape[1] == 200 + inside[-1] + 1
    assert_same_cache(actual.past_key_values, expected.past_key_values)


def test_a_conversation_goes_on_from_either_cache(plain, looked_up):
    first = plain(prompt(30), return_dict_in_generate=True)
    again = looked_up(prompt(30), return_dict_in_generate=True)
    more = np.concatenate([first.sequences, prompt(7)], axis=1)
    expected = plain(more)
    for go_on, before in ((plain, again), (looked_up, first), (looked_up, again)):
        actual = go_on(more, past_key_values=before.past_key_values, cache_length=None)
        np.testing.assert_array_equal(actual, expected)


def test_guesses_have_slots_of_their_own(looked_up):
    """With one slot less, what the last call reads would be written over what is before it."""
    output = looked_up(prompt(200), return_dict_in_generate=True)
    assert output.past_key_values.max_length == SLOTS
    message = rf"cache_length must be at least {SLOTS} .* {NEW} new tokens \(and {GUESSES} that are looked up\)"
    with pytest.raises(ValueError, match=message):
        looked_up(prompt(200), cache_length=SLOTS - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens must be an integer of at least 1, got 0"),
        ({"max_matching_ngram_size": 0}, "max_matching_ngram_size must be an integer of at least 1, got 0"),
        ({"num_beams": 2}, "prompt_lookup_num_tokens=5 is for one continuation at a time, got num_beams=2"),
        ({"do_sample": True, "num_return_sequences": 3}, "one continuation at a time, got num_return_sequences=3"),
        ({"output_scores": True, "return_dict_in_generate": True}, "several tokens at a time, and output_scores are"),
        ({"input_ids": np.full((2, 4), 5)}, "prompt_lookup_num_tokens=5 is for one prompt at a time, got 2 rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_go_together(looked_up, arguments, message):
    with pytest.raises(ValueError, match=message):
        looked_up(**{"input_ids": prompt(4)} | arguments)


def test_a_size_of_groups_alone_has_no_effect(plain):
    with pytest.warns(UserWarning, match="max_matching_ngram_size=3 has no effect without prompt_lookup_num_tokens"):
        plain(prompt(4), max_new_tokens=1, max_matching_ngram_size=3)


def test_a_call_copies_no_weight_and_no_whole_cache(model):
    """Nor do the two loops in one, which choose between the calls."""
    slots = 4 * cached_attention.BLOCK + 8
    structure, weights = programs.take_apart(model)
    cache = jax.eval_shape(lambda: model.init_cache(1, slots))
    static, knobs = split()
    program = lookup.decode.lower(
        structure,
        weights,
        cache,
        decoding(np.zeros((1, slots), np.int32)),
        prompt_of(8),
        knobs,
        np.int32(5),
        np.int32(5),
        processors=static,
        num_tokens=GUESSES,
        ngram_size=2,
    )
    large = {leaf.size for leaf in weights if leaf.size >= 1000} | {layer.key.size for layer in cache.attention}
    copied = [shape for shape in copied_in_loop(program.compile().as_text()) if np.prod(shape) in large]
    assert not copied, f"the loops' bodies copy arrays of shapes {copied}"


# ---- without a model ----


def split(**arguments):
    values = options.merge(None, None, Zamba2Config(vocab_size=VOCABULARY), {"max_new_tokens": NEW, **arguments})
    checked = options.check(
        values, prompt_length=8, vocab_size=VOCABULARY, max_position_embeddings=4096, explicit=[], seed=3
    )
    return processors.split(checked, VOCABULARY)


def prompt_of(length):
    return Prompt(
        length=np.int32(length), given=np.zeros(1, np.int32), real=np.zeros(1, np.int32), tokens=np.full(1, length)
    )


def decoding(tokens, step=0, stop=None):
    return programs.Decoding(
        tokens=tokens,
        step=np.int32(step),
        finished=np.zeros(1, bool),
        done=np.bool_(False),
        scores=None,
        logits=None,
        stop=stop,
    )


@pytest.mark.parametrize("ngram_size", [1, 2, 4])
def test_look_up(ngram_size):
    """Against a search, on texts of few letters; and against transformers, where there is but one place to choose."""
    rng = np.random.default_rng(ngram_size)
    find = jax.jit(functools.partial(lookup.look_up, num_tokens=7, ngram_size=ngram_size))
    candidates = PromptLookupCandidateGenerator(num_output_tokens=7, max_matching_ngram_size=ngram_size, max_length=99)
    seen = set()
    for letters in (2, 4, 30) * 30:
        start, end = sorted(rng.choice(40, 2, replace=False))
        tokens = rng.integers(0, letters, 50).astype(np.int32)
        guesses, found = find(tokens, np.int32(start), np.int32(end))
        text = tokens[start:end].tolist()
        places = []
        for size in range(min(ngram_size, len(text) - 1), 0, -1):
            group = text[-size:]
            places = [place for place in range(size, len(text)) if text[place - size : place] == group]
            if places:
                break
        assert found == bool(places)
        if places:
            follows = text[places[-1] :]
            assert guesses.tolist() == [follows[index % len(follows)] for index in range(7)]
        if len(places) == 1:
            (theirs,), _ = candidates.get_candidates(torch.tensor([text]))
            theirs = theirs[len(text) :].tolist()
            assert guesses[: len(theirs)].tolist() == theirs
        seen.add(min(len(places), 2))
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("limit", [NEW, 7])
@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize(
    "choices",
    [
        {"eos_token_id": [5, 6]},
        {"eos_token_id": 5, "min_new_tokens": 6, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"eos_token_id": None, "do_sample": True, "top_k": 4, "temperature": 0.7},
    ],
    ids=str,
)
def test_several_are_chosen_as_one_by_one(choices, stops, limit):
    """Scores of a few likely tokens, and guesses that are often right: until one is wrong or the row ends."""
    static, knobs = split(**choices)
    table = jnp.asarray(np.random.default_rng(0).integers(-1, 6, (6, VOCABULARY)), jnp.int16) if stops else None
    fixed = {"knobs": knobs, "stop_table": table, "processors": static, "prompt": prompt_of(8)}
    several = jax.jit(functools.partial(lookup.choose_several, limit=np.int32(limit), **fixed))
    one = jax.jit(functools.partial(programs.choose, **fixed))
    counts = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        start = decoding(rng.integers(3, 9, (1, 32)).astype(np.int32), 4, np.array([2], np.int32) if stops else None)
        logits = rng.normal(size=(1, GUESSES + 1, VOCABULARY)).astype(np.float32)
        logits[..., 3:7] += 6
        expected, chosen = start, []
        guesses = np.empty((1, GUESSES), np.int32)
        for place in range(GUESSES + 1):
            expected = one(logits[:, place], expected)
            chosen.append(int(expected.tokens[0, 8 + 4 + place]))
            is_right = rng.random() < 0.8
            if place < GUESSES:
                guesses[0, place:] = chosen[-1] if is_right else rng.integers(3, 9)
            if expected.done or expected.step == limit or place == GUESSES or guesses[0, place] != chosen[-1]:
                break
        actual, count = several(logits, guesses, start)
        assert count == len(chosen)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
        counts.add(int(count))
    assert len(counts) > 2
