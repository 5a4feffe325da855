"""The compiled loop of generation, and how a model is handed to it."""

import dataclasses
import gc
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zamba2_jax import Zamba2Config, Zamba2ForCausalLM
from zamba2_jax.generation import options, processors, programs
from zamba2_jax.generation.processors import Prompt
from zamba2_jax.ops.decode import cached_attention

CONFIG = Zamba2Config(
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=3,
    layers_block_type=["mamba", "hybrid", "mamba"],
    n_mamba_heads=6,
    mamba_d_state=20,
    num_attention_heads=4,
    adapter_rank=5,
    use_mem_rope=True,
    use_shared_attention_adapter=True,
)
PROMPT = np.arange(3, 11)[None]


@pytest.fixture(scope="module")
def model():
    return Zamba2ForCausalLM(CONFIG, rngs=nnx.Rngs(0))


def compiled_loop(model, rows, slots):
    values = options.merge(None, None, model.config, {"max_new_tokens": 5, "eos_token_id": None})
    checked = options.check(
        values, prompt_length=8, vocab_size=97, max_position_embeddings=4096, explicit=["max_new_tokens"], seed=None
    )
    static, knobs = processors.split(checked, 97)
    state = programs.Decoding(
        tokens=np.zeros((rows, slots), np.int32),
        step=np.int32(0),
        finished=np.zeros(rows, bool),
        done=np.bool_(False),
        scores=None,
        logits=None,
    )
    per_row = np.zeros(rows, np.int32)
    prompt = Prompt(length=np.int32(8), given=per_row, real=per_row, tokens=per_row)
    structure, weights = programs.take_apart(model)
    cache = jax.eval_shape(lambda: model.init_cache(rows, slots))
    lowered = programs.decode.lower(structure, weights, cache, state, prompt, knobs, np.int32(5), processors=static)
    return lowered.compile().as_text(), weights, cache


def copied_in_loop(program: str) -> list[tuple[int, ...]]:
    """Shapes that are copied by an instruction of a while loop's body, or of what it calls."""
    computations = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", program, re.M | re.S))
    inside = list(re.findall(r"body=%?([\w.\-]+)", program))
    for name in inside:
        called = re.findall(r"(?:calls|to_apply|body|called_computations=\{)=?%?([\w.\-]+)", computations.get(name, ""))
        inside += [other for other in called if other not in inside]
    assert any(name in computations for name in inside)
    shapes = []
    for name in inside:
        for dims in re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", computations.get(name, "")):
            shapes.append(tuple(int(size) for size in dims.split(",") if size))
    return shapes


class TestCopies:
    def test_the_check_finds_a_copied_array(self):
        def loop(x, kept):
            def body(index, carry):
                x, kept = carry
                return x + kept.sum() * index, x

            return jax.lax.fori_loop(0, 5, body, (x, kept))

        text = jax.jit(loop).lower(jnp.ones((7, 1000)), jnp.ones((7, 1000))).compile().as_text()
        assert (7, 1000) in copied_in_loop(text)

    @pytest.mark.parametrize("rows", [1, 3])
    def test_a_step_copies_no_weight_and_no_whole_cache(self, model, rows):
        # More slots than one block of attention: on a CPU its products take copies of a block. SSM states are left out:
        # there XLA copies each once a step, where a GPU's kernel is handed the state itself.
        program, weights, cache = compiled_loop(model, rows, 4 * cached_attention.BLOCK + 8)
        large = {leaf.size for leaf in weights if leaf.size >= 1000} | {layer.key.size for layer in cache.attention}
        states = {layer.ssm.shape for layer in cache.mamba}
        copied = [shape for shape in copied_in_loop(program) if np.prod(shape) in large and shape not in states]
        assert not copied, f"the loop's body copies arrays of shapes {copied}"


class TestTakeApart:
    def test_again_it_is_the_same_structure(self, model):
        first, weights = programs.take_apart(model)
        second, again = programs.take_apart(model)
        assert first is second
        assert all(ours is theirs for ours, theirs in zip(weights, again, strict=True))

    def test_new_values_are_seen(self):
        model = Zamba2ForCausalLM(CONFIG, rngs=nnx.Rngs(0))
        structure, _ = programs.take_apart(model)
        before = model.generate(PROMPT, max_new_tokens=5)
        nnx.update(model, jax.tree.map(lambda leaf: -1.5 * leaf[::-1], nnx.state(model)))
        same, weights = programs.take_apart(model)
        assert same is structure
        expected = jax.tree.leaves(nnx.state(model))
        assert all(ours is theirs for ours, theirs in zip(weights, expected, strict=True))
        assert (model.generate(PROMPT, max_new_tokens=5) != before).any()

    def test_another_structure_is_seen(self):
        model = Zamba2ForCausalLM(CONFIG, rngs=nnx.Rngs(0))
        structure, weights = programs.take_apart(model)
        layer = model.model.layers[0]
        layer.mamba.conv_x.bias = None
        changed, fewer = programs.take_apart(model)
        assert changed != structure
        assert len(fewer) == len(weights) - 1
        # Deep inside, an attribute that is no array.
        model.model.final_layernorm.eps = 0.5
        assert programs.take_apart(model)[0] != changed

    def test_a_model_is_not_kept_alive(self):
        model = Zamba2ForCausalLM(CONFIG, rngs=nnx.Rngs(0))
        programs.take_apart(model)
        # NNX's variables cannot be referred to weakly; a layer that holds one stands for them.
        layer = weakref.ref(model.model.layers[0])
        del model
        gc.collect()
        assert layer() is None


class TestStateDtype:
    def test_the_cache_keeps_it_through_prefill_and_loop(self, model):
        output = model.generate(PROMPT, max_new_tokens=4, ssm_dtype=jnp.bfloat16, return_dict_in_generate=True)
        assert {layer.ssm.dtype for layer in output.past_key_values.mamba} == {jnp.dtype(jnp.bfloat16)}
        output = model.generate(PROMPT, max_new_tokens=4, return_dict_in_generate=True)
        assert {layer.ssm.dtype for layer in output.past_key_values.mamba} == {jnp.dtype(jnp.float32)}

    def test_its_rounding_stays_small(self, model):
        graphdef, state = nnx.split(model)
        tokens = np.random.default_rng(0).integers(3, 97, (2, 256))

        @jax.jit
        def scores(state, cache):
            model = nnx.merge(graphdef, state)

            def step(cache, token):
                output = model(token[:, None], past_key_values=cache)
                return output.past_key_values, output.logits[:, 0]

            return jax.lax.scan(step, cache, tokens.T)[1]

        exact = scores(state, model.init_cache(2, 256))
        rounded = scores(state, model.init_cache(2, 256, ssm_dtype=jnp.bfloat16))
        error = float(jnp.sqrt(jnp.mean((rounded - exact) ** 2) / jnp.mean(exact**2)))
        print(f"bfloat16 states, 256 steps: root mean square error of the logits {error:.2e} of theirs")
        assert 0 < error < 2**-8

    @pytest.mark.parametrize("value", [jnp.int32, "nonsense"])
    def test_what_is_no_floating_dtype(self, model, value):
        with pytest.raises(ValueError, match="ssm_dtype must be a floating dtype"):
            model.generate(PROMPT, max_new_tokens=4, ssm_dtype=value)

    def test_not_with_a_cache_that_has_one(self, model):
        cache = model.init_cache(1, 64)
        with pytest.raises(ValueError, match="no use with past_key_values"):
            model.generate(PROMPT, max_new_tokens=4, past_key_values=cache, ssm_dtype=jnp.bfloat16)

    def test_the_default_is_float32(self, model):
        cache = dataclasses.replace(model.init_cache(1, 8))
        assert {layer.ssm.dtype for layer in cache.mamba} == {jnp.dtype(jnp.float32)}
