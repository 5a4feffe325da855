"""The kernels of the recurrence for Hopper GPUs: their programs run by hand (see `warpgroups_by_hand`) beside Triton's
kernels in interpret mode; lowered, where JAX is new enough; and run on a GPU that they take."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.warpgroups_by_hand import by_hand
from zamba2_jax.ops.ssd import hopper_backward, hopper_forward, hopper_tiles, pallas_gpu, pallas_gpu_steps, reference
from zamba2_jax.ops.ssd import pallas_gpu_kernels as kernels
from zamba2_jax.ops.ssd.pallas_gpu_tiles import Launch

CHUNK = HEADDIM = 64


def inputs(batch, length, heads, groups, size, *, skip=True, resets=False):
    """Arguments of `pallas_gpu.ssd`, and gradients of its results."""
    random = np.random.default_rng(length + heads + size)

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(random.standard_normal(shape), dtype)

    half = functools.partial(normal, dtype=jnp.bfloat16)
    arguments = {
        "x": half(batch, length, heads, HEADDIM),
        # A chunk forgets between a part and nearly all of what comes to it.
        "dt": jax.nn.softplus(normal(batch, length, heads) - 3.0),
        "A": -jnp.exp(normal(heads)),
        "B": half(batch, length, groups, size),
        "C": half(batch, length, groups, size),
        "D": normal(heads) if skip else None,
        "initial_state": normal(batch, heads, HEADDIM, size),
    }
    marks = jnp.asarray(random.random((batch, length)) < 0.03) if resets else None
    return arguments, marks, (half(batch, length, heads, HEADDIM), normal(batch, heads, HEADDIM, size))


def assert_near(ours, wanted, tolerance, name):
    """By root mean squares, of the difference and of what is wanted."""
    assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype), name
    ours, wanted = (np.asarray(array, np.float64) for array in (ours, wanted))
    error = np.sqrt(np.mean((ours - wanted) ** 2) / np.mean(wanted**2))
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


# The order of additions differs in float32. Where a sum lies between two numbers of bfloat16 it may be rounded either
# way, which is a 256th of one entry in thousands: of M for dx, of dG for dB and dC, and of the results.
CLOSE, ROUNDED = 1e-5, 1e-3


def operands(arguments, resets, gradients):
    """What the second half of the backward pass reads, up to `ends`."""
    x, dt, A, B, C, D, state = arguments.values()
    dy, dstate = gradients
    launch = functools.partial(Launch, CHUNK, warps=4, interpret=True)
    marks = None if resets is None else resets.astype(jnp.int32)
    steps, s = pallas_gpu_steps.prepare((dt, A), marks, 1, x.dtype, launch(stages=1))
    starts, _ = kernels.states(x, steps, s, B, state, launch(stages=3))
    ends, _ = kernels.states(dy, None, s, C, dstate, launch(stages=3))
    return x, steps, s, B, C, D, starts, dy, ends


class TestBackwardByHand:
    # Heads of a program: one, fewer than there are places for their tiles, and more; a group's in one block and in two.
    @pytest.mark.parametrize(
        ("sizes", "options", "some"),
        [
            ((1, 64, 4, 1, 64), {"skip": False}, 1),
            ((1, 192, 4, 1, 64), {"resets": True}, 2),
            ((2, 192, 6, 2, 128), {"resets": True}, 3),
            ((1, 64, 6, 1, 128), {"skip": False}, 6),
        ],
    )
    def test_it_makes_what_the_triton_kernels_make(self, monkeypatch, sizes, options, some):
        x, steps, s, B, C, D, starts, dy, ends = operands(*inputs(*sizes, **options))
        launch = functools.partial(Launch, CHUNK, interpret=True)
        dx, (ddt, ds), at_end, skip = kernels.backward_heads(
            x, steps, s, B, C, D, starts, dy, ends, launch(warps=4, stages=1)
        )
        dB, dC = kernels.backward_groups(x, steps, s, B, C, starts, dy, ends, launch(warps=8, stages=3, heads=some))

        by_hand(monkeypatch, hopper_backward, hopper_tiles)
        ours = hopper_backward.backward(x, steps, s, B, C, D, starts, dy, ends, heads=some)
        assert_near(ours[0], dx, ROUNDED, "dx")
        assert_near(ours[1][0], ddt, CLOSE, "ddt")
        assert_near(sum(ours[1][1:]), ds, CLOSE, "ds")
        assert_near(ours[2].sum(axis=3), at_end, CLOSE, "at the chunks' ends")
        assert_near(ours[3].reshape(*at_end.shape, CHUNK).sum(axis=3), skip, CLOSE, "skip")
        assert_near(ours[4], dB, ROUNDED, "dB")
        assert_near(ours[5], dC, ROUNDED, "dC")

    def test_backward_pass(self, monkeypatch):
        """All gradients, with the kernel chosen and not."""
        arguments, resets, gradients = inputs(2, 192, 6, 2, 128, resets=True)
        x, dt, A, B, C, D, state = arguments.values()
        residuals = x, (dt, A), B, C, D, state, resets.astype(jnp.int32), []
        launch, real, calls = Launch, hopper_backward.backward, []

        def backward(*arguments, **options):
            calls.append(options)
            return real(*arguments, **options)

        monkeypatch.setattr(
            pallas_gpu, "Launch", lambda *sizes, **options: launch(*sizes, **options | {"interpret": True})
        )
        monkeypatch.setattr(pallas_gpu, "_heads_per_program", lambda *_: 3)
        monkeypatch.setattr(hopper_backward, "backward", backward)
        by_hand(monkeypatch, hopper_backward, hopper_tiles)

        def run(reason):
            monkeypatch.setattr(pallas_gpu, "hopper_obstacle", lambda *_: reason)
            dx, (ddt, dA), dB, dC, dD, dstate, _ = pallas_gpu._ssd_backward(CHUNK, False, False, residuals, gradients)
            return {"x": dx, "dt": ddt, "A": dA, "B": dB, "C": dC, "D": dD, "initial_state": dstate}

        wanted = run("switched off")
        assert not calls
        ours = run(None)
        assert calls == [{"heads": 3}]
        for name, gradient in ours.items():
            assert gradient.dtype == arguments[name].dtype
            assert_near(gradient, wanted[name], ROUNDED if gradient.dtype == jnp.bfloat16 else CLOSE, name)


class TestForwardByHand:
    # One chunk, and more than there are places for their tiles; one part and several.
    @pytest.mark.parametrize(
        ("sizes", "options", "parts"),
        [
            ((1, 64, 2, 1, 64), {"skip": False}, 1),
            ((1, 192, 4, 2, 128), {"resets": True}, 1),
            ((2, 384, 4, 1, 64), {"resets": True}, 2),
        ],
    )
    def test_it_makes_what_the_triton_kernel_makes(self, monkeypatch, sizes, options, parts):
        arguments, resets, _ = inputs(*sizes, **options)
        x, dt, A, B, C, D, state = arguments.values()
        launch = functools.partial(Launch, CHUNK, warps=4, interpret=True)
        marks = None if resets is None else resets.astype(jnp.int32)
        steps, s = pallas_gpu_steps.prepare((dt, A), marks, parts, x.dtype, launch(stages=1))
        x, B, C = (array.reshape(sizes[0] * parts, sizes[1] // parts, *array.shape[2:]) for array in (x, B, C))
        before = kernels.last_states(x, steps, s, B, parts, launch(stages=3)) if parts > 1 else None
        y, final = kernels.forward(x, steps, s, B, C, D, state, launch(stages=2), before)

        by_hand(monkeypatch, hopper_forward, hopper_tiles)
        our_y, our_final = hopper_forward.forward(x, steps, s, B, C, D, state, before=before)
        assert_near(our_y, y, ROUNDED, "y")
        assert_near(our_final, final, CLOSE, "state")

    @pytest.mark.parametrize("parts", [1, 2])
    def test_states_that_are_kept(self, monkeypatch, parts):
        """Those that the backward pass would make again, of whole rows, in whatever parts rows are walked."""
        arguments, _, gradients = inputs(2, 384, 4, 1, 64)
        x, steps, s, B, C, D, starts, *_ = operands(arguments, None, gradients)
        state = arguments["initial_state"]

        def split(array):
            return array.reshape(2 * parts, 384 // parts, *array.shape[2:])

        def split_steps(array):
            return array.reshape(2, 4, parts, -1).swapaxes(1, 2).reshape(2 * parts, 4, -1)

        walked = (split(x), split_steps(steps), tuple(map(split_steps, s)), split(B))
        launch = Launch(CHUNK, warps=4, stages=3, interpret=True)
        before = kernels.last_states(*walked, parts, launch) if parts > 1 else None
        by_hand(monkeypatch, hopper_forward, hopper_tiles)
        *plain, kept = hopper_forward.forward(*walked, split(C), D, state, before=before, keep_states=True)
        assert_near(kept, starts, ROUNDED, "states")
        for ours, other in zip(plain, hopper_forward.forward(*walked, split(C), D, state, before=before), strict=True):
            np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(other, np.float32))


class TestAccount:
    """That `warpgroups_by_hand` finds what is left out of a program whose results may be right nevertheless."""

    def run(self, monkeypatch, **changes):
        by_hand(monkeypatch, hopper_backward, hopper_tiles)
        for name, change in changes.items():
            monkeypatch.setattr(
                hopper_backward.plgpu, name, functools.partial(change, getattr(hopper_backward.plgpu, name))
            )
        half = functools.partial(jnp.ones, dtype=jnp.bfloat16)
        tokens, steps, shared, states = (1, 64, 4, 64), (1, 4, 64), (1, 64, 1, 64), (1, 4, 1, 64, 64)
        return hopper_backward.backward(
            half(tokens), jnp.ones(steps), (-jnp.ones(steps),), half(shared), half(shared), None, half(states),
            half(tokens), half(states), heads=4,
        )  # fmt: skip

    def test_nothing_left_out(self, monkeypatch):
        for array in jax.tree.leaves(self.run(monkeypatch)):
            assert np.isfinite(np.asarray(array, np.float32)).all()

    @staticmethod
    def but(name):
        """Barriers of this name are not attended to."""
        return lambda real, barrier: None if getattr(barrier, "name", "").startswith(name) else real(barrier)

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("barrier_arrive", but("freed"), "all warpgroups wait for ever: .* for freed"),
            ("barrier_wait", but("freed"), "overwritten before .* certainly had done with it: of_head"),
            ("barrier_wait", but("arrived["), "read before it has certainly arrived from copies to arrived"),
            # The first to arrive would do.
            (
                "Barrier",
                lambda real, num_arrivals=1, num_barriers=1: real(
                    1 if (num_arrivals, num_barriers) == (2, 2) else num_arrivals, num_barriers
                ),
                "overwritten before the threads of warpgroup 1 certainly had done with it: of_head",
            ),
            ("commit_smem", lambda real: None, "read before it has certainly arrived from the threads"),
            # A warpgroup's barrier alone.
            (
                "commit_smem",
                lambda real: hopper_backward.plgpu.wait_smem_to_gmem(2),
                "used before the threads of warpgroup 0 have committed it",
            ),
            ("wgmma_wait", lambda real, n: None, "overwritten before the products of warpgroup 1 certainly had done"),
            ("wgmma_accumulator_load", lambda real, acc, wait_n: real(acc, wait_n + 1), "an accumulator was read"),
            ("wait_smem_to_gmem", lambda real, n, **_: real(n + 1), "overwritten before the copies of warpgroup 0"),
            # The last two, which nothing is written over.
            ("wait_smem_to_gmem", lambda real, n, **_: real(max(n, 1)), "copies of warpgroup 0 may still read at"),
        ],
    )
    def test_what_is_left_out(self, monkeypatch, name, change, message):
        with pytest.raises(AssertionError, match=message.replace("[", r"\[")):
            self.run(monkeypatch, **{name: change})


class TestObstacle:
    def reason(self, monkeypatch, *, jax_version="0.11.0", capability=9.0, dtype=jnp.bfloat16, **changes):
        sizes = {"length": 192, "heads": 4, "headdim": 64, "size": 128, "chunk": 64} | changes
        numbers = tuple(map(int, jax_version.split(".")))
        monkeypatch.setattr(pallas_gpu.jax, "__version__", jax_version)
        monkeypatch.setattr(pallas_gpu.jax, "__version_info__", numbers)
        monkeypatch.setattr(pallas_gpu, "compute_capability", lambda: capability)
        x = jax.ShapeDtypeStruct((2, sizes["length"], sizes["heads"], sizes["headdim"]), dtype)
        B = jax.ShapeDtypeStruct((2, sizes["length"], 2, sizes["size"]), dtype)
        return pallas_gpu.hopper_obstacle(x, B, sizes["chunk"])

    @pytest.mark.parametrize("changes", [{}, {"size": 64}, {"length": 64}, {"jax_version": "0.12.1"}])
    def test_what_they_serve(self, monkeypatch, changes):
        assert self.reason(monkeypatch, **changes) is None

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"jax_version": "0.10.2"}, "this is JAX 0.10.2; they take 0.11.0 or newer"),
            ({"capability": 0.0}, "Hopper's, and this GPU has compute capability 0.0"),
            ({"capability": 8.9}, "Hopper's, and this GPU has compute capability 8.9"),
            ({"capability": 10.0}, "Hopper's, and this GPU has compute capability 10.0"),
            ({"dtype": jnp.float32}, "x has dtype float32; they take bfloat16"),
            ({"size": 256}, "chunk, head dim and state are (64, 64, 256); they take (64, 64, 64) or (64, 64, 128)"),
            ({"headdim": 128}, "are (64, 128, 128)"),
            ({"chunk": 32}, "are (32, 64, 128)"),
            ({"length": 100}, "there are 100 tokens; they take multiples of 64"),
            ({"heads": 6}, "a group has 3 heads; they take an even number"),
        ],
    )
    def test_what_they_do_not(self, monkeypatch, changes, reason):
        assert reason in self.reason(monkeypatch, **changes)


newer_jax = pytest.mark.skipif(
    jax.__version_info__ < pallas_gpu.HOPPER_JAX, reason="the kernels are written for the interface of a newer JAX"
)


# Mosaic's part of the lowering needs no GPU. It knows of layouts, which the programs run by hand do not have.
@newer_jax
@pytest.mark.parametrize(("size", "skip"), [(64, False), (128, True)])
def test_backward_lowers(size, skip):
    half = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    whole = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    tokens, steps, shared, states = (2, 192, 6, 64), (2, 6, 192), (2, 192, 2, size), (2, 6, 3, 64, size)
    D = whole((6,)) if skip else None
    arguments = (
        half(tokens), whole(steps), (whole(steps),), half(shared), half(shared), D, half(states), half(tokens),
        half(states),
    )  # fmt: skip
    traced = jax.jit(functools.partial(hopper_backward.backward, heads=3)).trace(*arguments)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@newer_jax
@pytest.mark.parametrize(("size", "skip", "parts"), [(64, False, 1), (128, True, 2)])
def test_forward_lowers(size, skip, parts):
    half = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    whole = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    tokens, steps, shared, state = (
        (2 * parts, 192, 6, 64),
        (2 * parts, 6, 192),
        (2 * parts, 192, 1, size),
        (6, 64, size),
    )
    arguments = (
        half(tokens), whole(steps), (whole(steps),), half(shared), half(shared), whole((6,)) if skip else None,
        whole((2, *state)),
    )  # fmt: skip
    before = None if parts == 1 else (whole((2, parts - 1, *state)), whole((2, parts - 1, 6)))
    traced = jax.jit(hopper_forward.forward).trace(*arguments, before=before)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@newer_jax
def test_gradients_of_each(monkeypatch):
    """`jax.vmap` over the gradient, for which Mosaic's kernels have no rule of their own."""
    monkeypatch.setattr(pallas_gpu, "hopper_obstacle", lambda *_: None)
    arguments, _, gradients = inputs(1, 64, 2, 1, 64)

    def pull(arguments, gradients):
        return jax.vjp(lambda arguments: pallas_gpu.ssd(**arguments, resets=None), arguments)[1](gradients)[0]

    each = jax.tree.map(lambda array: jnp.stack([array] * 2), (arguments, gradients))
    assert {"ssd_forward", "ssd_backward"} <= set(re.findall(r"\bssd_\w+", str(jax.make_jaxpr(jax.vmap(pull))(*each))))


OBSTACLE = pallas_gpu.hopper_obstacle(
    jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16), 64
)


@pytest.mark.skipif(OBSTACLE is not None, reason=f"the kernels cannot run here: {OBSTACLE}")
class TestOnHopper:
    def compiled(self, function, arguments, gradients, kernels):
        """The gradients' program, traced anew, since the choice of kernels is no argument; it has `kernels`."""

        def pull(arguments, gradients):
            return jax.vjp(lambda arguments: function(**arguments), arguments)[1](gradients)[0]

        traced = jax.jit(pull).trace(arguments, gradients)
        assert set(re.findall(r"\bssd_backward\w*", str(traced.jaxpr))) == kernels
        return traced.lower().compile()

    def with_kernels(self, monkeypatch, case, *, hopper, together):
        arguments, resets, gradients = case
        with monkeypatch.context() as patch:
            if not hopper:
                patch.setattr(pallas_gpu, "hopper_obstacle", lambda *_: "switched off")
            if together is not None:
                patch.setattr(pallas_gpu, "_heads_per_program", lambda *_: together)
            names = {"ssd_backward"} if hopper else {"ssd_backward_heads", "ssd_backward_groups"}
            function = functools.partial(pallas_gpu.ssd, resets=resets)
            return self.compiled(function, arguments, gradients, names | {"ssd_backward_steps"})

    # One chunk and several; heads of a program as they are chosen, and so many that places are used again, in one block
    # of a group and in several.
    @pytest.mark.parametrize(
        ("sizes", "options", "together"),
        [
            ((1, 64, 2, 1, 64), {}, None),
            ((2, 256, 6, 1, 128), {"skip": False, "resets": True}, 3),
            ((1, 1088, 6, 3, 64), {"resets": True}, 1),
            ((3, 256, 12, 2, 64), {"resets": True}, 2),
            ((2, 1088, 64, 2, 128), {"resets": True}, None),
            ((2, 1088, 64, 2, 128), {}, 32),
            ((4, 1088, 64, 1, 64), {"skip": False}, None),
        ],
    )
    def test_beside_the_triton_kernels(self, monkeypatch, sizes, options, together):
        case = inputs(*sizes, **options)
        arguments, _, gradients = case
        ours, wanted = (
            self.with_kernels(monkeypatch, case, hopper=hopper, together=together)(arguments, gradients)
            for hopper in (True, False)
        )
        for name, array in arguments.items():
            if array is not None:
                # The hardware's exponentials are good to 22 bits, and sums of A are differences of larger ones.
                tolerance = ROUNDED if array.dtype == jnp.bfloat16 else 10 * CLOSE
                assert_near(ours[name], wanted[name], tolerance, name)

    # Whole rows, and rows that are cut into parts.
    @pytest.mark.parametrize(
        ("sizes", "options"),
        [
            ((2, 256, 6, 3, 64), {"skip": False}),
            ((1, 4096, 4, 1, 128), {"resets": True}),
            ((4, 1024, 64, 1, 128), {}),
        ],
    )
    def test_forward_beside_the_triton_kernel(self, monkeypatch, sizes, options):
        arguments, resets, _ = inputs(*sizes, **options)

        def run(arguments):
            return pallas_gpu.ssd(**arguments, resets=resets)

        ours = jax.jit(run)
        assert "mosaic_gpu" in ours.lower(arguments).as_text()
        y, state = ours(arguments)
        monkeypatch.setattr(pallas_gpu, "hopper_obstacle", lambda *_: "switched off")
        wanted = jax.jit(lambda arguments: run(arguments))
        assert "mosaic_gpu" not in wanted.lower(arguments).as_text()
        wanted_y, wanted_state = wanted(arguments)
        assert_near(y, wanted_y, ROUNDED, "y")
        assert_near(state, wanted_state, CLOSE, "state")

    # Whole rows, and rows that are cut into parts.
    @pytest.mark.parametrize("sizes", [(2, 256, 6, 3, 64), (1, 4096, 4, 1, 128), (4, 1024, 64, 1, 128)])
    def test_states_that_are_kept(self, sizes):
        """The gradients are those of states that are made again."""
        arguments, resets, gradients = inputs(*sizes, resets=True)

        def pull(arguments, *, keep_states):
            run = functools.partial(pallas_gpu.ssd, resets=resets, keep_states=keep_states)
            return jax.vjp(lambda arguments: run(**arguments), arguments)[1](gradients)[0]

        kept, again = (jax.jit(functools.partial(pull, keep_states=keep)) for keep in (True, False))
        names = set(re.findall(r"\bssd_states\w*", str(kept.trace(arguments).jaxpr)))
        assert names == {"ssd_states_backwards"}
        ours, wanted = kept(arguments), again(arguments)
        for name, array in ours.items():
            assert_near(array, wanted[name], ROUNDED if array.dtype == jnp.bfloat16 else 10 * CLOSE, name)

    def test_repeatable(self, monkeypatch):
        """Who comes first makes no difference."""
        case = inputs(2, 1088, 64, 2, 128, resets=True)
        arguments, _, gradients = case
        compiled = self.with_kernels(monkeypatch, case, hopper=True, together=8)
        first = compiled(arguments, gradients)
        for _ in range(20):
            jax.tree.map(np.testing.assert_array_equal, compiled(arguments, gradients), first)

    @pytest.mark.parametrize(("sizes", "together"), [((2, 256, 6, 1, 64), 3), ((1, 256, 4, 2, 128), 2)])
    def test_beside_the_recurrence(self, monkeypatch, sizes, together):
        """In float32, one token at a time. What passes through bfloat16 is rounded several times, to a 512th at most
        and less than half of that in the mean: M, dG, states and results. In interpret mode that makes 2.5e-3."""
        case = inputs(*sizes, resets=True)
        arguments, resets, gradients = case
        ours = self.with_kernels(monkeypatch, case, hopper=True, together=together)(arguments, gradients)
        wide, gradients = jax.tree.map(lambda array: array.astype(jnp.float32), (arguments, gradients))
        function = functools.partial(reference.ssd, resets=resets)
        wanted = self.compiled(function, wide, gradients, set())(wide, gradients)
        for name, gradient in ours.items():
            assert gradient.dtype == arguments[name].dtype
            # Of D, sums of products that are exact in float32.
            assert_near(gradient.astype(jnp.float32), wanted[name], CLOSE if name == "D" else 5e-3, name)
