"""The compiled step: everything that happens on the devices between one batch and the next.

`Program` describes it without allocating anything: `train.plan` compiles for a machine that is not there exactly what
`train.run` runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.optimizer import make_optimizer, make_schedule
from train.options import StepOptions
from zamba2_jax.compilation import for_many_tokens
from zamba2_jax.sharding import batch_sharding, param_shardings

Params = dict[str, jax.Array]
"""Parameters by name, such as "model.layers.0.mamba.A_log"."""

Batch = Mapping[str, jax.Array]
"""Arrays whose first axis is the rows of the whole batch."""

Loss = Callable[[nnx.Module, Batch, jax.Array | None, jax.Array], jax.Array]
"""(model, some rows, key for dropout or None, count) -> the summed loss of the rows over `count`."""

Count = Callable[[Batch], jax.Array]
"""What the loss of a whole batch is the mean of: its number of counted tokens, or rows."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes and a checkpoint holds.

    Attributes:
        step: () int32, batches trained on, skipped ones included.
        params: the trained parameters, float32.
        optimizer: optax's state.
        key: the run's random key; a step derives its own from it.
        skipped: () int32, how many updates were left out because loss or gradient was not finite.
        bad_steps: () int32, how many of these came last, in a row.
    """

    step: jax.Array
    params: Params
    optimizer: Any
    key: jax.Array
    skipped: jax.Array
    bad_steps: jax.Array


class Skeleton:
    """A model taken apart: what it is, and its parameters by name, of which some are trained and the others frozen.

    Args:
        model: concrete or abstract (`nnx.eval_shape`).
        trainable: an NNX filter of its trained parameters, `nnx.Param` for all or `zamba2_jax.lora.trainable(model)`.
    """

    def __init__(self, model: nnx.Module, trainable: nnx.filterlib.Filter = nnx.Param):
        self.config = model.config
        self._graph, state = nnx.split(model)
        self._variables = {_name(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
        chosen = nnx.filterlib.to_predicate(trainable)
        self._trained = {name: chosen(path, variable) for name, (path, variable) in self._variables.items()}

    def build(self, params: Params, frozen: Params) -> nnx.Module:
        """The model with these arrays."""
        arrays = {**params, **frozen}
        flat = [(path, variable.replace(arrays[name])) for name, (path, variable) in self._variables.items()]
        return nnx.merge(self._graph, nnx.from_flat_state(flat))

    def split(self, model: nnx.Module) -> tuple[Params, Params]:
        """The trained arrays, in float32, and the frozen ones of a model like this one."""
        _, state = nnx.split(model)
        arrays = {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}
        trained = {name: array.astype(jnp.float32) for name, array in self._part(arrays, True).items()}
        return trained, self._part(arrays, False)

    def abstract(self, mesh: Mesh) -> tuple[Params, Params]:
        """Shapes, dtypes and shardings of the trained and the frozen arrays.

        Raises:
            ValueError: the mesh does not divide the model.
        """
        state = nnx.from_flat_state([(path, variable) for path, variable in self._variables.values()])
        shardings = dict(nnx.to_flat_state(param_shardings(state, mesh)))
        arrays = {
            name: jax.ShapeDtypeStruct(
                variable.shape, jnp.float32 if self._trained[name] else variable.dtype, sharding=shardings[path]
            )
            for name, (path, variable) in self._variables.items()
        }
        return self._part(arrays, True), self._part(arrays, False)

    def _part(self, arrays: Mapping[str, Any], trained: bool) -> dict[str, Any]:
        return {name: array for name, array in arrays.items() if self._trained[name] == trained}


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


@dataclasses.dataclass(frozen=True)
class Program:
    """The step for one model, its options and a mesh; see `make_program`.

    Attributes:
        train_step: jitted, (state, frozen, batch) -> (state, metrics); donates the state. Metrics are () arrays: loss,
            grad_norm, learning_rate, tokens (not padding), skipped, bad_steps.
        eval_step: jitted, (params, frozen, batch) -> (summed loss, count).
        init_state: jitted, (params, key) -> the state of step 0; donates the parameters.
        state, frozen: abstract, with shardings.
        skeleton: of the model.
        mesh: to run under: `with jax.set_mesh(program.mesh): ...`.
    """

    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    init_state: Callable[..., TrainState]
    state: TrainState
    frozen: Params
    skeleton: Skeleton
    mesh: Mesh

    def abstract_batch(self, shapes: Mapping[str, tuple[int, ...]]) -> Batch:
        """int32 arrays of these shapes, spread over the mesh as batches are."""
        return {
            name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows_sharding(self.mesh, len(shape)))
            for name, shape in shapes.items()
        }


def rows_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """Of a batch's arrays, (b, l) or (b,): rows over data and fsdp, a row's tokens over sequence."""
    return NamedSharding(mesh, PartitionSpec(*batch_sharding(mesh).spec[:ndim]))


def make_program(skeleton: Skeleton, options: StepOptions, mesh: Mesh, loss: Loss, count: Count) -> Program:
    """The step, and the state that it takes, as abstract values.

    Args:
        skeleton: of the model; it carries the dtype of computation, the policy of gradient checkpointing and so on.
        options: of the optimiser, and how many parts a batch is taken in (`accumulate`).
        mesh: of devices, which may be ones of a topology that is not there.
        loss, count: what is minimised, and what it is the mean of.
    """
    optimizer, schedule = make_optimizer(options), make_schedule(options)
    params, frozen = skeleton.abstract(mesh)

    def init_state(params: Params, key: jax.Array) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, optimizer.init(params), key, zero, zero)

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        # ---- the loss of the whole batch and its gradient, in `accumulate` parts
        total = jnp.maximum(count(batch), 1).astype(jnp.float32)

        def part_loss(params: Params, rows: Batch, key: jax.Array) -> jax.Array:
            return loss(skeleton.build(params, frozen), rows, key, total)

        key = jax.random.fold_in(state.key, state.step)
        value, gradient = _summed_gradient(part_loss, state.params, batch, key, options.accumulate)

        # ---- the update, unless something is not a number
        norm = optax.global_norm(gradient)
        good = jnp.isfinite(value) & jnp.isfinite(norm)
        direction, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        rate = schedule(state.step)
        updated = jax.tree.map(lambda array, change: array - rate * change, state.params, direction)
        updated, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), (updated, optimizer_state), (state.params, state.optimizer)
        )

        bad = 1 - good.astype(jnp.int32)
        state = TrainState(
            step=state.step + 1,
            params=updated,
            optimizer=optimizer_state,
            key=state.key,
            skipped=state.skipped + bad,
            bad_steps=(state.bad_steps + bad) * bad,
        )
        metrics = {
            "loss": value,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens": _real_tokens(batch),
            "skipped": state.skipped,
            "bad_steps": state.bad_steps,
        }
        return state, metrics

    # ---- the same as abstract values
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(init_state, params, key)
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda _: replicated, state)
    of_params = {name: array.sharding for name, array in params.items()}
    of_optimizer = optax.tree_utils.tree_map_params(
        optimizer, lambda _, sharding: sharding, state.optimizer, of_params, transform_non_params=lambda _: replicated
    )
    shardings = dataclasses.replace(shardings, params=of_params, optimizer=of_optimizer)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings
    )
    return Program(
        train_step=jax.jit(
            train_step,
            donate_argnums=0,
            out_shardings=(shardings, replicated),
            compiler_options=for_many_tokens(),
        ),
        eval_step=make_eval_step(skeleton, loss, count, mesh),
        init_state=jax.jit(init_state, donate_argnums=0, out_shardings=shardings),
        state=state,
        frozen=frozen,
        skeleton=skeleton,
        mesh=mesh,
    )


def make_eval_step(
    skeleton: Skeleton, loss: Loss, count: Count, mesh: Mesh
) -> Callable[[Params, Params, Batch], tuple[jax.Array, jax.Array]]:
    """Jitted: (params, frozen, batch) -> (summed loss, count), without dropout."""

    def eval_step(params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return loss(skeleton.build(params, frozen), batch, None, jnp.ones((), jnp.float32)), count(batch)

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(eval_step, out_shardings=replicated, compiler_options=for_many_tokens())


def make_predict_step(
    skeleton: Skeleton, predict: Callable[[nnx.Module, Batch], jax.Array], mesh: Mesh
) -> Callable[[Params, Params, Batch], jax.Array]:
    """Jitted: (params, frozen, batch) -> what `predict` makes of the batch, whole on every device."""

    def predict_step(params: Params, frozen: Params, batch: Batch) -> jax.Array:
        return predict(skeleton.build(params, frozen), batch)

    return jax.jit(predict_step, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _summed_gradient(
    loss: Callable[[Params, Batch, jax.Array], jax.Array], params: Params, batch: Batch, key: jax.Array, parts: int
) -> tuple[jax.Array, Params]:
    """Loss and gradient of a batch, taken in `parts` of equally many rows; both are sums over the parts."""
    gradient_of = jax.value_and_grad(loss)
    if parts == 1:
        return gradient_of(params, batch, key)

    def split(array: jax.Array) -> jax.Array:
        """(b, ...) to (parts, b / parts, ...). A part takes every so many-th row, so that it holds as many of each
        device's rows as the others."""
        array = array.reshape(array.shape[0] // parts, parts, *array.shape[1:])
        return jnp.moveaxis(array, 1, 0)

    def add_part(
        sums: tuple[jax.Array, Params], part: tuple[Batch, jax.Array]
    ) -> tuple[tuple[jax.Array, Params], None]:
        rows, index = part
        return jax.tree.map(jnp.add, sums, gradient_of(params, rows, jax.random.fold_in(key, index))), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    sums, _ = jax.lax.scan(add_part, zero, (jax.tree.map(split, dict(batch)), jnp.arange(parts)))
    return sums


def _real_tokens(batch: Batch) -> jax.Array:
    """() int32: how many tokens of a batch are not padding, which is segment 0 or masked."""
    real = batch["segment_ids"] if "segment_ids" in batch else batch["attention_mask"]
    return jnp.sum(real != 0, dtype=jnp.int32)
