"""Which implementation of the recurrence is chosen, and what is refused."""

import jax
import numpy as np
import pytest

from tests.ops.ssd_cases import (
    inputs,
)
from zamba2_jax.ops.ssd import api, ssd, ssd_step

pytestmark = pytest.mark.usefixtures("products_in_full")


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
