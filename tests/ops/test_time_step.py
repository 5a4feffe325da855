"""The time steps of the recurrence from what the projection gives."""

import jax.numpy as jnp
import numpy as np
import pytest

from zamba2_jax.ops.ssd import time_step


def test_softplus():
    """Values worked out in float64: small ones where softplus is exp, large ones where it is the identity."""
    dt = np.array([[[-20.0, 0.0], [3.0, 50.0]]], np.float32)
    bias = np.array([0.5, -1.0], np.float32)
    wanted = np.log1p(np.exp(np.float64(dt) + bias))
    np.testing.assert_allclose(time_step(dt, bias), wanted, rtol=1e-6)


def test_bfloat16_is_raised_before_the_sum():
    dt, bias = jnp.full((1, 1, 1), 1.0, jnp.bfloat16), jnp.full((1,), 2.0**-10)
    step = time_step(dt, bias)
    assert step.dtype == jnp.float32
    np.testing.assert_allclose(step, np.log1p(np.exp(1 + 2.0**-10)), rtol=1e-6)


def test_limit_and_mask():
    dt = np.array([[[-20.0], [0.0], [50.0], [0.0]]], np.float32)
    mask = np.array([[True, True, True, False]])
    step = time_step(dt, np.zeros(1, np.float32), limit=(0.01, 30.0), mask=mask)
    np.testing.assert_allclose(step[0, :, 0], [0.01, np.log(2), 30.0, 0.0], rtol=1e-6)


@pytest.mark.parametrize("limit", [(1.0, 0.5), (-1.0, 1.0), (1.0,)])
def test_bad_limit(limit):
    with pytest.raises(ValueError, match=r"limit is .*low, high.* with 0 <= low <= high"):
        time_step(np.zeros((1, 1, 2), np.float32), np.zeros(2, np.float32), limit=limit)


def test_bad_bias_and_mask():
    dt = np.zeros((3, 5, 2), np.float32)
    with pytest.raises(ValueError, match=r"dt_bias has shape \(3,\); it must be \(h,\) = \(2,\)"):
        time_step(dt, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"mask has shape \(3, 5, 2\); it must be .* = \(3, 5\)"):
        time_step(dt, np.zeros(2, np.float32), mask=np.ones((3, 5, 2), bool))
    with pytest.raises(ValueError, match="mask has dtype int32; it must be bool"):
        time_step(dt, np.zeros(2, np.float32), mask=np.ones((3, 5), np.int32))
