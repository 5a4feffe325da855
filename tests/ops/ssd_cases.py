"""Inputs of the recurrence, what it makes of them in float64, and how both are compared: of all `test_ssd*`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from zamba2_jax.ops.ssd import ssd
from zamba2_jax.ops.ssd.api import FUSED, IMPLEMENTATIONS

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


def by_form(name, *, xla, fused):
    """Parametrizes over `form` and a second argument. Fused kernels are given other values: their chunks are not ours
    to choose, and every shape costs seconds in the interpreter."""
    values = [(form, value) for form in IMPLEMENTATIONS for value in (fused if form in FUSED.values() else xla)]
    return pytest.mark.parametrize(("form", name), values, indirect=["form"])


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
