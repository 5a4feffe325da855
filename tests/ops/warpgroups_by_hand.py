"""Running by hand a Mosaic kernel whose programs have several warpgroups: a thread for each, arrays for memories, and a
matrix product for the matrix units.

The threads take turns, another's coming where one has to wait, so that a test ends the same way each time; where all
wait, it ends at once. What would go wrong in another order, or on a GPU only, is found by keeping account of what is
certain to have happened before what: copies and matrix products go on by themselves until they are waited for, and a
barrier hands on what those who arrived at it knew. So a tile must not be read unless it has certainly arrived, nor
overwritten unless all have certainly read it, whatever the order of this run. The threads of a warpgroup count as
being apart, too, until a barrier of theirs.

Layouts, swizzling and what the compiler makes of it all are not tested.
"""

import dataclasses
import threading
import types
from typing import Any

import jax
import jax.experimental.pallas
import jax.numpy as jnp
import numpy as np

from tests.ops.mosaic_by_hand import fori_loop, when

# Of a Hopper's multiprocessor: bytes that a program can have, and registers for a thread of each of its warpgroups,
# all together.
SHARED_MEMORY = 227 * 1024
REGISTERS = 512


class Ref:
    """An array that is read and written by index, as Pallas' references are: a part of `memory`, which keeps account,
    or in the GPU's memory."""

    def __init__(self, array, memory=None):
        self.array, self.memory = array, memory
        self.shape, self.dtype = array.shape, array.dtype

    @property
    def at(self):
        return _At(self)

    def __getitem__(self, index):
        part = self.at[index]
        if self.memory is not None:
            self.memory.read(part)
        # A copy: JAX would use the memory itself, which others go on to write to.
        return jnp.array(part.array)

    def __setitem__(self, index, value):
        part, value = self.at[index], np.asarray(value)
        assert part.shape == value.shape, f"{value.shape} written to {part.shape}"
        assert part.dtype == value.dtype, f"{value.dtype} written to {part.dtype}"
        if self.memory is None:
            _assert_unwritten(part)
        else:
            self.memory.write(part)
        part.array[...] = value

    def transpose(self, axes):
        return Ref(self.array.transpose(axes), self.memory)


class _At:
    def __init__(self, ref):
        self._ref = ref

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        # With an ellipsis, one element is a view too.
        index = index if any(part is Ellipsis for part in index) else (*index, ...)
        sizes = iter(self._ref.shape)
        array = self._ref.array[tuple(part if part is Ellipsis else _part(part, next(sizes)) for part in index)]
        return Ref(array, self._ref.memory)


def _part(part, size):
    """NumPy would take a negative number for one from the end, and cut a slice short."""
    some = isinstance(part, jax.experimental.pallas.Slice)
    first, count = (int(part.start), int(part.size)) if some else (int(part), 1)
    assert 0 <= first <= first + count <= size, f"{first} to {first + count} of {size}"
    return slice(first, first + count) if some else first


def _assert_unwritten(part):
    assert np.isnan(part.array.astype(np.float32)).all(), "written where a number is already"


def _unwritten(kind):
    return np.full(kind.shape, np.nan, kind.dtype)


@dataclasses.dataclass
class _Access:
    first: int
    end: int
    by: Any  # who: a warpgroup's threads, its matrix products, its copies to the GPU's memory, or copies to a barrier
    time: int  # theirs
    writes: bool
    committed: bool = True  # for the matrix units and copies to see


class _Memory:
    """An allocation of shared memory."""

    def __init__(self, name, array, here):
        self.name, self._here = name, here
        self._start = np.lib.array_utils.byte_bounds(array)[0]
        self._accesses = []

    def read(self, part):
        me = self._here.warpgroup
        self._touch(part, me, me.threads, me.time, writes=False)

    def write(self, part):
        me = self._here.warpgroup
        access = self._touch(part, me, me.threads, me.time, writes=True)
        access.committed = False
        me.uncommitted.append(access)

    def read_by_itself(self, part, by, time):
        self._touch(part, self._here.warpgroup, by, time, writes=False, by_itself=True)

    def write_by_itself(self, part, by, time):
        self._touch(part, self._here.warpgroup, by, time, writes=True, by_itself=True)

    def _touch(self, part, me, by, time, *, writes, by_itself=False):
        first, end = (bound - self._start for bound in np.lib.array_utils.byte_bounds(part.array))
        access = _Access(first, end, by, time, writes)
        what = f"{self.name}, bytes {first} to {end}, by {by}"
        overlapping = [past for past in self._accesses if past.first < end and first < past.end]
        assert writes or any(past.writes for past in overlapping), f"read before anyone has written: {what}"
        for past in overlapping:
            if not writes and not past.writes:
                continue
            certain = me.knows.get(past.by, 0) >= past.time
            assert certain or writes, f"read before it has certainly arrived from {past.by}: {what}"
            assert certain, f"overwritten before {past.by} certainly had done with it: {what}"
            assert past.committed or not by_itself, f"used before {past.by} have committed it: {what}"
        if writes:  # who comes after this comes after those within
            self._accesses = [past for past in self._accesses if past.first < first or end < past.end]
        self._accesses.append(access)
        return access


class _Warpgroup:
    def __init__(self, number, places):
        self.number, self.places = number, places
        self.threads, self.products, self.stores = (
            f"the {what} of warpgroup {number}" for what in ("threads", "products", "copies")
        )
        # How much of what everybody did is certain to have happened. Of its own threads: what all of them know of.
        self.knows = {}
        self.time = 1
        self.begun = {self.products: 0, self.stores: 0}
        self.uncommitted = []
        self.waits = {}
        self.scopes = 0

    def meet(self):
        """A barrier of the warpgroup's threads."""
        self.knows[self.threads] = self.time
        self.time += 1

    def hand_on(self):
        """What is known to one who has seen all threads arrive."""
        known = self.knows | {self.threads: self.time}
        self.time += 1
        return known

    def learn(self, known):
        self.knows = _both(self.knows, known)

    def await_but(self, kind, count):
        """Until at most `count` of those begun go on."""
        self.learn({kind: self.begun[kind] - count})


def _both(one, other):
    return {name: max(one.get(name, 0), other.get(name, 0)) for name in one | other}


class _Barrier:
    def __init__(self, name, arrivals):
        self.name, self._arrivals = name, arrivals
        self._arrived, self._known = 0, {}
        self.phases = []  # what each one that is complete hands on
        self.copies = 0

    def arrive(self, known):
        self._known, self._arrived = _both(self._known, known), self._arrived + 1
        if self._arrived == self._arrivals:
            self.phases.append(self._known)
            self._arrived, self._known = 0, {}

    def complete(self, me):
        return len(self.phases) > me.waits.get(self.name, 0)

    def pass_by(self, me):
        count = me.waits.get(self.name, 0)
        wait, known = f"{self.name}, waits of {me.number}", self.phases[count]
        # A waiter sees but whether the number of phases is even: it must not miss one.
        assert known.get(wait, 0) == count, f"{self.name} may be complete again before warpgroup {me.number} saw it"
        me.waits[self.name] = count + 1
        me.learn(known | {wait: count + 1})

    def check_end(self, warpgroups):
        assert self._arrived == 0, f"{self.name}: {self._arrived} of {self._arrivals} have arrived at the end"
        waits = max(me.waits.get(self.name, 0) for me in warpgroups)
        assert not self.copies or waits == len(self.phases), f"{self.name}: nobody has waited for the last copies"


class _Barriers:
    def __init__(self, name, arrivals, count):
        self.all = [_Barrier(f"{name}[{number}]", arrivals) for number in range(count)]

    @property
    def at(self):
        return self

    def __getitem__(self, number):
        return self.all[_part(number, len(self.all))]


def _one(barrier):
    return barrier if isinstance(barrier, _Barrier) else barrier[0]


class _Accumulator:
    def __init__(self, array, here):
        self.array, self._here = array, here
        self.shape, self.dtype = array.shape, array.dtype
        self.product = 0  # the last one added

    def __getitem__(self, index):
        assert index is Ellipsis
        return self.load(0)

    def load(self, but):
        me = self._here.warpgroup
        me.await_but(me.products, but)
        assert me.knows[me.products] >= self.product, "an accumulator was read before its products were added up"
        return jnp.array(self.array)


@dataclasses.dataclass(frozen=True)
class _Shared:
    shape: tuple[int, ...]
    dtype: Any
    transforms: Any = ()


@dataclasses.dataclass(frozen=True)
class _BarrierKind:
    num_arrivals: int = 1
    num_barriers: int = 1


class _AccumulatorKind:
    def __init__(self, shape, dtype):
        self.initial = np.zeros(shape, dtype)

    @classmethod
    def init(cls, initial):
        kind = cls(initial.shape, initial.dtype)
        kind.initial[...] = initial
        return kind


class _Stopped(Exception):  # noqa: N818
    """Another thread has failed."""


class _Turns:
    """Of threads that run one at a time, until they are done or wait for what is not yet so."""

    def __init__(self, count):
        self._changed = threading.Condition()
        self._turn, self._failure = 0, None
        self._waits = dict.fromkeys(range(count))  # of who is not done: None, or whether it is so, and what

    def run(self, bodies):
        threads = [threading.Thread(target=self._one, args=item) for item in enumerate(bodies)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure

    def _one(self, me, body):
        try:
            self._take_turn(me)
            body()
            del self._waits[me]
            self._hand_on(me)
        except _Stopped:
            pass
        except BaseException as failure:
            self._fail(failure)

    def wait(self, me, is_so, what):
        if not is_so():
            self._waits[me] = is_so, what
            self._hand_on(me)
            self._take_turn(me)
            self._waits[me] = None

    def _take_turn(self, me):
        with self._changed:
            self._changed.wait_for(lambda: self._turn == me or self._failure is not None)
        if self._failure is not None:
            raise _Stopped

    def _hand_on(self, me):
        others = sorted(self._waits, key=lambda other: (other <= me, other))
        ready = [other for other in others if self._waits[other] is None or self._waits[other][0]()]
        if not ready and others:
            waits = ", ".join(f"{other} for {self._waits[other][1]}" for other in sorted(others))
            self._fail(AssertionError(f"all warpgroups wait for ever: {waits}"))
        with self._changed:
            self._turn = ready[0] if ready else None
            self._changed.notify_all()

    def _fail(self, failure):
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()


class _Program:
    """One program of the grid: its warpgroups, and what they share."""

    def __init__(self, mesh, place, here):
        self._here = here
        places = dict(zip(mesh.grid_names, place, strict=True))
        self._warpgroups = [_Warpgroup(me, places | {mesh.thread_name: me}) for me in range(mesh.num_threads)]
        self._turns = _Turns(mesh.num_threads)
        self._scopes, self._barriers = [], []
        self._bytes, self.registers = 0, {}

    def run(self, body):
        def of(me):
            def one():
                self._here.program, self._here.warpgroup = self, me
                body()

            return one

        self._turns.run([of(me) for me in self._warpgroups])
        for barrier in self._barriers:
            barrier.check_end(self._warpgroups)
        for me in self._warpgroups:
            assert me.knows.get(me.stores, 0) == me.begun[me.stores], f"{me.stores} may still read at the end"
        assert sum(self.registers.values()) <= REGISTERS

    def wait(self, barrier):
        me = self._here.warpgroup
        self._turns.wait(me.number, lambda: barrier.complete(me), barrier.name)
        barrier.pass_by(me)

    def allocate(self, kinds):
        """The same for all warpgroups that come to the same place."""
        me = self._here.warpgroup
        me.scopes += 1
        if len(self._scopes) < me.scopes:
            self._scopes.append(jax.tree_util.tree_map_with_path(self._allocate, kinds))
        return self._scopes[me.scopes - 1]

    def _allocate(self, path, kind):
        name = jax.tree_util.keystr(path[1:], simple=True, separator=".")
        if isinstance(kind, _BarrierKind):
            barriers = _Barriers(name, kind.num_arrivals, kind.num_barriers)
            self._barriers += barriers.all
            return barriers
        array = _unwritten(kind)
        self._bytes += array.nbytes
        assert self._bytes <= SHARED_MEMORY, f"{self._bytes} bytes of shared memory"
        return Ref(array, _Memory(name, array, self._here))


def by_hand(monkeypatch, *modules):
    """Puts threads and arrays in the place of Mosaic's in modules with kernels: `pl.kernel` runs them."""
    here = threading.local()

    def copy_in(source, target, barrier):
        barrier, me = _one(barrier), here.warpgroup
        _assert_alike(source, target)
        by, time = f"copies to {barrier.name}", len(barrier.phases) + 1
        target.memory.write_by_itself(target, by, time)
        target.array[...] = source.array
        barrier.copies += 1
        barrier.arrive(me.hand_on() | {by: time})

    def copy_out(source, target):
        me = here.warpgroup
        _assert_alike(target, source)
        me.begun[me.stores] += 1
        source.memory.read_by_itself(source, me.stores, me.begun[me.stores])
        _assert_unwritten(target)
        target.array[...] = source.array

    def wait_for_copies_out(count, wait_read_only=False):
        me = here.warpgroup
        me.await_but(me.stores, count)
        me.meet()

    def commit():
        me = here.warpgroup
        for access in me.uncommitted:
            access.committed = True
        me.uncommitted.clear()
        me.meet()

    def multiply(total, left, right):
        me = here.warpgroup
        assert left.shape == (64, right.shape[0])
        assert total.shape == (64, right.shape[1])
        assert left.dtype == right.dtype == jnp.bfloat16
        me.begun[me.products] += 1
        total.product = me.begun[me.products]
        for operand in (left, right):
            if isinstance(operand, Ref):
                operand.memory.read_by_itself(operand, me.products, total.product)
        left, right = (getattr(operand, "array", operand) for operand in (left, right))
        total.array += np.asarray(left).astype(np.float32) @ right.astype(np.float32)

    def wait_for_products(count):
        here.warpgroup.await_but(here.warpgroup.products, count)

    def set_max_registers(count, action):
        assert count in range(24, 257, 8)
        here.program.registers[here.warpgroup.number] = count

    def accumulator(kind):
        return _Accumulator(kind.initial.copy(), here)

    def run_scoped(function, *kinds, collective_axes=None):
        if collective_axes is not None:
            return function(*here.program.allocate(kinds))
        return function(*(accumulator(kind) for kind in kinds))

    def run_state(function):
        def run(kinds):
            refs = jax.tree.map(accumulator, kinds)
            function(refs)
            return jax.tree.map(lambda ref: ref[...], refs)

        return run

    def kernel(body, *, out_type, mesh, **_):
        def run(*operands):
            given = jax.tree.map(lambda array: Ref(np.array(array)), operands)
            outputs = [Ref(_unwritten(kind)) for kind in out_type]
            for place in np.ndindex(*mesh.grid):
                _Program(mesh, place, here).run(lambda: body(*given, *outputs))
            return [jnp.array(output.array) for output in outputs]

        return run

    def store_column_sums(ref, values):
        ref[...] = values.reshape(4, -1, values.shape[1]).sum(axis=1)

    mosaic = types.SimpleNamespace(
        Layout=types.SimpleNamespace(WGMMA=types.SimpleNamespace(reduce=lambda axis: None)),
        LoweringSemantics=types.SimpleNamespace(Lane=None),
        CompilerParams=types.SimpleNamespace,
        Mesh=types.SimpleNamespace,
        TilingTransform=lambda tiling: None,
        SwizzleTransform=lambda swizzle: None,
        SMEM=_Shared,
        ACC=_AccumulatorKind,
        Barrier=_BarrierKind,
        barrier_arrive=lambda barrier: _one(barrier).arrive(here.warpgroup.hand_on()),
        barrier_wait=lambda barrier: here.program.wait(_one(barrier)),
        broadcasted_iota=lambda dtype, shape, axis, layout: jax.lax.broadcasted_iota(dtype, shape, axis),
        commit_smem=commit,
        copy_gmem_to_smem=copy_in,
        copy_smem_to_gmem=copy_out,
        layout_cast=lambda values, layout: values,
        load=lambda ref, layout=None, optimized=True: ref[...],
        set_max_registers=set_max_registers,
        wait_smem_to_gmem=wait_for_copies_out,
        wgmma=multiply,
        wgmma_accumulator_load=lambda total, wait_n=0: total.load(wait_n),
        wgmma_wait=wait_for_products,
    )
    lax = _but(
        jax.lax,
        axis_index=lambda name: jnp.int32(here.warpgroup.places[name]),
        fori_loop=fori_loop,
        rem=lambda a, b: jnp.int32(int(a) % int(b)),
    )
    pallas = _but(jax.experimental.pallas, when=when, run_scoped=run_scoped, run_state=run_state, kernel=kernel)
    for module in modules:
        monkeypatch.setattr(module, "plgpu", mosaic)
        monkeypatch.setattr(module, "pl", pallas)
        # A program run by hand needs numbers, not what tracing has in their place.
        batching = types.SimpleNamespace(sequential_vmap=lambda function: function)
        monkeypatch.setattr(module, "jax", _but(jax, lax=lax, custom_batching=batching))
        if hasattr(module, "store_column_sums"):  # in Mosaic's dialect, which nothing stands in for
            monkeypatch.setattr(module, "store_column_sums", store_column_sums)


def _but(module, **changes):
    return types.SimpleNamespace(**vars(module) | changes)


def _assert_alike(source, target):
    assert source.memory is None, "what is copied lies in shared memory already"
    assert target.memory is not None, "what is copied to shared memory goes elsewhere"
    assert source.shape == target.shape, f"{source.shape} copied to {target.shape}"
    assert source.dtype == target.dtype, f"{source.dtype} copied to {target.dtype}"
