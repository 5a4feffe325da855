"""The whole-layer kernel's program (`ops.decode.layer_gpu`), run by hand: each of its 132 programs in a thread, with
arrays for memories and a matrix product for the matrix units. Neither hardware nor compiler is tested by that, but what
the programs read, compute and hand to one another is, and that no tile is overwritten before it was used."""

import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zamba2_jax import Zamba2Config
from zamba2_jax.cache import MambaState
from zamba2_jax.layers import decoding, whole_layer
from zamba2_jax.layers.mamba2 import MambaLayer
from zamba2_jax.ops.decode import layer_gpu
from zamba2_jax.tokens import TokenLayout

SIZES = {
    "hidden_size": 2048,
    "n_mamba_heads": 64,
    "mamba_d_state": 128,
    "num_hidden_layers": 1,
    "layers_block_type": ["mamba"],
}


class Ref:
    """An array that is read and written by index, as Pallas' references are."""

    def __init__(self, array):
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype

    @property
    def at(self):
        return _At(self)

    def __getitem__(self, index):
        return jnp.asarray(self.array[_index(index)])

    def __setitem__(self, index, value):
        self.array[_index(index)] = np.asarray(value)

    def transpose(self, axes):
        return Ref(self.array.transpose(axes))


class _At:
    def __init__(self, ref):
        self.ref = ref

    def __getitem__(self, index):
        index = _index(index)
        # With an ellipsis, one element is a view too.
        return Ref(self.ref.array[(*(index if isinstance(index, tuple) else (index,)), ...)])


class Operand(Ref):
    """(8, K) that lies in tiles (1, K / 64, 8, 64), which `ref` shows as they are."""

    def __init__(self, shape, dtype):
        self.ref = Ref(np.full((1, shape[1] // 64, 8, 64), np.nan, dtype))
        self.shape, self.dtype = shape, self.ref.dtype

    @property
    def array(self):
        return self.ref.array[0].transpose(1, 0, 2).reshape(self.shape)


class Barriers:
    """Counts of copies and waits, one pair for each slot."""

    def __init__(self, count):
        self.counts = [[0, 0] for _ in range(count)]

    @property
    def at(self):
        return self

    def __getitem__(self, slot):
        return self.counts[int(slot)]


def _index(index):
    def one(part):
        if hasattr(part, "size") and hasattr(part, "start"):
            return slice(int(part.start), int(part.start) + int(part.size))
        return part if part is Ellipsis or isinstance(part, slice) else int(part)

    return tuple(map(one, index)) if isinstance(index, tuple) else one(index)


def copy(source, target, barrier):
    assert barrier[0] == barrier[1], "a tile was overwritten before it was used"
    barrier[0] += 1
    target.array[...] = source.array


def wait_for_copy(barrier):
    assert barrier[0] == barrier[1] + 1, "a tile was waited for that nobody had asked for"
    barrier[1] += 1


def multiply(total, left, right):
    total.array += left.array.astype(np.float32) @ right.array.astype(np.float32)


def run_scoped(function, *kinds):
    return function(*(kind() for kind in kinds))


def fori_loop(first, last, body, carry):
    for index in range(int(first), int(last)):
        carry = body(jnp.int32(index), carry)
    return carry


def when(condition):
    return lambda body: body() if bool(condition) else None


@pytest.fixture
def by_hand(monkeypatch):
    """Puts threads and arrays in the place of Mosaic's; returns what runs a kernel's body."""
    here, counting = threading.local(), threading.Condition()

    def arrive(count):
        with counting:
            count.array[...] += 1
            counting.notify_all()

    def wait(count, programs):
        with counting:
            assert counting.wait_for(lambda: int(count.array) >= programs, timeout=60), "a program never arrived"

    def store_operand(memory, values):
        memory.array[0, : values.shape[0] // 64, 0, :] = np.asarray(values).reshape(-1, 64)

    class Layout:
        WGMMA = types.SimpleNamespace(reduce=lambda axis: None)
        WG_STRIDED = staticmethod(lambda shape, vec_size: None)

    mosaic = types.SimpleNamespace(
        Layout=Layout,
        load=lambda ref, layout=None, optimized=True: ref[...],
        layout_cast=lambda values, layout: values,
        copy_gmem_to_smem=copy,
        barrier_wait=wait_for_copy,
        wgmma=multiply,
        wgmma_wait=lambda count: None,
        commit_smem=lambda: None,
        SMEM=lambda shape, dtype, transforms=(): (
            lambda: Operand(shape, dtype) if shape[0] == 8 and len(shape) == 2 else Ref(np.zeros(shape, dtype))
        ),
        ACC=lambda shape, dtype: lambda: Ref(np.zeros(shape, dtype)),
        Barrier=lambda num_barriers: lambda: Barriers(num_barriers),
    )
    lax = types.SimpleNamespace(
        axis_index=lambda name: jnp.int32(here.program),
        fori_loop=fori_loop,
        rem=lambda a, b: jnp.int32(int(a) % int(b)),
        rsqrt=jax.lax.rsqrt,
        broadcast_in_dim=jax.lax.broadcast_in_dim,
    )
    monkeypatch.setattr(layer_gpu, "plgpu", mosaic)
    monkeypatch.setattr(layer_gpu, "pl", types.SimpleNamespace(ds=layer_gpu.pl.ds, when=when, run_scoped=run_scoped))
    monkeypatch.setattr(layer_gpu, "jax", types.SimpleNamespace(lax=lax, nn=jax.nn, Array=jax.Array))
    for name, stand_in in (("arrive", arrive), ("wait", wait), ("barrier", lambda: None)):
        monkeypatch.setattr(layer_gpu, f"_{name}", stand_in)
    monkeypatch.setattr(layer_gpu, "_store_operand", store_operand)

    def run(programs, body):
        failed = []

        def one(program):
            here.program = program
            try:
                body()
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=one, args=(program,)) for program in range(programs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]

    return run


def test_program(by_hand, monkeypatch):
    limit = (0.01, 0.05)
    config = Zamba2Config(**SIZES, time_step_limit=limit)
    layer = MambaLayer(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def draw(*shape, dtype=jnp.bfloat16, scale=1.0):
        return jnp.asarray(rng.normal(0.0, scale, shape), dtype)

    mixer = layer.mamba
    for part in (layer.input_layernorm.scale, mixer.norm.scale, mixer.D, mixer.conv_x.bias, mixer.conv_bc.bias):
        part[...] = 1.0 + draw(*part.shape, dtype=part.dtype, scale=0.3)
    before = layer_gpu.Unsummed(
        draw(2048), draw(4, 2048, dtype=jnp.float32), jnp.full((1,), 9000.0), jnp.zeros((2,), jnp.int32)
    )
    added = draw(2048)
    state = MambaState(draw(1, 3, 4096), draw(1, 3, 2, 128), draw(1, 64, 64, 128, dtype=jnp.float32))

    # The plain layer, from the sum that the kernel makes of what the layer before has left.
    factor = jax.lax.rsqrt(before.squares[0] / 4096 + mixer.norm.eps)
    hidden = (before.pieces.sum(axis=0) * factor).astype(jnp.bfloat16) + before.hidden
    layout = TokenLayout.make(
        1, 1, token_mask=None, segment_ids=None, position_ids=None, first_position=jnp.zeros(1, jnp.int32)
    )
    monkeypatch.setattr(decoding, "mamba_obstacle", lambda *_: "switched off")
    expected, left = layer(hidden[None, None], layout, state, added[None, None])

    def ref(array):
        return Ref(np.array(array))

    def unwritten(shape, dtype):
        array = np.full(shape, np.nan if dtype != np.int32 else 7, dtype)
        return Ref(array)

    sizes = layer_gpu.sizes_of(2048, 4096)
    weights = {name: ref(array) for name, array in whole_layer.weights_of(layer).items()}
    arrays = {name: unwritten(*shape) for name, shape in layer_gpu.outputs_of(sizes, np.dtype(jnp.bfloat16)).items()}
    states = [ref(state.conv_x[0]), ref(state.conv_bc.reshape(3, 256)), ref(state.ssm[0])]
    given = [ref(array) for array in (before.waits, before.hidden, before.pieces, before.squares, added)]

    def body():
        layer_gpu._program(
            sizes, list(arrays), layer.input_layernorm.eps, mixer.norm.eps, limit, *given, weights, *states,
            *arrays.values(),
        )  # fmt: skip

    by_hand(sizes.programs, body)
    out = {name: array[...] for name, array in arrays.items()}
    factor = jax.lax.rsqrt(out["squares"][0] / 4096 + mixer.norm.eps)
    got = (out["pieces"].sum(axis=0) * factor).astype(jnp.bfloat16) + out["hidden"]
    np.testing.assert_array_equal(out["hidden"], hidden)
    assert not out["waits"].any()

    def assert_close(ours, theirs):
        ours, theirs = (np.asarray(array, np.float32) for array in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=np.abs(theirs).max() / 100)

    assert_close(got, expected[0, 0])
    assert_close(states[0][...], left.conv_x[0])
    assert_close(states[1][...], left.conv_bc.reshape(3, 256))
    np.testing.assert_allclose(states[2][...], left.ssm[0], rtol=2e-2, atol=2e-2)
