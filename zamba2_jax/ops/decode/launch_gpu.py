"""How the decode kernels are launched: every program sees all of every array and finds its own part.

From JAX 0.11 on XLA launches them so that a kernel may be set up while the one before still runs (programmatic
dependent launch). Letting the next one in at the beginning instead of at the end (`griddepcontrol.launch_dependents`)
was measured to save 2 to 3 % of a step on an H100, and is not done: a kernel of XLA's own that follows may read through
a cache that such a launch does not clear.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def launch(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, ...],
    operands: Sequence[Any],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    warps: int,
    stages: int = 1,
    in_place: Mapping[int, int] | None = None,
    interpret: bool = False,
) -> list[jax.Array]:
    """Runs `kernel(*operands, *outputs)`, all of them references, once for each place of the grid.

    Args:
      name: what a profile shows.
      operands: arrays, or trees of arrays, of which the kernel is given trees of references.
      warps, stages: of a program, for Triton's compiler.
      in_place: outputs that take the memory of operands, by the operands' places; such an operand is an array.
      interpret: run the body in plain JAX, on any device.
    """
    kernel.__name__ = name
    # Pallas counts arrays.
    before = [len(jax.tree.leaves(operands[:place])) for place in range(len(operands))]
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[jax.tree.map(lambda array: _whole(array.shape), operand) for operand in operands],
        out_specs=[_whole(array.shape) for array in outputs],
        out_shape=list(outputs),
        input_output_aliases={before[place]: output for place, output in (in_place or {}).items()},
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=name,
    )(*operands)


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, functools.partial(_origin, len(shape)))


def _origin(rank: int, *_: Any) -> tuple[int, ...]:
    return (0,) * rank
