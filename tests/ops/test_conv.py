"""The causal convolution: against PyTorch's, and its runs, windows and segments against plain calls row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.zamba2 import modeling_zamba2 as oracle

from zamba2_jax.ops.conv import causal_conv, causal_conv_step

WIDTH = 4
CHANNELS = (5,)
# At most eight float32 multiply-adds of numbers of size 1 to 3.
CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def inputs(length, *, batch=3, width=WIDTH, channels=CHANNELS, seed=0):
    """x, kernel, bias, window."""
    random = np.random.default_rng(seed)
    shapes = ((batch, length, *channels), (width, *channels), channels, (batch, width - 1, *channels))
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


def plain(x, kernel, bias, window):
    """The definition in float64 for whole rows without segments: y and the window after the last token."""
    padded = np.concatenate([window, x], axis=1).astype(np.float64)
    length = x.shape[1]
    y = bias + sum(kernel[i] * padded[:, i : i + length] for i in range(len(kernel)))
    return y, padded[:, length:]


class TestValues:
    @pytest.mark.parametrize(
        ("length", "width", "channels"), [(11, 4, (5,)), (1, 4, (5,)), (2, 4, (2, 3)), (7, 3, (2, 3)), (6, 1, (5,))]
    )
    def test_definition(self, length, width, channels):
        x, kernel, bias, window = inputs(length, width=width, channels=channels)
        y, after = causal_conv(x, kernel, bias, initial_window=window)
        wanted, wanted_after = plain(x, kernel, bias, window)
        CLOSE(y, wanted)
        np.testing.assert_array_equal(after, wanted_after.astype(np.float32))

    def test_no_bias_no_window(self):
        x, kernel, bias, window = inputs(7)
        y, after = causal_conv(x, kernel)
        wanted, wanted_after = plain(x, kernel, 0 * bias, 0 * window)
        CLOSE(y, wanted)
        np.testing.assert_array_equal(after, wanted_after.astype(np.float32))

    @pytest.mark.parametrize("activation", [None, "silu"])
    def test_oracle(self, activation):
        x, kernel, bias, _ = inputs(9)
        wanted = oracle.causal_conv1d_fn(
            torch.tensor(x).transpose(1, 2), torch.tensor(kernel).T.contiguous(), torch.tensor(bias), activation
        ).transpose(1, 2)
        CLOSE(causal_conv(x, kernel, bias, activation=activation)[0], wanted)

    def test_bfloat16_accumulates_in_float32(self):
        """One rounding of the result: the float32 result of the same inputs, rounded, is met exactly."""
        x, kernel, bias, window = (jnp.asarray(a, jnp.bfloat16) for a in inputs(9))
        y, after = causal_conv(x, kernel, bias, initial_window=window, activation="silu")
        wide = [a.astype(jnp.float32) for a in (x, kernel, bias)]
        wanted, _ = causal_conv(*wide, initial_window=window.astype(jnp.float32), activation="silu")
        assert y.dtype == after.dtype == jnp.bfloat16
        np.testing.assert_array_equal(y, wanted.astype(jnp.bfloat16))


class TestStep:
    @pytest.mark.parametrize(("width", "channels"), [(4, (5,)), (3, (2, 3)), (1, (5,))])
    def test_steps_equal_sequence(self, width, channels):
        x, kernel, bias, window = inputs(6, width=width, channels=channels)
        y, after = causal_conv(x, kernel, bias, initial_window=window, activation="silu")
        for t in range(x.shape[1]):
            step, window = causal_conv_step(x[:, t], window, kernel, bias, "silu")
            CLOSE(step, y[:, t])
        np.testing.assert_array_equal(window, after)

    def test_oracle(self):
        x, kernel, bias, window = inputs(1)
        state = torch.tensor(window).transpose(1, 2).contiguous()
        wanted = oracle.causal_conv1d_update(
            torch.tensor(x).transpose(1, 2), state, torch.tensor(kernel).T.contiguous(), torch.tensor(bias), "silu"
        )
        y, after = causal_conv_step(x[:, 0], window, kernel, bias, "silu")
        CLOSE(y, wanted[:, :, 0])
        np.testing.assert_array_equal(after, state.transpose(1, 2))

    def test_keeps_the_window_dtype(self):
        x, kernel, bias, window = inputs(1)
        y, after = causal_conv_step(jnp.asarray(x[:, 0], jnp.bfloat16), window, kernel, bias)
        assert y.dtype == jnp.bfloat16
        assert after.dtype == jnp.float32


LENGTH = 7
# Every run of a row of seven tokens: lengths 0, 1, k-2, k-1, k and more, padded on either side or both.
RUNS = [(s, e) for s in range(LENGTH + 1) for e in range(s, LENGTH + 1)]


@pytest.fixture(scope="module")
def all_runs():
    """One call whose rows are all runs; what lies outside them is huge, so that it would be seen."""
    x, kernel, bias, window = inputs(LENGTH, batch=len(RUNS))
    place = np.arange(LENGTH)
    start, end = np.array(RUNS, np.int32).T
    outside = (place < start[:, None]) | (place >= end[:, None])
    x[outside] = 1e6
    y, after = causal_conv(x, kernel, bias, initial_window=window, run_start=start, run_end=end)
    return x, kernel, bias, window, np.asarray(y), np.asarray(after)


class TestRuns:
    @pytest.mark.parametrize("row", range(len(RUNS)), ids=str)
    def test_equals_plain_call(self, all_runs, row):
        x, kernel, bias, window, y, after = all_runs
        start, end = RUNS[row]
        wanted, wanted_after = plain(x[row : row + 1, start:end], kernel, bias, window[row : row + 1])
        CLOSE(y[row, start:end], wanted[0])
        np.testing.assert_array_equal(after[row], wanted_after[0].astype(np.float32))

    def test_outside_is_finite(self, all_runs):
        assert np.isfinite(all_runs[4]).all()

    def test_one_bound_alone(self):
        x, kernel, bias, window = inputs(LENGTH)
        bounds = np.array([2, 0, 5], np.int32)
        whole = np.full(3, LENGTH, np.int32)
        for given, full in (
            ({"run_start": bounds}, {"run_start": bounds, "run_end": whole}),
            ({"run_end": bounds}, {"run_start": 0 * bounds, "run_end": bounds}),
        ):
            y, after = causal_conv(x, kernel, bias, initial_window=window, **given)
            wanted, wanted_after = causal_conv(x, kernel, bias, initial_window=window, **full)
            np.testing.assert_array_equal(y, wanted)
            np.testing.assert_array_equal(after, wanted_after)

    def test_width_one_has_no_window(self):
        x, kernel, bias, window = inputs(5, width=1)
        bounds = np.array([1, 0, 3], np.int32)
        ids = np.arange(15, dtype=np.int32).reshape(3, 5)
        y, after = causal_conv(
            x, kernel, bias, initial_window=window, run_start=bounds, run_end=bounds + 2, segment_ids=ids
        )
        for row, start in enumerate(bounds):
            CLOSE(y[row, start : start + 2], kernel[0] * x[row, start : start + 2] + bias)
        assert after.shape == (3, 0, 5)


class TestSegments:
    # Segments of 1, 2, k-1 and more tokens; the second row's last segment is shorter than the window.
    IDS = np.array([[3, 3, 1, 1, 1, 1, 3, 3, 3, 3], [0, 1, 1, 2, 2, 2, 2, 2, 5, 5]], np.int32)

    def bounds(self, row):
        edges = np.flatnonzero(np.diff(self.IDS[row])) + 1
        return zip([0, *edges], [*edges, self.IDS.shape[1]], strict=True)

    def test_packed_equals_separate(self):
        x, kernel, bias, window = inputs(self.IDS.shape[1], batch=2)
        y, after = causal_conv(x, kernel, bias, initial_window=window, segment_ids=self.IDS)
        for row in range(2):
            before = window[row : row + 1]
            for start, stop in self.bounds(row):
                wanted, wanted_after = plain(x[row : row + 1, start:stop], kernel, bias, before)
                CLOSE(y[row, start:stop], wanted[0])
                before = np.zeros_like(before)
            np.testing.assert_array_equal(after[row], wanted_after[0].astype(np.float32))

    def test_with_runs(self):
        """The window belongs to the segment of the run's first token, whatever id the padding has."""
        x, kernel, bias, window = inputs(self.IDS.shape[1], batch=2)
        start, end = np.array([1, 5], np.int32), np.array([4, 9], np.int32)
        y, after = causal_conv(
            x, kernel, bias, initial_window=window, run_start=start, run_end=end, segment_ids=self.IDS
        )
        for row, (s, e, cut) in enumerate([(1, 4, 2), (5, 9, 8)]):
            first, _ = plain(x[row : row + 1, s:cut], kernel, bias, window[row : row + 1])
            second, wanted_after = plain(x[row : row + 1, cut:e], kernel, bias, 0 * window[row : row + 1])
            CLOSE(y[row, s:e], np.concatenate([first, second], axis=1)[0])
            np.testing.assert_array_equal(after[row], wanted_after[0].astype(np.float32))

    def test_empty_run_keeps_the_window(self):
        x, kernel, bias, window = inputs(self.IDS.shape[1], batch=2)
        place = np.array([4, 10], np.int32)
        _, after = causal_conv(
            x, kernel, bias, initial_window=window, run_start=place, run_end=place, segment_ids=self.IDS
        )
        np.testing.assert_array_equal(after, window)


class TestGradients:
    def test_every_input(self):
        """Against PyTorch's autograd through the definition in float64, with runs and a window."""
        x, kernel, bias, window = inputs(LENGTH)
        start, end = np.array([0, 2, 3], np.int32), np.array([7, 7, 5], np.int32)
        weight = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
        place = np.arange(LENGTH)
        inside = (place >= start[:, None]) & (place < end[:, None])
        weight = np.where(inside[..., None], weight, 0)

        @jax.jit
        @functools.partial(jax.grad, argnums=(0, 1, 2, 3))
        def gradients(x, kernel, bias, window):
            y, after = causal_conv(x, kernel, bias, initial_window=window, run_start=start, run_end=end)
            return jnp.sum(y * weight) + jnp.sum(jnp.square(after))

        tensors = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, kernel, bias, window)]
        tx, tkernel, tbias, twindow = tensors
        total = 0.0
        for row in range(3):
            padded = torch.cat([twindow[row], tx[row, start[row] : end[row]]])
            for t in range(start[row], end[row]):
                taps = padded[t - start[row] : t - start[row] + WIDTH]
                total = total + ((tkernel * taps).sum(0) + tbias) @ torch.tensor(weight[row, t], dtype=torch.float64)
            total = total + padded[len(padded) - (WIDTH - 1) :].square().sum()
        total.backward()
        for actual, tensor in zip(gradients(x, kernel, bias, window), tensors, strict=True):
            CLOSE(actual, tensor.grad)


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x": np.zeros((3, 7), np.float32)}, r"x has shape \(3, 7\); it must be \(b, l, ...channels\)"),
            ({"x": np.zeros((3, 7, 5), np.int32)}, "x has dtype int32; it must be a floating-point type"),
            ({"kernel": np.zeros((4, 6), np.float32)}, r"kernel has shape \(4, 6\); .* and channels \(5,\)"),
            ({"kernel": np.zeros((0, 5), np.float32)}, r"kernel has shape \(0, 5\); it must be .* with k >= 1"),
            ({"bias": np.zeros(4, np.float32)}, r"bias has shape \(4,\); .* = \(5,\)"),
            ({"initial_window": np.zeros((3, 4, 5), np.float32)}, r"initial_window has shape .* = \(3, 3, 5\)"),
            ({"run_start": np.zeros(2, np.int32)}, r"run_start has shape \(2,\); it must be \(b,\) = \(3,\)"),
            ({"run_end": np.zeros(3, np.float32)}, "run_end has dtype float32; it must be an integer type"),
            ({"segment_ids": np.zeros((3, 6), np.int32)}, r"segment_ids has shape \(3, 6\); .* = \(3, 7\)"),
            ({"activation": "relu"}, "activation is 'relu'; it must be None or one of 'silu'"),
        ],
    )
    def test_sequence(self, changes, message):
        x, kernel, bias, _ = inputs(LENGTH)
        with pytest.raises(ValueError, match=message):
            causal_conv(**({"x": x, "kernel": kernel, "bias": bias} | changes))

    def test_step(self):
        x, kernel, bias, window = inputs(1)
        with pytest.raises(ValueError, match=r"window has shape \(3, 2, 5\); .* = \(3, 3, 5\)"):
            causal_conv_step(x[:, 0], window[:, 1:], kernel, bias)
        with pytest.raises(ValueError, match="activation is 'gelu'"):
            causal_conv_step(x[:, 0], window, kernel, bias, "gelu")
