"""The whole-layer kernel's program (`ops.decode.layer_gpu`), run by hand: see `mosaic_by_hand`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.ops.mosaic_by_hand import by_hand, ref, unwritten
from zamba2_jax import Zamba2Config
from zamba2_jax.cache import MambaState
from zamba2_jax.layers import decoding, whole_layer
from zamba2_jax.layers.mamba2 import MambaLayer
from zamba2_jax.layers.quantized import QuantizedLinear
from zamba2_jax.ops.decode import layer_gpu
from zamba2_jax.tokens import TokenLayout

SIZES = {
    "hidden_size": 2048,
    "n_mamba_heads": 64,
    "mamba_d_state": 128,
    "num_hidden_layers": 1,
    "layers_block_type": ["mamba"],
}


@pytest.mark.parametrize("bits", [16, 8])
def test_program(bits, monkeypatch):
    limit = (0.01, 0.05)
    config = Zamba2Config(**SIZES, time_step_limit=limit)
    layer = MambaLayer(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def draw(*shape, dtype=jnp.bfloat16, scale=1.0):
        return jnp.asarray(rng.normal(0.0, scale, shape), dtype)

    mixer = layer.mamba
    for part in (layer.input_layernorm.scale, mixer.norm.scale, mixer.D, mixer.conv_x.bias, mixer.conv_bc.bias):
        part[...] = 1.0 + draw(*part.shape, dtype=part.dtype, scale=0.3)
    if bits == 8:
        for name in ("zx_proj", "bc_proj", "out_proj"):
            setattr(mixer, name, QuantizedLinear(getattr(mixer, name), bits=8))
    before = layer_gpu.Unsummed(
        draw(2048), draw(4, 2048, dtype=jnp.float32), jnp.full((1,), 9000.0), jnp.zeros((6,), jnp.int32)
    )
    added = draw(2048)
    state = MambaState(draw(1, 3, 4096), draw(1, 3, 2, 128), draw(1, 64, 64, 128, dtype=jnp.float32))

    # The plain layer, from the sum that the kernel makes of what the layer before has left.
    factor = jax.lax.rsqrt(before.squares[0] / 4096 + mixer.norm.eps)
    hidden = (before.pieces.sum(axis=0) * factor).astype(jnp.bfloat16) + before.hidden
    layout = TokenLayout.make(
        1, 1, token_mask=None, segment_ids=None, position_ids=None, first_position=jnp.zeros(1, jnp.int32)
    )
    monkeypatch.setattr(decoding, "mamba_obstacle", lambda *_: "switched off")
    expected, left = layer(hidden[None, None], layout, state, added[None, None])

    sizes = layer_gpu.sizes_of(2048, 4096, int8=bits == 8)
    weights = jax.tree.map(ref, whole_layer.weights_of(layer))
    arrays = unwritten(layer_gpu.outputs_of(sizes, jnp.bfloat16))
    states = [ref(state.conv_x[0]), ref(state.conv_bc.reshape(3, 256)), ref(state.ssm[0])]
    given = [ref(array) for array in (before.waits, before.hidden, before.pieces, before.squares, added)]

    def body():
        layer_gpu._program(
            sizes, list(arrays), layer.input_layernorm.eps, mixer.norm.eps, limit, *given, weights, *states,
            *arrays.values(),
        )  # fmt: skip

    by_hand(monkeypatch, layer_gpu)(sizes.programs, body)
    out = {name: array[...] for name, array in arrays.items()}
    factor = jax.lax.rsqrt(out["squares"][0] / 4096 + mixer.norm.eps)
    got = (out["pieces"].sum(axis=0) * factor).astype(jnp.bfloat16) + out["hidden"]
    np.testing.assert_array_equal(out["hidden"], hidden)
    assert not out["waits"].any()

    def assert_close(ours, theirs):
        ours, theirs = (np.asarray(array, np.float32) for array in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=np.abs(theirs).max() / 100)

    assert_close(got, expected[0, 0])
    assert_close(states[0][...], left.conv_x[0])
    assert_close(states[1][...], left.conv_bc.reshape(3, 256))
    np.testing.assert_allclose(states[2][...], left.ssm[0], rtol=2e-2, atol=2e-2)
