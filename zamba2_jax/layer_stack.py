"""Runs a model's layers one after the other: as they are, recomputed in the backward pass, or scanned.

A model stores a list of layers. How they are run is a choice (`Execution`) that changes no parameter and no result.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from zamba2_jax import layer_pattern
from zamba2_jax.cache import KeyValue, MambaState
from zamba2_jax.layer_pattern import Stage
from zamba2_jax.layers import decoding, whole_layer
from zamba2_jax.layers.linear import Linear
from zamba2_jax.layers.mamba2 import MambaLayer
from zamba2_jax.layers.projection import PROJECTION
from zamba2_jax.layers.shared_block import AttentionContext, SharedBlockUse, SharedTransformerBlock
from zamba2_jax.layers.shared_gradients import for_this_use
from zamba2_jax.ops.attention import ATTENTION
from zamba2_jax.tokens import TokenLayout

_has_name_of_attention = jax.checkpoint_policies.save_only_these_names(ATTENTION)
_has_name_of_projection = jax.checkpoint_policies.save_only_these_names(PROJECTION)


# Functions with names, not closures: programs kept on disk are told apart by them.
def _keep_attention(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    # Attention's result and its queries; keys and values, each as large, are made again. cuDNN's gives the sums of its
    # softmax beside its result: both kept, it is not run again. It has no place for a name; a JAX that calls it
    # otherwise runs it twice.
    is_cudnn = primitive.name.startswith("dot_product_attention_fwd")
    return is_cudnn or _has_name_of_attention(primitive, *arguments, **parameters)


def _keep_projections(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    keep = _keep_attention(primitive, *arguments, **parameters)
    return keep or _has_name_of_projection(primitive, *arguments, **parameters)


CHECKPOINT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "layer": jax.checkpoint_policies.nothing_saveable,
    "attention": _keep_attention,
    "projections": _keep_projections,
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model runs its layers. Hashable: a split model serves as a static argument.

    Attributes:
        checkpoint: a name of `CHECKPOINT_POLICIES`: what of a layer is kept for the backward pass beside its input. A
            mamba layer counts as one, and so do a shared block's attention and its MLP: their inputs are narrow, and
            what leads from one to the other need not be made again. Of the last layer all is kept, unless layers are
            scanned: its backward pass comes first, when nothing else of the kind is there.
        scan: whether one compiled body serves all equal layers, whose arrays are stacked first.
    """

    checkpoint: str = "none"
    scan: bool = False

    def __post_init__(self) -> None:
        if self.checkpoint not in CHECKPOINT_POLICIES:
            names = ", ".join(map(repr, CHECKPOINT_POLICIES))
            raise ValueError(f"the policy of gradient checkpointing is {self.checkpoint!r}; it must be one of {names}")


@dataclasses.dataclass(frozen=True)
class Past:
    """What a call brings along: a state and a key for dropout per layer; keys and values, and another key for dropout,
    per hybrid layer. None, each, for nothing."""

    mamba: Sequence[MambaState | None]
    attention: Sequence[KeyValue | None]
    dropout_keys: Sequence[jax.Array | None]
    mamba_dropout_keys: Sequence[jax.Array | None]


@dataclasses.dataclass
class Trail:
    """What a pass through the layers leaves, in their order.

    Attributes:
        inputs: (b, l, d), the input of every layer; None each unless asked for.
        mamba: the state of every layer; None each without a cache.
        attention: keys and values of every hybrid layer; None each without a cache.
        weights: attention probabilities of every hybrid layer; None each unless asked for.
    """

    inputs: list[Float[Array, "b l d"] | None] = dataclasses.field(default_factory=list)
    mamba: list[MambaState | None] = dataclasses.field(default_factory=list)
    attention: list[KeyValue | None] = dataclasses.field(default_factory=list)
    weights: list[Float[Array, "b heads l s"] | None] = dataclasses.field(default_factory=list)

    def add_layer(self, left: tuple[Any, Any]) -> None:
        self.inputs.append(left[0])
        self.mamba.append(left[1])

    def add_use(self, left: tuple[Any, Any]) -> None:
        self.attention.append(left[0])
        self.weights.append(left[1])


@dataclasses.dataclass(frozen=True)
class LayerStack:
    """The layers, and what all of them read of a call.

    Attributes:
        layers, blocks, uses: the model's modules. Use j runs block j mod len(blocks), before layer hybrid_layer_ids[j].
        embedded: (b, l, d), the embedding that shared blocks read beside the stream.
        layout, context: of the call's tokens.
        keep_inputs: whether every layer's input is wanted.
    """

    layers: Sequence[MambaLayer]
    blocks: Sequence[SharedTransformerBlock]
    uses: Sequence[SharedBlockUse]
    hybrid_layer_ids: Sequence[int]
    embedded: Float[Array, "b l d"]
    layout: TokenLayout
    context: AttentionContext
    keep_inputs: bool

    def run(
        self, hidden: Float[Array, "b l d"], past: Past, execution: Execution
    ) -> tuple[Float[Array, "b l d"], Trail]:
        """What the last layer makes of `hidden`, before the final norm, and the trail."""
        if execution.scan:
            return self._scan(hidden, past, execution.checkpoint)
        if self._has_whole_steps(past):
            return self._whole_steps(hidden, past)
        if self._has_fused_steps(hidden, past):
            return self._steps(hidden, past)
        remember = _checkpoint(execution.checkpoint)
        trail = Trail()
        last, blocks = len(self.layers) - 1, list(self.blocks)
        for index, layer in enumerate(self.layers):
            output = None
            if index in self._use_of_layer:
                j = self._use_of_layer[index]
                use = (past.attention[j], past.dropout_keys[j])
                block = blocks[j % len(blocks)]
                if remember is not _all_kept and j + len(blocks) < len(self.uses):
                    block, blocks[j % len(blocks)] = for_this_use(block)
                output, left = self._apply_use(remember, block, self.uses[j], hidden, *use)
                trail.add_use(left)
            of_layer = (past.mamba[index], past.mamba_dropout_keys[index])
            remember_layer = remember if index < last else _all_kept
            hidden, left = self._apply_layer(remember_layer, layer, hidden, *of_layer, output)
            trail.add_layer(left)
        return hidden, trail

    def _is_step(self, past: Past) -> bool:
        """Whether this is one token of rows that every layer has a state of."""
        return self.layout.is_step and all(state is not None for state in past.mamba)

    def _has_whole_steps(self, past: Past) -> bool:
        if not self._is_step(past):
            return False
        pairs = zip(self.layers, past.mamba, strict=True)
        return all(whole_layer.obstacle(layer, self.layout, state) is None for layer, state in pairs)

    def _whole_steps(self, hidden: Float[Array, "1 1 d"], past: Past) -> tuple[Float[Array, "1 1 d"], Trail]:
        """`run` for one token of one sequence on a Hopper GPU: each layer is one launch, which the next one sums up."""
        trail, stream = Trail(), whole_layer.begin(self.layers[0], hidden)
        for index, (layer, state) in enumerate(zip(self.layers, past.mamba, strict=True)):
            output = None
            if index in self._use_of_layer:
                hidden, output, left, stream = self._use_between(
                    layer, stream, hidden if index == 0 else None, past, index
                )
                trail.add_use(left)
                stream = whole_layer.begin(layer, hidden, stream)
            before = whole_layer.summed(layer, stream) if self.keep_inputs else None
            stream, state = whole_layer.step(layer, stream, output, state)
            trail.add_layer((before, state))
        return whole_layer.summed(self.layers[-1], stream), trail

    def _use_between(self, layer, stream, hidden, past: Past, index: int):
        """The shared block before `layer`, from what the one before left: the stream, the output, what it leaves, and
        `stream` with its counters as they are then."""
        j = self._use_of_layer[index]
        block, use, key_value = self._block_of(j), self.uses[j], past.attention[j]
        fused = self.context.is_decoding and decoding.shared_block_obstacle(block, use, 1) is None
        if hidden is None and fused:
            hidden, normed = whole_layer.summed_and_normed(layer, stream, block.input_layernorm, self.embedded)
            if whole_layer.shared_block_obstacle(block, use) is None:
                args = (block, normed, use, self.context, key_value, stream)
                output, key_value, stream = whole_layer.shared_block_step(*args)
            else:
                args = (block, hidden, self.embedded, use, self.context, key_value)
                output, key_value = decoding.shared_block_step(*args, normed=normed)
            return hidden, output, (key_value, None), stream
        if hidden is None:
            hidden = whole_layer.summed(layer, stream)
        use_past = (key_value, past.dropout_keys[j])
        return hidden, *self._apply_use(_checkpoint("none"), block, use, hidden, *use_past), stream

    def _has_fused_steps(self, hidden: Float[Array, "b l d"], past: Past) -> bool:
        if not self._is_step(past):
            return False
        return all(decoding.mamba_obstacle(layer, hidden.shape[0]) is None for layer in self.layers)

    def _steps(self, hidden: Float[Array, "b 1 d"], past: Past) -> tuple[Float[Array, "b 1 d"], Trail]:
        """`run` for one token on a GPU: each layer begins the next one, whose norm it makes with its sum."""
        trail, normed = Trail(), None
        for index, layer in enumerate(self.layers):
            output = None
            if index in self._use_of_layer:
                j = self._use_of_layer[index]
                use = (past.attention[j], past.dropout_keys[j])
                output, left = self._apply_use(_checkpoint("none"), self._block_of(j), self.uses[j], hidden, *use)
                trail.add_use(left)
            following = None
            if index + 1 < len(self.layers) and index + 1 not in self._use_of_layer:
                following = self.layers[index + 1].input_layernorm
            before = hidden if self.keep_inputs else None
            hidden, state, normed = decoding.mamba_layer_step(
                layer, hidden, self.layout, past.mamba[index], output, normed, following
            )
            trail.add_layer((before, state))
        return hidden, trail

    @functools.cached_property
    def _use_of_layer(self) -> dict[int, int]:
        return {index: use for use, index in enumerate(self.hybrid_layer_ids)}

    def _block_of(self, use: int) -> SharedTransformerBlock:
        return self.blocks[use % len(self.blocks)]

    def _apply_use(self, remember, block, use, hidden, key_value, dropout_key):
        context = dataclasses.replace(self.context, dropout_key=dropout_key)
        output, *left = block(hidden, self.embedded, use, context, key_value, remember)
        return output, tuple(left)

    def _apply_layer(self, remember, layer, hidden, state, dropout_key, transformer_output=None):
        layout = dataclasses.replace(self.layout, recomputed=remember is not _all_kept)

        def apply(hidden, state, transformer_output):
            return layer(hidden, layout, state, transformer_output, dropout_key)

        before = hidden if self.keep_inputs else None
        hidden, state = remember(apply)(hidden, state, transformer_output)
        return hidden, (before, state)

    def _scan(self, hidden, past: Past, policy: str):
        layers = [_Part.of(layer) for layer in self.layers]
        uses = [_Part.of(use) for use in self.uses]
        stages = layer_pattern.stages([part.kind for part in layers], self._use_of_layer)

        def kind(stage: Stage) -> Hashable:
            end = stage.start + stage.plain
            plain = (stage.plain, layers[stage.start].kind if stage.plain else None)
            if stage.use is None:
                return plain
            return (*plain, layers[end].kind, stage.use % len(self.blocks), uses[stage.use].kind)

        def arrays(stage: Stage):
            """(parameters, state, key) of the plain layers, stacked, and of the hybrid one; (parameters, past) of its
            use."""

            def of_layer(index: int):
                return layers[index].params, past.mamba[index], past.mamba_dropout_keys[index]

            end = stage.start + stage.plain
            plain = [of_layer(index) for index in range(stage.start, end)]
            plain = _stack(plain) if plain else None
            if stage.use is None:
                return plain, None, None
            of_use = (uses[stage.use].params, past.attention[stage.use], past.dropout_keys[stage.use])
            return plain, of_layer(end), of_use

        def run_stage(stage: Stage, remember, hidden, arrays):
            plain, hybrid, of_use = arrays
            left_plain = left_hybrid = left_use = None
            if plain is not None:

                def step(hidden, arrays):
                    params, *of_layer = arrays
                    layer = layers[stage.start].module(params)
                    return self._apply_layer(_checkpoint(policy, in_loop=True), layer, hidden, *of_layer)

                hidden, left_plain = jax.lax.scan(step, hidden, plain)
            if stage.use is not None:
                use = uses[stage.use].module(of_use[0])
                output, left_use = self._apply_use(remember, self._block_of(stage.use), use, hidden, *of_use[1:])
                layer = layers[stage.start + stage.plain].module(hybrid[0])
                hidden, left_hybrid = self._apply_layer(remember, layer, hidden, *hybrid[1:], output)
            return hidden, (left_plain, left_hybrid, left_use)

        trail = Trail()
        for first, period, count in layer_pattern.repetitions([kind(stage) for stage in stages]):
            remember = _checkpoint(policy, in_loop=count > 1)

            def run_period(hidden, arrays, pattern=tuple(stages[first : first + period]), remember=remember):
                left = []
                for stage, of_stage in zip(pattern, arrays, strict=True):
                    hidden, of_stage = run_stage(stage, remember, hidden, of_stage)
                    left.append(of_stage)
                return hidden, left

            covered = stages[first : first + period * count]
            periods = [[arrays(stage) for stage in covered[i : i + period]] for i in range(0, len(covered), period)]
            if count == 1:
                hidden, left = run_period(hidden, periods[0])
                left = [left]
            else:
                hidden, left = jax.lax.scan(run_period, hidden, _stack(periods))
                left = _unstack(left, count)
            for stage, (plain, hybrid, of_use) in zip(covered, itertools.chain.from_iterable(left), strict=True):
                for of_layer in _unstack(plain, stage.plain):
                    trail.add_layer(of_layer)
                if stage.use is not None:
                    trail.add_layer(hybrid)
                    trail.add_use(of_use)
        return hidden, trail


@dataclasses.dataclass(frozen=True)
class _Part:
    """A module taken apart for stacking.

    Attributes:
        graphdef, params: of `nnx.split`. Matrices are in the dtype that they are multiplied in, as their products would
            cast them anyway: what is stacked is the cast.
        kind: equal for modules that differ in the values of their arrays only.
    """

    graphdef: Any
    params: Any
    kind: Hashable

    @classmethod
    def of(cls, module: nnx.Module) -> _Part:
        dtypes = {path: part.dtype for path, part in nnx.iter_modules(module) if isinstance(part, Linear)}
        graphdef, state = nnx.split(module)
        flat = [
            (path, _narrowed(variable, dtypes[path[:-1]]) if path[:-1] in dtypes else variable)
            for path, variable in nnx.to_flat_state(state)
        ]
        params = nnx.from_flat_state(flat)
        leaves, treedef = jax.tree.flatten(params)
        return cls(graphdef, params, (graphdef, treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)))

    def module(self, params: Any) -> Any:
        return nnx.merge(self.graphdef, params)


def _narrowed(variable: nnx.Variable, dtype: jnp.dtype) -> nnx.Variable:
    value = variable.get_value()
    narrows = jnp.issubdtype(value.dtype, jnp.floating) and jnp.dtype(dtype).itemsize < value.dtype.itemsize
    return variable.replace(value.astype(dtype)) if narrows else variable


def _all_kept(function: Callable) -> Callable:
    return function


def _checkpoint(policy: str, *, in_loop: bool = False) -> Callable[[Callable], Callable]:
    """What makes a function forget, by the policy, what its backward pass can recompute."""
    if policy == "none":
        return _all_kept
    # A compiler would otherwise undo the recomputation, which it sees to be the same work; a loop's two passes it
    # cannot merge.
    return functools.partial(jax.checkpoint, policy=CHECKPOINT_POLICIES[policy], prevent_cse=not in_loop)


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _unstack(tree: Any, count: int) -> list[Any]:
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]
