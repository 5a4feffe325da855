"""Attention: the implementations that a CPU can run against PyTorch's, and the choice between all of them."""

import functools
import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from zamba2_jax.ops import attention as module
from zamba2_jax.ops import blocked_attention
from zamba2_jax.ops.attention import attention, attention_with_weights, prefill_attention
from zamba2_jax.ops.blocked_attention import BLOCK
from zamba2_jax.ops.cudnn_attention import cudnn_attention

BATCH, QUERIES, KEYS, HEADS, KV_HEADS, HEAD_DIM = 2, 7, 11, 6, 3, 5
# Weighted means of at most 11 float32 values of size 1 to 3, the weights from sums of 5 products.
TOLERANCE = 5e-6


@pytest.fixture(params=["reference", "xla"])
def implementation(request):
    return request.param


def inputs(queries=QUERIES, keys=KEYS, seed=0):
    """query, key, value."""
    random = np.random.default_rng(seed)
    shapes = ((queries, HEADS), (keys, KV_HEADS), (keys, KV_HEADS))
    return [random.standard_normal((BATCH, length, heads, HEAD_DIM)).astype(np.float32) for length, heads in shapes]


def some_mask(queries=QUERIES, keys=KEYS):
    """(b, l, s), with at least one key for every query."""
    mask = np.random.default_rng(1).random((BATCH, queries, keys)) < 0.5
    mask[..., 0] = True
    return mask


# Left padding and a hole; right padding.
SOME_TOKENS = np.array([[0, 0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0, 0]], bool)


def torch_attention(query, key, value, *, mask=None, is_causal=False, scale=None):
    """PyTorch's function, which has the heads before the length, in float64; differentiable."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    mask = None if mask is None else torch.tensor(mask)[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def doubles(*arrays, requires_grad=False):
    return [torch.tensor(array, dtype=torch.float64, requires_grad=requires_grad) for array in arrays]


class TestValues:
    @pytest.mark.parametrize("scale", [None, 0.7])
    @pytest.mark.parametrize("axes", [3, 4])
    def test_mask(self, implementation, axes, scale):
        arrays, mask = inputs(), some_mask()
        given = mask if axes == 3 else mask[:, None]
        out = attention(*arrays, mask=given, scale=scale, implementation=implementation)
        assert out.shape == (BATCH, QUERIES, HEADS, HEAD_DIM)
        np.testing.assert_allclose(out, torch_attention(*doubles(*arrays), mask=mask, scale=scale), atol=TOLERANCE)

    def test_no_condition(self, implementation):
        arrays = inputs()
        out = attention(*arrays, implementation=implementation)
        np.testing.assert_allclose(out, torch_attention(*doubles(*arrays)), atol=TOLERANCE)

    def test_causal(self, implementation):
        arrays = inputs(keys=QUERIES)
        out = attention(*arrays, is_causal=True, implementation=implementation)
        np.testing.assert_allclose(out, torch_attention(*doubles(*arrays), is_causal=True), atol=TOLERANCE)

    def test_segments(self, implementation):
        """Packed causal segments equal separate calls."""
        arrays = inputs(keys=QUERIES)
        ids = np.array([[0, 0, 0, 1, 1, 1, 1], [4, 4, 4, 4, 4, 2, 2]], np.int32)
        out = attention(*arrays, is_causal=True, segment_ids=(ids, ids), implementation=implementation)
        for row, cut in enumerate([3, 5]):
            for part in (slice(0, cut), slice(cut, None)):
                wanted = torch_attention(*doubles(*(a[row : row + 1, part] for a in arrays)), is_causal=True)
                np.testing.assert_allclose(out[row : row + 1, part], wanted, atol=TOLERANCE)

    def test_conditions_are_joined(self, implementation):
        arrays, mask = inputs(keys=QUERIES), some_mask(keys=QUERIES)
        ids = np.array([[0] * 4 + [1] * 3, [0] * 7], np.int32)
        joined = mask & np.tri(QUERIES, dtype=bool) & (ids[:, :, None] == ids[:, None, :])
        joined |= np.eye(QUERIES, dtype=bool)
        out = attention(
            *arrays,
            mask=mask | np.eye(QUERIES, dtype=bool),
            is_causal=True,
            segment_ids=(ids, ids),
            implementation=implementation,
        )
        np.testing.assert_allclose(out, torch_attention(*doubles(*arrays), mask=joined), atol=TOLERANCE)

    def test_bfloat16(self, implementation):
        """Scores in float32; the weights and the result are rounded once each, by at most 2^-9 of themselves."""
        arrays = [jnp.asarray(array, jnp.bfloat16) for array in inputs()]
        out = attention(*arrays, implementation=implementation)
        assert out.dtype == jnp.bfloat16
        wanted = torch_attention(*doubles(*(np.float32(array) for array in arrays))).numpy()
        error = np.linalg.norm(np.float64(out) - wanted) / np.linalg.norm(wanted)
        assert error < 2 * 2.0**-9

    def test_padding_is_hidden(self, implementation):
        """Real tokens, wherever they stand, see each other alone; with segments, those of their own."""
        arrays, real, ids = inputs(keys=QUERIES), SOME_TOKENS, np.array([[3, 3, 3, 3, -1, -1, -1]] * 2)
        visible = np.tri(QUERIES, dtype=bool) & real[:, None, :] | np.eye(QUERIES, dtype=bool)
        out = attention(*arrays, is_causal=True, token_mask=real, implementation=implementation)
        weighted = attention_with_weights(*arrays, is_causal=True, token_mask=real)[0]
        wanted = torch_attention(*doubles(*arrays), mask=visible)
        np.testing.assert_allclose(out[real], wanted[real], atol=TOLERANCE)
        np.testing.assert_allclose(weighted[real], wanted[real], atol=TOLERANCE)
        assert np.isfinite(out).all()

        segments = {"segment_ids": (ids, ids), "implementation": implementation}
        out = attention(*arrays, is_causal=True, token_mask=real, **segments)
        wanted = torch_attention(*doubles(*arrays), mask=visible & (ids[:, :, None] == ids[:, None]))
        np.testing.assert_allclose(out[real], wanted[real], atol=TOLERANCE)

    @pytest.mark.parametrize("start", [0, 4])
    @pytest.mark.parametrize("apart", [False, True])
    def test_tokens_that_a_cache_holds_already(self, start, apart):
        query, cached_key, cached_value = inputs()
        key, value = (array[:, start : start + QUERIES] for array in (cached_key, cached_value))
        slots = np.arange(KEYS) <= start + np.arange(QUERIES)[:, None]
        real = np.concatenate([np.ones((BATCH, start), bool), SOME_TOKENS, np.ones((BATCH, KEYS), bool)], 1)[:, :KEYS]
        mask = slots & real[:, None] | np.eye(QUERIES, KEYS, start, dtype=bool)

        @jax.jit
        def run(start):
            return prefill_attention(
                query,
                key,
                value,
                cached_key,
                cached_value,
                start,
                mask=jnp.asarray(mask),
                token_mask=jnp.asarray(SOME_TOKENS),
                beginning_apart=apart,
            )

        out = np.asarray(run(start))
        wanted = torch_attention(*doubles(query, cached_key, cached_value), mask=mask).numpy()
        np.testing.assert_allclose(out[SOME_TOKENS], wanted[SOME_TOKENS], atol=TOLERANCE)
        assert ("stablehlo.case" in run.lower(start).as_text()) == apart


class TestCudnn:
    """What is done around cuDNN's kernel, with XLA's in its place."""

    @pytest.fixture(autouse=True)
    def kernel(self, monkeypatch):
        """The shapes that the kernel was given."""
        given = []
        plain = jax.nn.dot_product_attention

        def stand_in(query, key, value, *, mask, scale, is_causal, implementation):
            if implementation == "cudnn":
                given.append((query.shape[1], key.shape[1], None if mask is None else mask.shape))
            return plain(query, key, value, mask=mask, scale=scale, is_causal=is_causal, implementation="xla")

        monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
        return given

    def both(self, arrays, real, **options):
        """Values and gradients at the queries in `real`, through cuDNN's form and through the reference."""
        weight = np.random.default_rng(3).standard_normal(arrays[0].shape).astype(np.float32)
        weight = np.where(real[..., None, None], weight, 0)

        def run(form):
            def loss(arrays):
                out = form(*arrays)
                return jnp.sum(weight * out), jnp.where(real[..., None, None], out, 0)

            gradients, out = jax.grad(loss, has_aux=True)(tuple(map(jnp.asarray, arrays)))
            return out, *gradients

        mask = options.get("mask")
        own = {"scale": 0.4, "is_causal": False, "token_mask": None} | options
        own["mask"] = None if mask is None else mask[:, None]
        reference = functools.partial(attention, **options, scale=0.4, implementation="reference")
        return run(functools.partial(cudnn_attention, **own)), run(reference)

    @pytest.mark.parametrize("length", [7, 8])
    @pytest.mark.parametrize("padded", [False, True])
    def test_causal(self, kernel, length, padded):
        arrays = inputs(length, length)
        real = np.random.default_rng(4).random((BATCH, length)) < (0.6 if padded else 2)
        options = {"token_mask": jnp.asarray(real)} if padded else {}
        for ours, wanted in zip(*self.both(arrays, real, is_causal=True, **options), strict=True):
            np.testing.assert_allclose(ours, wanted, atol=4 * TOLERANCE)
        assert kernel == [(8, 8, None)]

    @pytest.mark.parametrize("masked", [False, True])
    def test_odd_keys(self, kernel, masked):
        arrays, real = inputs(), np.ones((BATCH, QUERIES), bool)
        options = {"mask": jnp.asarray(some_mask())} if masked else {}
        for ours, wanted in zip(*self.both(arrays, real, **options), strict=True):
            np.testing.assert_allclose(ours, wanted, atol=4 * TOLERANCE)
        assert kernel == [(8, 12, (BATCH, 1, 8, 12))]


class TestGradients:
    def test_every_input(self, implementation):
        arrays, mask = inputs(), some_mask()
        weight = np.random.default_rng(2).standard_normal(arrays[0].shape).astype(np.float32)
        tensors = doubles(*arrays, requires_grad=True)
        (torch_attention(*tensors, mask=mask) * torch.tensor(weight)).sum().backward()

        def loss(query, key, value):
            return jnp.sum(weight * attention(query, key, value, mask=mask, implementation=implementation))

        for actual, tensor in zip(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays), tensors, strict=True):
            # Sums over up to 14 queries of products of three factors.
            np.testing.assert_allclose(actual, tensor.grad, atol=4 * TOLERANCE)

    def test_nothing_to_see_is_finite(self, implementation):
        arrays, mask = inputs(), some_mask()
        mask[0, 2] = False
        mask[1] = False

        def loss(query, key, value):
            out = attention(query, key, value, mask=mask, implementation=implementation)
            return jnp.sum(jnp.square(out)), out

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
        for array in (out, *gradients):
            assert np.isfinite(array).all()


class TestWeights:
    def test_without_dropout(self):
        arrays, mask = inputs(), some_mask()
        out, weights = attention_with_weights(*arrays, mask=mask)
        np.testing.assert_array_equal(out, attention(*arrays, mask=mask, implementation="reference"))
        assert weights.shape == (BATCH, HEADS, QUERIES, KEYS)
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
        assert (np.where(mask[:, None], 0, weights) == 0).all()
        value = np.repeat(arrays[2], HEADS // KV_HEADS, axis=2)
        np.testing.assert_allclose(out, np.einsum("bhls,bshd->blhd", weights, value), atol=TOLERANCE)

    def test_dropout(self):
        """Dropped weights are zero, kept ones divided by what is kept, and the result is made of them."""
        arrays, rate = inputs(queries=64, keys=64), 0.25
        whole = np.asarray(attention_with_weights(*arrays)[1])
        result = attention_with_weights(*arrays, dropout_rate=rate, dropout_key=jax.random.key(0))
        out, dropped = (np.asarray(array) for array in result)
        kept = dropped != 0
        np.testing.assert_allclose(dropped[kept], whole[kept] / (1 - rate), rtol=1e-6)
        # The share of 49,152 draws that are dropped has a standard deviation of 0.002.
        assert abs(1 - kept.mean() - rate) < 0.01
        value = np.repeat(arrays[2], HEADS // KV_HEADS, axis=2)
        np.testing.assert_allclose(out, np.einsum("bhls,bshd->blhd", dropped, value), atol=TOLERANCE)

    def test_errors(self):
        arrays = inputs()
        with pytest.raises(ValueError, match=r"dropout_rate is 1.0; it must be at least 0 and less than 1"):
            attention_with_weights(*arrays, dropout_rate=1.0)
        with pytest.raises(ValueError, match=r"dropout_key is None and dropout_rate is 0.1"):
            attention_with_weights(*arrays, dropout_rate=0.1)


def as_arguments(length=256, *, dtype=jnp.bfloat16, head_dim=128):
    shape = jax.ShapeDtypeStruct((2, length, 4, head_dim), dtype)
    return shape, shape, shape


def chosen(monkeypatch, platform, arguments, **options):
    """Which implementation None stands for on a platform: the backends are replaced by ones that report themselves."""
    calls = []
    monkeypatch.setattr(module, "platform", lambda: platform)
    monkeypatch.setattr(module, "compute_capability", lambda: 9.0)
    monkeypatch.setattr(module, "masked_attention", lambda query, *_, **__: calls.append("xla") or query)
    monkeypatch.setattr(module, "_splash", lambda query, *_, **__: calls.append("splash") or query)
    monkeypatch.setattr(module, "causal_attention", lambda query, *_, **__: calls.append("xla") or query)

    def dot_product_attention(query, *_, implementation, **__):
        calls.append(implementation)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", dot_product_attention)
    # The undecorated function: a jitted one would remember the choice made for another platform.
    names = [name for name in ("mask", "token_mask", "segment_ids") if name in options]
    arrays = [options.pop(name) for name in names]
    jax.eval_shape(
        lambda q, k, v, *rest: attention.__wrapped__(q, k, v, **dict(zip(names, rest, strict=True)), **options),
        *arguments,
        *arrays,
    )
    (call,) = calls
    return call


class TestChoice:
    MASK = jax.ShapeDtypeStruct((2, 256, 256), jnp.bool_)
    ODD_MASK = jax.ShapeDtypeStruct((2, 255, 255), jnp.bool_)
    TOKENS = jax.ShapeDtypeStruct((2, 256), jnp.bool_)
    IDS = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    @pytest.mark.parametrize(
        ("platform", "arguments", "options", "wanted"),
        [
            ("cpu", {}, {"is_causal": True}, "xla"),
            ("gpu", {}, {"is_causal": True}, "cudnn"),
            ("gpu", {"head_dim": 224}, {"mask": MASK}, "cudnn"),
            ("gpu", {"dtype": jnp.float32}, {"is_causal": True}, "xla"),
            ("gpu", {"head_dim": 20}, {"is_causal": True}, "xla"),
            ("gpu", {"length": 255}, {"is_causal": True}, "cudnn"),
            ("gpu", {"length": 255}, {"mask": ODD_MASK}, "cudnn"),
            ("gpu", {}, {"is_causal": True, "token_mask": TOKENS}, "cudnn"),
            ("gpu", {}, {"is_causal": True, "segment_ids": (IDS, IDS)}, "xla"),
            ("gpu", {}, {"is_causal": True, "segment_ids": (IDS, IDS), "token_mask": TOKENS}, "xla"),
            ("tpu", {}, {"is_causal": True}, "splash"),
            ("tpu", {"dtype": jnp.float32, "head_dim": 160}, {"is_causal": True}, "splash"),
            ("tpu", {"length": 200}, {"is_causal": True}, "xla"),
            ("tpu", {}, {}, "xla"),
            ("tpu", {}, {"is_causal": True, "mask": MASK}, "xla"),
        ],
    )
    def test_none(self, monkeypatch, platform, arguments, options, wanted):
        assert chosen(monkeypatch, platform, as_arguments(**arguments), **options) == wanted

    @pytest.mark.parametrize(
        ("platform", "implementation", "arguments", "options", "message"),
        [
            ("cpu", "cudnn", {}, {}, "'cudnn' cannot serve: it needs a GPU, and this runs on cpu"),
            ("gpu", "cudnn", {"dtype": jnp.float32}, {}, "query has dtype float32; it takes bfloat16 and float16"),
            ("gpu", "cudnn", {"head_dim": 264}, {}, "head_dim is 264; it takes multiples of 8 up to 256"),
            ("gpu", "cudnn", {}, {"is_causal": True, "segment_ids": (IDS, IDS)}, "segment_ids were given, which would"),
            ("gpu", "splash", {}, {"is_causal": True}, "'splash' cannot serve: it needs a TPU, and this runs on gpu"),
            ("tpu", "splash", {}, {}, "is_causal is False; it is set up for causal attention only"),
            ("tpu", "splash", {}, {"is_causal": True, "mask": MASK}, "mask was given; it takes is_causal and segment"),
            ("tpu", "splash", {"length": 200}, {"is_causal": True}, "200 queries and 200 keys; it takes multiples of"),
        ],
    )
    def test_named_serves_or_raises(self, monkeypatch, platform, implementation, arguments, options, message):
        with pytest.raises(ValueError, match=message):
            chosen(monkeypatch, platform, as_arguments(**arguments), implementation=implementation, **options)


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"implementation": "flash"}, "implementation is 'flash'; it must be None or one of 'reference', 'xla'"),
            ({"query": np.zeros((2, 7, 6), np.float32)}, r"query has shape \(2, 7, 6\); it must have 4 axes"),
            ({"query": np.zeros((2, 7, 6, 5), np.int32)}, "query has dtype int32; it must be a floating-point type"),
            ({"key": np.zeros((2, 11, 3, 4), np.float32)}, r"key has shape .* = \(2, 11, 3, 5\)"),
            ({"value": np.zeros((2, 10, 3, 5), np.float32)}, "value has shape .*; it must be the shape of key"),
            ({"value": np.zeros((2, 11, 3, 5), np.float16)}, "value has dtype float16; it must be query's, float32"),
            ({"query": np.zeros((2, 7, 4, 5), np.float32)}, "key has 3 heads and query has 4; .* a multiple"),
            ({"is_causal": True}, "is_causal is True with 7 queries and 11 keys; it needs as many queries as keys"),
            ({"mask": np.ones((2, 7, 12), bool)}, r"mask has shape \(2, 7, 12\); .* \(2, 7, 11\)"),
            ({"mask": np.ones((2, 7, 11), np.int32)}, "mask has dtype int32; it must be bool, True where"),
            ({"segment_ids": np.zeros((2, 7), np.int32)}, "segment_ids must be a tuple of two arrays"),
            ({"segment_ids": (np.zeros((2, 7), int), np.zeros((2, 7), int))}, r"segment_ids\[1\] has shape \(2, 7\)"),
            ({"token_mask": np.ones((2, 7), bool)}, "token_mask was given and is_causal is False; say with mask"),
        ],
    )
    def test_messages(self, changes, message):
        arguments = dict(zip(("query", "key", "value"), inputs(), strict=True))
        with pytest.raises(ValueError, match=message):
            attention(**(arguments | changes))


# Compiles forward and backward for a TPU that is not there. The mesh says so, and None must then choose the kernel.
SPLASH_PROGRAM = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec
    from zamba2_jax.ops.attention import attention

    head_dim, rows, heads = map(int, sys.argv[1:])
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = jax.sharding.Mesh(np.array(topology.devices[: rows * heads]).reshape(rows, heads), ("data", "tensor"))
    by_row, by_head = (NamedSharding(mesh, PartitionSpec("data", *rest)) for rest in ((), (None, "tensor")))
    query = jax.ShapeDtypeStruct((2, 512, 4, head_dim), jnp.bfloat16, sharding=by_head)
    ids = jax.ShapeDtypeStruct((2, 512), jnp.int32, sharding=by_row)

    def loss(query, key, value, ids):
        out = attention(query, key, value, scale=0.1, is_causal=True, segment_ids=(ids, ids))
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, query, query, ids).compile()
    print("kernels:", compiled.as_text().count("tpu_custom_call"))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the TPU compiler: pip install 'jax[tpu]'")
@pytest.mark.parametrize(("head_dim", "rows", "heads"), [(128, 1, 1), (160, 1, 1), (224, 1, 1), (128, 2, 2)])
def test_splash_compiles_for_tpus(head_dim, rows, heads):
    """On one chip, and on four: rows over two, heads over two."""
    variables = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SPLASH_PROGRAM), *map(str, (head_dim, rows, heads))],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    # Forward, the gradient of the queries, that of keys and values.
    assert "kernels: 3" in result.stdout


class TestBlockedCausal:
    """The "xla" form of causal attention takes queries in blocks: groups of several and a rest, whole blocks only, less
    than one."""

    @pytest.mark.parametrize(("length", "groups"), [(3 * BLOCK + 37, 2), (2 * BLOCK, 8), (1, 8)])
    def test_values_and_gradients(self, monkeypatch, length, groups):
        monkeypatch.setattr(blocked_attention, "GROUPS", groups)
        rng = np.random.default_rng(length)
        query = jnp.asarray(rng.normal(size=(2, length, 4, 3)), jnp.float32)
        key, value = (jnp.asarray(rng.normal(size=(2, length, 2, 3)), jnp.float32) for _ in range(2))
        segments = jnp.asarray(np.sort(rng.integers(0, 3, (2, length))))
        weight = jnp.asarray(rng.normal(size=query.shape), jnp.float32)

        def run(implementation, *arrays):
            # Not through `attention` itself, whose compiled program would outlive the patched constant.
            out = attention.__wrapped__(
                *arrays, is_causal=True, segment_ids=(segments, segments), implementation=implementation
            )
            return jnp.sum(out * weight), out

        arrays = (query, key, value)
        grads, out = jax.grad(lambda a: run("xla", *a), has_aux=True)(arrays)
        wanted_grads, wanted = jax.grad(lambda a: run("reference", *a), has_aux=True)(arrays)
        np.testing.assert_allclose(out, wanted, atol=2e-6)
        for ours, theirs in zip(grads, wanted_grads, strict=True):
            # Sums over up to `length` queries of float32 products of order one.
            np.testing.assert_allclose(ours, theirs, atol=2e-5)

    def test_no_square_of_scores_in_memory(self):
        length = 8192
        array = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)

        def loss(query, key, value):
            return attention(query, key, value, is_causal=True, implementation="xla").sum()

        memory = jax.jit(jax.grad(loss)).lower(array, array, array).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.25 * 2 * length * length * 4

    @pytest.mark.parametrize("length", [300, 1024])
    def test_many_queries_against_a_cache(self, length):
        slots = 1 << 14  # blocks of 64 queries: a rest, and none
        rng = np.random.default_rng(length)
        query = jnp.asarray(rng.normal(size=(2, length, 2, 3)), jnp.float32)
        key, value = (jnp.asarray(rng.normal(size=(2, slots, 1, 3)), jnp.float32) for _ in range(2))
        mask = jnp.asarray(rng.random((2, length, slots)) < 0.3).at[0, 5].set(False)
        out = attention(query, key, value, mask=mask, implementation="xla")
        wanted = attention(query, key, value, mask=mask, implementation="reference")
        assert np.isfinite(out).all()
        np.testing.assert_allclose(out, wanted, atol=2e-6)

    def test_memory_of_reading_a_long_cache_is_bounded(self):
        queries, slots, heads = 2048, 1 << 16, 2
        query = jax.ShapeDtypeStruct((1, queries, heads, 8), jnp.float32)
        key = jax.ShapeDtypeStruct((1, slots, heads, 8), jnp.float32)
        mask = jax.ShapeDtypeStruct((1, queries, slots), jnp.bool_)

        def run(query, key, value, mask):
            return attention(query, key, value, mask=mask, implementation="xla")

        memory = jax.jit(run).lower(query, key, key, mask).compile().memory_analysis()
        # The mask's own copy is a byte a pair; all scores would be 4 * heads.
        assert memory.temp_size_in_bytes < 0.25 * 4 * heads * queries * slots
