"""The program of what follows a shared block's attention (`ops.decode.feed_forward_gpu`), run by hand: see
`mosaic_by_hand`."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.ops.mosaic_by_hand import by_hand, ref, unwritten
from zamba2_jax import Zamba2Config
from zamba2_jax.layers import whole_layer
from zamba2_jax.layers.shared_block import SharedBlockUse, SharedTransformerBlock
from zamba2_jax.ops.decode import feed_forward_gpu, hopper, products_gpu

SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "adapter_rank": 128,
    "num_hidden_layers": 1,
    "layers_block_type": ["hybrid"],
    "use_shared_attention_adapter": True,
}


def test_program(monkeypatch):
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    config = Zamba2Config(**SIZES, initializer_range=0.03)
    block, use = SharedTransformerBlock(config, **options), SharedBlockUse(config, **options)
    rng = np.random.default_rng(0)
    norm = block.pre_ff_layernorm
    norm.scale[...] = jnp.asarray(rng.normal(1.0, 0.3, 2048), jnp.bfloat16)
    mixed = jnp.asarray(rng.normal(size=(1, 1, 4096)), jnp.bfloat16)
    x = block.feed_forward(norm(block.self_attn.o_proj(mixed)), use, None)
    expected = np.asarray(use.linear(x)[0, 0], np.float32)

    weights = {name: ref(array) for name, array in whole_layer.feed_forward_weights_of(block, use).items()}
    arrays = unwritten(feed_forward_gpu.outputs_of(jnp.bfloat16))
    waits = ref(jnp.zeros((hopper.WAITS,), jnp.int32))
    activate = products_gpu.ACTIVATIONS[block.feed_forward.activation]

    def body():
        feed_forward_gpu._program(list(arrays), norm.eps, activate, waits, ref(mixed[0, 0]), weights, *arrays.values())

    by_hand(monkeypatch, feed_forward_gpu)(feed_forward_gpu.PROGRAMS, body)
    got = np.asarray(arrays["pieces"][...]).sum(axis=0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=np.abs(expected).max() / 100)
    # The layer that follows counts with the first.
    np.testing.assert_array_equal(waits[...], [0, 0, 128, 32, 128, 128])


@pytest.mark.parametrize(
    ("sizes", "found"),
    [((4096, 2048, 8192, 128), None), ((5120, 2560, 10240, 128), "5120 features"), ((4096, 2048, 8192, 64), "rank 64")],
)
def test_sizes(sizes, found):
    reason = feed_forward_gpu.shape_obstacle(*sizes)
    assert reason is None if found is None else found in reason


def test_tiles_fit():
    """What the kernel's loops count on."""
    slots, first = feed_forward_gpu.SLOTS, feed_forward_gpu._O + feed_forward_gpu.DURING_FIRST_WAIT
    assert slots <= feed_forward_gpu._WIDE
    assert slots <= first <= feed_forward_gpu._LOW + slots
    assert slots >= feed_forward_gpu.DURING_SECOND_WAIT
    assert feed_forward_gpu._LINEAR_STEPS <= slots <= feed_forward_gpu._DOWN_STEPS
    assert feed_forward_gpu._OF_LOW <= feed_forward_gpu.PROGRAMS == 128
