"""The models against PyTorch's, float32: logits, every hidden state, attentions, losses, caches, gradients.

Tolerances: 1e-4 of the largest value, the figure the README promises; what is measured is around 1e-6 (`python -m bench
    parity` prints it).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from bench.oracle import (
    SHAPES,
    cache_error,
    gradients,
    jit_call,
    load_tensors,
    pair,
    relative_error,
    to_torch,
    tokens,
    without_dt_clamp,
)
from zamba2_jax.layers import shared_block
from zamba2_jax.ops.attention import prefill_attention

TOLERANCE = 1e-4
# One token; a chunk plus one; several chunks and a rest.
LENGTHS = (1, 17, 101)


@pytest.fixture(params=list(SHAPES))
def models(request, oracle_dir):
    return pair(oracle_dir, request.param)


@pytest.mark.parametrize("length", LENGTHS)
def test_everything_equals_pytorch(models, length):
    ids = tokens(models.jax.config.vocab_size, 2, length)
    with torch.no_grad():
        expected = models.torch(
            to_torch(ids), labels=to_torch(ids), output_hidden_states=True, output_attentions=True, use_cache=False
        )
    actual = jit_call(models.jax, output_hidden_states=True, output_attentions=True)(input_ids=ids, labels=ids)

    assert relative_error(actual.logits, expected.logits) < TOLERANCE
    assert len(actual.hidden_states) == len(expected.hidden_states) == models.jax.config.num_hidden_layers + 1
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(ours, theirs) < TOLERANCE
    assert len(actual.attentions) == len(expected.attentions) == models.jax.config.num_hybrid_layers
    for ours, theirs in zip(actual.attentions, expected.attentions, strict=True):
        assert relative_error(ours, theirs) < TOLERANCE
    if length > 1:  # a single token predicts nothing: NaN in both
        assert relative_error(actual.loss, expected.loss) < TOLERANCE
    else:
        assert np.isnan(actual.loss)
        assert torch.isnan(expected.loss)


def test_gradients_equal_pytorch(models, tmp_path):
    ids = tokens(models.jax.config.vocab_size, 2, 37)
    ids[:, 5] = 0  # the padding row of the embedding gets no gradient from the look-up, in either
    labels = np.where(np.arange(37) % 5 == 0, -100, ids)
    models.torch.zero_grad(set_to_none=True)
    models.torch(to_torch(ids), labels=to_torch(labels), use_cache=False).loss.backward()
    expected = load_tensors(models, gradients(models.torch), tmp_path)

    graphdef, params = nnx.split(models.jax)

    @jax.jit
    def gradient(params):
        return jax.grad(lambda params: nnx.merge(graphdef, params)(input_ids=ids, labels=labels).loss)(params)

    actual = nnx.to_flat_state(gradient(params))
    reference = dict(nnx.to_flat_state(nnx.state(expected, nnx.Param)))
    assert len(actual) == len(reference)
    for path, leaf in actual:
        assert relative_error(leaf.get_value(), reference[path].get_value()) < 1e-3, path


def test_bfloat16_is_as_close_to_float32_as_pytorch_is(models):
    ids = tokens(models.jax.config.vocab_size, 2, 61)
    exact = jit_call(models.jax)(input_ids=ids).logits
    ours = jit_call(type(models.jax).from_pretrained(models.path, dtype=jnp.bfloat16))(input_ids=ids).logits
    half = type(models.torch).from_pretrained(models.path, dtype=torch.bfloat16, attn_implementation="eager").eval()
    without_dt_clamp(half)
    with torch.no_grad():
        theirs = half(to_torch(ids), use_cache=False).logits

    def rms(x):
        return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float32) - np.asarray(exact)))))

    assert ours.dtype == jnp.bfloat16
    assert rms(ours) <= 1.1 * rms(theirs.float().numpy())


def padded(ids: np.ndarray, lengths: list[int], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Keeps the first lengths[i] tokens of row i, moved to the left (right padding) or the right."""
    width = ids.shape[1]
    out, mask = np.zeros_like(ids), np.zeros_like(ids)
    for row, length in enumerate(lengths):
        columns = slice(0, length) if side == "right" else slice(width - length, width)
        out[row, columns] = ids[row, :length]
        mask[row, columns] = 1
    return out, mask


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "unusual"])
@pytest.mark.parametrize("pattern", ["left", "right", "holes"])
def test_any_mask_equals_pytorch_at_real_tokens(oracle_dir, shape, pattern):
    models = pair(oracle_dir, shape)
    ids = tokens(models.jax.config.vocab_size, 4, 41)
    if pattern == "holes":
        mask = (np.random.default_rng(3).random(ids.shape) < 0.7).astype(np.int64)
    else:
        ids, mask = padded(ids, [41, 40, 17, 1], pattern)
    with torch.no_grad():
        expected = models.torch(to_torch(ids), attention_mask=to_torch(mask), use_cache=False).logits
    actual = jit_call(models.jax)(input_ids=ids, attention_mask=mask).logits
    real = mask.astype(bool)
    assert relative_error(np.asarray(actual)[real], expected.numpy()[real]) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(models, side):
    """Each row alone, unpadded, is the judge; with biases too, which leak into the conv window of transformers' padded
    rows."""
    ids = tokens(models.jax.config.vocab_size, 4, 23)
    lengths = [23, 22, 9, 1]
    padded_ids, mask = padded(ids, lengths, side)
    call = jit_call(models.jax, use_cache=True, cache_length=48)
    batch = call(input_ids=padded_ids, attention_mask=mask)
    more = tokens(models.jax.config.vocab_size, 4, 5, seed=1)
    continued = call(input_ids=more, past_key_values=batch.past_key_values)
    one_more = call(input_ids=more[:, :1], past_key_values=continued.past_key_values)

    # The same rows without padding. What fills them up at the end cannot be seen by the tokens before.
    alone = tokens(models.jax.config.vocab_size, 4, 29, seed=2)
    for row, length in enumerate(lengths):
        alone[row, : length + 6] = np.concatenate([ids[row, :length], more[row], more[row, :1]])
    expected = np.asarray(jit_call(models.jax)(input_ids=alone).logits)
    for row, length in enumerate(lengths):
        real = mask[row].astype(bool)
        assert relative_error(np.asarray(batch.logits)[row, real], expected[row, :length]) < TOLERANCE
        assert relative_error(continued.logits[row], expected[row, length : length + 5]) < TOLERANCE
        assert relative_error(one_more.logits[row], expected[row, length + 5 : length + 6]) < TOLERANCE


def test_an_entirely_masked_row_leaves_the_cache_as_it_was(models):
    ids = tokens(models.jax.config.vocab_size, 2, 9)
    call = jit_call(models.jax, use_cache=True, cache_length=32)
    for length in (1, 4):
        before = call(input_ids=ids).past_key_values
        mask = np.array([[1] * length, [0] * length])
        after = call(input_ids=ids[:, :length], attention_mask=mask, past_key_values=before).past_key_values
        for old, new in zip(before.mamba, after.mamba, strict=True):
            for name in ("conv_x", "conv_bc", "ssm"):
                assert np.array_equal(getattr(old, name)[1], getattr(new, name)[1]), name
                assert not np.array_equal(getattr(old, name)[0], getattr(new, name)[0]), name
        assert after.next_position[1] == before.next_position[1]
        assert not after.slot_mask[1, 9:].any()


@pytest.mark.parametrize("pieces", [(1,) * 9, (2, 1, 3, 1, 2), (17, 1, 16, 3)])
def test_pieces_equal_one_pass(models, pieces):
    """Appending one token or many to a cache, shorter than the conv window and longer than a chunk, gives what one pass
    gives."""
    ids = tokens(models.jax.config.vocab_size, 2, sum(pieces))
    whole = jit_call(models.jax, use_cache=True, cache_length=40)(input_ids=ids)
    call = jit_call(models.jax, use_cache=True)
    cache, logits, start = models.jax.init_cache(2, 40), [], 0
    for length in pieces:
        outputs = call(input_ids=ids[:, start : start + length], past_key_values=cache)
        cache, start = outputs.past_key_values, start + length
        logits.append(outputs.logits)
    assert relative_error(np.concatenate(logits, axis=1), whole.logits) < TOLERANCE
    assert cache.get_seq_length() == sum(pieces)
    for ours, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(whole.past_key_values), strict=True):
        assert relative_error(ours, theirs) < TOLERANCE


@pytest.mark.parametrize(
    "shape", [s for s in SHAPES if s != "no-hybrid"]
)  # transformers' cache needs an attention layer
def test_the_cache_equals_pytorchs(oracle_dir, shape):
    assert cache_error(pair(oracle_dir, shape), 19) < TOLERANCE


def test_a_prompts_beginning_may_be_read_apart(oracle_dir, monkeypatch):
    """As on a GPU: a program for any cache that attends to the call's own tokens alone where the cache was empty."""
    model = pair(oracle_dir, "1.2B").jax
    ids, mask = padded(tokens(131, 2, 12), [12, 7], "left")

    def two_pieces():
        call = jit_call(model)
        first = call(input_ids=ids, attention_mask=mask, past_key_values=model.init_cache(2, 20))
        return first, call(input_ids=ids[:, :3], past_key_values=first.past_key_values)

    plain = two_pieces()
    apart = functools.partial(prefill_attention, beginning_apart=True)
    monkeypatch.setattr(shared_block, "prefill_attention", apart)
    first, second = two_pieces()
    real = mask.astype(bool)
    assert relative_error(np.asarray(first.logits)[real], np.asarray(plain[0].logits)[real]) < 1e-5
    assert relative_error(second.logits, plain[1].logits) < 1e-5


def test_a_cache_keeps_its_own_dtypes(oracle_dir):
    model = type(pair(oracle_dir, "1.2B").jax).from_pretrained(pair(oracle_dir, "1.2B").path, dtype=jnp.bfloat16)
    cache = model.init_cache(1, 8, dtype=jnp.float32)
    for length in (3, 1):
        after = jax.eval_shape(lambda ids, cache: model(ids, past_key_values=cache), tokens(131, 1, length), cache)
        assert jax.tree.map(lambda leaf: leaf.dtype, after.past_key_values) == jax.tree.map(lambda x: x.dtype, cache)


def test_masks_may_cover_the_past_too(oracle_dir):
    models = pair(oracle_dir, "1.2B")
    ids, mask = padded(tokens(models.jax.config.vocab_size, 2, 12), [12, 7], "left")
    first = models.jax(ids, attention_mask=mask, use_cache=True, cache_length=20).past_key_values
    more = tokens(models.jax.config.vocab_size, 2, 2, seed=1)
    ones = np.ones_like(more)
    short = models.jax(more, attention_mask=ones, past_key_values=first).logits
    full = models.jax(more, attention_mask=np.concatenate([mask, ones], 1), past_key_values=first).logits
    assert np.array_equal(short, full)


def test_packed_documents_equal_documents_apart(models):
    lengths = [9, 1, 20, 3]
    ids = tokens(models.jax.config.vocab_size, 1, sum(lengths))
    segments = np.repeat(np.arange(len(lengths)), lengths)[None]
    packed = jit_call(models.jax, output_hidden_states=True)(input_ids=ids, labels=ids, segment_ids=segments)

    # The documents as rows of a batch. What fills a row up at the end cannot be seen by the tokens before, and has no
    # labels.
    rows = tokens(models.jax.config.vocab_size, len(lengths), max(lengths), seed=1)
    labels = np.full_like(rows, -100)
    ends = np.cumsum(lengths)
    for row, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        rows[row, :length] = labels[row, :length] = ids[0, end - length : end]
    apart = jit_call(models.jax, output_hidden_states=True)(input_ids=rows, labels=labels)
    for ours, theirs in zip(packed.hidden_states, apart.hidden_states, strict=True):
        expected = np.concatenate([theirs[row, :length] for row, length in enumerate(lengths)])
        assert relative_error(ours[0], expected) < TOLERANCE
    assert abs(float(packed.loss) - float(apart.loss)) < 1e-6 * float(apart.loss)


def test_positions_and_embeddings_may_be_given(models):
    ids = tokens(models.jax.config.vocab_size, 2, 11)
    positions = np.random.default_rng(1).permutation(40)[:11][None].repeat(2, 0)
    with torch.no_grad():
        embeds = models.torch.get_input_embeddings()(to_torch(ids))
        # With a mask: without one, transformers takes positions that do not count up by one for packed documents.
        expected = models.torch(
            inputs_embeds=embeds,
            position_ids=to_torch(positions),
            attention_mask=torch.ones(2, 11, dtype=torch.long),
            use_cache=False,
        ).logits
    actual = jit_call(models.jax)(inputs_embeds=embeds.numpy(), position_ids=positions).logits
    assert relative_error(actual, expected) < TOLERANCE


def test_logits_to_keep(oracle_dir):
    models = pair(oracle_dir, "unusual")
    ids = tokens(models.jax.config.vocab_size, 2, 8)
    every = np.asarray(models.jax(ids).logits)
    assert relative_error(models.jax(ids, logits_to_keep=3).logits, every[:, -3:]) < 1e-5
    assert relative_error(models.jax(ids, logits_to_keep=np.array([6, 0])).logits, every[:, [6, 0]]) < 1e-5


def test_outputs_read_like_transformers(oracle_dir):
    model = pair(oracle_dir, "1.2B").jax
    outputs = model(tokens(131, 1, 4), use_cache=True, cache_length=4)
    assert outputs["logits"] is outputs.logits
    assert outputs[0] is outputs.logits  # no loss was asked for
    assert len(outputs.to_tuple()) == 2
    assert jax.tree.structure(jax.tree.map(jnp.zeros_like, outputs)) == jax.tree.structure(outputs)
    assert outputs.past_key_values.get_seq_length() == 4
    assert model(tokens(131, 1, 4), use_cache=True).past_key_values.max_length == model.config.max_position_embeddings


def test_the_base_model_is_the_causal_model_without_its_head(oracle_dir):
    models = pair(oracle_dir, "2.7B")
    ids = tokens(131, 2, 9)
    with torch.no_grad():
        expected = models.torch.model(to_torch(ids)).last_hidden_state
    assert relative_error(models.jax.model(ids).last_hidden_state, expected) < TOLERANCE


def test_a_time_step_limit_holds_in_prefill_and_decode(oracle_dir):
    """transformers applies (time_step_min, inf) in prefill, whatever the config says, and no limit in decode."""
    models = pair(oracle_dir, "1.2B")
    limit = (0.3, float("inf"))  # of dt's around 0.1
    ids = tokens(131, 2, 20)
    limited = type(models.jax).from_pretrained(models.path, dtype=jnp.float32)
    limited.config = limited.model.config = models.jax.config.replace(time_step_limit=limit)
    for layer in limited.model.layers:
        layer.mamba.config = limited.config
    mixers = [module for module in models.torch.modules() if hasattr(module, "time_step_limit")]
    try:
        for mixer in mixers:
            mixer.time_step_limit = limit
        with torch.no_grad():
            expected = models.torch(to_torch(ids), use_cache=False).logits
    finally:
        without_dt_clamp(models.torch)
    assert relative_error(jit_call(limited)(input_ids=ids).logits, expected) < TOLERANCE
    assert relative_error(jit_call(models.jax)(input_ids=ids).logits, expected) > 0.01
    call = jit_call(limited, use_cache=True, cache_length=20)
    cache = call(input_ids=ids[:, :19]).past_key_values
    last = call(input_ids=ids[:, 19:], past_key_values=cache).logits
    assert relative_error(last[:, 0], expected[:, -1]) < TOLERANCE


def test_attention_dropout_in_training(oracle_dir):
    model = pair(oracle_dir, "1.2B", attention_dropout=0.3).jax
    ids = tokens(131, 2, 12)
    call = jit_call(model, output_attentions=True)
    plain = call(input_ids=ids)
    first, again = (call(input_ids=ids, dropout_key=jax.random.key(1)) for _ in range(2))
    other = call(input_ids=ids, dropout_key=jax.random.key(2))
    assert np.array_equal(first.logits, again.logits)
    assert not np.array_equal(first.logits, other.logits)
    assert not np.array_equal(first.logits, plain.logits)
    for dropped, kept in zip(first.attentions, plain.attentions, strict=True):
        visible = np.broadcast_to(np.tril(np.ones((12, 12), bool)), dropped.shape)
        assert 0.2 < np.mean(np.asarray(dropped)[visible] == 0) < 0.4
        assert (np.asarray(kept)[visible] > 0).all()
    # The layers draw masks of their own.
    masks = [np.asarray(weights) == 0 for weights in first.attentions]
    assert not np.array_equal(masks[0], masks[1])


def test_a_shared_block_is_stored_once_and_serves_every_use(oracle_dir):
    model = pair(oracle_dir, "7B").jax
    graphdef, params = nnx.split(model)
    flat = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}
    assert sum(name.endswith("o_proj.kernel") for name in flat) == 2
    assert sum(name.endswith("linear.kernel") for name in flat) == 4
    ids = tokens(131, 1, 6)
    grads = jax.grad(lambda p: nnx.merge(graphdef, p)(ids, labels=ids).loss)(params)
    stepped = nnx.merge(graphdef, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
    assert len(jax.tree.leaves(nnx.state(stepped, nnx.Param))) == len(jax.tree.leaves(params))
    changed = stepped.model.shared_blocks[0].self_attn.o_proj.kernel[...]
    assert not np.array_equal(changed, model.model.shared_blocks[0].self_attn.o_proj.kernel[...])


def test_the_three_sensitive_parameters_stay_float32(oracle_dir):
    model = type(pair(oracle_dir, "1.2B").jax).from_pretrained(pair(oracle_dir, "1.2B").path, dtype=jnp.bfloat16)
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        expected = jnp.float32 if path[-1] in ("A_log", "D", "dt_bias") else jnp.bfloat16
        assert leaf.get_value().dtype == expected, path


def test_a_split_model_can_be_a_static_argument(oracle_dir):
    model = pair(oracle_dir, "1.2B").jax
    assert model.generation_config["eos_token_id"] == 2
    assert hash(nnx.split(model)[0]) == hash(nnx.split(model)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either input_ids or inputs_embeds, got neither"),
        ({"input_ids": np.ones((1, 2), int), "inputs_embeds": np.ones((1, 2, 32))}, "got both"),
        ({"input_ids": np.array([[1, 131]])}, r"in \[0, 131\).*row 0, column 1"),
        ({"input_ids": np.array([[-1, 1]])}, "row 0, column 0"),
        ({"input_ids": np.array([1, 2])}, r"input_ids\[None\]"),
        ({"input_ids": np.ones((1, 2))}, "must be integers, got float64"),
        ({"input_ids": np.ones((1, 0), int)}, "at least one row and one token"),
        ({"input_ids": np.ones((2, 3), int), "attention_mask": np.ones((2, 4))}, r"shape \(2, 3\), got \(2, 4\)"),
        ({"input_ids": np.ones((1, 2), int), "attention_mask": np.array([[1, 2]])}, "1 .or True. at real tokens"),
        ({"input_ids": np.ones((1, 2), int), "position_ids": np.ones((1, 3), int)}, "position_ids must have shape"),
        ({"input_ids": np.ones((1, 2), int), "segment_ids": np.ones((1, 2))}, "segment_ids must be integers"),
        ({"inputs_embeds": np.ones((1, 2, 31))}, r"\(batch, length, 32\)"),
        ({"input_ids": np.ones((1, 9), int), "use_cache": True, "cache_length": 8}, "less than the 9 tokens"),
        ({"input_ids": np.ones((1, 2), int), "labels": np.ones((1, 3), int)}, "labels must have shape"),
        ({"input_ids": np.ones((1, 2), int), "labels": np.array([[1, 200]])}, r"-100 or in \[0, 131\), got 200"),
        ({"input_ids": np.ones((1, 2), int), "labels": np.ones((1, 2), int), "logits_to_keep": 1}, "every token"),
        ({"input_ids": np.ones((1, 2), int), "logits_to_keep": -1}, "got -1"),
        (
            {"input_ids": np.ones((1, 2), int), "logits_to_keep": np.array([2])},
            r"the 2 columns of this call, got \[2\]",
        ),
        ({"input_ids": np.ones((1, 2), int), "logits_to_keep": np.ones((1, 1))}, "1-D integer"),
        ({"input_ids": np.ones((1, 2), int), "past_key_values": object()}, "must be a Zamba2Cache"),
    ],
)
def test_bad_input_is_refused_by_name(oracle_dir, arguments, message):
    with pytest.raises(ValueError, match=message):
        pair(oracle_dir, "1.2B").jax(**arguments)


def test_caches_that_do_not_fit_are_refused(oracle_dir):
    model = pair(oracle_dir, "1.2B").jax
    ids = np.ones((1, 5), int)
    cache = model.init_cache(1, 8)
    used = model(ids, past_key_values=cache).past_key_values
    with pytest.raises(ValueError, match="5 of 8 slots are taken and 5 tokens are to come"):
        model(ids, past_key_values=used)
    with pytest.raises(ValueError, match="holds 2 rows, the call has 1"):
        model(ids, past_key_values=model.init_cache(2, 8))
    with pytest.raises(ValueError, match="made for another model"):
        model(ids, past_key_values=pair(oracle_dir, "7B").jax.init_cache(1, 8))
    with pytest.raises(ValueError, match="segment_ids do not go with past_key_values"):
        model(ids, past_key_values=cache, segment_ids=ids)
    with pytest.raises(ValueError, match="4 slots, the call alone has 5"):
        model(ids, past_key_values=model.init_cache(1, 4))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        model.init_cache(0, 8)


def test_every_activation_of_pytorch(oracle_dir):
    from transformers.activations import ACT2FN

    from zamba2_jax.layers.activations import ACTIVATIONS

    x = np.linspace(-12, 12, 997, dtype=np.float32)
    for name, activation in ACTIVATIONS.items():
        assert relative_error(activation(jnp.asarray(x)), ACT2FN[name](torch.from_numpy(x))) < 1e-6, name


def test_gated_activation_is_rounded_once_and_keeps_its_input_alone():
    from zamba2_jax.layers.activations import gated

    gate_up = jax.random.normal(jax.random.key(0), (1, 5, 2, 7), jnp.bfloat16) * 3
    wide = gate_up.astype(jnp.float32)

    def plain(gate_up):
        return jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]

    result, backward = jax.vjp(functools.partial(gated, "silu"), gate_up)
    exact, exact_backward = jax.vjp(plain, wide)
    assert result.dtype == jnp.bfloat16
    # Half a unit in the last of eight bits.
    np.testing.assert_allclose(result.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)
    assert [leaf.shape for leaf in jax.tree.leaves(backward) if leaf.size > 1] == [gate_up.shape]
    cotangent = jax.random.normal(jax.random.key(1), result.shape, jnp.bfloat16)
    [gradient], [expected] = backward(cotangent), exact_backward(cotangent.astype(jnp.float32))
    np.testing.assert_allclose(gradient.astype(jnp.float32), expected, rtol=2**-8, atol=1e-5)
