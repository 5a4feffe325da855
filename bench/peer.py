"""The PyTorch peer, set to compute what the models were trained to compute."""

import math

import torch


def without_dt_clamp(model: torch.nn.Module) -> None:
    """Lifts the lower bound that transformers 5 puts on dt in prefill, but not in decoding; the models were trained
    without."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, math.inf)
