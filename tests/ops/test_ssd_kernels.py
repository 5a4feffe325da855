"""What is the fused kernels' own: steps made inside, memory, parts of rows, more elements than 32 bits count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.ssd_cases import (
    GRADIENT_TOLERANCE,
    LENGTH,
    LONG,
    assert_near,
    expected,
    expected_gradients,
    inputs,
    weights_for,
)
from zamba2_jax.ops._platform import platform
from zamba2_jax.ops.gate import Behind
from zamba2_jax.ops.ssd import RawSteps, pallas_gpu, ssd
from zamba2_jax.ops.ssd.api import FUSED

pytestmark = pytest.mark.usefixtures("products_in_full")


# The fused kernel for GPUs, interpreted where there is none.
KERNEL = {"implementation": "pallas_gpu", "interpret": platform() != "gpu"}


class TestRawSteps:
    """The kernel for GPUs makes dt and A itself, of columns that lie behind others."""

    HEADS, BEFORE = 3, 4

    def raw(self, columns, bias, A_log, mask, limit, shares_gradient):
        return RawSteps(Behind(columns, shares_gradient), bias, A_log, mask, limit)

    def arguments(self, length, batch=2):
        random = np.random.default_rng(0)
        arguments = inputs(length, batch=batch, group_heads=self.HEADS)
        arguments |= {
            "columns": random.standard_normal((batch, length, self.BEFORE + self.HEADS)).astype(np.float32),
            "bias": random.standard_normal(self.HEADS).astype(np.float32),
            "A_log": random.standard_normal(self.HEADS).astype(np.float32),
        }
        return {name: array for name, array in arguments.items() if name not in ("dt", "A")}

    @pytest.mark.parametrize(
        ("length", "limit", "masked", "packed"),
        [(LENGTH, None, False, False), (LONG, (0.3, 1.5), True, True), (8 * 4 * pallas_gpu.CHUNK, None, True, False)],
        ids=["plain", "limit, mask and segments", "row in parts"],
    )
    def test_values_and_gradients(self, length, limit, masked, packed):
        batch = 1 if length > LONG else 2
        arguments = self.arguments(length, batch)
        random = np.random.default_rng(1)
        mask = random.random((batch, length)) < 0.8 if masked else None
        ids = np.cumsum(random.random((batch, length)) < 0.05, axis=1) if packed else None
        cotangent = random.standard_normal(arguments["x"].shape).astype(np.float32)

        def total(arguments, raw):
            rest = dict(arguments)
            steps = self.raw(*(rest.pop(name) for name in ("columns", "bias", "A_log")), mask, limit, raw)
            dt, A = (steps, None) if raw else steps.made()
            y, state = ssd(dt=dt, A=A, segment_ids=ids, **rest, **KERNEL)
            return jnp.sum(y * cotangent) + jnp.sum(jnp.sin(state)), (y, state)

        program = str(jax.make_jaxpr(lambda arguments: total(arguments, True))(arguments))
        assert program.count("name=ssd_prepare") == 1
        assert program.count("name=ssd_last_states") == (length > LONG)
        run = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
        (_, ours), gradients = run(arguments, True)
        (_, wanted), wanted_gradients = run(arguments, False)
        jax.tree.map(assert_near, ours, wanted)
        for name, gradient in gradients.items():
            if name == "columns":  # what lies before the steps is another's to write
                gradient, wanted_gradients[name] = (g[..., self.BEFORE :] for g in (gradient, wanted_gradients[name]))
            assert_near(gradient, wanted_gradients[name], GRADIENT_TOLERANCE)

    def test_bfloat16_columns(self):
        arguments = self.arguments(LENGTH)
        steps = self.raw(
            jnp.asarray(arguments.pop("columns"), jnp.bfloat16), *self.of_heads(arguments), None, None, True
        )
        wanted = ssd(**arguments, **dict(zip(("dt", "A"), steps.made(), strict=True)), **KERNEL)
        jax.tree.map(assert_near, ssd(**arguments, dt=steps, A=None, **KERNEL), wanted)

    def test_others_are_given_made_ones(self):
        """A gradient that nobody completes is not left in pieces, and only the kernel knows raw steps."""
        arguments = self.arguments(LENGTH)
        columns, of_heads = arguments.pop("columns"), self.of_heads(arguments)
        for form, shares in ((KERNEL, False), ({"implementation": "chunked"}, True)):

            def total(columns, form=form, shares=shares):
                return jnp.sum(ssd(**arguments, dt=self.raw(columns, *of_heads, None, None, shares), A=None, **form)[0])

            gradient = jax.grad(total)(columns)
            assert np.all(gradient[..., : self.BEFORE] == 0)
            assert np.all(gradient[..., self.BEFORE :] != 0)

    def test_errors(self):
        arguments = self.arguments(LENGTH)
        columns, of_heads = arguments.pop("columns"), self.of_heads(arguments)
        with pytest.raises(
            ValueError, match=r"A has shape \(3,\) and dt is made with an A_log of its own; A must be None"
        ):
            ssd(**arguments, dt=self.raw(columns, *of_heads, None, None, True), A=of_heads[1])
        with pytest.raises(ValueError, match=r"dt has shape \(2, 23, 2\)"):
            ssd(**arguments, dt=self.raw(columns, *(array[:2] for array in of_heads), None, None, True), A=None)

    def of_heads(self, arguments):
        return arguments.pop("bias"), arguments.pop("A_log")


class TestKernels:
    @pytest.mark.slow
    def test_tpu_memory(self):
        """The interpreter that copies blocks as a TPU does, from memory full of NaN: what is read was written before,
        blocks of states rest where they are still wanted, and no two copies race. Several groups, blocks of heads and
        chunks; the plain interpreter gives the same numbers."""
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call
        from jax.experimental.pallas import tpu as pltpu

        from zamba2_jax.ops.ssd import pallas_tpu

        arguments = inputs(130, batch=1, groups=2, group_heads=4, headdim=130, state=7)
        resets = np.zeros((1, 130), bool)
        resets[:, [70, 129]] = True

        def results(interpret):
            def weighted(arguments):
                y, state = pallas_tpu.ssd(**arguments, resets=resets, interpret=interpret)
                return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(state)), (y, state)

            return jax.jit(jax.grad(weighted, has_aux=True))(arguments)

        careful = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
        for actual, wanted in zip(jax.tree.leaves(results(careful)), jax.tree.leaves(results(True)), strict=True):
            np.testing.assert_array_equal(actual, wanted)
        assert not interpret_pallas_call.races.races_found

    def test_states_that_are_kept(self):
        """On TPUs the gradients are the same, and no kernel makes the states again. (Of GPUs: `test_ssd_hopper`.)"""
        arguments = jax.tree.map(jnp.asarray, inputs(300, groups=2, group_heads=2))
        ids = jnp.asarray(np.arange(300)[None].repeat(2, 0) // 101)
        weights = weights_for(arguments)

        def gradients(keep_states):
            def weighted(arguments):
                form = {"implementation": "pallas_tpu", "interpret": True, "keep_states": keep_states}
                y, state = ssd(**arguments, segment_ids=ids, **form)
                return sum(jnp.vdot(*pair) for pair in zip((y, state), weights, strict=True))

            return jax.make_jaxpr(jax.grad(weighted))(arguments), jax.jit(jax.grad(weighted))(arguments)

        (kept, ours), (again, wanted) = gradients(True), gradients(False)
        assert ("ssd_states" in str(kept), "ssd_states" in str(again)) == (False, True)
        jax.tree.map(np.testing.assert_array_equal, ours, wanted)

    @pytest.mark.parametrize("parts", [2, 4])
    def test_rows_that_a_gpu_cuts_into_parts(self, parts):
        """Few heads, many tokens: what a part is told of those before it, past a reset too, and the state after all."""
        arguments = inputs(8 * parts * 16, groups=2)
        ids = np.cumsum(np.random.default_rng(parts).random(arguments["x"].shape[:2]) < 0.01, axis=1)
        resets = np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
        assert pallas_gpu._parts(arguments["x"], 16) == parts
        interpret = platform() != "gpu"
        y, state = pallas_gpu.ssd(
            **jax.tree.map(jnp.asarray, arguments), resets=jnp.asarray(resets), chunk=16, interpret=interpret
        )
        wanted_y, wanted_state = expected(arguments, ids)
        assert_near(y, wanted_y)
        assert_near(state, wanted_state)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", FUSED.values())
    def test_more_elements_than_32_bits_count(self, name):
        """x has more than 2^31 elements, and its last tokens are a segment of their own: the recurrence from zero."""
        if FUSED.get(platform()) != name:
            pytest.skip(f"needs the device of {name}, and this runs on {platform()}")
        memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
        if memory < 48e9:
            pytest.skip(f"needs 48 GB of device memory for arrays beyond 2^31 elements; there are {memory / 1e9:.0f}")
        heads, headdim, state, tail = 64, 64, 16, 100
        length = 2**31 // (2 * heads * headdim) + tail
        assert 2 * length * heads * headdim > 2**31
        piece = inputs(tail, batch=1, group_heads=heads, headdim=headdim, state=state)
        low = {key: np.float32(jnp.asarray(piece[key], jnp.bfloat16)) for key in ("x", "B", "C")}
        last = {key: np.repeat(array, 2, axis=0) for key, array in (piece | low).items() if key not in ("A", "D")}
        last |= {"A": piece["A"], "D": piece["D"], "initial_state": np.zeros((2, heads, headdim, state), np.float32)}
        weights = weights_for(last)
        wanted_gradients, (wanted_y, wanted_state) = expected_gradients(last, *weights)

        @jax.jit
        def run(x, dt, B, C, weight_y, weight_state):
            def fill(array):
                return jnp.pad(array, ((0, 0), (length - tail, 0)) + ((0, 0),) * (array.ndim - 2), constant_values=0.5)

            ids = jnp.arange(length) >= length - tail
            ids = jnp.broadcast_to(ids.astype(jnp.int32), (2, length))
            dt, B, C = map(fill, (dt, B, C))

            def results(x):
                return ssd(x, dt, piece["A"], B, C, piece["D"], segment_ids=ids, implementation=name)

            (y, last_state), pull = jax.vjp(results, fill(x))
            weight_y = jnp.pad(weight_y.astype(y.dtype), ((0, 0), (length - tail, 0), (0, 0), (0, 0)))
            (dx,) = pull((weight_y, weight_state))
            return y[:, -tail:], last_state, dx[:, -tail:], jnp.abs(dx[:, :-tail]).max()

        x, B, C = (jnp.asarray(last[key], jnp.bfloat16) for key in ("x", "B", "C"))
        y, last_state, dx, before = run(x, last["dt"], B, C, *weights)
        # The bounds of `test_bfloat16`, and one rounding more for the weights of y.
        for actual, wanted, roundings in (
            (y, wanted_y, 4),
            (last_state, wanted_state, 1),
            (dx, wanted_gradients["x"], 7),
        ):
            error = np.linalg.norm(np.float64(actual) - wanted) / np.linalg.norm(wanted)
            assert error < roundings * 2.0**-9
        assert before == 0
