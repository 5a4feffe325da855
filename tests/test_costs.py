"""Operations and bytes: against the published shapes' table, the cache itself, and XLA's count."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from zamba2_jax import Zamba2Config, Zamba2ForCausalLM, costs
from zamba2_jax.cache import init_cache
from zamba2_jax.config import block_types

PRESETS = {"1.2B": Zamba2Config.zamba2_1_2b, "2.7B": Zamba2Config.zamba2_2_7b, "7B": Zamba2Config.zamba2_7b}


@pytest.mark.parametrize(
    ("size", "weights", "state", "key_values"),
    [("1.2B", 3.52e9, 79.7e6, 100.7e6), ("2.7B", 7.71e9, 70.8e6, 188.7e6), ("7B", 22.06e9, 148.6e6, 381.7e6)],
)
def test_the_published_shapes(size, weights, state, key_values):
    """Weight bytes of a step, float32 SSM state of a sequence, keys and values of 1024 tokens; three digits."""
    config = PRESETS[size]()
    free = {"cache_itemsize": 0, "ssm_itemsize": 0}
    assert config.bytes_per_decode_step(1, 1, **free) == pytest.approx(weights, rel=2e-3)
    assert costs.state_bytes(config, cache_itemsize=0, ssm_itemsize=4) == pytest.approx(state, rel=2e-3)
    assert 1024 * costs.key_value_bytes(config, cache_itemsize=2) == pytest.approx(key_values, rel=2e-3)


def test_a_decode_step_reads_and_writes():
    config = PRESETS["1.2B"]()
    weights = 2 * config.num_parameters_applied_per_token()
    states = costs.state_bytes(config, cache_itemsize=2, ssm_itemsize=4)
    token = costs.key_value_bytes(config, cache_itemsize=2)
    assert config.bytes_per_decode_step(8, 2048) == weights + 8 * (2 * states + 2048 * token + token)
    assert (
        config.bytes_per_decode_step(8, 2048, weight_itemsize=1) == config.bytes_per_decode_step(8, 2048) - weights / 2
    )


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_cache_has_the_bytes_that_are_said(preset):
    config = PRESETS[preset]()
    cache = jax.eval_shape(lambda: init_cache(config, 3, 50, jnp.bfloat16))
    leaves = jax.tree.leaves((cache.mamba, cache.attention))
    assert config.cache_bytes(3, 50) == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def test_operations_of_the_matrices_are_twice_their_numbers():
    """What is left of the parameters met by a token: norms, the A, D and dt_bias, the convolutions."""
    for preset in PRESETS.values():
        config = preset()
        parts = costs.operations(config, keys=1, chunk=1)
        matrices = (parts.mamba_matrices + parts.shared_matrices + parts.head) / 2
        small = config.num_parameters_applied_per_token() - matrices
        assert 0 < small < 0.001 * matrices


def small_config(**changes):
    """Wide enough for matrices to outweigh what is done to every number that they make."""
    shape = {
        "vocab_size": 512,
        "hidden_size": 256,
        "num_hidden_layers": 3,
        "layers_block_type": block_types(3, (1, 2)),
        "n_mamba_heads": 8,
        "mamba_d_state": 32,
        "num_attention_heads": 4,
        "adapter_rank": 16,
        "num_mem_blocks": 1,
        "use_mem_rope": True,
        "use_shared_attention_adapter": True,
        "hidden_act": "relu",
    }
    return Zamba2Config(**shape | changes)


def counted(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()


@pytest.fixture(scope="module")
def split():
    return nnx.split(nnx.eval_shape(lambda: Zamba2ForCausalLM(small_config(), rngs=nnx.Rngs(0))))


LENGTH = 32  # one chunk and one block of attention, so that XLA sees no loop: it counts a loop's body once
IDS = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
# XLA also counts norms, activations, RoPE and softmax: some 20 operations for each of the few numbers of a token's
# stream, against 2 d = 512 and more for each number that a matrix makes.
OVERHEAD = 1.05


def expected(training):
    """With the upper half of the attention's square, which XLA's plain form computes on a CPU."""
    config = small_config()
    skipped = costs.operations(config, keys=LENGTH, chunk=1).attention
    skipped -= costs.operations(config, keys=(LENGTH + 1) / 2, chunk=1).attention
    return IDS.size * (config.flops_per_token(LENGTH, training=training) + skipped * (3 if training else 1))


def test_a_forward_pass_against_xla(split):
    graphdef, params = split
    count = counted(lambda params, ids: nnx.merge(graphdef, params)(ids).logits, params, IDS)
    assert expected(False) < count["flops"] < OVERHEAD * expected(False)


def test_a_training_step_against_xla(split):
    graphdef, params = split
    gradient = jax.grad(lambda params, ids: nnx.merge(graphdef, params)(ids, labels=ids).loss)
    count = counted(gradient, params, IDS)
    # The chunk and the block of attention are recomputed, two operations in a hundred here.
    assert expected(True) < count["flops"] < (OVERHEAD + 0.02) * expected(True)


def test_a_decode_step_against_xla(split):
    graphdef, params = split
    config, slots = small_config(), 64
    cache = jax.eval_shape(lambda: nnx.merge(graphdef, params).init_cache(2, slots))

    def step(params, ids, cache):
        outputs = nnx.merge(graphdef, params)(ids, past_key_values=cache)
        return outputs.logits, outputs.past_key_values

    count = counted(step, params, jax.ShapeDtypeStruct((2, 1), jnp.int32), cache)
    flops = config.flops_per_decode_step(2, slots)
    assert flops < count["flops"] < 1.1 * flops
    # All operands and results of all instructions: no fewer than what must move.
    assert count["bytes accessed"] > config.bytes_per_decode_step(2, slots, weight_itemsize=4, cache_itemsize=4)


def test_a_model_knows_its_dtypes():
    config = small_config()
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}
    model = nnx.eval_shape(lambda: Zamba2ForCausalLM(config, rngs=nnx.Rngs(0), **options))
    assert model.bytes_per_decode_step(3, 50) == config.bytes_per_decode_step(3, 50, weight_itemsize=4)
    assert model.flops_per_token(50, training=True) == 3 * model.flops_per_token(50) == 3 * config.flops_per_token(50)


def test_bad_sizes_are_refused():
    config = small_config()
    for call, name in (
        (lambda: config.flops_per_token(0), "length"),
        (lambda: config.flops_per_token(8, chunk_size=0), "chunk_size"),
        (lambda: config.flops_per_decode_step(1, 0), "context_length"),
        (lambda: config.bytes_per_decode_step(0, 1), "batch_size"),
        (lambda: config.cache_bytes(1, 0), "max_length"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be a positive integer, got 0"):
            call()
