"""int8 and int4 weights, for inference and beside LoRAs that are trained: a 7B model in 7.5 or 4.1 GB instead of 14.7.

Quantised are the matrices that make up nine tenths of a model and more: the projections of the mixers and of the shared
blocks, `linear`, the embedding and the head. What is small or feeds an exponential stays as it is: norms,
convolutions, dt_proj, A_log, D and dt_bias, the adapters, the head of a classifier. The embedding and the head are int8
in an int4 model too: they are read once per token, and the head's error goes straight into the scores.

This is our own scheme and not qwix's. qwix (0.1.8) quantises an NNX model by running it once on example inputs with
JAX's functions replaced, and runs every later call so. It has products, but no look-up in a quantised embedding,
which a tied head needs; its int4 weights are `jnp.int4`, which takes a byte each on CPUs; and how a product widens
its integers, on which a decode step's speed hangs, would be another package's affair. What we write instead are
two roundings and two products (`zamba2_jax/ops/quantized.py`, `zamba2_jax/ops/quantized_products.py`), and decode
kernels that read the same integers (`zamba2_jax/ops/decode/`).

The integers and their scales are constants. Gradients pass through them, to LoRAs beside them (`zamba2_jax.lora`, arXiv
2305.14314) and to what is not quantised.
"""

import copy
import math
from typing import TypeVar

import jax
from flax import nnx

from zamba2_jax.layers.linear import Embed, Linear
from zamba2_jax.layers.quantized import QuantizedEmbed, QuantizedLinear
from zamba2_jax.ops.quantized import SMALLEST_GROUP, group_size

Model = TypeVar("Model", bound=nnx.Module)
Path = tuple[str | int, ...]

BITS = {"int8": 8, "int4": 4}
_MATRICES = {
    "zx_proj",
    "bc_proj",
    "out_proj",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_up_proj",
    "down_proj",
    "linear",
}
_TABLES = {"embed_tokens", "lm_head"}


def check_quantize(quantize: str | None) -> None:
    """Raises ValueError for anything but "int8", "int4" or None."""
    if quantize is not None and not (isinstance(quantize, str) and quantize in BITS):
        raise ValueError(f'quantize must be "int8", "int4" or None, got {quantize!r}.')


def quantize(model: Model, quantize: str) -> Model:
    """A model whose matrices are integers of 8 or 4 bits, which run, take LoRAs (`add_lora`), and are not trained.

    The given model stays as it is; the arrays of what is not quantised are shared with it. To load a large checkpoint
    use `from_pretrained(..., quantize=...)`, which never holds the whole of it in full precision.

    Args:
        model: a Zamba2Model, Zamba2ForCausalLM or Zamba2ForSequenceClassification, on any devices.
        quantize: "int8" or "int4".

    Raises:
        ValueError: another name; a model that is quantised already; int4 for widths that do not suit it, all named.
    """
    if quantize is None:
        raise ValueError('quantize must be "int8" or "int4", got None.')
    check_quantize(quantize)
    present = quantization(model)
    if present is not None:
        raise ValueError(f"the model is quantized to {present} already; quantize the one that it was made from.")
    result = nnx.clone(model)  # its variables are its own, their arrays are not copied
    result.generation_config = copy.deepcopy(model.generation_config)
    for path, bits in quantized_modules(model, quantize).items():
        parent = result
        for name in path[:-1]:
            parent = parent[name] if isinstance(name, int) else getattr(parent, name)
        module = getattr(parent, path[-1])
        new = QuantizedEmbed(module) if isinstance(module, Embed) else QuantizedLinear(module, bits=bits)
        setattr(parent, path[-1], new)
    return result


def quantized_modules(model: nnx.Module, quantize: str) -> dict[Path, int]:
    """Path -> bits of every module to be quantised.

    Raises:
        ValueError: int4 for widths that do not suit it, all named.
    """
    modules = {}
    faults = []
    for path, module in nnx.iter_modules(model):
        if not isinstance(module, Linear | Embed) or path[-1] not in _MATRICES | _TABLES:
            continue
        modules[path] = 8 if path[-1] in _TABLES else BITS[quantize]
        if modules[path] == 4 and group_size(module.kernel.shape[0]) is None:
            faults.append(f"{'.'.join(map(str, path))} {module.kernel.shape}")
    if faults:
        raise ValueError(
            f"int4 needs input widths that are multiples of {SMALLEST_GROUP}, which these are not: "
            f"{', '.join(faults)}; int8 takes any."
        )
    return modules


def quantization(model: nnx.Module) -> str | None:
    """ "int8", "int4", or None for a model in full precision."""
    bits = [m.bits for _, m in nnx.iter_modules(model) if isinstance(m, QuantizedLinear)]
    return None if not bits else "int4" if 4 in bits else "int8"


def weight_itemsize(model: nnx.Module) -> float:
    """Bytes of a weight: `param_dtype`'s; of a quantised model on average, all that it stores over its parameters."""
    if quantization(model) is None:
        return model.param_dtype.itemsize
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model)))
    dense = sum(
        math.prod(module.values.shape) * (8 // getattr(module, "bits", 8))
        for _, module in nnx.iter_modules(model)
        if isinstance(module, QuantizedLinear | QuantizedEmbed)
    )
    rest = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return stored / (dense + rest)
