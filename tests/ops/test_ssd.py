"""The state-space recurrence: every implementation against the recurrence in float64, and against transformers'
functions."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.zamba2 import modeling_zamba2 as oracle

from tests.ops.ssd_cases import CHUNK, LENGTH, LONG, assert_near, by_form, expected, inputs, part
from zamba2_jax.ops.ssd import advance_state, chunked, ssd, ssd_step
from zamba2_jax.ops.ssd.api import CPU_CHUNK_SIZE

pytestmark = pytest.mark.usefixtures("products_in_full")


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
