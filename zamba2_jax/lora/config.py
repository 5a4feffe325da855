"""LoraConfig: PEFT's names and meanings, its defaults but for `target_modules`; and where the LoRAs of shared blocks
are."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

ALL_LINEAR = "all-linear"
INITIALIZERS = (True, "gaussian", False)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which projections get a LoRA, and of what kind. Hashable; sequences become tuples, mappings tuples of pairs.

    Attributes:
        r: rank.
        lora_alpha: the product is scaled by lora_alpha / r.
        target_modules: names of modules, transformers' ("q_proj", "model.layers.3.mamba.in_proj") or ours
            ("shared_blocks.0.self_attn.q_proj"): the last parts of a name, whole, are enough, and the name of a list
            of adapters stands for all its matrices. Or, as one string, a regular expression for whole names; or
            "all-linear", everything but embedding and head.
        exclude_modules: what of these to leave out, by the same rules.
        shared: what a LoRA of a shared block's projection belongs to. "block": one per block, for all its uses; it can
            be merged into the block. "use": one per use, as PEFT makes them; beside Zamba2's own adapters, which each
            use has. What a use owns anyway (`linear`, the adapters) has its own LoRA in either case.
        lora_dropout: probability that an element of the input is left out, in calls with a `dropout_key`.
        use_rslora: scale by lora_alpha / sqrt(r) instead.
        bias: "none": biases are not trained.
        init_lora_weights: True: A uniform in ±in^-1/2, B zero; "gaussian": A normal with standard deviation 1 / r, B
            zero; False: both as A for True, so that the model is another one at once.
        rank_pattern, alpha_pattern: name -> r or lora_alpha of modules that have others. Names are regular expressions
            for the last parts of a module's name; the first that fits counts.

    Raises:
        ValueError: a value that makes no sense.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] = ()
    shared: str = "block"
    lora_dropout: float = 0.0
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str = True
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, _pairs(name, getattr(self, name)))
        if not self.target_modules:
            raise ValueError('target_modules is empty; name modules, such as ("in_proj", "q_proj"), or "all-linear".')
        for name, rank in (("r", self.r), *(("rank_pattern", rank) for _, rank in self.rank_pattern)):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"{name} must be a positive integer, got {rank!r}.")
        for name, alpha in (("lora_alpha", self.lora_alpha), *(("alpha_pattern", a) for _, a in self.alpha_pattern)):
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {alpha!r}.")
        if isinstance(self.lora_dropout, bool) or not isinstance(self.lora_dropout, int | float):
            raise ValueError(f"lora_dropout must be a number, got {self.lora_dropout!r}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and less than 1, got {self.lora_dropout!r}.")
        if self.shared not in ("block", "use"):
            raise ValueError(f'shared must be "block" or "use", got {self.shared!r}.')
        if self.bias != "none":
            raise ValueError(f'bias must be "none", got {self.bias!r}: biases are not trained beside a LoRA.')
        if not any(self.init_lora_weights is value or self.init_lora_weights == value for value in INITIALIZERS):
            raise ValueError(f'init_lora_weights must be True, "gaussian" or False, got {self.init_lora_weights!r}.')

    def rank(self, names: Iterable[str]) -> int:
        """The rank for a module of these names."""
        return _of_pattern(self.rank_pattern, names, self.r)

    def alpha(self, names: Iterable[str]) -> float:
        """`lora_alpha` for a module of these names."""
        return _of_pattern(self.alpha_pattern, names, self.lora_alpha)

    def scale(self, names: Iterable[str], rank: int) -> float:
        """What the product of a module of these names is multiplied by."""
        return self.alpha(names) / (rank**0.5 if self.use_rslora else rank)


def _names(argument: str, names: str | Iterable[str] | None) -> str | tuple[str, ...]:
    if isinstance(names, str):
        if names.lower() == ALL_LINEAR:
            return ALL_LINEAR
        _check_expression(argument, names)
        return names
    try:
        names = tuple(sorted(names)) if isinstance(names, set | frozenset) else tuple(names or ())
    except TypeError:
        names = (None,)
    wrong = [name for name in names if not isinstance(name, str) or not name]
    if wrong:
        raise ValueError(f"{argument} must be names of modules, or one regular expression, got {wrong[0]!r} in it.")
    return names


def _pairs(argument: str, pattern: Mapping[str, float] | Iterable[tuple[str, float]] | None) -> tuple:
    try:
        pairs = tuple((name, value) for name, value in dict(pattern or ()).items())
    except (TypeError, ValueError):
        raise ValueError(f"{argument} must map names to numbers, got {pattern!r}.") from None
    for name, _ in pairs:
        if not isinstance(name, str):
            raise ValueError(f"{argument} must map names to numbers, got the name {name!r}.")
        _check_expression(argument, name)
    return pairs


def _check_expression(argument: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{argument} holds {expression!r}, which is no regular expression: {error}.") from None


def _of_pattern(pattern: tuple[tuple[str, float], ...], names: Iterable[str], default: float) -> float:
    names = tuple(names)
    for expression, value in pattern:
        if any(re.match(rf"(.*\.)?({expression})$", name) for name in names):
            return value
    return default
