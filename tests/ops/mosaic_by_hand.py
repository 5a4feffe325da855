"""Running a Mosaic kernel's program by hand: each of its programs in a thread, with arrays for memories and a matrix
product for the matrix units. Neither hardware nor compiler is tested by that, but what the programs read, compute and
hand to one another is, and that no tile is overwritten before it was used."""

import threading
import types

import jax
import jax.experimental.pallas
import jax.numpy as jnp
import numpy as np

from zamba2_jax.ops.decode import hopper


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


def by_hand(monkeypatch, kernel):
    """Puts threads and arrays in the place of Mosaic's in the module `kernel`; returns what runs a body of it."""
    here, counting = threading.local(), threading.Condition()

    def arrive(count):
        with counting:
            count.array[...] += 1
            counting.notify_all()

    def wait(count, programs):
        with counting:
            assert counting.wait_for(lambda: int(count.array) >= programs, timeout=60), "a program never arrived"

    def store_operand(memory, values, int8=False):
        memory.array[0, : values.shape[0] // 64, 0, :] = np.asarray(values).reshape(-1, 64)

    def widened(tiles, slot, half):
        # In the features' own order, as `store_operand` has them here.
        return Ref(tiles.array[int(slot)][:, half * hopper.DEPTH : (half + 1) * hopper.DEPTH])

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
    for module in (kernel, hopper):
        monkeypatch.setattr(module, "plgpu", mosaic)
        monkeypatch.setattr(
            module, "pl", types.SimpleNamespace(ds=jax.experimental.pallas.ds, when=when, run_scoped=run_scoped)
        )
    monkeypatch.setattr(kernel, "jax", types.SimpleNamespace(lax=lax, nn=jax.nn, Array=jax.Array))
    for name, stand_in in {
        "arrive": arrive,
        "wait": wait,
        "barrier": lambda: None,
        "store_operand": store_operand,
        "widened": widened,
    }.items():
        monkeypatch.setattr(hopper, name, stand_in)

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


def ref(array):
    return Ref(np.array(array))


def unwritten(shapes):
    """Arrays by name that nobody has written yet."""
    return {
        name: Ref(np.full(shape, np.nan if jnp.issubdtype(dtype, jnp.floating) else 7, dtype))
        for name, (shape, dtype) in shapes.items()
    }
