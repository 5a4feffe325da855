"""Whole layers in few launches (`layers.decoding`) against the layers themselves: in Pallas' interpreter, or on a GPU
(`JAX_PLATFORMS=cuda`) as they are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zamba2_jax import Zamba2Config, Zamba2ForCausalLM, quantize
from zamba2_jax.layers import decoding
from zamba2_jax.layers.shared_block import AttentionContext
from zamba2_jax.ops.decode import products_gpu
from zamba2_jax.ops.decode.strips_gpu import Tiling
from zamba2_jax.tokens import TokenLayout

INTERPRET = jax.default_backend() != "gpu"
SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "layers_block_type": ["mamba", "hybrid"],
    "n_mamba_heads": 4,
    "mamba_d_state": 16,
    "num_attention_heads": 4,
    "adapter_rank": 4,
}
KINDS = {
    "1.2B": {"use_mem_rope": True, "use_shared_attention_adapter": True},
    "7B": {"use_mem_rope": True, "mamba_ngroups": 2, "num_key_value_heads": 2},
}
# Both forms round to bfloat16 in a dozen places, not always the same way: a few units in the last place of values
# around 1.
CLOSE = {"rtol": 2e-2, "atol": 2e-2}


@functools.cache
def made(kind, dtype, integers):
    model = Zamba2ForCausalLM(Zamba2Config(**SIZES, **KINDS[kind]), dtype=dtype, rngs=nnx.Rngs(0))
    return model if integers is None else quantize(model, integers)


def make(kind, dtype=jnp.bfloat16, integers=None):
    return made(kind, dtype, integers), np.random.default_rng(0)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The interpreter's time grows with the tiles, not with the weights."""
    monkeypatch.setattr(decoding, "TILING", Tiling(columns=32, depth=32, warps=1, stages=2))
    monkeypatch.setattr(decoding, "WIDE", Tiling(columns=16, depth=64, warps=1, stages=2))
    monkeypatch.setattr(decoding, "DEEP", Tiling(columns=16, depth=16, warps=1, stages=2))
    monkeypatch.setattr(decoding, "INT8", Tiling(columns=32, depth=32, warps=1, stages=2))
    monkeypatch.setattr(decoding, "INT4", Tiling(columns=16, depth=64, warps=1, stages=2))


def states_like(tree, rng):
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), tree)


def switch_off(monkeypatch, name):
    """On a GPU the layers would take the fused form themselves."""
    monkeypatch.setattr(decoding, name, lambda *_: "switched off")


def assert_close(got, expected):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), **CLOSE)


@pytest.mark.parametrize(
    ("kind", "rows", "masked", "integers"),
    [
        pytest.param("1.2B", 1, False, None, marks=pytest.mark.slow),
        ("7B", 3, True, None),
        ("7B", 3, True, "int8"),
        ("1.2B", 1, False, "int4"),
    ],
)
def test_mamba_layer(kind, rows, masked, integers, monkeypatch):
    switch_off(monkeypatch, "mamba_obstacle")
    model, rng = make(kind, integers=integers)
    layer = model.model.layers[0]
    hidden, other = (jnp.asarray(rng.normal(size=(rows, 1, 64)), jnp.bfloat16) for _ in range(2))
    state = states_like(model.init_cache(rows, 8).mamba[0], rng)
    mask = jnp.asarray([[True], [False], [True]]) if masked else None
    layout = TokenLayout.make(
        rows, 1, token_mask=mask, segment_ids=None, position_ids=None, first_position=jnp.zeros(rows, jnp.int32)
    )
    expected, left = jax.jit(lambda *arrays: layer(arrays[0], layout, *arrays[1:]))(hidden, state, other)
    following = model.model.layers[1].input_layernorm
    got, ours, normed = jax.jit(
        lambda hidden, state, other: decoding.mamba_layer_step(
            layer, hidden, layout, state, other, following=following, interpret=INTERPRET
        )
    )(hidden, state, other)
    assert_close(normed, following(got)[:, 0])
    real = slice(None) if mask is None else mask[:, 0]  # what a masked token yields is read by nobody
    assert_close((got[real], ours), (expected[real], left))
    if masked:
        assert_close(jax.tree.map(lambda leaf: leaf[1], ours), jax.tree.map(lambda leaf: leaf[1], state))


def test_layers_that_norm_for_each_other(monkeypatch):
    """A step of all layers, each of which hands the next its norm, but where a shared block comes between."""
    kinds = ["mamba", "mamba", "hybrid", "mamba"]
    config = Zamba2Config(**SIZES | {"num_hidden_layers": 4, "layers_block_type": kinds}, **KINDS["1.2B"])
    model = Zamba2ForCausalLM(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    cache = model(jnp.asarray([[5, 6, 7]]), use_cache=True, cache_length=8).past_key_values
    step = {"past_key_values": cache, "output_hidden_states": True}
    switch_off(monkeypatch, "mamba_obstacle")
    plain = jax.jit(lambda: model(jnp.asarray([[8]]), **step))()

    handed_on = []
    fused_step = decoding.mamba_layer_step

    def watched(layer, hidden, layout, state, output, normed, following):
        handed_on.append((normed is not None, following is not None))
        return fused_step(layer, hidden, layout, state, output, normed, following, interpret=INTERPRET)

    monkeypatch.setattr(decoding, "mamba_obstacle", lambda *_: None)
    monkeypatch.setattr(decoding, "mamba_layer_step", watched)
    fused = jax.jit(lambda: model(jnp.asarray([[8]]), **step))()
    assert handed_on == [(False, True), (True, False), (False, True), (True, False)]
    assert_close((fused.hidden_states, fused.past_key_values.mamba), (plain.hidden_states, plain.past_key_values.mamba))


@pytest.mark.parametrize(("dtype", "masked"), [(jnp.bfloat16, False), (jnp.float32, True)])
def test_recurrence_of_many_rows(dtype, masked, monkeypatch):
    for name in ("mamba_obstacle", "recurrence_obstacle"):
        switch_off(monkeypatch, name)
    model, rng = make("7B", dtype)
    mixer, rows = model.model.layers[0].mamba, 3
    hidden = jnp.asarray(rng.normal(size=(rows, 1, 64)), dtype)
    state = states_like(model.init_cache(rows, 8).mamba[0], rng)
    mask = jnp.asarray([[True], [False], [True]]) if masked else None
    layout = TokenLayout.make(
        rows, 1, token_mask=mask, segment_ids=None, position_ids=None, first_position=jnp.zeros(rows, jnp.int32)
    )

    def steps(hidden, state):
        zx, bc, dt = (product(hidden) for product in (mixer.zx_proj, mixer.bc_proj, mixer.dt_proj))
        y, ours = decoding.recurrence_step(mixer, zx[:, 0], bc[:, 0], dt[:, 0], layout, state, interpret=INTERPRET)
        return mixer._step(zx, bc, dt, layout, state), (y[:, None], ours)

    (expected, left), (got, ours) = jax.jit(steps)(hidden, state)
    real = slice(None) if mask is None else mask[:, 0]
    close = CLOSE if dtype == jnp.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for one, other in zip(jax.tree.leaves((got[real], ours)), jax.tree.leaves((expected[real], left)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), **close)
    if masked:
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize(
    ("kind", "rows", "integers"),
    [("1.2B", 1, None), pytest.param("7B", 3, None, marks=pytest.mark.slow), ("1.2B", 3, "int8"), ("1.2B", 1, "int4")],
)
def test_shared_block(kind, rows, integers, monkeypatch):
    switch_off(monkeypatch, "shared_block_obstacle")
    model, rng = make(kind, integers=integers)
    block, use = model.model.shared_blocks[0], model.model.shared_block_uses[0]
    head_dim = model.config.attention_head_dim
    hidden, embedded = (jnp.asarray(rng.normal(size=(rows, 1, 64)), jnp.bfloat16) for _ in range(2))
    past = states_like(model.init_cache(rows, 12).attention[0], rng)
    slot_mask = jnp.asarray(rng.random((rows, 12)) < 0.8).at[:, 7].set(True) & (jnp.arange(12) <= 7)
    angles = rng.normal(size=(rows, 1, head_dim // 2))
    nothing = {field.name: None for field in dataclasses.fields(AttentionContext)}
    context = AttentionContext(
        **nothing
        | {
            "rotation": (jnp.cos(angles), jnp.sin(angles)),
            "mask": slot_mask[:, None],
            "slot_mask": slot_mask,
            "first_slot": jnp.int32(7),
            "return_weights": False,
        }
    )
    assert context.is_decoding
    assert not dataclasses.replace(context, return_weights=True).is_decoding
    expected, left, _ = jax.jit(lambda *arrays: block(*arrays[:2], use, context, arrays[2]))(hidden, embedded, past)
    got, ours = jax.jit(
        lambda *arrays: decoding.shared_block_step(block, *arrays[:2], use, context, arrays[2], interpret=INTERPRET)
    )(hidden, embedded, past)
    # The block's output is small next to what passes through it.
    scale = float(jnp.abs(expected).max())
    assert_close((got / scale, ours), (expected / scale, left))


@pytest.mark.parametrize(("rows", "integers"), [(1, None), (1, "int8"), (3, "int8")])
def test_head(rows, integers):
    model, rng = make("1.2B", integers=integers)
    hidden = jnp.asarray(rng.normal(size=(rows, 1, 64)), jnp.bfloat16)
    embedding = model.model.embed_tokens
    assert_close(decoding.head_scores(embedding, hidden, interpret=INTERPRET), embedding.attend(hidden))


class TestObstacles:
    @pytest.mark.parametrize("integers", [None, "int8", "int4"])
    def test_none_in_the_interpreter(self, integers):
        model, _ = make("1.2B", integers=integers)
        base = model.model
        assert decoding.mamba_obstacle(base.layers[0], 1, interpret=INTERPRET) is None
        assert decoding.shared_block_obstacle(base.shared_blocks[0], base.shared_block_uses[0], 1, INTERPRET) is None
        assert decoding.head_obstacle(base.embed_tokens, 1, interpret=INTERPRET) is None

    def test_each_says_why(self):
        model, _ = make("1.2B")
        layer = model.model.layers[0]
        if INTERPRET:
            assert "needs a GPU" in decoding.mamba_obstacle(layer, 1)
        many = products_gpu.MAX_ROWS + 1
        assert f"{many} rows" in decoding.mamba_obstacle(layer, many, interpret=INTERPRET)
        assert decoding.recurrence_obstacle(layer.mamba, interpret=INTERPRET) is None
        single, _ = make("1.2B", dtype=jnp.float32)
        assert "float32" in decoding.mamba_obstacle(single.model.layers[0], 1, interpret=INTERPRET)
        assert "2 rows" in decoding.head_obstacle(model.model.embed_tokens, 2, interpret=INTERPRET)
        narrow = Zamba2Config(**SIZES | {"hidden_size": 48, "mamba_ngroups": 2})
        four = quantize(Zamba2ForCausalLM(narrow, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), "int4").model
        assert "groups of 16" in decoding.mamba_obstacle(four.layers[0], 1, interpret=INTERPRET)
        thirds = Zamba2Config(**SIZES | {"n_mamba_heads": 6, "mamba_expand": 3, "mamba_ngroups": 2})
        four = quantize(Zamba2ForCausalLM(thirds, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), "int4").model
        assert "groups of int4 reach" in decoding.mamba_obstacle(four.layers[0], 1, interpret=INTERPRET)
        half, _ = make("1.2B", dtype=jnp.float16)
        assert "float16" in decoding.mamba_obstacle(half.model.layers[0], 1, interpret=INTERPRET)

    def test_arrays_on_several_devices(self):
        model, _ = make("1.2B")
        mesh = jax.sharding.AbstractMesh((2,), ("tensor",))
        with jax.sharding.use_abstract_mesh(mesh):
            assert "2 devices" in decoding.mamba_obstacle(model.model.layers[0], 1, interpret=INTERPRET)
