"""What is asked of XLA's compilers, and where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zamba2_jax import Zamba2Config, Zamba2ForCausalLM, compilation
from zamba2_jax.compilation import for_many_tokens, jit_many_tokens
from zamba2_jax.layers import projection
from zamba2_jax.layers.projection import apart


def test_options_are_for_gpus_alone(monkeypatch):
    assert for_many_tokens() is None
    monkeypatch.setattr(compilation, "platform", lambda: "gpu")
    # A name that XLA does not know would be refused when a program is compiled.
    options = for_many_tokens()
    jax.jit(jnp.sin, compiler_options=options).lower(1.0).compile()
    assert options == {"xla_gpu_enable_triton_gemm": False}


def test_the_platform_is_asked_at_the_call(monkeypatch):
    asked = []
    program = jit_many_tokens(lambda x, twice: x + x if twice else x, static_argnames=("twice",))
    monkeypatch.setattr(compilation, "for_many_tokens", lambda: asked.append(1))
    assert not asked
    assert program(jnp.ones(()), twice=True) == 2
    assert program(jnp.ones(()), twice=True) == 2
    assert len(asked) == 1


@pytest.fixture(scope="module")
def model():
    sizes = {"vocab_size": 32, "hidden_size": 32, "n_mamba_heads": 2, "mamba_d_state": 8, "num_attention_heads": 2}
    config = Zamba2Config(num_hidden_layers=1, layers_block_type=["hybrid"], adapter_rank=2, **sizes)
    return Zamba2ForCausalLM(config, rngs=nnx.Rngs(0))


# The inputs of gate and x, of query, key and value, of gate and up; with a cache what the layer leaves there. Of one
# token, query, key and value share theirs, and gate and x have none.
@pytest.mark.parametrize(("length", "cached", "barriers"), [(5, False, 5), (5, True, 6), (1, False, 2)])
def test_barriers_on_gpus(model, length, cached, barriers, monkeypatch):
    ids = jnp.ones((1, length), jnp.int32)

    def program(ids):
        outputs = model(ids, use_cache=cached, **({"cache_length": 8} if cached else {}))
        return outputs.logits, outputs.past_key_values

    assert str(jax.make_jaxpr(program)(ids)).count("optimization_barrier") == 0
    expected = program(ids)
    monkeypatch.setattr(projection, "platform", lambda: "gpu")
    jax.clear_caches()
    assert str(jax.make_jaxpr(program)(ids)).count("optimization_barrier") == barriers
    jax.tree.map(np.testing.assert_array_equal, program(ids), expected)


def test_barriers_are_identities(monkeypatch):
    monkeypatch.setattr(projection, "platform", lambda: "gpu")
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: (apart(x) ** 2).sum()))(x), 2 * x)
    np.testing.assert_array_equal(jax.vmap(apart)(x), x)
    text = jax.jit(lambda x: (apart(x), apart(x), apart(apart(x)))).lower(x).as_text()
    assert text.count("optimization_barrier") == 4
