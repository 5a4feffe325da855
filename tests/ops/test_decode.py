"""The kernels of a decoding step against the plain operations, in Pallas' interpreter or, where there is a GPU
(`JAX_PLATFORMS=cuda`), as they are; and their lowering for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zamba2_jax.layers.rope import rotate, rotation
from zamba2_jax.ops.attention import attention
from zamba2_jax.ops.conv import causal_conv_step
from zamba2_jax.ops.decode import attention_gpu, products_gpu, rows_gpu, state_gpu, window_gpu
from zamba2_jax.ops.decode.cached_attention import cached_attention, cached_attention_of_several, in_blocks
from zamba2_jax.ops.decode.strips_gpu import Tiling
from zamba2_jax.ops.quantized import Integers, dequantize_int4, dequantize_int8, quantize_int4, quantize_int8
from zamba2_jax.ops.ssd import ssd_step, time_step

INTERPRET = jax.default_backend() != "gpu"


@pytest.fixture(autouse=True)
def exact_products():
    """A GPU rounds the operands of float32 products otherwise."""
    with jax.default_matmul_precision("highest"):
        yield


# Strips of 16 columns and rounds of 64 rows: small weights take several programs and rounds.
SMALL = Tiling(columns=16, depth=64, warps=1, stages=2)
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def draw(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def integers(seed: int, depth: int, columns: int, bits: int = 8) -> Integers:
    quantize = quantize_int8 if bits == 8 else quantize_int4
    return Integers(*quantize(draw(seed, depth, columns), axis=0))


def dense(weight: jax.Array | Integers) -> jax.Array:
    if isinstance(weight, jax.Array):
        return weight
    dequantize = dequantize_int8 if weight.group is None else dequantize_int4
    return dequantize(weight.values, weight.scale).T


def normalised(x, eps, groups=1):
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    return (grouped / np.sqrt(np.square(grouped).mean(-1, keepdims=True) + eps)).reshape(x.shape)


class TestProducts:
    @pytest.mark.parametrize("rows", [1, 3, 16])
    @pytest.mark.parametrize("depth", [128, 90])
    def test_several_weights(self, rows, depth):
        x = draw(0, rows, depth)
        weights = [draw(2, depth, 40), draw(3, depth, 24), draw(4, depth, 1030)]
        results = products_gpu.skinny_matmul(x, weights, tiling=SMALL, interpret=INTERPRET)
        for result, weight in zip(results, weights, strict=True):
            np.testing.assert_allclose(result, x @ weight, **CLOSE)

    def test_one_weight(self):
        x, weight = draw(0, 2, 100), draw(1, 100, 33)
        (result,) = products_gpu.skinny_matmul(x, [weight], tiling=SMALL, interpret=INTERPRET)
        np.testing.assert_allclose(result, x @ weight, **CLOSE)

    @pytest.mark.parametrize(("rows", "splits"), [(1, 4), (3, 2)])
    def test_pieces_along_the_depth(self, rows, splits):
        x, weight = draw(0, rows, 128), draw(1, 128, 48)
        pieces = products_gpu.split_matmul(x, weight, splits=splits, tiling=SMALL, interpret=INTERPRET)
        expected = jnp.einsum("bsk,skn->sbn", x.reshape(rows, splits, -1), weight.reshape(splits, -1, 48))
        np.testing.assert_allclose(pieces, expected, **CLOSE)

    @pytest.mark.parametrize(("depth", "groups"), [(4096, 1), (7168, 2), (2048, 1), (100, 1), (90, 3)])
    def test_a_weight_is_cut_into_equal_pieces_that_respect_groups(self, depth, groups):
        splits = products_gpu.depth_splits(jax.ShapeDtypeStruct((depth, 2048), jnp.bfloat16), Tiling(), groups)
        assert depth % splits == 0
        assert splits % groups == 0

    def test_a_weight_is_not_cut_inside_a_group_of_int4(self):
        assert products_gpu.depth_splits(integers(0, 384, 16, bits=4), SMALL) == 2
        assert products_gpu.depth_splits(integers(0, 384, 16, bits=4), Tiling(columns=16, depth=32)) == 2
        assert products_gpu.depth_splits(integers(0, 384, 16), Tiling(columns=16, depth=32)) == 4

    @pytest.mark.parametrize(("rows", "depth"), [(1, 128), (3, 90), (16, 96)])
    def test_integers(self, rows, depth):
        """int8 and int4 weights beside plain ones."""
        x = draw(0, rows, depth)
        weights = [integers(2, depth, 40), draw(3, depth, 24), integers(4, depth, 1030)]
        if depth % products_gpu.SMALLEST_INT4_GROUP == 0:
            weights += [integers(5, depth, 1030, bits=4), integers(6, depth, 24, bits=4)]
        results = products_gpu.skinny_matmul(x, weights, tiling=SMALL, interpret=INTERPRET)
        for result, weight in zip(results, weights, strict=True):
            np.testing.assert_allclose(result, x @ dense(weight), **CLOSE)

    @pytest.mark.parametrize(("bits", "splits"), [(8, 4), (4, 3)])
    def test_integers_in_pieces(self, bits, splits):
        x, weight = draw(0, 3, 384), integers(1, 384, 48, bits=bits)
        pieces = products_gpu.split_matmul(x, weight, splits=splits, tiling=SMALL, interpret=INTERPRET)
        expected = jnp.einsum("bsk,skn->sbn", x.reshape(3, splits, -1), dense(weight).reshape(splits, -1, 48))
        np.testing.assert_allclose(pieces, expected, **CLOSE)

    @pytest.mark.parametrize("activation", products_gpu.ACTIVATIONS)
    def test_gated_activation(self, activation):
        gate_up, low, up = draw(0, 3, 80), draw(1, 3, 12), draw(2, 12, 80)
        result = products_gpu.gated_activation(
            gate_up, low, up, activation=activation, tiling=SMALL, interpret=INTERPRET
        )
        plain = {"gelu": lambda x: jax.nn.gelu(x, approximate=False), "silu": jax.nn.silu, "relu": jax.nn.relu}
        plain["swish"] = plain["silu"]
        whole = gate_up + low @ up
        np.testing.assert_allclose(result, plain[activation](whole[:, :40]) * whole[:, 40:], **CLOSE)

    def test_head(self):
        x, embedding = draw(0, 3, 36), draw(1, 50, 36)
        np.testing.assert_allclose(
            products_gpu.head_matmul(x, embedding, interpret=INTERPRET), x @ embedding.T, **CLOSE
        )


class TestRows:
    """Whole rows between two products."""

    @pytest.mark.parametrize("widths", [(64,), (40, 24), (7, 600)])
    def test_norm_of_what_is_put_together(self, widths):
        parts = [[draw(index, 3, width), draw(index + 5, 3, width)][: 2 - index] for index, width in enumerate(widths)]
        scale = draw(9, sum(widths))
        result = rows_gpu.rms_norm(parts, scale, eps=1e-3, interpret=INTERPRET)
        whole = jnp.concatenate([sum(part[1:], part[0]) for part in parts], axis=-1)
        np.testing.assert_allclose(result, normalised(whole, 1e-3) * scale, **CLOSE)

    @pytest.mark.parametrize("width", [48, 512, 700])
    def test_pieces_alone(self, width):
        pieces = draw(0, 4, 2, width)
        result, normed = rows_gpu.join(pieces, dtype=jnp.float32, interpret=INTERPRET)
        np.testing.assert_allclose(result, pieces.sum(0), **CLOSE)
        assert normed is None

    @pytest.mark.parametrize(("rows", "groups", "splits"), [(1, 1, 4), (3, 2, 4), (2, 2, 2)])
    def test_pieces_of_a_normed_row_and_a_residual(self, rows, groups, splits):
        x, weight, residual = draw(0, rows, 128), draw(1, 128, 48), draw(3, rows, 48)
        pieces = jnp.einsum("bsk,skn->sbn", x.reshape(rows, splits, -1), weight.reshape(splits, -1, 48))
        squares = jnp.square(x).reshape(rows, groups, 4, -1).sum(-1)[:, :, :3]
        squares = squares.at[:, :, 2].add(jnp.square(x).reshape(rows, groups, 4, -1).sum(-1)[:, :, 3])
        scale = draw(4, 48)
        result, normed = rows_gpu.join(
            pieces,
            squares,
            residual,
            scale,
            groups=groups,
            width=128 // groups,
            gate_eps=1e-2,
            eps=1e-3,
            dtype=jnp.float32,
            interpret=INTERPRET,
        )
        expected = normalised(x, 1e-2, groups) @ weight + residual
        np.testing.assert_allclose(result, expected, **CLOSE)
        np.testing.assert_allclose(normed, normalised(expected, 1e-3) * scale, **CLOSE)

    @pytest.mark.parametrize("width", [48, 700])
    def test_norm_of_the_sum(self, width):
        pieces, scale = draw(0, 4, 2, width), draw(1, width)
        result, normed = rows_gpu.join(pieces, scale=scale, eps=1e-3, dtype=jnp.float32, interpret=INTERPRET)
        np.testing.assert_allclose(result, pieces.sum(0), **CLOSE)
        np.testing.assert_allclose(normed, normalised(pieces.sum(0), 1e-3) * scale, **CLOSE)

    @pytest.mark.parametrize(("width", "more"), [(64, 64), (48, 700)])
    def test_norm_of_the_sum_and_what_is_beside_it(self, width, more):
        pieces, beside, scale = draw(0, 4, 2, width), draw(1, 2, more), draw(2, width + more)
        result, normed = rows_gpu.join(
            pieces, scale=scale, beside=beside, eps=1e-3, dtype=jnp.float32, interpret=INTERPRET
        )
        np.testing.assert_allclose(result, pieces.sum(0), **CLOSE)
        both = jnp.concatenate([pieces.sum(0), beside], axis=1)
        np.testing.assert_allclose(normed, normalised(both, 1e-3) * scale, **CLOSE)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("bias", "limit", "masked"), [(True, None, False), (False, (0.3, 0.9), True)])
def test_mamba_projections(rows, bias, limit, masked):
    depth, inner, both, heads, taps = 72, 40, 24, 5, 4
    x = draw(0, rows, depth)
    zx, bc, dt = draw(2, depth, 2 * inner), draw(3, depth, both), draw(4, depth, heads)
    conv_x, conv_bc = ((draw(n, taps, w), draw(n + 1, w) if bias else None) for n, w in ((5, inner), (7, both)))
    window_x, window_bc, dt_bias = draw(9, rows, taps - 1, inner), draw(10, rows, taps - 1, both), draw(11, heads)
    keep = jnp.arange(rows) % 2 == 1 if masked else None
    results = products_gpu.mamba_projections(
        x,
        zx,
        bc,
        dt,
        conv_x,
        conv_bc,
        window_x,
        window_bc,
        dt_bias,
        None if keep is None else keep.astype(jnp.int32),
        limit=limit,
        tiling=SMALL,
        interpret=INTERPRET,
    )
    wide = x @ zx
    new_x, next_x = causal_conv_step(wide[:, inner:], window_x, *conv_x, activation="silu")
    new_bc, next_bc = causal_conv_step(x @ bc, window_bc, *conv_bc, activation="silu")
    if masked:
        next_x = jnp.where(keep[:, None, None], next_x, window_x)
        next_bc = jnp.where(keep[:, None, None], next_bc, window_bc)
    step = time_step(x @ dt, dt_bias, limit=limit, mask=keep)
    for result, expected in zip(results, (wide[:, :inner], new_x, new_bc, step, next_x, next_bc), strict=True):
        np.testing.assert_allclose(result, expected, **CLOSE)


@pytest.mark.parametrize(("bias", "limit", "masked"), [(True, None, False), (False, (0.3, 0.9), True)])
def test_conv_step(bias, limit, masked):
    rows, inner, both, heads, taps = 3, 300, 24, 5, 4
    zx, bc, dt, dt_bias = draw(0, rows, 2 * inner), draw(1, rows, both), draw(2, rows, heads), draw(3, heads)
    conv_x, conv_bc = ((draw(n, taps, w), draw(n + 1, w) if bias else None) for n, w in ((5, inner), (7, both)))
    window_x, window_bc = draw(9, rows, taps - 1, inner), draw(10, rows, taps - 1, both)
    keep = jnp.asarray([True, False, True]) if masked else None
    results = window_gpu.conv_step(
        zx,
        bc,
        dt,
        conv_x,
        conv_bc,
        window_x,
        window_bc,
        dt_bias,
        None if keep is None else keep.astype(jnp.int32),
        offset=inner,
        limit=limit,
        interpret=INTERPRET,
    )
    new_x, next_x = causal_conv_step(zx[:, inner:], window_x, *conv_x, activation="silu")
    new_bc, next_bc = causal_conv_step(bc, window_bc, *conv_bc, activation="silu")
    if masked:
        next_x = jnp.where(keep[:, None, None], next_x, window_x)
        next_bc = jnp.where(keep[:, None, None], next_bc, window_bc)
    step = time_step(dt, dt_bias, limit=limit, mask=keep)
    for result, expected in zip(results, (new_x, new_bc, step, next_x, next_bc), strict=True):
        np.testing.assert_allclose(result, expected, **CLOSE)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_state_step(groups, dtype):
    rows, heads, headdim, size = 2, 4, 16, 8
    state = draw(0, rows, heads, headdim, size, dtype=dtype)
    x, z = draw(1, rows, heads * headdim), draw(2, rows, heads * headdim)
    bc, a_log, skip = draw(3, rows, 2 * groups * size), draw(4, heads), draw(5, heads)
    dt = jnp.abs(draw(6, rows, heads)).at[0].set(0.0)
    gated, new = state_gpu.state_step(
        state, x, z, bc, dt, a_log, skip, groups=groups, rows_per_program=8, warps=1, interpret=INTERPRET
    )
    B, C = bc.reshape(rows, 2, groups, size).swapaxes(0, 1)
    y, expected = ssd_step(state, x.reshape(rows, heads, headdim), dt, -jnp.exp(a_log), B, C, skip)
    np.testing.assert_allclose(gated, y.reshape(x.shape) * jax.nn.silu(z), **CLOSE)
    plain, _ = state_gpu.state_step(
        state, x, None, bc, dt, a_log, skip, groups=groups, rows_per_program=8, warps=1, interpret=INTERPRET
    )
    np.testing.assert_allclose(plain, y.reshape(x.shape), **CLOSE)
    scale = draw(7, heads * headdim)
    scaled, _, squares = state_gpu.state_step(
        state, x, z, bc, dt, a_log, skip, scale, groups=groups, rows_per_program=8, warps=1, interpret=INTERPRET
    )
    np.testing.assert_allclose(scaled, gated * scale, **CLOSE)
    np.testing.assert_allclose(squares.sum(-1), np.square(gated).reshape(rows, groups, -1).sum(-1), **CLOSE)
    assert new.dtype == dtype
    # A bfloat16 state is rounded once, when it is stored.
    np.testing.assert_allclose(
        new.astype(jnp.float32), expected, rtol=2e-5 if dtype == jnp.float32 else 2**-8, atol=2e-5
    )
    np.testing.assert_array_equal(new[0], state[0])


class TestCachedAttention:
    SHAPES = pytest.mark.parametrize(
        ("rows", "heads", "kv_heads", "head_dim", "slots", "length"),
        [(1, 2, 2, 16, 40, 33), (3, 4, 2, 10, 24, 5), (2, 4, 1, 8, 24, 24), (2, 2, 2, 20, 19, 1)],
    )

    @staticmethod
    def case(rows, heads, kv_heads, head_dim, slots, length):
        query = draw(0, rows, heads, head_dim)
        key, value = draw(1, rows, slots, kv_heads, head_dim), draw(2, rows, slots, kv_heads, head_dim)
        mask = jnp.asarray(np.random.default_rng(slots).random((rows, slots)) < 0.7).at[:, 0].set(True)
        # What lies beyond the filled slots must not matter.
        key, value = key.at[:, length:].set(1e4), value.at[:, length:].set(1e4)
        visible = (mask & (jnp.arange(slots) < length))[:, None]
        expected = attention(query[:, None], key, value, scale=0.3, mask=visible, implementation="reference")
        return (query, key, value, mask, jnp.int32(length)), expected[:, 0]

    @SHAPES
    def test_plain_form_in_blocks(self, rows, heads, kv_heads, head_dim, slots, length):
        arguments, expected = self.case(rows, heads, kv_heads, head_dim, slots, length)
        query, key, value, slot_mask, length = arguments
        blocks = in_blocks(query[:, None], key, value, slot_mask[:, None], length, scale=0.3, block=8)
        np.testing.assert_allclose(blocks[:, 0], expected, **CLOSE)
        np.testing.assert_allclose(cached_attention(*arguments, scale=0.3), expected, **CLOSE)

    @SHAPES
    def test_several_tokens(self, rows, heads, kv_heads, head_dim, slots, length):
        """Each sees the slots that its mask says, of the blocks up to the last one's."""
        (_, key, value, mask, length), _ = self.case(rows, heads, kv_heads, head_dim, slots, length)
        query = draw(3, rows, 3, heads, head_dim)
        seen = mask[:, None] & (jnp.arange(slots) < jnp.maximum(length - jnp.array([[2], [1], [0]]), 1))
        expected = attention(query, key, value, scale=0.3, mask=seen, implementation="reference")
        np.testing.assert_allclose(in_blocks(query, key, value, seen, length, scale=0.3, block=8), expected, **CLOSE)
        result = cached_attention_of_several(query, key, value, seen, length, scale=0.3)
        np.testing.assert_allclose(result, expected, **CLOSE)

    @SHAPES
    def test_kernel(self, rows, heads, kv_heads, head_dim, slots, length):
        arguments, expected = self.case(rows, heads, kv_heads, head_dim, slots, length)
        result = cached_attention(*arguments, scale=0.3, implementation="pallas_gpu", interpret=INTERPRET)
        np.testing.assert_allclose(result, expected, **CLOSE)

    @pytest.mark.parametrize("parts", [1, 2, 8])
    def test_kernel_split_over_slots(self, parts):
        (query, key, value, mask, length), expected = self.case(3, 4, 2, 10, 24, 20)
        result = attention_gpu.cached_attention(
            query,
            key,
            value,
            mask,
            length,
            scale=0.3,
            masked_score=-1e30,
            interpret=INTERPRET,
            slots_per_step=8,
            parts=parts,
        )
        np.testing.assert_allclose(result, expected, **CLOSE)

    def test_a_row_that_sees_nothing_stays_finite(self):
        (query, key, value, mask, length), _ = self.case(2, 2, 2, 16, 24, 10)
        mask = mask.at[0].set(False)
        for form in ({"implementation": "xla"}, {"implementation": "pallas_gpu", "interpret": INTERPRET}):
            assert np.isfinite(cached_attention(query, key, value, mask, length, scale=0.3, **form)).all()

    @pytest.mark.skipif(not INTERPRET, reason="there is a GPU")
    def test_a_kernel_that_cannot_serve_raises(self):
        arguments, _ = self.case(2, 2, 2, 16, 24, 10)
        with pytest.raises(ValueError, match=r"pallas_gpu.*needs a GPU"):
            cached_attention(*arguments, scale=0.3, implementation="pallas_gpu")

    @pytest.mark.parametrize(
        ("position", "value", "message"),
        [
            (0, draw(0, 2, 3, 16), "multiple of key's"),
            (2, draw(0, 2, 24, 2, 8), "value has shape"),
            (3, jnp.ones((2, 24)), "slot_mask has dtype"),
            (4, jnp.ones((1,), jnp.int32), "length has shape"),
        ],
    )
    def test_arguments_that_do_not_fit(self, position, value, message):
        arguments = list(self.case(2, 2, 2, 16, 24, 10)[0])
        arguments[position] = value
        with pytest.raises(ValueError, match=message):
            cached_attention(*arguments, scale=0.3)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("adapter", "rope"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("rank", [12, 4])
def test_rotate_and_store(rank, rows, adapter, rope):
    heads, kv_heads, head_dim, slots = 4, 2, 10, 24
    widths = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    projected = tuple(draw(index, rows, width) for index, width in enumerate(widths))
    low = tuple(draw(index + 3, rows, rank) for index in range(3)) if adapter else None
    up = tuple(draw(index + 6, rank, width) for index, width in enumerate(widths)) if adapter else None
    key_cache, value_cache = draw(9, rows, slots, kv_heads, head_dim), draw(10, rows, slots, kv_heads, head_dim)
    angles = rotation(jnp.arange(rows)[:, None] + 3, head_dim, 1e4) if rope else None
    query, keys, values = attention_gpu.rotate_and_store(
        projected,
        low,
        up,
        None if angles is None else tuple(part[:, 0] for part in angles),
        key_cache,
        value_cache,
        jnp.int32(4),
        interpret=INTERPRET,
    )
    if adapter:
        projected = [array + left @ right for array, left, right in zip(projected, low, up, strict=True)]
    whole = [array.reshape(rows, 1, -1, head_dim) for array in projected]
    if rope:
        whole[:2] = [rotate(array, *angles) for array in whole[:2]]
    np.testing.assert_allclose(query.reshape(whole[0].shape), whole[0], **CLOSE)
    np.testing.assert_allclose(keys, key_cache.at[:, 4].set(whole[1][:, 0]), **CLOSE)
    np.testing.assert_allclose(values, value_cache.at[:, 4].set(whole[2][:, 0]), **CLOSE)


# jax 0.11 asks the GPU for its model before it lowers a kernel.
@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="lowering for CUDA without a GPU: jax 0.10 only")
class TestLoweringForCuda:
    @staticmethod
    def lower(function, *shapes):
        arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
        text = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("__gpu$xla.gpu.triton") == 1

    HALF, SINGLE = jnp.bfloat16, jnp.float32

    @pytest.mark.parametrize(("width", "heads"), [(2048, 64), (2560, 80), (3584, 112)])
    def test_mamba_projections(self, width, heads):
        half, inner = self.HALF, 2 * width
        shapes = [(8, width), (width, 2 * inner), (width, 256), (width, heads), (4, inner), (inner,)]
        shapes += [(4, 256), (256,), (8, 3, inner), (8, 3, 256), (heads,)]

        def function(x, zx, bc, dt, kx, bx, kbc, bbc, *rest):
            return products_gpu.mamba_projections(x, zx, bc, dt, (kx, bx), (kbc, bbc), *rest, None, limit=None)

        self.lower(function, *((shape, half) for shape in shapes))

    @pytest.mark.parametrize("head_dim", [128, 160, 224])
    @pytest.mark.parametrize("rows", [1, 8])
    def test_attention(self, rows, head_dim):
        half, cache = self.HALF, (rows, 1152, 32, head_dim)
        self.lower(
            lambda *arrays: attention_gpu.cached_attention(*arrays, scale=0.1, masked_score=-1e30, interpret=False),
            ((rows, 32, head_dim), half),
            (cache, half),
            (cache, half),
            ((rows, 1152), jnp.bool_),
            ((), jnp.int32),
        )

    def test_conv_step(self):
        half = self.HALF
        shapes = [(8, 8192), (8, 256), (8, 64), (4, 4096), (4096,), (4, 256), (256,), (8, 3, 4096), (8, 3, 256), (64,)]

        def function(x, bc, dt, kx, bx, kbc, bbc, *rest):
            return window_gpu.conv_step(x, bc, dt, (kx, bx), (kbc, bbc), *rest, None, offset=4096, limit=None)

        self.lower(function, *((shape, half) for shape in shapes))

    def test_state_step(self):
        half, single = self.HALF, self.SINGLE
        self.lower(
            lambda *arrays: state_gpu.state_step(*arrays, groups=2),
            ((2, 112, 64, 64), single),
            ((2, 7168), half),
            ((2, 7168), half),
            ((2, 256), half),
            ((2, 112), single),
            ((112,), single),
            ((112,), single),
        )
