"""The recurrence's gradients and its accuracy, in every implementation, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.ssd_cases import (
    CHUNK,
    GRADIENT_TOLERANCE,
    LENGTH,
    NAMES,
    assert_near,
    expected,
    expected_gradients,
    inputs,
    long_case,
    weights_for,
    with_gradients,
)
from zamba2_jax.ops.ssd import chunked, ssd

pytestmark = pytest.mark.usefixtures("products_in_full")


class TestGradients:
    @pytest.mark.parametrize("case", ["bare", "full"])
    def test_every_input(self, form, case):
        """With as little as can be given, and with everything: groups, D, a state and segments."""
        if case == "bare":
            arguments, ids = inputs(LENGTH), None
            del arguments["D"], arguments["initial_state"]
        else:
            arguments, ids = long_case()
            assert set(arguments) == set(NAMES)
        weights = weights_for(arguments)
        wanted_gradients, wanted = expected_gradients(arguments, *weights, ids)
        gradients, results = with_gradients(arguments, *weights, ids, chunk_size=CHUNK, **form)
        for actual, right in zip(results, wanted, strict=True):
            assert_near(actual, right)
        for name, gradient in gradients.items():
            assert_near(gradient, wanted_gradients[name], GRADIENT_TOLERANCE)

    def test_strong_decay(self, form):
        """exp(6 · 64) overflows: what a query may not see is hidden before exp, in the gradient as well."""
        arguments, ids = long_case()
        arguments["dt"][:] = 6.0
        arguments["A"][:] = -1.0
        weights = weights_for(arguments)
        wanted_gradients, wanted = expected_gradients(arguments, *weights, ids)
        gradients, results = with_gradients(arguments, *weights, ids, chunk_size=CHUNK, **form)
        for actual, right in zip(results, wanted, strict=True):
            assert_near(actual, right)
        # What A changes is e^-6 of what dt does, and rounds as terms of that size do.
        terms = np.abs(arguments["dt"] * wanted_gradients["dt"]).sum(axis=(0, 1))
        assert np.abs(gradients.pop("A") - wanted_gradients["A"]).max() <= GRADIENT_TOLERANCE * terms.max()
        for name, gradient in gradients.items():
            assert_near(gradient, wanted_gradients[name], GRADIENT_TOLERANCE)

    def test_strong_decay_in_a_long_chunk_gives_no_nan(self):
        """exp(6 * 40) overflows: what a query may not see is hidden before exp, in the gradient as well."""
        arguments = inputs(40)
        arguments["dt"][:] = 6.0
        arguments["A"][:] = -1.0
        resets = np.zeros((2, 40), bool)

        # Called past the public function, which makes chunks shorter on a CPU.
        @jax.jit
        @jax.grad
        def gradients(arguments):
            return jnp.sum(chunked.ssd(**arguments, resets=resets, chunk_size=40)[0])

        for name, gradient in gradients(arguments).items():
            assert np.isfinite(gradient).all(), name

    def test_backward_keeps_no_square_matrices(self):
        """No residual is a stack of (q, q) matrices, by chunk or by head."""
        length, q = 4 * CHUNK, CHUNK
        arguments = inputs(length, headdim=2, state=3)
        _, backward = jax.vjp(lambda x: ssd(**(arguments | {"x": x}), chunk_size=q)[0], arguments["x"])
        shapes = [leaf.shape for leaf in jax.tree.leaves(backward)]
        assert shapes
        assert not any(len(shape) > 2 and shape[-2:] == (q, q) for shape in shapes)


class TestAccuracy:
    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
    def test_cumulative_sum(self, scale):
        """Plain float32 is off by 1e-8 of the whole sum and more; the pair keeps 40 bits of it (2^-40 is 1e-12)."""
        random = np.random.default_rng(0)
        values = (-scale * random.uniform(0, 6, (3, 256))).astype(np.float32)
        values[1] *= np.linspace(1, 0, 256, dtype=np.float32) ** 8
        values[2] = 0
        high, low = jax.jit(chunked.split_cumsum)(values)
        wanted = np.cumsum(values.astype(np.float64), axis=-1)
        total = np.abs(wanted).max(axis=-1)
        assert (np.abs(np.float64(high) + np.float64(low) - wanted).max(axis=-1) <= 1e-12 * total).all()
        assert np.abs(np.cumsum(values[0], dtype=np.float32) - wanted[0]).max() > 1e-8 * total[0]

    def test_slow_decay_after_a_fast_one(self):
        """Sums reach -750 before the tokens that matter; differences of a plain float32 sum would be off by 3e-5."""
        arguments = inputs(256, batch=1)
        arguments["A"][:] = -1.0
        arguments["dt"][:, :128] = np.random.default_rng(0).uniform(5.7, 6, arguments["dt"][:, :128].shape)
        arguments["dt"][:, 128:] *= 0.01
        resets = np.zeros((1, 256), bool)
        # Called past the public function, which makes chunks shorter on a CPU.
        y, state = jax.jit(chunked.ssd, static_argnames="chunk_size")(**arguments, resets=resets, chunk_size=256)
        wanted_y, wanted_state = expected(arguments)
        assert_near(y[:, 128:], wanted_y[:, 128:], 1e-6)
        assert_near(state, wanted_state, 1e-6)

    def test_slow_decay_after_a_fast_one_in_every_form(self, form):
        """The same within the fused kernels' chunks: sums reach -210, and plain ones would be off by 7e-6."""
        arguments, ids = long_case()
        arguments["A"][:] = -1.0
        arguments["dt"] *= 0.01
        arguments["dt"][:, 64:100] = np.random.default_rng(0).uniform(5.7, 6, arguments["dt"][:, 64:100].shape)
        ids[:] = 0
        weights = weights_for(arguments)
        wanted_y, wanted_state = expected(arguments, ids)
        _, (y, state) = with_gradients(arguments, *weights, ids, chunk_size=CHUNK, **form)
        assert_near(y[:, 100:128], wanted_y[:, 100:128], 1e-6)
        assert_near(state, wanted_state, 1e-6)

    def test_bfloat16(self, form):
        """The same bfloat16 inputs in float64 give the truth.

        Four roundings lie between inputs and outputs of the chunked and fused forms (weights, carried state, inflow,
        result), each of at most 2^-9 of a term: their sum bounds the error relative to the norm. The others round only
        the result. On a gradient's way there are two more, of what comes from behind.
        """
        arguments = inputs(LENGTH, groups=2)
        low = {name: jnp.asarray(arguments[name], jnp.bfloat16) for name in ("x", "B", "C")}
        weights = weights_for(arguments)
        weights[0] = np.float32(jnp.asarray(weights[0], jnp.bfloat16))
        wanted_gradients, (wanted_y, wanted_state) = expected_gradients(
            arguments | {name: np.float32(array) for name, array in low.items()}, *weights
        )
        gradients, (y, state) = with_gradients(arguments | low, *weights, chunk_size=CHUNK, **form)
        assert y.dtype == jnp.bfloat16
        assert state.dtype == jnp.float32

        def error(actual, wanted):
            return np.linalg.norm(np.float64(actual) - wanted) / np.linalg.norm(wanted)

        roundings = 1 if form["implementation"] in ("reference", "scan") else 4
        assert error(y, wanted_y) < roundings * 2.0**-9
        # The state takes one rounding, of the inflow.
        assert error(state, wanted_state) < 2.0**-9
        for name, gradient in gradients.items():
            assert gradient.dtype == (jnp.bfloat16 if name in low else jnp.float32)
            assert error(gradient, wanted_gradients[name]) < (roundings + 2) * 2.0**-9, name
