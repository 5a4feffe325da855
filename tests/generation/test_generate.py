"""What generate promises beside equality with transformers: padding, caches, streaming, seeds, programs, messages."""

import contextlib
import gc
import threading
import warnings
import weakref

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from flax import nnx
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer

from bench.oracle import jit_call
from zamba2_jax import Zamba2Config, Zamba2ForCausalLM
from zamba2_jax.generation import GenerateOutput, programs

NEW = 10


@contextlib.contextmanager
def compilations():
    """Names nothing but counts everything that XLA compiles, small eager operations included."""
    count = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            count.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def model(models):
    return models.jax


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(3)
    return [rng.integers(3, 131, length) for length in (4, 11, 7)]


@pytest.fixture(scope="module")
def alone(model, rows):
    """Each row's continuation when it is the only one."""
    return [model.generate(row[None], max_new_tokens=NEW, eos_token_id=None)[0, len(row) :] for row in rows]


def padded(rows, side, extra=0):
    length = max(map(len, rows)) + extra
    ids, mask = np.zeros((2, len(rows), length), int)
    for index, row in enumerate(rows):
        columns = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[index, columns], mask[index, columns] = row, 1
    return ids, mask


@pytest.fixture(scope="module")
def tokenizer():
    """A word per token: "w5" is 5."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, 131)}
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


# ---- the prompt ----


def test_equals_the_plain_loop(model, rows, alone):
    """The judge: no cache, no chunks, the whole text again for every token."""
    forward = jit_call(model)
    text = np.zeros((1, 32), int)
    for row, expected in zip(rows, alone, strict=True):
        text[:] = 0
        text[0, : len(row)] = row
        for length in range(len(row), len(row) + NEW):
            mask = (np.arange(32) < length)[None]
            text[0, length] = np.argmax(forward(input_ids=text, attention_mask=mask).logits[0, length - 1])
        np.testing.assert_array_equal(text[0, len(row) : len(row) + NEW], expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_continues_as_alone(model, rows, alone, side):
    for extra in (0, 5):
        ids, mask = padded(rows, side, extra)
        output = model.generate(ids, mask, max_new_tokens=NEW, eos_token_id=None)
        np.testing.assert_array_equal(output[:, : ids.shape[1]], ids)
        np.testing.assert_array_equal(output[:, ids.shape[1] :], alone)


def test_right_padding_with_processors_is_as_alone(model, rows):
    options = {"max_new_tokens": NEW, "eos_token_id": None, "repetition_penalty": 1.5, "no_repeat_ngram_size": 3}
    ids, mask = padded(rows, "right")
    output = model.generate(ids, mask, **options)
    for index, row in enumerate(rows):
        np.testing.assert_array_equal(output[index, 11:], model.generate(row[None], **options)[0, len(row) :])


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_of_any_size_change_nothing(model, rows, alone, chunk):
    output = model.generate(rows[1][None], max_new_tokens=NEW, eos_token_id=None, prefill_chunk=chunk)
    np.testing.assert_array_equal(output[0, 11:], alone[1])


def test_any_kind_of_array_and_lists(model, rows, alone):
    as_given = (rows[0][None].tolist(), jax.numpy.asarray(rows[0][None]), rows[0][None].astype(np.int64))
    for ids in as_given:
        output = model.generate(input_ids=ids, max_new_tokens=NEW, eos_token_id=None)
        assert (type(output), output.dtype) == (np.ndarray, np.int32)
        np.testing.assert_array_equal(output[0, 4:], alone[0])


def test_with_a_tokenizer(model, tokenizer):
    """The README's own lines."""
    inputs = tokenizer("w5 w6 w7", return_tensors="np")
    outputs = model.generate(inputs["input_ids"], inputs["attention_mask"], max_new_tokens=NEW, eos_token_id=None)
    assert tokenizer.decode(outputs[0]).split()[:3] == ["w5", "w6", "w7"]
    assert len(tokenizer.decode(outputs[0]).split()) == 3 + NEW
    inputs.pop("token_type_ids", None)
    np.testing.assert_array_equal(model.generate(**inputs, max_new_tokens=NEW, eos_token_id=None), outputs)


# ---- caches ----


def test_a_returned_cache_continues(model, rows, alone):
    """Two turns of a chat: the second reads only what is new. The cache stays valid: two answers can grow from it."""
    ids, mask = padded(rows, "left")
    options = {"eos_token_id": None, "return_dict_in_generate": True}
    first = model.generate(ids, mask, max_new_tokens=4, **options)
    assert isinstance(first, GenerateOutput)
    longer = np.concatenate([mask, np.ones((3, 4), int)], axis=1)
    for _ in range(2):
        second = model.generate(
            first.sequences, longer, max_new_tokens=NEW - 4, past_key_values=first.past_key_values, **options
        )
        np.testing.assert_array_equal(second.sequences[:, 11:], alone)
    assert second.past_key_values.get_seq_length() > first.past_key_values.get_seq_length()


def test_a_cache_of_ones_own_length(model, rows, alone):
    output = model.generate(
        rows[1][None],
        max_new_tokens=NEW,
        eos_token_id=None,
        cache_length=11 + NEW - 1,
        prefill_chunk=11,
        return_dict_in_generate=True,
    )
    np.testing.assert_array_equal(output.sequences[0, 11:], alone[1])
    assert output.past_key_values.max_length == output.past_key_values.get_seq_length() == 20


def test_the_loop_consumes_its_cache(model, rows, monkeypatch):
    """Donated: decoding must not hold two caches. (Warnings are errors here, so an unused donation would fail too.)"""
    consumed = []
    decode = programs.decode

    def spy(structure, weights, cache, *arguments, **options):
        consumed.append(cache)
        return decode(structure, weights, cache, *arguments, **options)

    monkeypatch.setattr(programs, "decode", spy)
    model.generate(rows[0][None], max_new_tokens=NEW, eos_token_id=None)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(consumed))


# ---- streaming ----


class Recorder:
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(np.array(value))

    def end(self):
        self.ended = True


@pytest.mark.parametrize("block", [None, 1, 3, 100])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 5}], ids=str)
def test_streaming_changes_nothing(model, rows, options, block):
    options = {"max_new_tokens": NEW, "eos_token_id": None, **options}
    expected = model.generate(rows[0][None], **options)
    recorder = Recorder()
    streamed = model.generate(rows[0][None], streamer=recorder, stream_block=block, **options)
    np.testing.assert_array_equal(streamed, expected)
    # As transformers: the prompt with its rows, then each step's tokens.
    assert [value.shape for value in recorder.values] == [(1, 4)] + [(1,)] * NEW
    np.testing.assert_array_equal(np.concatenate([value.reshape(-1) for value in recorder.values]), expected[0])
    assert recorder.ended


def test_streaming_stops_at_the_end(model, rows, alone):
    recorder = Recorder()
    end = int(alone[0][3])
    output = model.generate(rows[0][None], max_new_tokens=NEW, eos_token_id=end, streamer=recorder, stream_block=4)
    assert recorder.values[-1] == [end] == output[0, -1]
    assert len(recorder.values) - 1 == output.shape[1] - 4 <= 4


def test_transformers_text_streamers(model, rows, tokenizer, capsys):
    output = model.generate(rows[0][None], max_new_tokens=NEW, eos_token_id=None)
    text = tokenizer.decode(output[0])
    model.generate(rows[0][None], max_new_tokens=NEW, eos_token_id=None, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == text + "\n"

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=120)
    options = {"max_new_tokens": NEW, "eos_token_id": None, "streamer": streamer}
    thread = threading.Thread(target=model.generate, args=(rows[0][None],), kwargs=options)
    thread.start()
    assert "".join(streamer) == tokenizer.decode(output[0, 4:])
    thread.join()

    with pytest.raises(ValueError, match="only supports batch size 1"):
        model.generate(np.stack([rows[0]] * 2), max_new_tokens=NEW, streamer=TextStreamer(tokenizer))


# ---- seeds ----


def test_seeds(model, rows):
    options = {"max_new_tokens": NEW, "eos_token_id": None, "do_sample": True}
    one, same, other = (model.generate(rows[0][None], seed=seed, **options) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert not np.array_equal(*(model.generate(rows[0][None], **options) for _ in range(2)))


# ---- programs ----


def test_twenty_lengths_compile_few_programs():
    """Everything that XLA compiles is counted, for a model whose programs are no other test's. The third class, up to
    16384 tokens, counts like these two: test_prompt.py.
    """
    config = Zamba2Config(
        vocab_size=139,
        hidden_size=16,
        num_hidden_layers=2,
        layers_block_type=["mamba", "hybrid"],
        n_mamba_heads=2,
        mamba_d_state=4,
        num_attention_heads=2,
        adapter_rank=2,
        max_position_embeddings=16384,
    )
    model = Zamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    lengths = [1, 2, 3, 17, 32, 33, 64, 128, 129, 257, 511, 777, 1018, 1019, 1024, 1500, 2000, 3333, 4090, 5000]
    with compilations() as compiled:
        for length in lengths[:-1]:
            model.generate(rng.integers(3, 139, (1, length)), max_new_tokens=length % 5 + 1, eos_token_id=None)
        assert len(compiled) == 6  # a prompt, its first token and the loop, of two classes
        model.generate(rng.integers(3, 139, (1, lengths[-1])), max_new_tokens=2, eos_token_id=None)
    assert len(compiled) == 9


def test_a_first_token_needs_no_loop(model, rows, monkeypatch):
    """Neither alone nor in a stream does it wait for the loop's program."""
    alone = model.generate(rows[0][None], max_new_tokens=1)
    came = []

    class Streamer:
        def put(self, value):
            came.append(value)

        def end(self):
            pass

    def loop(*_, **__):
        raise RuntimeError(f"asked for after {len(came)}")

    monkeypatch.setattr(programs, "decode", loop)
    np.testing.assert_array_equal(model.generate(rows[0][None], max_new_tokens=1), alone)
    with pytest.raises(RuntimeError, match="asked for after 2"):  # the prompt and the first token
        model.generate(rows[0][None], max_new_tokens=5, streamer=Streamer())
    assert came[1] == alone[0, -1]


def test_numeric_options_and_lengths_compile_nothing(model, rows):
    sampled = {"do_sample": True, "temperature": 0.5, "top_k": 10, "top_p": 0.9, "max_new_tokens": 3, "seed": 0}
    model.generate(rows[0][None], **sampled)
    with compilations() as compiled:
        model.generate(rows[1][None], **(sampled | {"temperature": 0.9, "top_k": 60, "top_p": 0.5}))
        model.generate(rows[1][None], **(sampled | {"max_new_tokens": 40, "seed": 9, "eos_token_id": [3, 4]}))
        model.generate(rows[2][None], streamer=Recorder(), **sampled)
    assert compiled == []


def test_another_model_of_the_same_shape_compiles_nothing(model, models, rows):
    model.generate(rows[0][None], max_new_tokens=2, eos_token_id=None)
    twin = Zamba2ForCausalLM.from_pretrained(models.path)
    twin.generation_config = {"eos_token_id": 5}
    with compilations() as compiled:
        twin.generate(rows[0][None], max_new_tokens=2)
    assert compiled == []


def test_programs_keep_no_weights_alive(models, rows):
    twin = Zamba2ForCausalLM.from_pretrained(models.path)
    twin.generate(rows[0][None], max_new_tokens=2, eos_token_id=None)
    weight = weakref.ref(twin.model.embed_tokens.embedding.get_value())
    del twin
    gc.collect()
    assert weight() is None


# ---- where options come from ----


def test_the_checkpoints_generation_config_is_read(models, rows, alone):
    model = Zamba2ForCausalLM.from_pretrained(models.path)
    model.generation_config = transformers.GenerationConfig(eos_token_id=int(alone[0][2]), max_new_tokens=7)
    assert model.generate(rows[0][None]).shape[1] <= 4 + 3
    assert model.generate(rows[0][None], eos_token_id=None).shape[1] == 4 + 7
    assert model.generate(rows[0][None], generation_config={"eos_token_id": 1, "max_new_tokens": 2}).shape[1] == 4 + 2


# ---- messages ----

IDS = [[5, 6, 7]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"input_ids": np.zeros((0, 3), int)},
            r"input_ids must hold at least one row and one token, got shape \(0, 3\)",
        ),
        ({"input_ids": [[]]}, r"input_ids must hold at least one row and one token, got shape \(1, 0\)"),
        ({"input_ids": [5, 6]}, r"input_ids must have shape \(batch, length\), got \(2,\)"),
        ({"input_ids": [[5], [6, 7]]}, "input_ids must be a rectangular array of integers.*pad them"),
        ({"input_ids": [[5.0]]}, "input_ids must be integers, got dtype float64"),
        ({"input_ids": [[5, 131]]}, "input_ids must be in the vocabulary, from 0 to 130, got 131 in row 0, column 1"),
        ({"input_ids": [[-1]]}, "input_ids must be in the vocabulary, from 0 to 130, got -1 in row 0"),
        ({"input_ids": [[5], [0]]}, r"row 1 has none by input_ids \(all are pad_token_id=0\)"),
        ({"input_ids": None, "bos_token_id": None}, "input_ids is missing and there is no bos_token_id"),
        ({"attention_mask": [[1, 1]]}, r"attention_mask must have the shape of input_ids, \(1, 3\), got \(1, 2\)"),
        ({"attention_mask": [[1, 2, 1]]}, "attention_mask must hold 1 at real tokens and 0 at padding only, got .*2"),
        ({"attention_mask": [[0, 0, 0]]}, "every row needs at least one real token; row 0 has none by attention_mask"),
        ({"inputs_embeds": np.zeros((1, 3, 32))}, "generate does not take inputs_embeds together with input_ids"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ({"max_new_token": 3}, "max_new_token in the arguments of generate is not an option"),
        ({"num_beams": 2, "streamer": Recorder()}, "streamer cannot follow beam search.*num_beams=2"),
        ({"streamer": Recorder(), "stream_block": 0}, "stream_block must be an integer of at least 1.*got 0"),
        ({"cache_length": 8, "prefill_chunk": 3}, "cache_length must be at least 12 for a prompt padded to 3.*got 8"),
        ({"past_key_values": "cache"}, "past_key_values must be a Zamba2Cache, got str"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(model, arguments, message):
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        model.generate(**({"input_ids": IDS, "max_new_tokens": 10} | arguments))
    assert compiled == []


def test_errors_about_a_given_cache(model):
    call = {"input_ids": IDS, "max_new_tokens": 10, "prefill_chunk": 3}
    cache = model.init_cache(1, 8)
    with pytest.raises(ValueError, match="cache_length=64 has no use with past_key_values"):
        model.generate(past_key_values=cache, cache_length=64, **call)
    with pytest.raises(ValueError, match="one row per prompt, got 2 for 1 prompts"):
        model.generate(past_key_values=model.init_cache(2, 64), **call)
    full = model.generate(IDS, max_new_tokens=1, return_dict_in_generate=True)
    with pytest.raises(
        ValueError, match="input_ids must hold the tokens in past_key_values and at least one more; row 0"
    ):
        model.generate(past_key_values=full.past_key_values, **call)


def test_a_text_beyond_the_models_positions_is_warned_of(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="cache_length"):  # stops before the work; the warning came first
            model.generate(IDS, max_new_tokens=5000, cache_length=10)
    assert "exceed max_position_embeddings=4096" in str(caught[0].message)
