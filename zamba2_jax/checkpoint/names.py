"""The one table between Hugging Face's tensors and our parameters; reading, writing and accounting all derive from it.

A PyTorch matrix is (out, in), ours is (in, *out). Where PyTorch fuses several matrices along its rows (`in_proj`: z,
x, B, C, dt), each of ours is a run of those rows. One formula therefore covers linear layers, their fused forms and
the depthwise convolution:

    ours = rows.reshape(len(rows), -1).T.reshape(shape of ours)

with `rows` the parameter's run of rows; norms, biases and the embedding are only reshaped.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from zamba2_jax.config import Zamba2Config

Path = tuple[str | int, ...]
Index = tuple[slice, ...]

# Class name -> (prefix of the base model's tensors, name of its head). transformers and we use the same words for both.
ARCHITECTURES: dict[str, tuple[str, str | None]] = {
    "Zamba2Model": ("", None),
    "Zamba2ForCausalLM": ("model", "lm_head"),
    "Zamba2ForSequenceClassification": ("model", "score"),
}
HEADS = ("lm_head", "score")
EMBEDDING = "embed_tokens.weight"

_ADAPTER = re.compile(
    r"layers\.(\d+)\.shared_transformer\.(self_attn\.linear_[qkv]|feed_forward\.gate_up_proj)_adapter_list\.(\d+)\.[01]\.weight"
)
_ROTARY = re.compile(r"(.*\.)?rotary_emb\.(original_)?inv_freq")


def _transposed(matrix: np.ndarray) -> np.ndarray:
    """The transpose as an array of its own. In tiles that the cache holds: a large matrix takes numpy two to four times
    as long in one go, and transposing is most of the work of loading a model."""
    tile, width = 16, 512
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    for row in range(0, matrix.shape[0], tile):
        for column in range(0, matrix.shape[1], width):
            block = matrix[row : row + tile, column : column + width]
            result[column : column + width, row : row + tile] = block.T
    return result


@dataclass(frozen=True)
class Part:
    """One of our parameters, as a run of rows (the first axis) of a Hugging Face tensor.

    Attributes:
        path: in our parameter tree, such as ("model", "layers", 3, "mamba", "zx_proj", "kernel").
        shape: of our array.
        start, stop: its rows.
        transposed: whether the formula of this module's docstring applies; otherwise the rows are only reshaped.
        float32: kept in float32 whatever the model's dtype is (A_log, D, dt_bias).
    """

    path: Path
    shape: tuple[int, ...]
    start: int
    stop: int
    transposed: bool
    float32: bool = False

    @property
    def name(self) -> str:
        return ".".join(map(str, self.path))

    def from_rows(self, rows: np.ndarray) -> np.ndarray:
        """The tensor's rows start:stop -> our array."""
        if not self.transposed:
            return rows.reshape(self.shape)
        return _transposed(rows.reshape(self.stop - self.start, -1)).reshape(self.shape)

    def to_rows(self, value: np.ndarray, row_shape: tuple[int, ...]) -> np.ndarray:
        """Our array -> the tensor's rows start:stop, each of shape `row_shape`."""
        rows = self.stop - self.start
        if not self.transposed:
            return value.reshape(rows, *row_shape)
        return _transposed(value.reshape(-1, rows)).reshape(rows, *row_shape)

    def read(self, read_rows: Callable[[int, int], np.ndarray], index: Index | None = None) -> np.ndarray:
        """Reads our array, or the slice `index` of it, asking only for the rows that it needs.

        Args:
            read_rows: returns the tensor's rows from a start to a stop.
            index: a slice per dimension of our array; None is all of it.
        """
        if index is None:
            return self.from_rows(read_rows(self.start, self.stop))
        bounds = [sl.indices(size) for sl, size in zip(index, self.shape, strict=True)]
        if not self.transposed:
            if len(self.shape) == 1 or self.shape[0] == self.stop - self.start:  # rows are our first axis
                low, high, _ = bounds[0]
                return read_rows(self.start + low, self.start + high)[(slice(None), *index[1:])]
            return self.from_rows(read_rows(self.start, self.stop))[index]
        # Our last axis runs along rows within each of the fused matrices that the axes before it count.
        width = self.shape[-1]
        low, high, _ = bounds[-1]
        matrices = range(*bounds[1]) if len(self.shape) == 3 else range(1)
        pieces = []
        for matrix in matrices:
            first = self.start + matrix * width
            rows = read_rows(first + low, first + high)
            pieces.append(_transposed(rows.reshape(high - low, -1)[:, index[0]]))
        return np.stack(pieces, axis=1) if len(self.shape) == 3 else pieces[0]


@dataclass(frozen=True)
class Tensor:
    """A Hugging Face tensor.

    Attributes:
        name: as transformers writes it.
        shape: in the file.
        parts: our parameters, in the order of its rows, which they cover.
        copies: other names under which a file may hold the same values: a shared block under the other layers that
            repeat it, and lm_head of a tied model.
        layers: the layers that apply it; several for a shared block's.
        stands_for_zero: transformers has this tensor even where our model has no parameter (a convolution without
            bias): written as zeros. It has no parts.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    copies: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    stands_for_zero: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def float32(self) -> bool:
        return any(part.float32 for part in self.parts)


class _Scope:
    """Builds tensors whose names and paths share prefixes."""

    def __init__(self, name: str, path: Path, copies: tuple[str, ...] = (), layers: tuple[int, ...] = ()):
        self.name, self.path, self.copies, self.layers = name, path, copies, layers

    def tensor(self, suffix: str, shape: tuple[int, ...], *parts: Part, **options) -> Tensor:
        copies = tuple(f"{copy}.{suffix}" for copy in self.copies)
        return Tensor(f"{self.name}.{suffix}", shape, parts, copies, self.layers, **options)

    def vector(self, suffix: str, path: Path, size: int, *, float32: bool = False) -> Tensor:
        return self.tensor(suffix, (size,), Part((*self.path, *path), (size,), 0, size, False, float32))

    def linear(
        self, suffix: str, path: Path, in_features: int, out: tuple[int, ...], *, use_bias: bool = False
    ) -> Iterator[Tensor]:
        yield from self.fused(suffix, [(path, out)], in_features, use_bias=use_bias)

    def fused(
        self, suffix: str, outs: list[tuple[Path, tuple[int, ...]]], in_features: int, *, use_bias: bool
    ) -> Iterator[Tensor]:
        """A PyTorch linear layer whose rows are several of ours, (path, shape of out) each."""
        kernels, biases, start = [], [], 0
        for path, out in outs:
            stop = start + math.prod(out)
            path = (*self.path, *path)
            kernels.append(Part((*path, "kernel"), (in_features, *out), start, stop, True))
            biases.append(Part((*path, "bias"), out, start, stop, False))
            start = stop
        yield self.tensor(f"{suffix}.weight", (start, in_features), *kernels)
        if use_bias:
            yield self.tensor(f"{suffix}.bias", (start,), *biases)


def table(config: Zamba2Config, architecture: str) -> list[Tensor]:
    """Every tensor of a transformers checkpoint of `architecture`, in the order of PyTorch's state dict.

    Args:
        config: decides shapes, biases, adapters and how shared blocks repeat.
        architecture: a key of `ARCHITECTURES`.
    """
    prefix, head = ARCHITECTURES[architecture]
    dot = f"{prefix}." if prefix else ""
    root: Path = (prefix,) if prefix else ()
    d, v = config.hidden_size, config.vocab_size

    tied_head = ("lm_head.weight",) if head == "lm_head" and config.tie_word_embeddings else ()
    embedding = Part((*root, "embed_tokens", "embedding"), (v, d), 0, v, False)
    tensors = [Tensor(f"{dot}{EMBEDDING}", (v, d), (embedding,), tied_head)]

    hybrids = config.hybrid_layer_ids
    for layer in range(config.num_hidden_layers):
        name = f"{dot}layers.{layer}"
        path = (*root, "layers", layer)
        if layer not in hybrids:
            tensors += _mamba_layer(_Scope(name, path, layers=(layer,)), config)
            continue
        use = hybrids.index(layer)
        use_path = (*root, "shared_block_uses", use)
        tensors += _Scope(name, use_path, layers=(layer,)).linear("linear", ("linear",), d, (d,))
        tensors += _mamba_layer(_Scope(f"{name}.mamba_decoder", path, layers=(layer,)), config)
        if use < config.num_mem_blocks:
            repeats = hybrids[use :: config.num_mem_blocks]
            names = [f"{dot}layers.{repeat}.shared_transformer" for repeat in repeats]
            tensors += _shared_block(names, root, use, repeats, config)

    final = Part((*root, "final_layernorm", "scale"), (d,), 0, d, False)
    tensors.append(Tensor(f"{dot}final_layernorm.weight", (d,), (final,)))
    if head == "lm_head" and not config.tie_word_embeddings:
        tensors += _head("lm_head", d, v)
    if head == "score":
        tensors += _head("score", d, config.num_labels)
    return tensors


def _head(name: str, in_features: int, out_features: int) -> list[Tensor]:
    part = Part((name, "kernel"), (in_features, out_features), 0, out_features, True)
    return [Tensor(f"{name}.weight", (out_features, in_features), (part,))]


def _mamba_layer(scope: _Scope, config: Zamba2Config) -> Iterator[Tensor]:
    d, k, heads = config.hidden_size, config.mamba_d_conv, config.n_mamba_heads
    inner, groups_state = config.mamba_intermediate_size, config.mamba_ngroups * config.mamba_d_state
    bias = config.add_bias_linear

    for name in ("dt_bias", "A_log", "D"):
        yield scope.vector(f"mamba.{name}", ("mamba", name), heads, float32=True)

    channels = inner + 2 * groups_state
    parts = [(("conv_x",), (inner,), 0, inner), (("conv_bc",), (2, groups_state), inner, channels)]
    kernels, biases = [], []
    for path, out, start, stop in parts:
        path = (*scope.path, "mamba", *path)
        kernels.append(Part((*path, "kernel"), (k, *out), start, stop, True))
        biases.append(Part((*path, "bias"), out, start, stop, False))
    yield scope.tensor("mamba.conv1d.weight", (channels, 1, k), *kernels)
    if config.use_conv_bias:
        yield scope.tensor("mamba.conv1d.bias", (channels,), *biases)
    else:
        yield scope.tensor("mamba.conv1d.bias", (channels,), stands_for_zero=True)

    in_proj = [
        (("mamba", "zx_proj"), (2, inner)),
        (("mamba", "bc_proj"), (2, groups_state)),
        (("mamba", "dt_proj"), (heads,)),
    ]
    yield from scope.fused("mamba.in_proj", in_proj, d, use_bias=bias)
    yield scope.vector("mamba.norm.weight", ("mamba", "norm", "scale"), inner)
    yield from scope.linear("mamba.out_proj", ("mamba", "out_proj"), inner, (d,), use_bias=bias)
    yield scope.vector("input_layernorm.weight", ("input_layernorm", "scale"), d)


def _shared_block(
    names: list[str], root: Path, block: int, repeats: tuple[int, ...], config: Zamba2Config
) -> Iterator[Tensor]:
    """A shared block under its first layer's name, with the adapters of all its uses; its other layers' names are
    copies."""
    d, i, r = config.hidden_size, config.intermediate_size, config.adapter_rank
    bias = config.add_bias_linear
    query = config.num_attention_heads * config.attention_head_dim
    key_value = config.num_key_value_heads * config.attention_head_dim
    scope = _Scope(names[0], (*root, "shared_blocks", block), tuple(names[1:]), repeats)
    uses = [(use, layer) for use, layer in enumerate(config.hybrid_layer_ids) if use % config.num_mem_blocks == block]

    def adapters(suffix: str, path: str, in_features: int, out: tuple[int, ...]) -> Iterator[Tensor]:
        for use, layer in uses:
            owner = _Scope(names[0], (*root, "shared_block_uses", use), tuple(names[1:]), (layer,))
            yield from owner.linear(f"{suffix}_adapter_list.{use}.0", (path, "down"), in_features, (r,))
            yield from owner.linear(f"{suffix}_adapter_list.{use}.1", (path, "up"), r, out)

    for letter, out in (("q", query), ("k", key_value), ("v", key_value)):
        yield from scope.linear(f"self_attn.{letter}_proj", ("self_attn", f"{letter}_proj"), 2 * d, (out,))
    yield from scope.linear("self_attn.o_proj", ("self_attn", "o_proj"), query, (d,))
    if config.use_shared_attention_adapter:
        for letter in "qkv":
            yield from adapters(f"self_attn.linear_{letter}", f"{letter}_adapter", 2 * d, (query,))
    gate_up = ("feed_forward", "gate_up_proj")
    yield from scope.linear("feed_forward.gate_up_proj", gate_up, d, (2, i), use_bias=bias)
    yield from scope.linear("feed_forward.down_proj", ("feed_forward", "down_proj"), i, (d,), use_bias=bias)
    yield from adapters("feed_forward.gate_up_proj", "gate_up_adapter", d, (2, i))
    yield scope.vector("input_layernorm.weight", ("input_layernorm", "scale"), 2 * d)
    yield scope.vector("pre_ff_layernorm.weight", ("pre_ff_layernorm", "scale"), d)


def written_names(tensors: list[Tensor], config: Zamba2Config) -> list[tuple[str, Tensor]]:
    """The names that a file for transformers holds, in the order of PyTorch's state dict, each with its tensor.

    transformers stores a shared block once, but (up to 5.23 at least) stops sharing anything when `tie_word_embeddings`
    is false: such a model would take its repeated blocks from random numbers if they were not in the file. They are
    then written under every layer.
    """
    names = [(tensor.name, tensor) for tensor in tensors]
    if not config.tie_word_embeddings:
        names += [(copy, tensor) for tensor in tensors for copy in tensor.copies]
        names.sort(key=lambda item: _state_dict_position(item[0]))  # stable: within a layer the order stays
    return names


def _state_dict_position(name: str) -> float:
    match = re.search(r"\blayers\.(\d+)\.", name)
    if match:
        return int(match[1])
    return -1 if name.endswith(EMBEDDING) else math.inf


def is_rotary_buffer(name: str) -> bool:
    """Whether `name` is a table of rotary frequencies, which the config determines."""
    return _ROTARY.fullmatch(name) is not None


def is_unused_adapter(name: str, config: Zamba2Config) -> bool:
    """Whether `name` (without "model.") is an adapter in a slot that its shared block never uses.

    Block b owns the slots j with j % num_mem_blocks == b; some published files hold every slot under every block.
    """
    match = _ADAPTER.fullmatch(name)
    if match is None or ("self_attn" in match[2] and not config.use_shared_attention_adapter):
        return False
    layer, slot = int(match[1]), int(match[3])
    hybrids = config.hybrid_layer_ids
    if layer not in hybrids or slot >= len(hybrids):
        return False
    return (slot - hybrids.index(layer)) % config.num_mem_blocks != 0
