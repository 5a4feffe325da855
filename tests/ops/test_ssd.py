"""The state-space recurrence: every implementation against the recurrence in float64, and against transformers'
functions."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.zamba2 import modeling_zamba2 as oracle

from zamba2_jax.ops._platform import platform
from zamba2_jax.ops.gate import Behind
from zamba2_jax.ops.ssd import RawSteps, advance_state, api, chunked, pallas_gpu, ssd, ssd_step
from zamba2_jax.ops.ssd.api import CPU_CHUNK_SIZE, FUSED, IMPLEMENTATIONS

# Float32 results are compared with float64 ones, relative to the largest entry. A sum of N products rounds to about
# sqrt(N) 6e-8 (N is below 200 here), and each exponent carries one rounding of a number of size up to 10.
TOLERANCE = 2e-6
# Gradients pass through twice as many operations, and those of A and dt are differences of large sums.
GRADIENT_TOLERANCE = 1e-5

CHUNK = 8
# Several chunks and a remainder. Most tests use this length, and so share their compiled programs.
LENGTH = 2 * CHUNK + 7
NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")


# Past the borders of the fused kernels' chunks, which are of 64 and 128 tokens.
LONG = 150


@pytest.fixture(params=IMPLEMENTATIONS)
def form(request):
    """The arguments of `ssd` that choose an implementation: a fused kernel runs for real where its device is, and is
    interpreted elsewhere."""
    name = request.param
    fused = {kernel: kind for kind, kernel in FUSED.items()}
    return {"implementation": name, "interpret": name in fused and platform() != fused[name]}


def by_form(name, *, xla, fused):
    """Parametrizes over `form` and a second argument. Fused kernels are given other values: their chunks are not ours
    to choose, and every shape costs seconds in the interpreter."""
    values = [(form, value) for form in IMPLEMENTATIONS for value in (fused if form in FUSED.values() else xla)]
    return pytest.mark.parametrize(("form", name), values, indirect=["form"])


@pytest.fixture(autouse=True)
def _products_in_full():
    """GPUs and TPUs would round the operands of XLA's float32 products."""
    with jax.default_matmul_precision("default" if platform() == "cpu" else "highest"):
        yield


def inputs(length, *, batch=2, groups=1, group_heads=3, headdim=5, state=7, seed=0):
    """Random arguments as a dictionary; all sizes differ, so that no two axes can be exchanged unnoticed."""
    random = np.random.default_rng(seed)
    heads = groups * group_heads

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    return {
        "x": normal(batch, length, heads, headdim),
        "dt": np.log1p(np.exp(normal(batch, length, heads))),
        "A": -np.exp(normal(heads)),
        "B": normal(batch, length, groups, state),
        "C": normal(batch, length, groups, state),
        "D": normal(heads),
        "initial_state": normal(batch, heads, headdim, state),
    }


def recurrence(x, dt, A, B, C, D, initial_state, segment_ids=None):
    """The definition, in torch and float64, one token at a time; differentiable."""
    heads = x.shape[2]
    B, C = (tensor.repeat_interleave(heads // tensor.shape[2], dim=2) for tensor in (B, C))
    state, outputs = initial_state, []
    for t in range(x.shape[1]):
        if segment_ids is not None and t > 0:
            state = state * torch.tensor(segment_ids[:, t] == segment_ids[:, t - 1])[:, None, None, None]
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1), state


def expected(arguments, segment_ids=None):
    tensors = {name: torch.tensor(array, dtype=torch.float64) for name, array in arguments.items()}
    y, state = recurrence(**tensors, segment_ids=segment_ids)
    return y.numpy(), state.numpy()


def assert_near(actual, wanted, tolerance=TOLERANCE):
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape
    error = np.abs(actual - wanted).max() / np.abs(wanted).max()
    assert error <= tolerance, f"relative error {error:.2e}"


def part(arguments, start, stop):
    return {name: array[:, start:stop] if name in ("x", "dt", "B", "C") else array for name, array in arguments.items()}


class TestValues:
    @by_form("length", xla=[1, 2, 7, CHUNK, CHUNK + 1, LENGTH], fused=[1, LENGTH, 128])
    def test_lengths(self, form, length):
        arguments = inputs(length, seed=length)
        y, state = ssd(**arguments, chunk_size=CHUNK, **form)
        wanted_y, wanted_state = expected(arguments)
        assert y.dtype == state.dtype == jnp.float32
        assert_near(y, wanted_y)
        assert_near(state, wanted_state)

    @by_form("groups", xla=[2, 3], fused=[3])
    def test_groups(self, form, groups):
        arguments = inputs(LENGTH, groups=groups, group_heads=2)
        y, state = ssd(**arguments, chunk_size=CHUNK, **form)
        wanted_y, wanted_state = expected(arguments)
        assert_near(y, wanted_y)
        assert_near(state, wanted_state)

    def test_without_skip_and_state(self, form):
        arguments = inputs(LENGTH)
        arguments["D"][:] = 0
        arguments["initial_state"][:] = 0
        wanted_y, wanted_state = expected(arguments)
        given = {name: arguments[name] for name in ("x", "dt", "A", "B", "C")}
        y, state = ssd(**given, chunk_size=CHUNK, **form)
        assert_near(y, wanted_y)
        assert_near(state, wanted_state)

    def test_steps_equal_sequence(self, form):
        """A step and a call of one token are the same thing."""
        arguments = inputs(1)
        y, state = ssd(**arguments, chunk_size=CHUNK, **form)
        one = {name: array[:, 0] if name in ("x", "dt", "B", "C") else array for name, array in arguments.items()}
        step_y, step_state = ssd_step(one.pop("initial_state"), **one)
        assert_near(step_y, y[:, 0], 1e-6)
        assert_near(step_state, state, 1e-6)


class TestAdvanceState:
    @pytest.mark.parametrize("groups", [1, 3])
    @pytest.mark.parametrize("length", [1, 7])
    def test_it_is_the_state_of_the_sequence(self, groups, length):
        arguments = inputs(length, groups=groups, seed=length)
        state = advance_state(arguments["initial_state"], *(arguments[name] for name in ("x", "dt", "A", "B")))
        assert state.dtype == jnp.float32
        assert_near(state, expected(arguments)[1])

    def test_tokens_without_time_leave_it_alone(self):
        arguments = inputs(7)
        arguments["dt"][0, 3:] = arguments["dt"][1] = 0
        state = advance_state(arguments["initial_state"], *(arguments[name] for name in ("x", "dt", "A", "B")))
        assert_near(
            state[0], expected(inputs(7) | {name: arguments[name][:, :3] for name in ("x", "dt", "B", "C")})[1][0]
        )
        np.testing.assert_array_equal(state[1], arguments["initial_state"][1])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"state": np.zeros((2, 3, 7, 5), np.float32)}, r"state has shape .* = \(2, 3, 5, 7\)"),
            ({"x": np.zeros((2, 3, 5), np.float32)}, r"x has shape .*; it must have 4 axes, \(b, l, h, p\)"),
            ({"dt": np.zeros((2, 3), np.float32)}, r"dt has shape \(2, 3\); it must be \(b, l, h\) = \(2, 4, 3\)"),
            ({"B": np.zeros((2, 3, 1, 7), np.float32)}, r"B has shape \(2, 3, 1, 7\); .* = \(2, 4, 1, 7\)"),
        ],
    )
    def test_bad_input(self, changes, message):
        arguments = inputs(4)
        given = {name: arguments[name] for name in ("x", "dt", "A", "B")} | {"state": arguments["initial_state"]}
        with pytest.raises(ValueError, match=message):
            advance_state(**(given | changes))


class TestChoice:
    def chosen(self, monkeypatch, kind, capability=0.0, *, dtype=np.float32, **sizes):
        """The fused kernel in the program that `ssd` would be on another platform, or None."""
        served = []
        import_module = api._module
        monkeypatch.setattr(api, "platform", lambda: kind)
        monkeypatch.setattr(api, "compute_capability", lambda: capability)
        monkeypatch.setattr(api, "_module", lambda name: served.append(name) or import_module(name))
        arguments = inputs(13, **sizes)
        arguments["x"] = arguments["x"].astype(dtype)
        # Unwrapped, for a program traced before must not be found again.
        program = str(jax.make_jaxpr(lambda arguments: ssd.__wrapped__(**arguments))(arguments))
        return served[-1] if "pallas_call" in program else None

    def test_default_is_the_fused_kernel_that_can_serve(self, monkeypatch):
        assert self.chosen(monkeypatch, "cpu") is None
        assert self.chosen(monkeypatch, "gpu", 9.0) == "pallas_gpu"
        assert self.chosen(monkeypatch, "gpu", 10.0) == "pallas_gpu"
        assert self.chosen(monkeypatch, "gpu", 8.0) is None
        assert self.chosen(monkeypatch, "tpu") == "pallas_tpu"
        for kind in ("gpu", "tpu"):
            assert self.chosen(monkeypatch, kind, 9.0, dtype=np.float16) is None
            assert self.chosen(monkeypatch, kind, 9.0, state=300) is None

    @pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a GPU or TPU")
    def test_default_on_cpu_is_chunked(self):
        arguments = inputs(13)
        for default, named in zip(ssd(**arguments), ssd(**arguments, implementation="chunked"), strict=True):
            np.testing.assert_array_equal(default, named)

    @pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a GPU or TPU")
    @pytest.mark.parametrize(("name", "kind"), [("pallas_gpu", "GPU"), ("pallas_tpu", "TPU")])
    def test_named_kernel_elsewhere(self, name, kind):
        with pytest.raises(
            ValueError, match=rf"'{name}' cannot serve: it needs a {kind}, and this runs on cpu.*interpr"
        ):
            ssd(**inputs(13), implementation=name)

    def test_named_kernel_on_an_old_gpu(self, monkeypatch):
        monkeypatch.setattr(api, "platform", lambda: "gpu")
        monkeypatch.setattr(api, "compute_capability", lambda: 8.0)
        with pytest.raises(ValueError, match=r"needs compute capability 9.0 or newer, and this GPU has 8.0"):
            ssd.__wrapped__(**inputs(13), implementation="pallas_gpu")

    @pytest.mark.parametrize("name", ["pallas_gpu", "pallas_tpu"])
    def test_named_kernel_and_what_it_does_not_take(self, name):
        arguments = inputs(13)
        half = arguments | {"x": arguments["x"].astype(np.float16)}
        with pytest.raises(ValueError, match="cannot serve: x has dtype float16; it takes bfloat16 and float32"):
            ssd(**half, implementation=name, interpret=True)
        with pytest.raises(ValueError, match="cannot serve: the head dim is 260; it takes up to"):
            ssd(**inputs(13, headdim=260), implementation=name, interpret=True)
        with pytest.raises(ValueError, match="cannot serve: the state size is 300; it takes up to 256"):
            ssd(**inputs(13, state=300), implementation=name, interpret=True)

    def test_tpu_states_beyond_its_memory(self):
        with pytest.raises(ValueError, match="states of a group's heads take 8388608 bytes; it takes up to 4194304"):
            ssd(
                **inputs(1, batch=1, group_heads=128, headdim=64, state=256),
                implementation="pallas_tpu",
                interpret=True,
            )

    @pytest.mark.parametrize("name", [None, "chunked"])
    def test_only_kernels_are_interpreted(self, name):
        with pytest.raises(ValueError, match=f"interpret is True with implementation {name!r}; it is for a named"):
            ssd(**inputs(13), implementation=name, interpret=True)


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


class TestHandOver:
    @by_form("cut", xla=[(LENGTH, 1), (LENGTH, CHUNK + 3), (LONG, LONG // 2)], fused=[(LONG, LONG // 2)])
    def test_split_equals_whole(self, form, cut):
        length, cut = cut
        arguments = inputs(length)
        first_y, middle = ssd(**part(arguments, 0, cut), chunk_size=CHUNK, **form)
        rest = part(arguments, cut, None) | {"initial_state": middle}
        second_y, last = ssd(**rest, chunk_size=CHUNK, **form)
        wanted_y, wanted_state = expected(arguments)
        assert_near(np.concatenate([first_y, second_y], axis=1), wanted_y)
        assert_near(last, wanted_state)

    @pytest.mark.parametrize("padding", [(3, 0), (0, 9), (5, 7)])
    def test_zero_time_step_is_padding(self, form, padding):
        """Padded on either side with arbitrary x, B and C: the same outputs and exactly the same state are left."""
        before, after = padding
        arguments = inputs(LENGTH)
        arguments["dt"][:, :before] = 0
        arguments["dt"][:, LENGTH - after :] = 0
        y, state = ssd(**arguments, chunk_size=CHUNK, **form)
        wanted_y, wanted_state = expected(part(arguments, before, LENGTH - after))
        assert_near(y[:, before : LENGTH - after], wanted_y)
        assert_near(state, wanted_state)

    def test_all_padding_keeps_the_state_bit_for_bit(self, form):
        arguments = inputs(LENGTH)
        arguments["dt"][:] = 0
        _, state = ssd(**arguments, chunk_size=CHUNK, **form)
        np.testing.assert_array_equal(state, arguments["initial_state"])


# Changes within a chunk, on a chunk's border (8, 16), several in one chunk, an id that comes back, and a segment of one
# token.
SEGMENT_IDS = np.array(
    [
        [4] * 5 + [2] * 3 + [4] * 8 + [5] * 1 + [6] * 2 + [7] * 4,
        [0] * 19 + [1] * 1 + [3] * 3,
    ],
    np.int32,
)


class TestSegments:
    def test_values(self, form):
        arguments = inputs(LENGTH)
        y, state = ssd(**arguments, segment_ids=SEGMENT_IDS, chunk_size=CHUNK, **form)
        wanted_y, wanted_state = expected(arguments, SEGMENT_IDS)
        assert_near(y, wanted_y)
        assert_near(state, wanted_state)

    def test_packed_equals_separate(self, form):
        """What belongs to other segments is multiplied by zero, not by something small: huge values are not felt."""
        ids = SEGMENT_IDS[:1]
        arguments = inputs(ids.shape[1], batch=1)
        edges = np.flatnonzero(np.diff(ids[0])) + 1
        bounds = list(itertools.pairwise([0, *edges, ids.shape[1]]))
        for start, stop in bounds:
            loud = {name: array.copy() for name, array in arguments.items()}
            outside = np.ones(ids.shape[1], bool)
            outside[start:stop] = False
            loud["x"][:, outside] *= 1e6
            if start > 0:
                loud["initial_state"] *= 1e6
            y, state = ssd(**loud, segment_ids=ids, chunk_size=CHUNK, **form)
            alone = part(arguments, start, stop)
            if start > 0:
                alone["initial_state"] = np.zeros_like(alone["initial_state"])
            wanted_y, wanted_state = expected(alone)
            assert_near(y[:, start:stop], wanted_y)
        assert_near(state, wanted_state)

    def test_one_segment_is_none(self, form):
        arguments = inputs(LENGTH)
        ids = np.full((2, LENGTH), 9, np.int32)
        wanted = ssd(**arguments, chunk_size=CHUNK, **form)
        for with_ids, without in zip(ssd(**arguments, segment_ids=ids, chunk_size=CHUNK, **form), wanted, strict=True):
            np.testing.assert_array_equal(with_ids, without)


@functools.partial(jax.jit, static_argnames=("chunk_size", "implementation", "interpret"))
def with_gradients(arguments, weight_y, weight_state, segment_ids=None, **form):
    """Gradients of a weighted sum of all results, and the results. One program for all tests of a shape."""

    def weighted(arguments):
        y, state = ssd(**arguments, segment_ids=segment_ids, **form)
        return jnp.sum(y.astype(jnp.float32) * weight_y) + jnp.sum(state * weight_state), (y, state)

    return jax.grad(weighted, has_aux=True)(arguments)


def weights_for(arguments):
    random = np.random.default_rng(1)
    x, B = arguments["x"], arguments["B"]
    state = (x.shape[0], *x.shape[2:], B.shape[3])
    return [random.standard_normal(shape).astype(np.float32) for shape in (x.shape, state)]


def expected_gradients(arguments, weight_y, weight_state, segment_ids=None):
    """The same from the recurrence in float64; missing arguments are zeros."""
    x = arguments["x"]
    missing = {"D": np.zeros(x.shape[2]), "initial_state": np.zeros(weight_state.shape)}
    tensors = {
        name: torch.tensor(a, dtype=torch.float64, requires_grad=True) for name, a in (missing | arguments).items()
    }
    y, state = recurrence(**tensors, segment_ids=segment_ids)
    ((y * torch.tensor(weight_y)).sum() + (state * torch.tensor(weight_state)).sum()).backward()
    gradients = {name: tensors[name].grad.numpy() for name in arguments}
    return gradients, (y.detach().numpy(), state.detach().numpy())


def long_case():
    """Arguments, and segments that change on the borders of 64 and 128 tokens and in several places between."""
    ids = np.zeros((2, LONG), np.int32)
    for row, start in ((0, 30), (0, 64), (0, 100), (0, 101), (0, 128), (1, 63), (1, 140)):
        ids[row, start:] += 1
    return inputs(LONG, groups=2), ids


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
        for actual, expected in zip(results, wanted, strict=True):
            assert_near(actual, expected)
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
        for actual, expected in zip(results, wanted, strict=True):
            assert_near(actual, expected)
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


class TestChunkLength:
    @pytest.mark.parametrize(
        ("length", "chunk_size", "wanted"),
        [
            (5, 256, 5),
            (256, 256, 256),
            (257, 256, 136),
            (300, 256, 152),
            (9, 8, 8),
            (512, 256, 256),
            (7, 1, 1),
            (13, 5, 5),
        ],
    )
    def test_even_chunks(self, length, chunk_size, wanted):
        assert chunked.chunk_length(length, chunk_size) == wanted

    def test_result_does_not_depend_on_it(self):
        arguments = inputs(CPU_CHUNK_SIZE + 9)
        wanted_y, wanted_state = expected(arguments)
        for chunk_size in (5, 10_000):
            y, state = ssd(**arguments, chunk_size=chunk_size)
            assert_near(y, wanted_y)
            assert_near(state, wanted_state)

    def test_short_call_does_short_work(self):
        """Five tokens cost a fraction of what a chunk of 256 costs, as the compiler counts operations."""

        def flops(length):
            return ssd.lower(**inputs(length), chunk_size=256).compile().cost_analysis()["flops"]

        assert flops(5) < flops(32) / 4


class TestOracle:
    """transformers' PyTorch functions on the same random inputs, float32 on both sides."""

    @by_form("length", xla=[5, LENGTH], fused=[LENGTH])
    def test_sequence(self, form, length):
        arguments = inputs(length, groups=3, group_heads=2)
        tensors = {name: torch.tensor(array) for name, array in arguments.items()}
        y, state = oracle.mamba2_chunk_scan(
            *(tensors[name] for name in ("x", "dt", "A", "B", "C")),
            chunk_size=CHUNK,
            D=tensors["D"],
            initial_states=tensors["initial_state"],
            return_final_states=True,
        )
        ours_y, ours_state = ssd(**arguments, chunk_size=CHUNK, **form)
        assert_near(ours_y, y)
        assert_near(ours_state, state)

    def test_step(self):
        arguments = inputs(1, groups=3, group_heads=2)
        one = {name: array[:, 0] if name in ("x", "dt", "B", "C") else array for name, array in arguments.items()}
        tensors = {name: torch.tensor(array) for name, array in one.items()}
        state = tensors["initial_state"].clone()
        # The oracle wants dt, A and D spread over the head dim and, for A, the state.
        headdim, size = state.shape[-2:]
        y = oracle.mamba2_selective_state_update(
            state,
            tensors["x"],
            tensors["dt"][..., None].expand(-1, -1, headdim),
            tensors["A"][:, None, None].expand(-1, headdim, size),
            tensors["B"],
            tensors["C"],
            tensors["D"][:, None].expand(-1, headdim),
        )
        ours_y, ours_state = ssd_step(one.pop("initial_state"), **one)
        assert_near(ours_y, y)
        assert_near(ours_state, state)


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"implementation": "fast"}, "implementation is 'fast'; it must be None or one of 'reference', 'scan', "),
            ({"chunk_size": 0}, "chunk_size is 0; it must be an integer of at least 1"),
            ({"chunk_size": 8.0}, "chunk_size is 8.0; it must be an integer"),
            ({"x": np.zeros((2, 13, 3), np.float32)}, r"x has shape \(2, 13, 3\); it must have 4 axes, \(b, l, h, p\)"),
            ({"x": np.zeros((2, 0, 3, 5), np.float32)}, "a sequence of length 0; it must hold at least one token"),
            ({"x": np.zeros((2, 13, 3, 5), np.int32)}, "x has dtype int32; it must be a floating-point type"),
            ({"dt": np.zeros((2, 13, 5), np.float32)}, r"dt has shape \(2, 13, 5\); .* \(b, l, h\) = \(2, 13, 3\)"),
            ({"A": np.zeros(4, np.float32)}, r"A has shape \(4,\); it must be \(h,\) = \(3,\)"),
            ({"D": np.zeros(4, np.float32)}, r"D has shape \(4,\); it must be \(h,\) = \(3,\)"),
            ({"D": np.zeros(3, np.int32)}, "D has dtype int32"),
            ({"B": np.zeros((2, 13, 7), np.float32)}, r"B has shape \(2, 13, 7\); it must have 4 axes"),
            ({"B": np.zeros((2, 12, 1, 7), np.float32)}, r"B has shape \(2, 12, 1, 7\); .* = \(2, 13, 1, 7\)"),
            ({"B": np.zeros((2, 13, 2, 7), np.float32)}, "B has 2 groups and x has 3 heads; heads must be a multiple"),
            ({"C": np.zeros((2, 13, 1, 6), np.float32)}, r"C has shape \(2, 13, 1, 6\); it must be the shape of B"),
            ({"initial_state": np.zeros((2, 3, 7, 5), np.float32)}, r"initial_state has shape .* = \(2, 3, 5, 7\)"),
            ({"segment_ids": np.zeros((2, 12), np.int32)}, r"segment_ids has shape \(2, 12\); .* = \(2, 13\)"),
            ({"segment_ids": np.zeros((2, 13), np.float32)}, "segment_ids has dtype float32; it must be an integer"),
        ],
    )
    def test_sequence(self, changes, message):
        with pytest.raises(ValueError, match=message):
            ssd(**(inputs(13) | changes))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"state": np.zeros((2, 3, 7, 5), np.float32)}, r"state has shape .* = \(2, 3, 5, 7\)"),
            ({"x": np.zeros((2, 1, 3, 5), np.float32)}, r"x has shape .*; it must have 3 axes, \(b, h, p\)"),
            ({"dt": np.zeros((2, 1), np.float32)}, r"dt has shape \(2, 1\); it must be \(b, h\) = \(2, 3\)"),
            ({"B": np.zeros((1, 1, 7), np.float32)}, r"B has shape \(1, 1, 7\); .* = \(2, 1, 7\)"),
            ({"C": np.zeros((2, 1, 8), np.float32)}, "C has shape .*; it must be the shape of B"),
        ],
    )
    def test_step(self, changes, message):
        arguments = inputs(1)
        one = {name: array[:, 0] if name in ("x", "dt", "B", "C") else array for name, array in arguments.items()}
        one["state"] = one.pop("initial_state")
        with pytest.raises(ValueError, match=message):
            ssd_step(**(one | changes))
