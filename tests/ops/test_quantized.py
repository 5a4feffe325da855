"""Weights as int8 and int4: rounding, and products with them, against the dense matrix that they stand for."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from zamba2_jax.ops.quantized import (
    dequantize_int4,
    dequantize_int8,
    dot_int4,
    dot_int8,
    group_size,
    quantize_int4,
    quantize_int8,
    take_int8,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class TestRounding:
    @pytest.mark.parametrize(("shape", "axis"), [((48, 5), 0), ((48, 2, 5), 0), ((7, 48), 1)])
    def test_int8_is_within_half_a_level(self, shape, axis):
        weight = normal(*shape)
        values, scale = quantize_int8(weight, axis=axis)
        assert (values.dtype, scale.dtype) == (jnp.int8, jnp.float32)
        assert scale.shape == shape[:axis] + shape[axis + 1 :]
        assert int(jnp.abs(values).max()) == 127
        np.testing.assert_allclose(scale, np.abs(weight).max(axis) / 127, rtol=1e-6)
        error = np.abs(dequantize_int8(values, scale, axis=axis) - weight)
        assert (error <= 0.5001 * np.expand_dims(scale, axis)).all()

    def test_int4_is_exact_where_it_can_be(self):
        levels = np.random.default_rng(0).integers(-8, 8, (128, 2, 3)).astype(np.float32)
        levels[::64] = -8  # so that each group's scale is the one used here
        weight = levels * np.repeat([[[0.5]], [[4.0]]], 64, axis=0).reshape(128, 1, 1)
        values, scale = quantize_int4(weight)
        assert (values.shape, values.dtype) == ((64, 2, 3), jnp.uint8)
        assert (scale.shape, scale.dtype) == ((2, 2, 3), jnp.bfloat16)
        np.testing.assert_array_equal(dequantize_int4(values, scale), weight)
        np.testing.assert_array_equal(values & 15, levels[0::2] + 8)
        np.testing.assert_array_equal(values >> 4, levels[1::2] + 8)

    def test_int4_error_is_below_that_of_the_plain_scale(self):
        weight = normal(256, 64)
        groups = weight.reshape(4, 64, 64)
        plain = np.abs(groups).max(axis=1, keepdims=True) / 7
        plain_error = np.square(np.rint(groups / plain) * plain - groups).mean() ** 0.5
        error = np.square(dequantize_int4(*quantize_int4(weight)) - weight).mean() ** 0.5
        # 0.84 is what the search over scales gains for a large normal matrix.
        assert error < 0.88 * plain_error

    @pytest.mark.parametrize("inputs", [8, 24, 96, 192])
    def test_int4_of_other_widths(self, inputs):
        weight = normal(inputs, 4)
        _, scale = quantize_int4(weight)
        assert scale.shape == (inputs // group_size(inputs), 4)
        error = dequantize_int4(*quantize_int4(weight)) - weight
        assert np.linalg.norm(error) < 0.12 * np.linalg.norm(weight)

    def test_zeros_stay_zeros(self):
        zeros = np.zeros((64, 2), np.float32)
        assert not dequantize_int8(*quantize_int8(zeros, axis=0), axis=0).any()
        assert not dequantize_int4(*quantize_int4(zeros)).any()

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_shows(self, bad):
        weight = normal(64, 2)
        weight[5, 1] = bad
        for scale in (quantize_int8(weight, axis=0)[1], quantize_int4(weight)[1][0]):
            np.testing.assert_array_equal(np.isfinite(scale.astype(jnp.float32)), [True, False])

    def test_what_does_not_suit_is_refused(self):
        with pytest.raises(ValueError, match=r"\(12, 4\).*multiple of 8, int8 takes any"):
            quantize_int4(normal(12, 4))
        with pytest.raises(ValueError, match="weight has dtype int32"):
            quantize_int8(np.ones((4, 4), np.int32), axis=0)


IMPLEMENTATIONS = ("fused", "blocked")


@pytest.mark.parametrize(("implementation", "block"), [("fused", 1), ("blocked", 1), ("blocked", 400)])
class TestProducts:
    """Blocks of one row or group, and of some."""

    @pytest.mark.parametrize("out", [(6,), (2, 5)])
    def test_int8(self, implementation, block, out):
        values, scale = quantize_int8(normal(96, *out), axis=0)
        for leading in ((), (3,), (2, 4)):
            x = normal(*leading, 96, seed=1)
            wanted = np.tensordot(x, dequantize_int8(values, scale, axis=0), 1)
            y = dot_int8(x, values, scale, axis=0, implementation=implementation, block=block)
            assert y.dtype == jnp.float32
            np.testing.assert_allclose(y, wanted, atol=3e-6 * 96**0.5)

    def test_int8_by_rows(self, implementation, block):
        values, scale = quantize_int8(normal(101, 32), axis=1)  # a prime: the last block overlaps
        x = normal(2, 3, 32, seed=1)
        y = dot_int8(x, values, scale, axis=1, implementation=implementation, block=block)
        np.testing.assert_allclose(y, x @ np.asarray(dequantize_int8(values, scale, axis=1)).T, atol=2e-5)

    @pytest.mark.parametrize("out", [(6,), (2, 5)])
    def test_int4(self, implementation, block, out):
        values, scale = quantize_int4(normal(192, *out))
        for leading in ((), (3,), (2, 4)):
            x = normal(*leading, 192, seed=1)
            y = dot_int4(x, values, scale, implementation=implementation, block=block)
            assert y.dtype == jnp.float32
            np.testing.assert_allclose(y, np.tensordot(x, dequantize_int4(values, scale), 1), atol=3e-6 * 192**0.5)

    def test_bfloat16(self, implementation, block):
        """No further from the exact product than rounding to bfloat16 once (int8) or of each weight (int4) explains."""
        weight = normal(256, 8)
        x = normal(3, 256, seed=1).astype(ml_dtypes.bfloat16)
        exact_x = x.astype(np.float64)
        eight, four = quantize_int8(weight, axis=0), quantize_int4(weight)
        y8 = dot_int8(x, *eight, axis=0, implementation=implementation, block=block)
        y4 = dot_int4(x, *four, implementation=implementation, block=block)
        assert y8.dtype == y4.dtype == jnp.bfloat16
        wanted8 = exact_x @ np.asarray(dequantize_int8(*eight, axis=0), np.float64)
        wanted4 = exact_x @ np.asarray(dequantize_int4(*four), np.float64)
        np.testing.assert_allclose(np.asarray(y8, np.float64), wanted8, rtol=2**-8, atol=1e-4)
        assert np.abs(np.asarray(y4, np.float64) - wanted4).max() < 2**-8 * np.abs(wanted4).max() + 2**-8 * 256**0.5


class TestMemory:
    """Widened integers never stand beside the integers: 4 and 8 times their size in float32."""

    @pytest.mark.parametrize("outputs", [(1024,), (2, 512)])
    @pytest.mark.parametrize("bits", [8, 4])
    def test_no_widened_matrix_is_kept(self, bits, outputs):
        weight = jax.ShapeDtypeStruct((2048, *outputs), jnp.bfloat16)
        arrays = jax.eval_shape(lambda w: quantize_int8(w, axis=0) if bits == 8 else quantize_int4(w), weight)
        temporary = {}
        for implementation in IMPLEMENTATIONS:

            def product(x, values, scale, implementation=implementation):
                if bits == 8:
                    return dot_int8(x, values, scale, axis=0, implementation=implementation, block=1 << 16)
                return dot_int4(x, values, scale, implementation=implementation, block=1 << 16)

            compiled = jax.jit(product).lower(jax.ShapeDtypeStruct((1, 1, 2048), jnp.bfloat16), *arrays).compile()
            temporary[implementation] = compiled.memory_analysis().temp_size_in_bytes
        widened = 4 * 2048 * 1024
        assert temporary["blocked"] < widened / 4
        if jax.default_backend() == "cpu":  # what "blocked" is for
            assert temporary["fused"] > widened / 2

    @pytest.mark.parametrize("bits", [8, 4])
    def test_a_loop_does_not_widen_in_advance(self, bits):
        """As generation's loop over tokens: the matrices do not change in it, so that a compiler likes to hoist what
        depends on them alone. By the platform's own choice: "fused" on a CPU is hoisted."""
        count, size = 8, 256
        weight = jax.ShapeDtypeStruct((size, size), jnp.float32)
        arrays = jax.eval_shape(lambda w: quantize_int8(w, axis=0) if bits == 8 else quantize_int4(w), weight)

        def product(x, values, scale):
            if bits == 8:
                return dot_int8(x, values, scale, axis=0, block=1 << 14)
            return dot_int4(x, values, scale, block=1 << 14)

        def loop(x, matrices):
            return jax.lax.fori_loop(0, 9, lambda _, x: functools.reduce(lambda x, m: product(x, *m), matrices, x), x)

        compiled = jax.jit(loop).lower(jax.ShapeDtypeStruct((1, size), jnp.float32), [arrays] * count).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * size * size * count / 2


def test_rows_are_taken():
    values, scale = quantize_int8(normal(11, 6), axis=1)
    rows = np.array([[3, 0, 10], [3, 3, 1]])
    np.testing.assert_array_equal(take_int8(values, scale, rows), dequantize_int8(values, scale, axis=1)[rows])


def test_no_gradient_passes():
    x = normal(3, 64)
    eight, four, rows = quantize_int8(normal(64, 4), axis=0), quantize_int4(normal(64, 4)), np.array([1, 2])
    for implementation in IMPLEMENTATIONS:
        with pytest.raises(ValueError, match="without quantize= to train"):
            jax.grad(lambda x, i=implementation: dot_int8(x, *eight, axis=0, implementation=i).sum())(x)
        with pytest.raises(ValueError, match="without quantize= to train"):
            jax.grad(lambda x, i=implementation: dot_int4(x, *four, implementation=i).sum())(x)
    with pytest.raises(ValueError, match="without quantize= to train"):
        jax.grad(lambda scale: take_int8(eight[0], scale, rows).sum())(jnp.ones(64))
    with pytest.raises(ValueError, match="without quantize= to train"):
        jax.grad(lambda scale: dequantize_int8(eight[0], scale, axis=0).sum())(eight[1])


def test_arguments_that_do_not_fit_are_named():
    x = normal(3, 64)
    eight, four = quantize_int8(normal(64, 4), axis=0), quantize_int4(normal(64, 4))
    with pytest.raises(ValueError, match="implementation is 'cuda'"):
        dot_int8(x, *eight, axis=0, implementation="cuda")
    with pytest.raises(ValueError, match=r"x has shape \(3, 60\)"):
        dot_int8(x[:, :60], *eight, axis=0)
    with pytest.raises(ValueError, match=r"x has shape \(3, 60\)"):
        dot_int4(x[:, :60], *four)
    with pytest.raises(ValueError, match=r"scale has shape \(3,\)"):
        dot_int8(x, eight[0], eight[1][:3], axis=0)
    with pytest.raises(ValueError, match=r"scale has shape \(4,\)"):
        dot_int4(x, four[0], four[1][0])
    with pytest.raises(ValueError, match="values has dtype int8"):
        dot_int4(x, eight[0], four[1])
    with pytest.raises(ValueError, match="values is uint8"):
        dot_int8(x, *four, axis=0)
    with pytest.raises(ValueError, match="x has dtype int32"):
        dot_int8(np.ones((3, 64), np.int32), *eight, axis=0)
