"""What is timed: a list of cases for a size, in groups, and what the hardware at best allows for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bench.sizes import Scale, scale_of

GROUPS = {
    "ssd": "the state-space recurrence alone, forward, and forward with backward",
    "conv": "the causal convolution alone, likewise",
    "decode": "one step of decoding, from the difference of a long and a short generate()",
    "prefill": "a prompt into a cache, scores of the last token only",
    "train": "loss and gradient: plain, rematerialised by layers, and with the matrix products' results kept",
    "context": "one step of decoding against ever more tokens in the cache",
    "first-token": "from weights in memory to a prompt's first new token: compiling, and from the compilation cache",
    "load": "a safetensors checkpoint onto the device",
    "int8": "decoding with int8 weights",
    "int4": "decoding with int4 weights",
    "growth": "twice the batch or the length of cases above",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        group: a key of `GROUPS`; cases of a group share a process.
        kind: what is run: "ssd", "conv", "decode", "prefill", "train", "context", "first-token" or "load".
        size: of the model.
        batch, length: rows, and tokens per row: of the prompt or context where one token follows.
        backward: with the gradient (ssd and conv; "train" always has it).
        remat: None, or the policy of gradient checkpointing: "layer", "attention" or "projections".
        filled: the compilation cache holds the programs already.
        quantize: None, "int8" or "int4" weights.
    """

    group: str
    kind: str
    size: str
    batch: int
    length: int
    backward: bool = False
    remat: str | None = None
    filled: bool = False
    quantize: str | None = None

    @property
    def name(self) -> str:
        """As in tables, such as "decode 8 x 2048"; unique within a size."""
        words = {"train": "forward+backward", "first-token": "first token of", "ssd": "SSD", "context": "decode at"}
        name = words.get(self.kind, self.kind)
        if self.kind == "load":
            return name
        if self.kind == "first-token":
            return f"{name} {self.length}, {'from the compilation cache' if self.filled else 'cold'}"
        if self.kind == "context":
            return f"{name} {self.length}"
        if self.kind in ("ssd", "conv") and self.backward:
            name += " forward+backward"
        name += f" {self.batch} x {self.length}"
        kept = {"layer": "rematerialised", "attention": "rematerialised but attention", "projections": "products kept"}
        name += f", {kept[self.remat]}" if self.remat else ""
        return name if self.quantize is None else f"{name}, {self.quantize}"

    @property
    def tokens(self) -> int:
        """Tokens that one timed run reads or makes; 0 where a rate makes no sense."""
        if self.kind in ("decode", "context"):
            return self.batch
        return 0 if self.kind in ("first-token", "load") else self.batch * self.length

    @property
    def alone(self) -> bool:
        """Whether it needs a process that has run nothing before."""
        return self.kind in ("first-token", "load")

    @property
    def ours_alone(self) -> bool:
        """Whether ours does: a training step can want half of a card's memory in one piece, which is not to be had
        where other programs have cut it up."""
        return self.alone or (self.kind == "train" and self.size != "tiny")


def cases_of(size: str, groups: Sequence[str]) -> list[Case]:
    """The cases of `groups`, group by group in their order, in each by the memory that they need: a process's peak is
    then the peak of its latest case.

    Raises:
        ValueError: a group that is not there.
    """
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise ValueError(f"unknown cases {', '.join(unknown)}; there are {', '.join(GROUPS)}.")
    scale = scale_of(size)
    return [case for group in groups for case in _group(group, size, scale)]


def _group(group: str, size: str, scale: Scale) -> list[Case]:
    match group:
        case "ssd" | "conv":
            return [
                Case(group, group, size, scale.ssd_batch, length, backward=backward)
                for length in scale.ssd_lengths
                for backward in (False, True)
            ]
        case "decode" | "prefill":
            return [Case(group, group, size, *shape) for shape in getattr(scale, group)]
        case "train":
            policies = ("layer", "attention", "projections", None)
            return [Case(group, group, size, *shape, remat=policy) for shape in scale.train for policy in policies]
        case "context":
            return [Case(group, group, size, 1, length) for length in scale.contexts]
        case "first-token":
            return [Case(group, group, size, 1, scale.first_token, filled=filled) for filled in (False, True)]
        case "load":
            return [Case(group, group, size, 1, 0)]
        case "int8" | "int4":
            return [Case(group, "decode", size, *shape, quantize=group) for shape in scale.decode]
        case "growth":
            return [Case(group, kind, size, batch, length) for kind, batch, length in scale.growth]
    raise AssertionError(group)
