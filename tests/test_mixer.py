"""The Mamba2 mixer with the kernels that it takes on a GPU, against itself in XLA's operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zamba2_jax import Zamba2Config
from zamba2_jax.cache import MambaState
from zamba2_jax.config import block_types
from zamba2_jax.layers import mamba2
from zamba2_jax.layers.quantized import QuantizedLinear
from zamba2_jax.ops import conv_gpu
from zamba2_jax.ops._platform import platform
from zamba2_jax.tokens import TokenLayout

BATCH, LENGTH = 2, 9
INTERPRETED = {"implementation": "pallas_gpu", "interpret": True}


def mixer(**changes):
    shape = {
        "vocab_size": 64,
        "hidden_size": 8,
        "num_hidden_layers": 3,
        "layers_block_type": block_types(3, [1]),
        "n_mamba_heads": 2,
        "mamba_d_state": 8,
        "mamba_ngroups": 2,
        "num_attention_heads": 2,
        "adapter_rank": 3,
    }
    config = Zamba2Config(**shape | changes)
    rngs = nnx.Rngs(0)
    made = mamba2.Mamba2Mixer(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs)
    # Biases that show: they begin as zeros.
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(rngs.params(), x.shape), made)


def layout(token_mask=None, **options):
    given = {"token_mask": token_mask, "segment_ids": None, "position_ids": None, "first_position": None}
    return TokenLayout.make(BATCH, LENGTH, **given | options)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The kernels of the convolutions and of the recurrence, interpreted, and what the mixer decides by them."""
    monkeypatch.setattr(conv_gpu, "TOKENS", 8)
    monkeypatch.setattr(conv_gpu, "TOGETHER", 2)
    monkeypatch.setattr(mamba2, "fused_gpu_obstacle", lambda: None)
    monkeypatch.setattr(mamba2, "mixer_convs", functools.partial(mamba2.mixer_convs, **INTERPRETED))
    monkeypatch.setattr(mamba2, "ssd", functools.partial(mamba2.ssd, **INTERPRETED))


def run(graphdef, params, hidden, layout, state):
    return nnx.merge(graphdef, params)(hidden, layout, state)


def program_of(layer, layout):
    return str(jax.make_jaxpr(functools.partial(run, nnx.split(layer)[0]))(nnx.split(layer)[1], hidden(), layout, None))


def hidden():
    return jax.random.normal(jax.random.key(1), (BATCH, LENGTH, 8))


@pytest.mark.skipif(platform() != "cpu", reason="XLA's own form is not what runs here")
@pytest.mark.parametrize(
    ("changes", "padded"),
    [({}, False), ({"add_bias_linear": True, "time_step_limit": (0.2, 0.9)}, True)],
    ids=["plain", "biases, limit and padding"],
)
def test_values_and_gradients(changes, padded, request):
    layer = mixer(**changes)
    graphdef, params = nnx.split(layer)
    mask = np.arange(LENGTH) >= np.array([[3], [0]]) if padded else None
    normal = functools.partial(jax.random.normal, jax.random.key(2))
    state = MambaState(normal((BATCH, 3, 16)), normal((BATCH, 3, 2, 16)), normal((BATCH, 2, 8, 8)))

    def total(params, hidden, state):
        y, state = run(graphdef, params, hidden, layout(mask), state)
        shown = y if mask is None else jnp.where(mask[..., None], y, 0)
        return jnp.sum(jnp.sin(shown)) + sum(jnp.sum(jnp.cos(part)) for part in jax.tree.leaves(state)), (shown, state)

    def evaluate():
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(params, hidden(), state)

    wanted = evaluate()
    request.getfixturevalue("as_on_a_gpu")
    program = program_of(layer, layout(mask))
    assert program.count("name=ssd_prepare") == 1
    assert f"f32[{BATCH},{LENGTH},34]" in program  # 32 columns of B and C, and two heads' steps
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5), evaluate(), wanted
    )


@pytest.mark.usefixtures("as_on_a_gpu")
def test_where_columns_are_read():
    """Not of one token, not where what B, C and dt are made of is looked at or added to, and not of other weights."""
    layer = mixer()
    assert layer._reads_columns(hidden(), layout())
    assert not layer._reads_columns(hidden()[:, :1], layout())
    assert not layer._reads_columns(hidden(), layout(tentative=True))
    quantised = mixer()
    quantised.bc_proj = QuantizedLinear(quantised.bc_proj, bits=8)
    assert not quantised._reads_columns(hidden(), layout())
    with_lora = mixer()
    with_lora.lora = nnx.data(nnx.Dict(in_proj=nnx.Dict()))
    assert not with_lora._reads_columns(hidden(), layout())
