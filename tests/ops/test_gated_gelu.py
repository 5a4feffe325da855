"""The gated GELU by every implementation, against float64: on a GPU the kernel itself, elsewhere its body in interpret
mode. On a mesh: `test_gpu_kernels.py`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zamba2_jax.ops._platform import fused_gpu_obstacle
from zamba2_jax.ops.gated_gelu import gated_gelu
from zamba2_jax.ops.gated_gelu_gpu import normal_distribution
from zamba2_jax.ops.gpu_arithmetic import Arithmetic

INTERPRET = fused_gpu_obstacle() is not None
IMPLEMENTATIONS = [{"implementation": "xla"}, {"implementation": "pallas_gpu", "interpret": INTERPRET}]


def cumulative(x):
    return 0.5 * np.vectorize(math.erfc)(-x * 0.5**0.5)


def exact(gate_up, cotangent):
    gate, up, cotangent = (np.asarray(array, np.float64) for array in (gate_up[:, :, 0], gate_up[:, :, 1], cotangent))
    phi = cumulative(gate)
    slope = phi + gate * np.exp(-0.5 * gate**2) / math.sqrt(2 * math.pi)
    return gate * phi * up, np.stack([cotangent * up * slope, cotangent * gate * phi], axis=2)


# One block and several of a program, and powers of two and not.
@pytest.mark.parametrize("shape", [(1, 1, 2, 256), (2, 3, 2, 768), (1, 5, 2, 4096)])
@pytest.mark.parametrize("options", IMPLEMENTATIONS, ids=lambda options: options["implementation"])
def test_values_and_gradients(shape, options):
    random = np.random.default_rng(shape[3])
    gate_up = jnp.asarray(random.uniform(-6, 6, shape), jnp.bfloat16)
    cotangent = jnp.asarray(random.standard_normal((*shape[:2], shape[3])), jnp.bfloat16)
    value, backward = jax.vjp(lambda gate_up: gated_gelu(gate_up, **options), gate_up)
    [gradient] = backward(cotangent)
    assert value.dtype == gradient.dtype == jnp.bfloat16
    wanted, wanted_gradient = exact(gate_up, cotangent)
    # Half a unit in the last of eight bits; XLA's form adds 1 and an erf near -1, whose last bit counts 36 times.
    cancelled = 36 * 2**-23 if options["implementation"] == "xla" else 1e-6
    np.testing.assert_allclose(np.asarray(value, np.float64), wanted, rtol=2**-8, atol=cancelled)
    # Where the slope is nearly zero, of terms that cancel: a few units in the last of 24 bits of those.
    np.testing.assert_allclose(np.asarray(gradient, np.float64), wanted_gradient, rtol=2**-8, atol=1e-5)


def test_normal_distribution_is_good_to_a_float32():
    x = np.linspace(-12, 12, 9973, dtype=np.float32)
    phi, exponential = normal_distribution(jnp.asarray(x), Arithmetic(rounded=True, interpret=True))
    # The formula's error, and some roundings of polynomials' values near 1.
    np.testing.assert_allclose(phi, cumulative(x.astype(np.float64)), rtol=0, atol=0.75e-7 + 3 * 2**-24)
    np.testing.assert_allclose(exponential, np.exp(-0.5 * x.astype(np.float64) ** 2), rtol=1e-5, atol=1e-30)


def test_the_backward_pass_is_left_the_input_alone():
    gate_up = jnp.ones((1, 3, 2, 256), jnp.bfloat16)
    for options in IMPLEMENTATIONS:
        _, backward = jax.vjp(lambda gate_up, options=options: gated_gelu(gate_up, **options), gate_up)
        assert [leaf.size for leaf in jax.tree.leaves(backward) if leaf.size > 1] == [gate_up.size]


@pytest.mark.parametrize(
    ("gate_up", "message"),
    [
        (jnp.zeros((3, 2, 256)), r"gate_up has shape \(3, 2, 256\); it must be \(b, l, 2, f\)"),
        (jnp.zeros((1, 3, 1, 256)), r"gate_up has shape \(1, 3, 1, 256\)"),
        (jnp.zeros((1, 3, 2, 256), int), "gate_up has dtype int32"),
        (jnp.zeros((1, 3, 2, 256)), "'pallas_gpu' cannot serve: gate_up has dtype float32; it takes 16 bits"),
        (jnp.zeros((1, 3, 2, 100), jnp.bfloat16), "cannot serve: a device has 100 features; it takes multiples of 256"),
    ],
)
def test_errors(gate_up, message):
    with pytest.raises(ValueError, match=message):
        gated_gelu(gate_up, implementation="pallas_gpu", interpret=True)
