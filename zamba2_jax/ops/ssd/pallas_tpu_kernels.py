"""The kernels of `pallas_tpu`: one forward, two backward.

With a_t = dt_t A and s_t the sum of a over the chunk's tokens up to and including t, L_ij = exp(s_i - s_j) for j <= i
within one segment and 0 elsewhere, f_i = exp(s_i) what is left at i of the chunk's first state S, e_j = exp(s_q - s_j)
what is left of j at the chunk's end:

    y_i = sum_j (C_i·B_j) L_ij dt_j x_j + f_i S C_i + D x_i          S <- f_q S + sum_j e_j dt_j x_j B_jᵀ

The grid is (row, group, chunk, block of heads), the last two in order. The states of all heads of a group stay in VMEM
from one chunk to the next, and C Bᵀ, which a group's heads share, from one block of heads to the next. No matrix over
two tokens and no state leaves the chip, but for the states with which the backward pass begins its chunks.

The layout keeps all 128 lanes at work: heads lie side by side in lanes, (tokens, heads · head dim), states are (state,
heads · head dim), and what is one number per token and head arrives as rows (heads, tokens). Where several heads share
128 lanes (a tile), a product is taken for the whole tile, which costs the matrix unit no more, and each head keeps its
lanes of it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8
# Added to exponents of what may not be seen: finite, so that no infinity meets a zero.
HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes after padding. A block is the heads of one program, all of one group; a tile is heads that share lanes."""

    batch: int
    groups: int
    blocks: int  # per group
    heads: int  # per block
    headdim: int  # divides LANES, or a multiple of it
    state: int
    chunks: int
    chunk: int
    dtype: jnp.dtype
    interpret: bool | pltpu.InterpretParams = False

    @property
    def width(self) -> int:
        """Lanes of a tile."""
        return max(self.headdim, LANES)

    @property
    def lanes(self) -> int:
        """Lanes of a block."""
        return self.heads * self.headdim

    @property
    def tiles(self) -> list[list[int]]:
        """The heads of each tile of a block."""
        count = self.width // self.headdim
        return [list(range(first, first + count)) for first in range(0, self.heads, count)]

    @property
    def row_heads(self) -> int:
        """Rows that the heads of a block take in an array of rows."""
        return -(-self.heads // SUBLANES) * SUBLANES

    @property
    def rows(self) -> int:
        """`high`, `low` and `dt` of a block's heads, each padded to `row_heads`, and `SUBLANES` rows for segments."""
        return 3 * self.row_heads + SUBLANES


def forward(plan: Plan, x, rows, B, C, D, state, *, keep_states: bool = False) -> tuple[jax.Array, ...]:
    """x (b, l, G·lanes), G = groups·blocks; rows (b, G, plan.rows, l) float32; B, C (b, g, l, n); D (G, 1, lanes) or
    None; state (b, n, G·lanes). Returns y like x and the last state; with `keep_states` also what `states` returns."""
    refs = {"x": x, "rows": rows, "B": B, "C": C} | ({} if D is None else {"D": D}) | {"initial": state}
    outputs = {"y": x, "final": state} | ({"starts": _starts(plan, x, state)} if keep_states else {})
    scratch = {
        "state": (plan.blocks, plan.state, plan.lanes),
        "scores": (plan.chunk, plan.chunk),
        "bias": (plan.chunk, plan.chunk),
    }
    return _call(_forward_kernel, plan, refs, outputs, scratch, name="ssd_forward")


def states(plan: Plan, x, rows, B, state) -> jax.Array:
    """The state at the start of each chunk, (b, c, n, G·lanes) in x's dtype, which is what products take."""
    refs = {"x": x, "rows": rows, "B": B, "initial": state}
    outputs = {"starts": _starts(plan, x, state)}
    scratch = {"state": (plan.blocks, plan.state, plan.lanes)}
    return _call(_states_kernel, plan, refs, outputs, scratch, name="ssd_states")[0]


def _starts(plan: Plan, x, state) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((plan.batch, plan.chunks, *state.shape[1:]), x.dtype)


def backward(plan: Plan, x, rows, B, C, D, starts, dy, dfinal) -> tuple[jax.Array, ...]:
    """Returns dx, drows, dB, dC, dD (b, c, 1, G·lanes) for each row and chunk, and dinitial.

    In drows the gradient of the sums s stands at `high`, that of dt outside the sums at dt, and zero at `low`.
    """
    refs = {"x": x, "rows": rows, "B": B, "C": C} | ({} if D is None else {"D": D})
    refs |= {"starts": starts, "dy": dy, "dfinal": dfinal}
    outputs = {"dx": x, "drows": rows, "dB": B, "dC": C}
    outputs |= {} if D is None else {"dD": jax.ShapeDtypeStruct((plan.batch, plan.chunks, 1, x.shape[2]), jnp.float32)}
    outputs |= {"dinitial": dfinal}
    square, by_state = (plan.chunk, plan.chunk), (plan.chunk, plan.state)
    scratch = {"dstate": (plan.blocks, plan.state, plan.lanes), "scores": square, "off_diagonal": square}
    scratch |= {"bias": square, "dscores": square, "dB_sum": by_state, "dC_sum": by_state}
    results = _call(_backward_kernel, plan, refs, outputs, scratch, name="ssd_backward", reverse=True)
    return results if D is not None else (*results[:4], None, results[4])


def _call(kernel, plan, inputs, outputs, scratch, *, name, reverse=False):
    """A kernel receives its arguments by name: references to blocks of `inputs`, of `outputs`, and to `scratch`."""
    names = [*inputs, *outputs, *scratch]

    def body(*refs):
        kernel(plan, **dict(zip(names, refs, strict=True)))

    specs = _specs(plan, reverse)
    return pl.pallas_call(
        body,
        name=name,
        grid=(plan.batch, plan.groups, plan.chunks, plan.blocks),
        in_specs=[specs[key] for key in inputs],
        out_specs=[specs[key] for key in outputs],
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in outputs.values()],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        ),
        interpret=plan.interpret,
    )(*inputs.values())


def _specs(plan: Plan, reverse: bool) -> dict[str, pl.BlockSpec]:
    last = plan.chunks - 1

    def spec(shape: Sequence[int | None], index: Callable) -> pl.BlockSpec:
        """`index` receives row, group, chunk, block of the group and block of all; `reverse` turns the chunks round."""

        def place(b, g, c, j):
            return index(b, g, last - c if reverse else c, j, g * plan.blocks + j)

        return pl.BlockSpec(shape, place)

    def at_chunk(chunk: int, resting: int) -> pl.BlockSpec:
        """The blocks of a state, each moved once: on all chunks but one, the index rests on the block that comes next
        or was the last, and nothing is moved."""

        def index(b, g, c, j, block):
            return b, 0, g * plan.blocks + jnp.where(c == chunk, j, resting)

        return spec((None, plan.state, plan.lanes), index)

    tokens = spec((None, plan.chunk, plan.lanes), lambda b, g, c, j, block: (b, c, block))
    rows = spec((None, None, plan.rows, plan.chunk), lambda b, g, c, j, block: (b, block, 0, c))
    by_group = spec((None, None, plan.chunk, plan.state), lambda b, g, c, j, block: (b, g, c, 0))
    starts = spec((None, None, plan.state, plan.lanes), lambda b, g, c, j, block: (b, c, 0, block))
    return {
        **dict.fromkeys(("x", "y", "dx", "dy"), tokens),
        **dict.fromkeys(("rows", "drows"), rows),
        **dict.fromkeys(("B", "C", "dB", "dC"), by_group),
        "D": spec((None, 1, plan.lanes), lambda b, g, c, j, block: (block, 0, 0)),
        "dD": spec((None, None, 1, plan.lanes), lambda b, g, c, j, block: (b, c, 0, block)),
        "starts": starts,
        # Read on the first chunk of the sweep, written on its last.
        "initial": at_chunk(0, plan.blocks - 1),
        "final": at_chunk(last, 0),
        "dfinal": at_chunk(last, plan.blocks - 1),
        "dinitial": at_chunk(0, 0),
    }


def _forward_kernel(plan, x, rows, B, C, initial, y, final, state, scores, bias, D=None, starts=None):
    chunk, block = pl.program_id(2), pl.program_id(3)
    decays = Decays(plan, rows[...])

    @pl.when(block == 0)
    def _():
        scores[...] = _dot(C[...], B[...], (1, 1))
        bias[...] = decays.bias()

    @pl.when(chunk == 0)
    def _():
        state[block] = initial[...]

    for index, heads in enumerate(plan.tiles):
        lanes = pl.ds(index * plan.width, plan.width)
        values = x[:, lanes]
        wide = values.astype(jnp.float32)
        before = state[block, :, lanes]
        if starts is not None:
            starts[:, lanes] = before.astype(plan.dtype)

        within = []
        for head in heads:
            decay = jnp.exp(decays.column("high", head) - decays.row("high", head) + _low_and_bias(decays, head, bias))
            within.append(_dot((scores[...] * decay * decays.row("dt", head)).astype(plan.dtype), values))
        result = _each_its_lanes(plan, within)
        result += _dot(C[...], before.astype(plan.dtype)) * decays.spread("from_start", heads)
        if D is not None:
            result += D[:, lanes] * wide
        y[:, lanes] = result.astype(plan.dtype)

        inflow = (wide * decays.spread("inflow", heads)).astype(plan.dtype)
        state[block, :, lanes] = before * decays.spread_last(heads) + _dot(B[...], inflow, (0, 0))

    @pl.when(chunk == plan.chunks - 1)
    def _():
        final[...] = state[block]


def _low_and_bias(decays, head, bias):
    return (decays.column("low", head) - decays.row("low", head)) + bias[...]


def _states_kernel(plan, x, rows, B, initial, starts, state):
    chunk, block = pl.program_id(2), pl.program_id(3)
    decays = Decays(plan, rows[...])

    @pl.when(chunk == 0)
    def _():
        state[block] = initial[...]

    for index, heads in enumerate(plan.tiles):
        lanes = pl.ds(index * plan.width, plan.width)
        before = state[block, :, lanes]
        starts[:, lanes] = before.astype(plan.dtype)
        inflow = (x[:, lanes].astype(jnp.float32) * decays.spread("inflow", heads)).astype(plan.dtype)
        state[block, :, lanes] = before * decays.spread_last(heads) + _dot(B[...], inflow, (0, 0))


def _backward_kernel(
    plan,
    x,
    rows,
    B,
    C,
    starts,
    dy,
    dfinal,
    dx,
    drows,
    dB,
    dC,
    dinitial,
    dstate,
    scores,
    off_diagonal,
    bias,
    dscores,
    dB_sum,
    dC_sum,
    D=None,
    dD=None,
):
    """Matrices over two tokens are transposed here, (key j, query i): all but two small products then take their
    operands as they lie.

    The gradient of s is the difference between a row's and a column's sum of one float32 matrix, dW_ij W_ij for the
    weights W of y = W x: what cancels between them then cancels to float32 rounding, also where the products' operands
    are bfloat16. The diagonal, which does not depend on s, is left out: where decay is strong it is all but everything,
    and its rounding would be more than the rest.
    """
    sweep, block = pl.program_id(2), pl.program_id(3)
    decays = Decays(plan, rows[...])

    @pl.when(block == 0)
    def _():
        scores[...] = _dot(B[...], C[...], (1, 1))
        down, along = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
        off_diagonal[...] = jnp.where(down == along, 0.0, scores[...])
        bias[...] = decays.bias(transposed=True)
        dscores[...] = jnp.zeros_like(dscores)
        dB_sum[...] = jnp.zeros_like(dB_sum)
        dC_sum[...] = jnp.zeros_like(dC_sum)

    @pl.when(sweep == 0)
    def _():
        dstate[block] = dfinal[...]

    diagonal = jnp.sum(B[...].astype(jnp.float32) * C[...].astype(jnp.float32), axis=1, keepdims=True)
    gradients = Gradients(plan)
    for index, heads in enumerate(plan.tiles):
        lanes = pl.ds(index * plan.width, plan.width)
        values, gradient = x[:, lanes], dy[:, lanes]
        wide, wide_gradient = values.astype(jnp.float32), gradient.astype(jnp.float32)
        start, dend = starts[:, lanes], dstate[block, :, lanes]
        dend_low = dend.astype(plan.dtype)

        from_end = _dot(B[...], dend_low) * decays.spread("to_end", heads)  # gradient of dt x, by way of the state
        from_start = decays.spread("from_start", heads)
        by_start = wide_gradient * from_start * _dot(C[...], start)
        by_end = wide * from_end
        by_itself = wide * wide_gradient
        by_state = jnp.sum(start.astype(jnp.float32) * dend, axis=0, keepdims=True)

        within = []
        for head in heads:
            mine = functools.partial(_own_lanes, plan, head)
            exponent = decays.row("high", head) - decays.column("high", head)
            exponent += (decays.row("low", head) - decays.column("low", head)) + bias[...]
            decay = jnp.exp(exponent)
            dt = decays.column("dt", head)
            dweights = _dot(mine(wide).astype(plan.dtype), gradient, (1, 1))
            within.append(_dot((scores[...] * decay).astype(plan.dtype), gradient))
            dweights *= decay
            dscores[...] += dweights * dt
            product = dweights * off_diagonal[...]
            gradients.add_row("high", head, jnp.sum(product * dt, axis=0, keepdims=True))

            end = jnp.sum(mine(by_end), axis=1, keepdims=True)
            onwards = jnp.sum(product, axis=1, keepdims=True) + end
            itself = jnp.sum(mine(by_itself), axis=1, keepdims=True) * diagonal
            gradients.add_column("dt", head, onwards + itself)
            gradients.add_column("high", head, jnp.sum(mine(by_start), axis=1, keepdims=True) - dt * onwards)
            total = jnp.sum(dt * end, axis=0, keepdims=True)
            total += decays.last(head) * jnp.sum(mine(by_state), axis=1, keepdims=True)
            gradients.add_last("high", head, total)

        result = (_each_its_lanes(plan, within) + from_end) * decays.spread("dt", heads)
        if D is not None:
            result += D[:, lanes] * wide_gradient
            dD[:, lanes] = jnp.sum(by_itself, axis=0, keepdims=True)
        dx[:, lanes] = result.astype(plan.dtype)

        inflow = (wide * decays.spread("inflow", heads)).astype(plan.dtype)
        outflow = (wide_gradient * from_start).astype(plan.dtype)
        dB_sum[...] += _dot(inflow, dend_low, (1, 1))
        dC_sum[...] += _dot(outflow, start, (1, 1))
        dstate[block, :, lanes] = dend * decays.spread_last(heads) + _dot(C[...], outflow, (0, 0))

    drows[...] = gradients.as_rows()

    @pl.when(block == plan.blocks - 1)
    def _():
        low = dscores[...].astype(plan.dtype)
        dB[...] = (dB_sum[...] + _dot(low, C[...])).astype(plan.dtype)
        dC[...] = (dC_sum[...] + _dot(low, B[...], (0, 0))).astype(plan.dtype)

    @pl.when(sweep == plan.chunks - 1)
    def _():
        dinitial[...] = dstate[block]


class Decays:
    """What `rows` says of a chunk and a block of heads: rows (1, q) and columns (q, 1) of a head, and both spread over
    the lanes of a tile."""

    def __init__(self, plan: Plan, rows: jax.Array):
        self.plan = plan
        n = plan.row_heads
        high, low, dt = rows[:n], rows[n : 2 * n], rows[2 * n : 3 * n]
        segment = rows[3 * n : 3 * n + 1]
        from_start = jnp.exp(jnp.where(segment == 0, high + low, HIDDEN))
        to_go = (high[:, -1:] - high) + (low[:, -1:] - low)
        to_end = jnp.exp(jnp.where(segment == segment[:, -1:], to_go, HIDDEN))
        self._rows = {
            "high": high,
            "low": low,
            "dt": dt,
            "from_start": from_start,
            "to_end": to_end,
            "inflow": to_end * dt,
            "segment": rows[3 * n :],
        }
        self._columns = jnp.concatenate(list(self._rows.values()), axis=0).T
        self._first = {name: index * n for index, name in enumerate(self._rows)}

    def row(self, name: str, head: int) -> jax.Array:
        return self._rows[name][head : head + 1]

    def column(self, name: str, head: int) -> jax.Array:
        index = self._first[name] + head
        return self._columns[:, index : index + 1]

    def last(self, head: int) -> jax.Array:
        """(1, 1): what is left of the chunk's first state at its end."""
        return self.row("from_start", head)[:, -1:]

    def spread(self, name: str, heads: Sequence[int]) -> jax.Array:
        return _each_its_lanes(self.plan, [self.column(name, head) for head in heads])

    def spread_last(self, heads: Sequence[int]) -> jax.Array:
        return _each_its_lanes(self.plan, [self.last(head) for head in heads])

    def bias(self, *, transposed: bool = False) -> jax.Array:
        """(q, q): 0 where query i (down, or along if transposed) may see key j, HIDDEN elsewhere."""
        shape = (self.plan.chunk,) * 2
        down, along = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        seen = (down <= along) if transposed else (down >= along)
        same = self.column("segment", 0) == self.row("segment", 0)
        return jnp.where(seen & same, 0.0, HIDDEN)


class Gradients:
    """Collects rows (1, q), columns (q, 1) and last numbers (1, 1) of heads into the gradient of `rows`."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._rows = jnp.zeros((plan.rows, plan.chunk), jnp.float32)
        self._columns = jnp.zeros((plan.chunk, plan.rows), jnp.float32)
        self._row_index = jax.lax.broadcasted_iota(jnp.int32, self._rows.shape, 0)
        self._row_token = jax.lax.broadcasted_iota(jnp.int32, self._rows.shape, 1)
        self._column_index = jax.lax.broadcasted_iota(jnp.int32, self._columns.shape, 1)

    def _index(self, name: str, head: int) -> int:
        return {"high": 0, "dt": 2 * self.plan.row_heads}[name] + head

    def add_row(self, name: str, head: int, row: jax.Array) -> None:
        self._rows += jnp.where(self._row_index == self._index(name, head), row, 0.0)

    def add_column(self, name: str, head: int, column: jax.Array) -> None:
        self._columns += jnp.where(self._column_index == self._index(name, head), column, 0.0)

    def add_last(self, name: str, head: int, number: jax.Array) -> None:
        here = (self._row_index == self._index(name, head)) & (self._row_token == self.plan.chunk - 1)
        self._rows += jnp.where(here, number, 0.0)

    def as_rows(self) -> jax.Array:
        return self._rows + self._columns.T


def _each_its_lanes(plan: Plan, parts: Sequence[jax.Array]) -> jax.Array:
    """(rows, width) of which each head's lanes are taken from its part, (rows, width) or (rows, 1)."""
    shape = (parts[0].shape[0], plan.width)
    result = jnp.broadcast_to(parts[0], shape)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    for index, part in enumerate(parts[1:], start=1):
        result = jnp.where(lane >= index * plan.headdim, part, result)
    return result


def _own_lanes(plan: Plan, head: int, array: jax.Array) -> jax.Array:
    """`array` (rows, width) with zeros in the lanes of other heads than `head`."""
    if plan.headdim >= plan.width:
        return array
    owner = jax.lax.broadcasted_iota(jnp.int32, array.shape, 1) // plan.headdim
    return jnp.where(owner == head % (plan.width // plan.headdim), array, 0.0)


def _dot(left: jax.Array, right: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """The product over axis contract[0] of left and contract[1] of right, in float32. Float32 operands are multiplied
    in full, which the matrix unit, made for bfloat16, does only when told to."""
    return jax.lax.dot_general(
        left,
        right,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
