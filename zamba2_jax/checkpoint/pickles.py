"""PyTorch pickles (.bin, .pt, .pth), read by torch with code execution switched off."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from zamba2_jax.checkpoint.safetensors import DTYPES, TensorInfo

# Training scripts often save the weights inside a dictionary with other state.
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def read_pickle(path: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors of a pickle, mapped into memory and read when asked for, and what is wrong with the file.

    Raises:
        ImportError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a PyTorch pickle, which only torch can read safely: `pip install torch`, or take a "
            "checkpoint in safetensors."
        ) from error

    try:
        state = _load(torch, path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return {}, [
            f"{path.name}: cannot be read as PyTorch weights: it is damaged, or holds more than tensors. Nothing "
            "in it was executed. "
            f"(torch: {reason[:200]})"
        ]
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        return {}, [f"{path.name}: holds a {type(state).__name__}, not a dictionary of tensors."]

    tensors, faults = {}, []
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            tensors[str(name)] = _info(torch, value, path.name)
        else:
            faults.append(f"{path.name}: {name} is a {type(value).__name__}, not a tensor.")
    return tensors, faults


def _load(torch: Any, path: Path) -> Any:
    options = {"weights_only": True, "map_location": "cpu"}
    try:
        return torch.load(path, mmap=True, **options)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        # The format from before torch 1.6 cannot be mapped; it is read whole.
        return torch.load(path, mmap=False, **options)


def _info(torch: Any, tensor: Any, file: str) -> TensorInfo:
    names = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    name = names.get(tensor.dtype)
    dtype = DTYPES.get(name)

    def read_rows(start: int, stop: int | None) -> np.ndarray:
        rows = tensor.detach()
        if rows.ndim:
            rows = rows[start:stop]
        rows = rows.contiguous()
        if name == "BF16":  # numpy knows bfloat16 only through ml_dtypes
            return rows.view(torch.int16).numpy().view(dtype)
        return rows.numpy()

    return TensorInfo(tuple(tensor.shape), dtype, name or str(tensor.dtype), file, read_rows)
