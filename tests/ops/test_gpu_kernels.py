"""The fused convolutions and norms for GPUs, against the same functions in XLA's operations: on a GPU the kernels
themselves, elsewhere their bodies in interpret mode."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zamba2_jax.ops import conv_gpu
from zamba2_jax.ops._platform import fused_gpu_obstacle
from zamba2_jax.ops.conv import causal_conv, mixer_convs
from zamba2_jax.ops.gate import Gate
from zamba2_jax.ops.gated_norm import gated_rms_norm
from zamba2_jax.ops.rms_norm import rms_norm

PROJECT = Path(__file__).parents[2]
FUSED = {"implementation": "pallas_gpu", "interpret": fused_gpu_obstacle() is not None}
XLA = {"implementation": "xla"}
# A handful of float32 operations, or a sum of a few hundred products of size 1: the order of addition differs.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def normal(random, *shape):
    return random.standard_normal(shape).astype(np.float32)


def assert_same(function, arguments, *, static, cotangents):
    """Values and gradients of `function(arguments, **static)` by both implementations."""

    def run(implementation):
        def total(arguments):
            outputs = function(arguments, **static, **implementation)
            return sum(
                jnp.sum(output.astype(jnp.float32) * cotangent)
                for output, cotangent in zip(outputs, cotangents, strict=True)
            ), outputs

        (_, outputs), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(arguments)
        return outputs, gradients

    jax.tree.map(lambda ours, wanted: np.testing.assert_allclose(ours, wanted, **CLOSE), run(FUSED), run(XLA))


def rows_of(case, random, batch, length):
    """What a call is told of its rows, and 1 where they hold tokens."""
    integers, mask, place = {}, np.ones((batch, length), np.float32), np.arange(length)
    if "runs" in case:
        start = np.array([0, length // 3, length // 2])
        end = np.array([length, length, length - length // 4])
        integers |= {"run_start": start, "run_end": end}
        mask = ((place >= start[:, None]) & (place < end[:, None])).astype(np.float32)
    if "segments" in case:
        integers["segment_ids"] = np.cumsum(random.random((batch, length)) < 0.2, axis=1)
    return integers, mask


@pytest.fixture
def few_tokens_per_program(monkeypatch):
    """In interpret mode the body's unrolled steps take seconds to compile."""
    monkeypatch.setattr(conv_gpu, "TOKENS", 8)
    monkeypatch.setattr(conv_gpu, "TOGETHER", 2)


class TestConv:
    # One token, and two programs and a rest.
    @pytest.mark.usefixtures("few_tokens_per_program")
    @pytest.mark.parametrize("length", [1, 19])
    @pytest.mark.parametrize("case", ["plain", "window", "runs", "segments", "runs and segments"])
    def test_values_and_gradients(self, length, case):
        random = np.random.default_rng(length)
        batch, channels, width = 3, 7, 4
        arguments = {
            "x": normal(random, batch, length, channels),
            "kernel": normal(random, width, channels),
            "bias": normal(random, channels),
        }
        if case != "plain":
            arguments["initial_window"] = normal(random, batch, width - 1, channels)
        integers, mask = rows_of(case, random, batch, length)

        def function(arguments, **options):
            y, window = causal_conv(**arguments, **integers, activation="silu", **options)
            return y * mask[..., None], window  # what lies outside a run is not defined

        cotangents = (normal(random, batch, length, channels), normal(random, batch, width - 1, channels))
        assert_same(function, arguments, static={}, cotangents=cotangents)

    def test_tokens_of_two_programs(self):
        random = np.random.default_rng(0)
        length = conv_gpu.TOKENS + 1
        arguments = {"x": normal(random, 1, length, 3), "kernel": normal(random, 4, 3)}
        cotangents = (normal(random, 1, length, 3), normal(random, 1, 3, 3))
        assert_same(
            lambda arguments, **options: causal_conv(**arguments, **options),
            arguments,
            static={},
            cotangents=cotangents,
        )

    @pytest.mark.usefixtures("few_tokens_per_program")
    @pytest.mark.parametrize(("width", "channels"), [(1, (5,)), (3, (2, 3))])
    def test_widths_and_channels(self, width, channels):
        random = np.random.default_rng(1)
        arguments = {
            "x": normal(random, 2, 9, *channels),
            "kernel": normal(random, width, *channels),
            "initial_window": normal(random, 2, width - 1, *channels),
        }
        cotangents = (normal(random, 2, 9, *channels), normal(random, 2, width - 1, *channels))
        assert_same(
            lambda arguments, **options: causal_conv(**arguments, **options),
            arguments,
            static={},
            cotangents=cotangents,
        )

    def test_bfloat16(self):
        """Computed in float32 and rounded once, whatever instructions take the exponential. The bounds of sums are of
        the terms, which are near 1."""
        random = np.random.default_rng(0)
        narrow = [normal(random, *shape).astype(jnp.bfloat16) for shape in ((2, 37, 24), (4, 24), (24,), (2, 37, 24))]

        def run(x, kernel, bias, cotangent, **implementation):
            def function(*arguments):
                return causal_conv(*arguments, activation="silu", **implementation)[0]

            y, backward = jax.vjp(function, x, kernel, bias)
            return y, *backward(cotangent)

        actual = run(*narrow, **FUSED)
        wanted = run(*(array.astype(np.float32) for array in narrow), **XLA)
        for ours, exact in zip(actual, wanted, strict=True):
            assert ours.dtype == jnp.bfloat16
            np.testing.assert_allclose(ours.astype(np.float32), exact, rtol=2**-8, atol=1e-4)

    def test_named_kernel_without_gpu_raises(self):
        if fused_gpu_obstacle() is None:
            pytest.skip("there is a GPU")
        x = jnp.zeros((1, 3, 2))
        with pytest.raises(ValueError, match="'pallas_gpu' cannot serve: it needs a GPU, and this runs on cpu"):
            causal_conv(x, jnp.zeros((4, 2)), implementation="pallas_gpu")


@pytest.mark.usefixtures("few_tokens_per_program")
class TestMixerConvs:
    INNER, STATE, WIDTH = 7, 5, 4

    def arguments(self, random, batch, length, *, windows):
        inner, state, width = self.INNER, self.STATE, self.WIDTH
        arguments = {
            "zx": normal(random, batch, length, 2, inner),
            "bc": normal(random, batch, length, 2, state),
            "conv_x": (normal(random, width, inner), normal(random, inner)),
            "conv_bc": (normal(random, width, 2, state), normal(random, 2, state)),
        }
        if windows:
            arguments["initial_windows"] = tuple(
                normal(random, batch, width - 1, *shape) for shape in ((inner,), (2, state))
            )
        return arguments

    # Fewer tokens than a window has; two programs and a rest.
    @pytest.mark.parametrize("length", [2, 19])
    @pytest.mark.parametrize("case", ["plain", "window", "runs and segments"])
    def test_values_and_gradients(self, length, case):
        """Down to the gate's norm, whose gradient and that of x share an array."""
        random = np.random.default_rng(length)
        batch = 3
        arguments = self.arguments(random, batch, length, windows=case != "plain")
        arguments["scale"] = normal(random, self.INNER)
        integers, mask = rows_of(case, random, batch, length)

        def function(arguments, **options):
            scale = arguments["scale"]
            convs = {name: array for name, array in arguments.items() if name != "scale"}
            results = mixer_convs(**convs, **integers, activation="silu", **options)
            x, B, C = (array * mask[..., None] for array in results[:3])
            return gated_rms_norm(x, results.gate, scale, **options), B, C, *results.windows

        program = str(jax.make_jaxpr(lambda arguments: function(arguments, **FUSED))(arguments))
        assert program.count("name=causal_conv") == 1
        inner, state, window = self.INNER, self.STATE, self.WIDTH - 1
        shapes = (length, inner), (length, state), (length, state), (window, inner), (window, 2, state)
        cotangents = tuple(normal(random, batch, *shape) for shape in shapes)
        assert_same(function, arguments, static={}, cotangents=cotangents)

    @pytest.mark.parametrize("case", ["plain", "window", "runs and segments"])
    def test_columns_behind_b_and_c(self, case):
        """What is not convolved is handed on, and its gradient comes back with that of B and C in one array."""
        random = np.random.default_rng(0)
        batch, length, others = 3, 19, 3
        arguments = self.arguments(random, batch, length, windows=case != "plain")
        bc = arguments.pop("bc").reshape(batch, length, -1)
        arguments["columns"] = np.concatenate([bc, normal(random, batch, length, others)], axis=2)
        integers, mask = rows_of(case, random, batch, length)

        def function(arguments, **options):
            convs = dict(arguments)
            columns = convs.pop("columns")
            results = mixer_convs(bc=columns, **convs, **integers, activation="silu", **options)
            assert results.behind.shares_gradient == (options["implementation"] == "pallas_gpu")
            x, B, C = (array * mask[..., None] for array in results[:3])
            return x, B, C, *results.windows, results.behind.last(others)

        inner, state, window = self.INNER, self.STATE, self.WIDTH - 1
        shapes = (
            (length, inner),
            (length, state),
            (length, state),
            (window, inner),
            (window, 2, state),
            (length, others),
        )
        cotangents = tuple(normal(random, batch, *shape) for shape in shapes)
        assert_same(function, arguments, static={}, cotangents=cotangents)

    def test_windows_are_of_their_inputs_dtypes(self):
        arguments = self.arguments(np.random.default_rng(0), 1, 5, windows=False)
        arguments["bc"] = arguments["bc"].astype(jnp.bfloat16)
        for options in (FUSED, {"implementation": "xla"}):
            x, bc = mixer_convs(**arguments, activation="silu", **options).windows
            assert (x.dtype, bc.dtype) == (jnp.float32, jnp.bfloat16)

    def test_without_windows_and_gate(self):
        random = np.random.default_rng(0)
        arguments = self.arguments(random, 2, 9, windows=False)
        arguments["conv_x"] = arguments["conv_x"][:1]

        def function(arguments, **options):
            convs = arguments | {"conv_x": (*arguments["conv_x"], None)}
            results = mixer_convs(**convs, keep_windows=False, **options)
            assert results.windows is None
            return results[:3]

        cotangents = tuple(normal(random, 2, 9, channels) for channels in (self.INNER, self.STATE, self.STATE))
        assert_same(function, arguments, static={}, cotangents=cotangents)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"zx": jnp.zeros((1, 3, 7))}, r"zx has shape \(1, 3, 7\); it must be \(b, l, 2, e\)"),
            (
                {"bc": jnp.zeros((1, 4, 2, 5))},
                r"bc has shape \(1, 4, 2, 5\); it must be \(b, l, 2, s\) = \(1, 3, 2, 's'\)",
            ),
            (
                {"bc": jnp.zeros((1, 3, 9))},
                r"bc has shape \(1, 3, 9\); .* \(b, l, w\) with at least the columns of conv_bc, .* \(4, 2, 5\)",
            ),
            ({"conv_x": (jnp.zeros((4, 5)), None)}, r"kernel has shape \(4, 5\); .* channels \(7,\)"),
            ({"conv_bc": (jnp.zeros((3, 2, 5)), None)}, "conv_bc has 3 taps and conv_x 4; they must have as many"),
            ({"run_end": jnp.zeros((2,), int)}, r"run_end has shape \(2,\)"),
            (
                {"initial_windows": (jnp.zeros((1, 3, 7)), jnp.zeros((1, 2, 2, 5)))},
                r"initial_windows\[1\] has shape \(1, 2, 2, 5\)",
            ),
        ],
    )
    def test_errors(self, changes, message):
        arguments = self.arguments(np.random.default_rng(0), 1, 3, windows=False)
        with pytest.raises(ValueError, match=message):
            mixer_convs(**arguments | changes, **FUSED)


class TestGatedNorm:
    # Groups of a power of two and not; more tokens than one program adds up.
    @pytest.mark.parametrize(("channels", "groups"), [(16, 1), (24, 2), (5, 1)])
    @pytest.mark.parametrize("beside_x", [False, True])
    def test_values_and_gradients(self, channels, groups, beside_x):
        random = np.random.default_rng(channels)
        batch, length = 3, 13
        arguments = {
            "y": normal(random, batch, length, channels),
            "gate": normal(random, batch, length, *((2,) if beside_x else ()), channels),
            "scale": normal(random, channels),
        }
        if beside_x:
            arguments["gate"] = Gate(arguments["gate"])
        assert_same(
            lambda arguments, **options: (gated_rms_norm(**arguments, **options),),
            arguments,
            static={"groups": groups},
            cotangents=(normal(random, batch, length, channels),),
        )

    def test_bfloat16(self):
        """Both round twice, after the norm and after the scale, and may differ where a value lies between two."""
        random = np.random.default_rng(0)
        y, gate = (normal(random, 2, 5, 64).astype(jnp.bfloat16) for _ in range(2))
        scale = normal(random, 64).astype(jnp.bfloat16)
        ours, wanted = (gated_rms_norm(y, gate, scale, **kind) for kind in (FUSED, XLA))
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(np.float32), wanted.astype(np.float32), rtol=2**-7, atol=1e-6)
        assert np.mean(np.asarray(ours) != np.asarray(wanted)) < 0.02

    def test_gradients_in_bfloat16(self):
        random = np.random.default_rng(0)
        narrow = [
            normal(random, *shape).astype(jnp.bfloat16) for shape in ((2, 37, 64), (2, 37, 64), (64,), (2, 37, 64))
        ]

        def gradients(y, gate, scale, cotangent, **implementation):
            return jax.vjp(lambda *a: gated_rms_norm(*a, **implementation), y, gate, scale)[1](cotangent)

        actual = gradients(*narrow, **FUSED)
        wanted = gradients(*(array.astype(np.float32) for array in narrow), **XLA)
        for ours, exact, bound in zip(actual, wanted, (1e-4, 1e-4, 74 * 2**-8), strict=True):
            assert ours.dtype == jnp.bfloat16
            # The normed values are rounded, as they were when the scale met them: 74 of them.
            np.testing.assert_allclose(ours.astype(np.float32), exact, rtol=2**-8, atol=bound)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"groups": 5}, "groups is 5; it must divide the 16 channels"),
            ({"gate": jnp.zeros((1, 3, 15))}, r"gate has shape \(1, 3, 15\)"),
            ({"gate": Gate(jnp.zeros((1, 3, 16)))}, r"gate.zx has shape \(1, 3, 16\)"),
            ({"y": jnp.zeros((3, 16))}, r"y has shape \(3, 16\); it must be \(b, l, e\)"),
            ({"scale": jnp.zeros((16,), int)}, "scale has dtype int32"),
        ],
    )
    def test_errors(self, changes, message):
        arguments = {"y": jnp.zeros((1, 3, 16)), "gate": jnp.zeros((1, 3, 16)), "scale": jnp.zeros((16,))}
        with pytest.raises(ValueError, match=message):
            gated_rms_norm(**arguments | changes)


class TestRMSNorm:
    # A power of two and not; more tokens than one program adds up.
    @pytest.mark.parametrize("features", [16, 5])
    @pytest.mark.parametrize("hand_on", [False, True])
    def test_values_and_gradients(self, features, hand_on):
        random = np.random.default_rng(features)
        shape = (3, 13, features)
        arguments = {"x": normal(random, *shape), "scale": normal(random, features)}

        def function(arguments, **options):
            results = rms_norm(**arguments, **options)
            return results if hand_on else (results,)

        cotangents = (normal(random, *shape), normal(random, *shape))[: 2 if hand_on else 1]
        assert_same(function, arguments, static={"eps": 1e-3, "hand_on": hand_on}, cotangents=cotangents)

    @pytest.mark.parametrize("sizes", [(16, 16), (5, 8)])
    def test_features_in_two_arrays(self, sizes):
        random = np.random.default_rng(0)
        arguments = {name: normal(random, 3, 13, size) for name, size in zip(("x", "beside"), sizes, strict=True)}
        arguments["scale"] = normal(random, sum(sizes))

        def function(arguments, **options):
            return (rms_norm(**arguments, **options),)

        program = str(jax.make_jaxpr(lambda arguments: function(arguments, eps=1e-3, **FUSED))(arguments))
        assert "name=rms_norm_of_parts" in program
        assert "concatenate" not in program
        assert_same(function, arguments, static={"eps": 1e-3}, cotangents=(normal(random, 3, 13, sum(sizes)),))

    def test_two_arrays_are_rounded_as_one(self):
        random = np.random.default_rng(0)
        one, other = (normal(random, 2, 5, 16).astype(jnp.bfloat16) for _ in range(2))
        scale = normal(random, 32).astype(jnp.bfloat16)
        apart = rms_norm(one, scale, beside=other, eps=1e-5, **FUSED)
        assert apart.dtype == jnp.bfloat16
        together = rms_norm(np.concatenate([one, other], axis=2), scale, eps=1e-5, **XLA)
        # The mean is added up in another order, which may turn a rounding.
        np.testing.assert_allclose(apart.astype(np.float32), together.astype(np.float32), rtol=2**-7)

    def test_bfloat16(self):
        """The gradient is computed in float32 and rounded once; XLA's rounds dout · scale too."""
        random = np.random.default_rng(0)
        narrow = [normal(random, *shape).astype(jnp.bfloat16) for shape in ((2, 5, 64), (64,), (2, 5, 64), (2, 5, 64))]

        def gradients(x, scale, *cotangents, **implementation):
            return jax.vjp(lambda *a: rms_norm(*a, eps=1e-5, hand_on=True, **implementation), x, scale)[1](cotangents)

        dx, dscale = gradients(*narrow, **FUSED)
        assert dx.dtype == dscale.dtype == jnp.bfloat16
        exact_dx, exact_dscale = gradients(*(array.astype(np.float32) for array in narrow), **XLA)
        np.testing.assert_allclose(dx.astype(np.float32), exact_dx, rtol=2**-8, atol=1e-6)
        # The normed values are rounded, as they were when the scale met them: ten of them.
        np.testing.assert_allclose(dscale.astype(np.float32), exact_dscale, rtol=2**-8, atol=10 * 2**-8)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x": jnp.zeros((3, 16))}, r"cannot serve: x has shape \(3, 16\); it takes \(b, l, d\)"),
            ({"scale": jnp.zeros((15,))}, r"scale has shape \(15,\); it must be \(d,\) = \(16,\)"),
            ({"x": jnp.zeros((1, 3, 16), int)}, "x has dtype int32"),
            ({"beside": jnp.zeros((1, 4, 2))}, r"beside has shape \(1, 4, 2\); it must be x's but for the last axis"),
            ({"beside": jnp.zeros((1, 3, 2))}, r"scale has shape \(16,\); it must be \(d,\) = \(18,\)"),
            (
                {"beside": jnp.zeros((1, 3, 2)), "scale": jnp.zeros((18,)), "hand_on": True},
                "hand_on is True with beside",
            ),
            ({"x": jnp.zeros((1, 1, 2**15)), "scale": jnp.zeros((2**15,))}, "cannot serve: x has 32768 features"),
        ],
    )
    def test_errors(self, changes, message):
        arguments = {"x": jnp.zeros((1, 3, 16)), "scale": jnp.zeros((16,))}
        with pytest.raises(ValueError, match=message):
            rms_norm(**arguments | changes, eps=1e-5, **FUSED)


_ON_A_MESH = """
import jax
import jax.numpy as jnp
import numpy as np
from zamba2_jax.ops.conv import mixer_convs
from zamba2_jax.ops.gated_gelu import gated_gelu
from zamba2_jax.ops.gated_norm import gated_rms_norm
from zamba2_jax.ops.rms_norm import rms_norm

random = np.random.default_rng(0)
shapes = {"zx": (2, 9, 2, 8), "bc": (2, 9, 2, 6), "y": (2, 9, 8), "x": (4, 8), "both": (4, 2, 6), "scale": (8,)}
arguments = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

def total(arguments, options):
    a = arguments
    convs = mixer_convs(a["zx"], a["bc"], (a["x"], None), (a["both"], None), activation="silu", **options)
    normed = gated_rms_norm(a["y"] * convs.x, convs.gate, a["scale"], groups=2, **options)
    return sum(jnp.sum(jnp.sin(array)) for array in (normed, convs.B * convs.C, *convs.windows))

def norm(arguments, options):
    y, passed = rms_norm(arguments["y"], arguments["scale"], eps=1e-5, hand_on=True, **options)
    return jnp.sum(jnp.sin(y * passed))

def run(**options):
    return jax.jit(jax.value_and_grad(lambda arguments: total(arguments, options)))(arguments)

wanted = run(implementation="xla")
mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
with jax.set_mesh(mesh):
    program = str(jax.make_jaxpr(lambda a: total(a, {"implementation": "pallas_gpu", "interpret": True}))(arguments))
    assert program.count("shard_map") == 2, program.count("shard_map")
    actual = run(implementation="pallas_gpu", interpret=True)
def close(actual, wanted):
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5), actual, wanted)

close(actual, wanted)

def gelu(gate_up, **options):
    return jax.jit(jax.value_and_grad(lambda x: jnp.sum(gated_gelu(x, **options).astype(jnp.float32))))(gate_up)

gate_up = random.standard_normal((4, 6, 2, 512)).astype(jnp.bfloat16)
wanted = gelu(gate_up, implementation="pallas_gpu", interpret=True)
for axes in ("data", "tensor"), ("data", "sequence"):
    with jax.set_mesh(jax.make_mesh((2, 2), axes, axis_types=(jax.sharding.AxisType.Auto,) * 2)):
        actual = gelu(gate_up, implementation="pallas_gpu", interpret=True)
    np.testing.assert_allclose(actual[0], wanted[0], rtol=1e-5)
    np.testing.assert_array_equal(actual[1], wanted[1])

gradients = jax.jit(jax.grad(norm), static_argnums=1)
class Options(dict):
    __hash__ = object.__hash__
wanted = gradients(arguments, Options(implementation="xla"))
fused = Options(implementation="pallas_gpu", interpret=True)
with jax.set_mesh(jax.make_mesh((2, 2), ("data", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 2)):
    # Nine tokens are on both devices along "sequence".
    try:
        gradients(arguments, fused)
    except ValueError as error:
        assert "devices along sequence hold the same tokens" in str(error), error
    else:
        raise AssertionError
with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
    assert "shard_map" in str(jax.make_jaxpr(lambda a: norm(a, fused))(arguments))
    close(gradients(arguments, fused), wanted)
"""


def test_each_device_of_a_mesh_its_own_part():
    """Rows over data, channels over tensor: values and gradients as on one device."""
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    finished = subprocess.run(
        [sys.executable, "-c", _ON_A_MESH], env=environment, cwd=PROJECT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
