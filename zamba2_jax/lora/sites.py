"""Where LoRAs can be: every projection of a model by its names in transformers and here, from the one table of names
(`zamba2_jax.checkpoint.names`)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from flax import nnx

from zamba2_jax.checkpoint.names import ARCHITECTURES, HEADS, Path, Tensor, table
from zamba2_jax.config import Zamba2Config
from zamba2_jax.layers.lora import Lora
from zamba2_jax.lora.config import ALL_LINEAR, LoraConfig

MAMBA, BLOCK, USE = "mamba layer", "shared block", "use of a shared block"


@dataclasses.dataclass(frozen=True)
class Site:
    """A place for one LoRA.

    Attributes:
        owner: what it belongs to: `MAMBA`, `BLOCK` or `USE`.
        kind: the last part of transformers' name of the projection; of an adapter's matrices, ours.
        holder: path of the module in whose `lora` it is.
        name: its name there.
        projections: paths of the Linear modules to whose results it adds; three for `in_proj`.
        modules: transformers' names of the module: one for each layer that computes it.
        ours: our name of it.
    """

    owner: str
    kind: str
    holder: Path
    name: str
    projections: tuple[Path, ...]
    modules: tuple[str, ...]
    ours: str

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.modules, self.ours)

    def find(self, model: nnx.Module) -> Lora | None:
        """The model's LoRA here."""
        loras = at(model, self.holder).lora
        return None if loras is None or self.name not in loras else loras[self.name]


def at(model: nnx.Module, path: Path) -> Any:
    """The module at a path."""
    for name in path:
        model = model[name] if isinstance(name, int) else getattr(model, name)
    return model


def check_model(model: Any) -> None:
    """Raises ValueError for what is none of the three models."""
    if type(model).__name__ not in ARCHITECTURES or not isinstance(getattr(model, "config", None), Zamba2Config):
        raise ValueError(f"model must be one of {', '.join(ARCHITECTURES)}, got {type(model).__name__}.")


def sites(model: nnx.Module, shared: str) -> list[Site]:
    """Every place for a LoRA in a model, those of shared blocks' projections per block or per use."""
    config, architecture = model.config, type(model).__name__
    found = []
    for tensor in table(config, architecture):
        if _is_projection(tensor):
            found += _sites_of(tensor, config, shared)
    return found


def module_names(model: nnx.Module) -> list[str]:
    """transformers' names of all modules that PEFT would find for a LoRA, slots of adapters that no layer uses
    included."""
    tensors = table(model.config, type(model).__name__)
    names = [name for tensor in tensors if _is_projection(tensor) for name in (tensor.name, *tensor.copies)]
    return [name.removesuffix(".weight") for name in names]


def _is_projection(tensor: Tensor) -> bool:
    paths = [part.path for part in tensor.parts]
    return bool(paths) and all(
        path[-1] == "kernel" and path[0] not in HEADS and not str(path[-2]).startswith("conv_") for path in paths
    )


def _sites_of(tensor: Tensor, config: Zamba2Config, shared: str) -> list[Site]:
    names = [name.removesuffix(".weight") for name in (tensor.name, *tensor.copies)]
    # An adapter's other names are slots that no layer uses.
    modules = tuple(name for name in names if int(re.search(r"\blayers\.(\d+)\.", name)[1]) in tensor.layers)
    projections = tuple(part.path[:-1] for part in tensor.parts)
    parent, kind = projections[0][:-1], names[0].rsplit(".", 1)[-1]

    def site(owner: str, holder: Path, name: str, modules: tuple[str, ...], kind: str = kind) -> Site:
        ours = ".".join(map(str, (*parent, kind if len(projections) > 1 else projections[0][-1])))
        return Site(owner, kind, holder, name, projections, modules, ours)

    if "shared_blocks" in parent:
        if shared == "block":
            return [site(BLOCK, parent, kind, modules)]
        root = parent[: parent.index("shared_blocks")]
        uses = [config.hybrid_layer_ids.index(layer) for layer in tensor.layers]
        pairs = zip(uses, modules, strict=True)
        return [site(USE, (*root, "shared_block_uses", use), kind, (module,)) for use, module in pairs]
    if "shared_block_uses" in parent:
        name = projections[0][-1]
        is_adapter = not isinstance(parent[-1], int)
        return [site(USE, parent, name, modules, f"{parent[-1]}.{name}" if is_adapter else name)]
    return [site(MAMBA, parent, kind, modules)]


def chosen(model: nnx.Module, config: LoraConfig) -> list[Site]:
    """The places that a config names.

    Raises:
        ValueError: a name that fits nothing, saying what there is; a name of some of the layers that share a LoRA.
    """
    everywhere = sites(model, config.shared)
    targets = _select(config.target_modules, everywhere, "target_modules")
    excluded = {site.names for site in _select(config.exclude_modules, everywhere, "exclude_modules")}
    found = [site for site in targets if site.names not in excluded]
    if not found:
        raise ValueError(f"exclude_modules {config.exclude_modules!r} leaves nothing of {config.target_modules!r}.")
    for argument in ("rank_pattern", "alpha_pattern"):
        for expression, _ in getattr(config, argument):
            if not any(re.match(rf"(.*\.)?({expression})$", name) for site in found for name in site.names):
                raise ValueError(f"{argument} names {expression!r}, which fits none of the modules chosen.")
    return found


def _select(wanted: str | tuple[str, ...], everywhere: list[Site], argument: str) -> list[Site]:
    if wanted == ALL_LINEAR:
        return everywhere
    if isinstance(wanted, str):
        expression = re.compile(wanted)
        found = [site for site in everywhere if _fits(site, expression.fullmatch, wanted, argument)]
        if not found:
            raise ValueError(
                f"{argument}={wanted!r} fits no module. A string is a regular expression for a whole name, such as "
                f"{everywhere[0].modules[0]!r}; for names give a list. {_what_there_is(everywhere)}"
            )
        return found
    chosen = set()
    for name in wanted:
        expression = re.compile(rf"(.*\.)?{re.escape(name)}(\.\d+\.[01]|\.down|\.up)?")
        found = [i for i, site in enumerate(everywhere) if _fits(site, expression.fullmatch, name, argument)]
        if not found:
            raise ValueError(f"{argument} names {name!r}, {_why_not(name)} {_what_there_is(everywhere)}")
        chosen.update(found)
    return [site for i, site in enumerate(everywhere) if i in chosen]


def _fits(site: Site, match: Any, wanted: str, argument: str) -> bool:
    fitting = [name for name in site.modules if match(name)]
    if fitting and len(fitting) < len(site.modules) and not match(site.ours):
        raise ValueError(
            f'{argument} {wanted!r} names {", ".join(fitting)}, but with shared="block" one LoRA serves all of '
            f'{", ".join(site.modules)}: name {site.ours!r}, or choose shared="use".'
        )
    return bool(fitting) or bool(match(site.ours))


def _why_not(name: str) -> str:
    last = name.rsplit(".", 1)[-1]
    if last in ("zx_proj", "bc_proj", "dt_proj"):
        return "a part of in_proj, whose three parts have one LoRA with one A: name in_proj."
    if last in ("embed_tokens", "lm_head"):
        return (
            "which takes no LoRA: the embedding is the head as well in a model with tied embeddings, and a product "
            "added to the one would be missing in the other."
        )
    if last == "score":
        return "the classifier's head, which is small and new, and is trained as it is (`trainable`)."
    if last in ("conv1d", "conv_x", "conv_bc"):
        return "a convolution, which takes no LoRA."
    return "which fits no module that takes a LoRA."


def _what_there_is(everywhere: Iterable[Site]) -> str:
    kinds: dict[str, list[str]] = {}
    for site in everywhere:
        kind = re.sub(r"\.\d+(?=\.[01]$)", ".N", ".".join(site.modules[0].split(".")[-3:]))
        kind = kind if ".N." in kind else site.kind
        names = kinds.setdefault(site.owner, [])
        if kind not in names:
            names.append(kind)
    return "There are: " + "; ".join(f"of a {owner}, {', '.join(names)}" for owner, names in kinds.items()) + "."
