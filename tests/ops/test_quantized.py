"""Weights as int8 and int4: rounding, products with them, and these products' gradients, against the dense matrix that
they stand for."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from zamba2_jax.ops.quantized import (
    dequantize_int4,
    dequantize_int8,
    group_size,
    quantize_int4,
    quantize_int8,
    take_int8,
)
from zamba2_jax.ops.quantized_products import IMPLEMENTATIONS, dot_int4, dot_int8


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class TestRounding:
    @pytest.mark.parametrize(("shape", "axis"), [((48, 5), 0), ((48, 2, 5), 0), ((7, 48), 1)])
    def test_int8_is_within_half_a_level(self, shape, axis):
        weight = normal(*shape)
        values, scale = quantize_int8(weight, axis=axis)
        weight = np.moveaxis(weight, axis, -1)
        assert (values.dtype, scale.dtype) == (jnp.int8, jnp.float32)
        assert (values.shape, scale.shape) == (weight.shape, weight.shape[:-1])
        assert int(jnp.abs(values).max()) == 127
        np.testing.assert_allclose(scale, np.abs(weight).max(-1) / 127, rtol=1e-6)
        error = np.abs(dequantize_int8(values, scale) - weight)
        assert (error <= 0.5001 * scale[..., None]).all()

    def test_int4_is_exact_where_it_can_be(self):
        levels = np.random.default_rng(0).integers(-8, 8, (2, 3, 128)).astype(np.float32)
        levels[..., ::64] = -8  # so that each group's scale is the one used here
        weight = levels * np.repeat([0.5, 4.0], 64)
        for axis in range(3):
            values, scale = quantize_int4(np.moveaxis(weight, -1, axis), axis=axis)
            assert (values.shape, values.dtype) == ((2, 3, 64), jnp.uint8)
            assert (scale.shape, scale.dtype) == ((2, 3, 2), jnp.bfloat16)
            np.testing.assert_array_equal(dequantize_int4(values, scale), weight)
            groups = levels.reshape(2, 3, 2, 2, 32) + 8
            np.testing.assert_array_equal(values & 15, groups[..., 0, :].reshape(2, 3, 64))
            np.testing.assert_array_equal(values >> 4, groups[..., 1, :].reshape(2, 3, 64))

    def test_int4_error_is_below_that_of_the_plain_scale(self):
        weight = normal(64, 256)
        groups = weight.reshape(64, 4, 64)
        plain = np.abs(groups).max(axis=-1, keepdims=True) / 7
        plain_error = np.square(np.rint(groups / plain) * plain - groups).mean() ** 0.5
        error = np.square(dequantize_int4(*quantize_int4(weight)) - weight).mean() ** 0.5
        # 0.84 is what the search over scales gains for a large normal matrix.
        assert error < 0.88 * plain_error

    @pytest.mark.parametrize("inputs", [8, 24, 96, 192])
    def test_int4_of_other_widths(self, inputs):
        weight = normal(4, inputs)
        _, scale = quantize_int4(weight)
        assert scale.shape == (4, inputs // group_size(inputs))
        error = dequantize_int4(*quantize_int4(weight)) - weight
        assert np.linalg.norm(error) < 0.12 * np.linalg.norm(weight)

    def test_zeros_stay_zeros(self):
        zeros = np.zeros((2, 64), np.float32)
        assert not dequantize_int8(*quantize_int8(zeros)).any()
        assert not dequantize_int4(*quantize_int4(zeros)).any()

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_shows(self, bad):
        weight = normal(2, 64)
        weight[1, 5] = bad
        for scale in (quantize_int8(weight)[1], quantize_int4(weight)[1][:, 0]):
            np.testing.assert_array_equal(np.isfinite(scale.astype(jnp.float32)), [True, False])

    def test_what_does_not_suit_is_refused(self):
        with pytest.raises(ValueError, match=r"\(4, 12\).*axis -1 that is a multiple of 8, int8 takes any"):
            quantize_int4(normal(4, 12))
        with pytest.raises(ValueError, match="weight has dtype int32"):
            quantize_int8(np.ones((4, 4), np.int32))


OUTPUTS = [(6,), (2, 5), (101,)]
# Blocks of one output and of some: also of so many that the last block is smaller.
WAYS = pytest.mark.parametrize(("implementation", "block"), [("fused", 1), ("blocked", 1), ("blocked", 400)])


@WAYS
class TestProducts:
    @pytest.mark.parametrize("out", OUTPUTS)
    def test_int8(self, implementation, block, out):
        values, scale = quantize_int8(normal(*out, 96))
        for leading in ((), (3,), (2, 4)):
            x = normal(*leading, 96, seed=1)
            wanted = np.tensordot(x, dequantize_int8(values, scale), (-1, -1))
            y = dot_int8(x, values, scale, implementation=implementation, block=block)
            assert y.dtype == jnp.float32
            np.testing.assert_allclose(y, wanted, atol=3e-6 * 96**0.5)

    @pytest.mark.parametrize("out", OUTPUTS)
    def test_int4(self, implementation, block, out):
        values, scale = quantize_int4(normal(*out, 192))
        for leading in ((), (3,), (2, 4)):
            x = normal(*leading, 192, seed=1)
            wanted = np.tensordot(x, dequantize_int4(values, scale), (-1, -1))
            y = dot_int4(x, values, scale, implementation=implementation, block=block)
            assert y.dtype == jnp.float32
            np.testing.assert_allclose(y, wanted, atol=3e-6 * 192**0.5)

    def test_bfloat16(self, implementation, block):
        """No further from the exact product than rounding to bfloat16 once (int8) or of each weight (int4) explains."""
        weight = normal(8, 256)
        x = normal(3, 256, seed=1).astype(ml_dtypes.bfloat16)
        exact_x = x.astype(np.float64)
        eight, four = quantize_int8(weight), quantize_int4(weight)
        y8 = dot_int8(x, *eight, implementation=implementation, block=block)
        y4 = dot_int4(x, *four, implementation=implementation, block=block)
        assert y8.dtype == y4.dtype == jnp.bfloat16
        wanted8 = exact_x @ np.asarray(dequantize_int8(*eight), np.float64).T
        wanted4 = exact_x @ np.asarray(dequantize_int4(*four), np.float64).T
        np.testing.assert_allclose(np.asarray(y8, np.float64), wanted8, rtol=2**-8, atol=1e-4)
        assert np.abs(np.asarray(y4, np.float64) - wanted4).max() < 2**-8 * np.abs(wanted4).max() + 2**-8 * 256**0.5


def slopes(dot, dense, x):
    """A slope of y = dot(x); what reverse mode makes of it; and what that is, exactly, for y = x dense^T."""
    y, pull = jax.vjp(dot, x)
    slope = normal(*y.shape, seed=2).astype(y.dtype)
    axes = (tuple(range(x.ndim - 1, y.ndim)), tuple(range(dense.ndim - 1)))
    return slope, pull(slope)[0], np.tensordot(slope.astype(np.float64), np.asarray(dense, np.float64), axes)


@WAYS
class TestGradients:
    """With respect to x."""

    @pytest.mark.parametrize("out", OUTPUTS)
    @pytest.mark.parametrize("bits", [8, 4])
    def test_float32(self, implementation, block, out, bits):
        weight, way = normal(*out, 192), {"implementation": implementation, "block": block}
        values, scale = quantize_int8(weight) if bits == 8 else quantize_int4(weight)
        dense = dequantize_int8(values, scale) if bits == 8 else dequantize_int4(values, scale)

        def dot(x):
            return dot_int8(x, values, scale, **way) if bits == 8 else dot_int4(x, values, scale, **way)

        for leading in ((), (2, 3)):
            _, actual, wanted = slopes(dot, dense, normal(*leading, 192, seed=1))
            assert actual.dtype == jnp.float32
            np.testing.assert_allclose(actual, wanted, atol=3e-6 * np.prod(out) ** 0.5)

    @pytest.mark.parametrize("bits", [8, 4])
    def test_bfloat16(self, implementation, block, bits):
        """Rounded are one operand of each product of numbers (int8: the slope times its scale; int4: the weight) and
        the result, by 2^-9 of their size at most."""
        weight, way = normal(40, 256), {"implementation": implementation, "block": block}
        matrix = quantize_int8(weight) if bits == 8 else quantize_int4(weight)
        dense = dequantize_int8(*matrix) if bits == 8 else dequantize_int4(*matrix)

        def dot(x):
            return dot_int8(x, *matrix, **way) if bits == 8 else dot_int4(x, *matrix, **way)

        slope, actual, wanted = slopes(dot, dense, normal(3, 256, seed=1).astype(ml_dtypes.bfloat16))
        assert actual.dtype == jnp.bfloat16
        size = np.abs(slope.astype(np.float64)) @ np.abs(np.asarray(dense, np.float64))
        assert (np.abs(np.asarray(actual, np.float64) - wanted) < 1.01 * 2**-8 * size).all()


class TestConstants:
    """Integers and scales: nothing is differentiated in them, wherever the product stands."""

    @pytest.fixture(scope="class")
    def matrices(self):
        return quantize_int8(normal(64, 64)), quantize_int4(normal(64, 64))

    def loss(self, x, matrices, implementation):
        """Of two products in a scan whose body is rematerialised, and jitted inside."""
        x, _ = jax.lax.scan(
            jax.checkpoint(lambda x, matrix: (self.product(x, matrix, implementation), None)),
            x,
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *[matrices] * 2),
        )
        return jnp.sum(x**2)

    def product(self, x, matrix, implementation):
        if matrix[0].dtype == jnp.int8:
            return dot_int8(x, *matrix, implementation=implementation)
        return dot_int4(x, *matrix, implementation=implementation)

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.parametrize("index", [0, 1])
    def test_a_scales_gradient_is_refused_and_an_inputs_is_not(self, matrices, implementation, index):
        x, matrix = normal(3, 64), matrices[index]
        dense = dequantize_int8(*matrix) if index == 0 else dequantize_int4(*matrix)
        actual = jax.jit(jax.grad(self.loss), static_argnums=2)(x, matrix, implementation)
        wanted = jax.grad(lambda x: jnp.sum((x @ dense.T @ dense.T) ** 2))(x)
        np.testing.assert_allclose(actual, wanted, atol=1e-5 * np.abs(wanted).max())
        values, scale = matrix
        for loss in (self.loss, lambda *a: self.product(*a).astype(jnp.float32).sum()):
            with pytest.raises(ValueError, match=r"scales of int8 and int4 weights are constants.*without quantize="):
                jax.grad(lambda scale, loss=loss: loss(x, (values, scale), implementation))(scale)

    def test_other_readers_of_scales(self, matrices):
        (eight, scale), (four, scales) = matrices
        for read in (
            lambda s: take_int8(eight, s, np.array([1, 2])),
            lambda s: dequantize_int8(eight, s),
            lambda s: dequantize_int4(four, s * scales),
        ):
            with pytest.raises(ValueError, match="scales of int8 and int4 weights are constants"):
                jax.grad(lambda s, read=read: read(s).sum())(jnp.ones_like(scale))

    def test_integers_have_no_gradient(self, matrices):
        x = normal(3, 64)
        for matrix in matrices:
            grad = jax.grad(lambda v, m=matrix: self.product(x, (v, m[1]), None).sum(), allow_int=True)(matrix[0])
            assert grad.dtype == jax.dtypes.float0

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_nothing_is_kept_for_the_way_back(self, matrices, implementation):
        """But the integers and scales themselves: neither x nor a widened matrix."""
        for matrix in matrices:
            _, pull = jax.vjp(lambda x, m=matrix: self.product(x, m, implementation), normal(3, 64))
            kept = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(pull)}
            assert kept == {(leaf.shape, leaf.dtype) for leaf in matrix}


class TestMemory:
    """Widened integers never stand beside the integers: 4 and 8 times their size in float32."""

    @pytest.mark.parametrize("outputs", [(1024,), (2, 512)])
    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize("way", ["forward", "back"])
    def test_no_widened_matrix_is_kept(self, bits, outputs, way):
        weight = jax.ShapeDtypeStruct((*outputs, 2048), jnp.bfloat16)
        arrays = jax.eval_shape(lambda w: quantize_int8(w) if bits == 8 else quantize_int4(w), weight)
        temporary = {}
        for implementation in IMPLEMENTATIONS:

            def product(x, values, scale, implementation=implementation):
                if bits == 8:
                    return dot_int8(x, values, scale, implementation=implementation, block=1 << 16)
                return dot_int4(x, values, scale, implementation=implementation, block=1 << 16)

            def back(x, values, scale, product=product):
                return jax.grad(lambda x: jnp.sum(product(x, values, scale) ** 2).astype(jnp.float32))(x)

            program = jax.jit(product if way == "forward" else back)
            compiled = program.lower(jax.ShapeDtypeStruct((1, 1, 2048), jnp.bfloat16), *arrays).compile()
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
        arrays = jax.eval_shape(lambda w: quantize_int8(w) if bits == 8 else quantize_int4(w), weight)

        def product(x, values, scale):
            if bits == 8:
                return dot_int8(x, values, scale, block=1 << 14)
            return dot_int4(x, values, scale, block=1 << 14)

        def loop(x, matrices):
            return jax.lax.fori_loop(0, 9, lambda _, x: functools.reduce(lambda x, m: product(x, *m), matrices, x), x)

        compiled = jax.jit(loop).lower(jax.ShapeDtypeStruct((1, size), jnp.float32), [arrays] * count).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * size * size * count / 2


def test_rows_are_taken():
    values, scale = quantize_int8(normal(11, 6))
    rows = np.array([[3, 0, 10], [3, 3, 1]])
    np.testing.assert_array_equal(take_int8(values, scale, rows), dequantize_int8(values, scale)[rows])


def test_arguments_that_do_not_fit_are_named():
    x = normal(3, 64)
    eight, four = quantize_int8(normal(4, 64)), quantize_int4(normal(4, 64))
    with pytest.raises(ValueError, match="implementation is 'cuda'"):
        dot_int8(x, *eight, implementation="cuda")
    with pytest.raises(ValueError, match=r"x has shape \(3, 60\)"):
        dot_int8(x[:, :60], *eight)
    with pytest.raises(ValueError, match=r"x has shape \(3, 60\)"):
        dot_int4(x[:, :60], *four)
    with pytest.raises(ValueError, match=r"scale has shape \(3,\)"):
        dot_int8(x, eight[0], eight[1][:3])
    with pytest.raises(ValueError, match=r"scale has shape \(4,\)"):
        dot_int4(x, four[0], four[1][:, 0])
    with pytest.raises(ValueError, match="values has dtype int8"):
        dot_int4(x, eight[0], four[1])
    with pytest.raises(ValueError, match="values has dtype uint8"):
        dot_int8(x, *four)
    with pytest.raises(ValueError, match="x has dtype int32"):
        dot_int8(np.ones((3, 64), np.int32), *eight)
