"""What of a model has a LoRA, as a table."""

from __future__ import annotations

import dataclasses
import math

import jax
from flax import nnx

from zamba2_jax.lora.config import LoraConfig
from zamba2_jax.lora.sites import check_model, sites


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of module.

    Attributes:
        owner: "mamba layer", "shared block" or "use of a shared block".
        kind: of module, such as "in_proj".
        adapted, total: how many have a LoRA, and how many there are.
        ranks: of their LoRAs.
        parameters: of their LoRAs, all together.
    """

    owner: str
    kind: str
    adapted: int
    total: int
    ranks: tuple[int, ...]
    parameters: int


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What of a model has a LoRA; `print` shows it.

    Attributes:
        rows: one per kind of module.
        trainable: parameters that `trainable` selects: of LoRAs, and of a classifier's head.
        total: parameters of the model without LoRAs, each counted once.
    """

    rows: tuple[Row, ...]
    trainable: int
    total: int

    def __str__(self) -> str:
        table = [("of a", "module", "with LoRA", "rank", "parameters")]
        for row in self.rows:
            ranks = ", ".join(map(str, row.ranks)) or "-"
            table.append((row.owner, row.kind, f"{row.adapted} of {row.total}", ranks, f"{row.parameters:,}"))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if index > 1 else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in table
        ]
        share = 100 * self.trainable / self.total
        return "\n".join((*lines, f"trainable: {self.trainable:,} beside {self.total:,} parameters ({share:.3f} %)"))


def lora_coverage(model: nnx.Module) -> Coverage:
    """Counts the LoRAs of a model per kind of module, kinds without one included.

    Raises:
        ValueError: no model of ours.
    """
    check_model(model)
    config: LoraConfig | None = model.lora_config
    groups: dict[tuple[str, str], list] = {}
    for site in sites(model, "block" if config is None else config.shared):
        groups.setdefault((site.owner, site.kind), []).append(site.find(model))
    rows = []
    for (owner, kind), loras in groups.items():
        present = [lora for lora in loras if lora is not None]
        ranks = tuple(sorted({lora.rank for lora in present}))
        rows.append(Row(owner, kind, len(present), len(loras), ranks, sum(map(_size, present))))
    adapters = sum(row.parameters for row in rows)
    head = model.score if config is not None and hasattr(model, "score") else None
    trainable = adapters + (0 if head is None else _size(head))
    return Coverage(tuple(rows), trainable, _parameters(model) - adapters)


def _size(module: nnx.Module) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def _parameters(model: nnx.Module) -> int:
    """Parameters of a model; of quantised matrices, what they were made of."""
    quantized = sum(
        math.prod(module.values.shape) * (8 // getattr(module, "bits", 8))
        for _, module in nnx.iter_modules(model)
        if hasattr(module, "values") and hasattr(module, "scale")
    )
    return _size(model) + quantized
