"""LoRAs in PEFT's files: adapter_config.json and adapter_model.safetensors.

transformers (5 and later) builds a shared block anew for every layer that uses it and ties the weights; PEFT gives each
of these modules a LoRA. So a file holds one LoRA per use of a block. LoRAs of a whole block are written once for each
use, all equal, and said to be one in the file's metadata; PEFT computes the same with them, but would train them apart.
"""

from __future__ import annotations

import errno
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from zamba2_jax.checkpoint.names import HEADS
from zamba2_jax.checkpoint.parameters import to_host
from zamba2_jax.checkpoint.safetensors import TensorInfo, read_header, read_metadata, write_file
from zamba2_jax.lora.adding import attach, check_addable, check_dtype, shapes
from zamba2_jax.lora.config import LoraConfig
from zamba2_jax.lora.coverage import Coverage, lora_coverage
from zamba2_jax.lora.sites import Site, check_model, module_names, sites

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TASKS = {"Zamba2ForCausalLM": "CAUSAL_LM", "Zamba2ForSequenceClassification": "SEQ_CLS", "Zamba2Model": None}

# Fields of adapter_config.json that say nothing of what an adapter computes once it is trained, or say it of the
# modules that the tensors name anyway.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_READ = {"alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout", "r", "rank_pattern", "use_rslora"}
# Ways of initialising that leave the model's own weights alone; others (pissa, olora, loftq, ...) change them, so that
# the adapter fits those alone.
_KEEPING_INITIALIZERS = (True, False, "gaussian", "eva", "orthogonal")


def save_lora(model: nnx.Module, path: str | os.PathLike[str], *, base_model_name_or_path: str | None = None) -> None:
    """Writes a model's LoRAs, and the head of a classifier, for `load_lora` and for
    `peft.PeftModel.from_pretrained(transformers_model, path)`.

    With PEFT the logits are the same. To merge, use `merge_lora` here: PEFT's `merge_and_unload` adds the LoRAs of all
    uses of a shared block to its one weight, which is right for blocks with one use only.

    Args:
        model: one of the three models, with LoRAs, on any devices.
        path: a directory, made if need be. Other files in it stay; an adapter in it is replaced.
        base_model_name_or_path: noted in the file, for programs that load the model by it.

    Raises:
        ValueError: no LoRAs; `path` is a file. OSError: it cannot be written; an adapter that was there stays.
    """
    check_model(model)
    if model.lora_config is None:
        raise ValueError("the model has no LoRAs to save.")
    directory = Path(path).expanduser()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{path} is a file; give a directory to write into.")
    found = [(site, site.find(model)) for site in sites(model, model.lora_config.shared)]
    found = [(site, lora) for site, lora in found if lora is not None]

    makers: dict[str, Callable[[], np.ndarray]] = {}
    layout = {}
    for site, lora in found:
        rows = sum(up.size for up in lora.up) // lora.rank
        for module in site.modules:
            names = [f"{_PREFIX}{module}.lora_{letter}.weight" for letter in "AB"]
            layout[names[0]] = (np.dtype(lora.down.dtype), (lora.rank, lora.down.shape[0]))
            layout[names[1]] = (np.dtype(lora.up[0].dtype), (rows, lora.rank))
            makers |= {names[0]: lambda lora=lora: _a_rows(lora), names[1]: lambda lora=lora: _b_rows(lora)}
    if hasattr(model, "score"):
        kernel = model.score.kernel
        layout[f"{_PREFIX}score.weight"] = (np.dtype(kernel.dtype), kernel.shape[::-1])
        makers[f"{_PREFIX}score.weight"] = lambda: to_host(kernel[...]).T
    settings = _settings(model, found, base_model_name_or_path)
    metadata = {"format": "pt", "zamba2_jax.shared": model.lora_config.shared}
    _write(directory, layout, lambda name: makers[name](), metadata, json.dumps(settings, indent=2, sort_keys=True))


def _a_rows(lora) -> np.ndarray:
    return to_host(lora.down[...]).T


def _b_rows(lora) -> np.ndarray:
    return np.concatenate([to_host(up[...]).reshape(lora.rank, -1) for up in lora.up], axis=1).T


def _settings(model: nnx.Module, found: list[tuple[Site, Any]], base: str | None) -> dict[str, Any]:
    config = model.lora_config
    modules = [(module, site, lora) for site, lora in found for module in site.modules]
    alphas = {module: config.alpha(site.names) for module, site, _ in modules}
    return {
        "alpha_pattern": {re.escape(m): alpha for m, alpha in alphas.items() if alpha != config.lora_alpha},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": ["score"] if hasattr(model, "score") else None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": {re.escape(m): lora.rank for m, _, lora in modules if lora.rank != config.r},
        "target_modules": _shortest({module for module, _, _ in modules}, module_names(model)),
        "task_type": _TASKS[type(model).__name__],
        "use_rslora": config.use_rslora,
    }


def _shortest(wanted: set[str], everything: list[str]) -> list[str]:
    """Names by which PEFT finds exactly the modules wanted: their last parts where these fit no others, else whole
    names."""
    names = set()
    for module in wanted:
        last = module.rsplit(".", 1)[-1]
        fitting = {name for name in everything if name.rsplit(".", 1)[-1] == last}
        names.add(last if fitting <= wanted else module)
    return sorted(names)


def _write(
    directory: Path,
    layout: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    produce: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
    settings: str,
) -> None:
    """Both files, complete before they take the place of older ones."""
    if jax.process_index() != 0:  # gathering an array takes every process, in the same order
        for name in sorted(layout):
            produce(name)
        return
    # All in memory: an adapter is small, and the order in which a file holds its tensors is then its own affair.
    arrays = {name: np.ascontiguousarray(produce(name)) for name in sorted(layout)}
    temporary = {name: directory / f".{name}.writing" for name in (WEIGHTS, CONFIG)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_file(temporary[WEIGHTS], layout, arrays.__getitem__, metadata)
        temporary[CONFIG].write_text(settings + "\n", encoding="utf-8")
        for name, file in temporary.items():
            os.replace(file, directory / name)
    except OSError as error:
        for file in temporary.values():
            file.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, f"the disk is full; no adapter was written to {directory}") from error
        raise


def load_lora(
    model: nnx.Module,
    path: str | os.PathLike[str],
    *,
    shared: str | None = None,
    param_dtype: DTypeLike = jnp.float32,
) -> Coverage:
    """Adds the LoRAs of a directory that `save_lora` or PEFT wrote to a model, in place. A classifier's head is loaded
    with them if the directory has it.

    Args:
        model: one of the three models, without LoRAs.
        path: a directory with adapter_config.json and adapter_model.safetensors.
        shared: "use": LoRAs of shared blocks' projections belong to single uses, as PEFT has them; "block": to the
            block, for which those of all uses must be equal. None: as they were saved here, and "use" for PEFT's.
        param_dtype: of the new parameters.

    Returns:
        What has a LoRA now, per kind of module: print it.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: an adapter of another kind, or for another model; every fault is named.
    """
    check_addable(model)
    param_dtype = check_dtype(param_dtype)
    directory = Path(path).expanduser()
    settings = _read_settings(directory)
    tensors, metadata = _read_tensors(directory)
    shared = metadata.get("zamba2_jax.shared", "use") if shared is None else shared
    config = _config_of(settings, shared, directory)

    by_module, head, faults = _sort(tensors)
    places = {module: site for site in sites(model, shared) for module in site.modules}
    has_prefix = any(module.startswith("model.") for module in places)
    by_module = {_with_prefix(module, has_prefix): pair for module, pair in by_module.items()}
    unused = set(module_names(model)) - set(places)
    ignored = [module for module in by_module if module in unused]
    for module in by_module:
        if module not in places and module not in unused:
            faults.append(f"{module}: the model has no such module")
    loading = []
    for site in dict.fromkeys(places.values()):
        present = [module for module in site.modules if module in by_module]
        if not present:
            continue
        rank = config.rank(present)
        values, fault = _read_site(model, site, rank, present, by_module)
        if fault is None:
            loading.append((site, values))
        else:
            faults.append(fault)
    if head is not None and not hasattr(model, "score"):
        warnings.warn(f"{directory}: score.weight is ignored: {type(model).__name__} has no such head.", stacklevel=2)
    elif head is not None and head.shape != model.score.kernel.shape[::-1]:
        faults.append(f"score.weight: has shape {head.shape}, but the model asks for {model.score.kernel.shape[::-1]}")
    if not loading and not faults:
        faults.append("it holds no LoRA of the model")
    if faults:
        raise ValueError(f"{directory} cannot be loaded into this {type(model).__name__}:\n  " + "\n  ".join(faults))
    if ignored:
        warnings.warn(
            f"{directory}: LoRAs of {len(ignored)} adapter matrices in slots that their shared block never uses are "
            "ignored.",
            stacklevel=2,
        )

    for site, (down, *up) in loading:
        attach(model, site, config, down.astype(param_dtype), [array.astype(param_dtype) for array in up])
    if head is not None and hasattr(model, "score"):
        kernel = model.score.kernel
        value = np.ascontiguousarray(head.read_rows(0, None).T).astype(kernel.dtype)
        kernel.set_value(jax.device_put(value, kernel.get_value().sharding))
    model.lora_config = config
    return lora_coverage(model)


def _read_settings(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{directory} holds no {CONFIG}; give a directory that save_lora or PEFT wrote.")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no JSON object.")
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{file} is of a {settings.get('peft_type')!r} adapter; only peft_type LORA can be loaded.")
    return settings


def _read_tensors(directory: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    file = directory / WEIGHTS
    if not file.is_file():
        hint = ""
        if (directory / "adapter_model.bin").is_file():
            hint = " adapter_model.bin is a pickle: load it with PEFT, and save it again from there."
        raise FileNotFoundError(f"{directory} holds no {WEIGHTS}.{hint}")
    tensors, faults = read_header(file)
    faults += [f"{name}: is {info.dtype_name}, no floating type" for name, info in tensors.items() if not info.dtype]
    if faults:
        raise ValueError(f"{directory} cannot be read:\n  " + "\n  ".join(faults))
    return tensors, read_metadata(file)


def _config_of(settings: Mapping[str, Any], shared: str, directory: Path) -> LoraConfig:
    strange = {
        name: value
        for name, value in settings.items()
        if name not in _IGNORED | _READ and value not in (None, False, {}, [], "megatron.core")
    }
    saved = settings.get("modules_to_save") or []
    strange |= {"modules_to_save": saved} if set(saved) - {"score", "classifier"} else {}
    initial = settings.get("init_lora_weights", True)
    if not any(initial is value or initial == value for value in _KEEPING_INITIALIZERS):
        strange["init_lora_weights"] = initial
    if strange:
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(strange.items()))
        raise ValueError(f"{directory / CONFIG} asks for {listed}, which this library does not have.")
    targets = settings.get("target_modules") or ()
    return LoraConfig(
        r=settings.get("r", 8),
        lora_alpha=settings.get("lora_alpha", 8),
        target_modules=targets,
        shared=shared,
        lora_dropout=settings.get("lora_dropout", 0.0),
        use_rslora=settings.get("use_rslora", False),
        bias=settings.get("bias", "none"),
        rank_pattern=settings.get("rank_pattern"),
        alpha_pattern=settings.get("alpha_pattern"),
    )


def _sort(
    tensors: Mapping[str, TensorInfo],
) -> tuple[dict[str, dict[str, TensorInfo]], TensorInfo | None, list[str]]:
    """Module -> its A and B; the head; what is neither."""
    by_module: dict[str, dict[str, TensorInfo]] = {}
    head, faults = None, []
    for name, info in tensors.items():
        bare = name.removeprefix(_PREFIX)
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", bare)
        if match and match[1].split(".")[-1] not in (*HEADS, "embed_tokens"):
            by_module.setdefault(match[1], {})[match[2]] = info
        elif bare == "score.weight":
            head = info
        else:
            faults.append(f"{name}: unexpected; LoRAs of projections can be loaded, and score.weight")
    return by_module, head, faults


def _with_prefix(module: str, has_prefix: bool) -> str:
    module = module.removeprefix("model.")
    return f"model.{module}" if has_prefix else module


def _read_site(
    model: nnx.Module, site: Site, rank: int, present: list[str], by_module: Mapping[str, dict[str, TensorInfo]]
) -> tuple[list[np.ndarray], str | None]:
    """A and B in our layout, or what is wrong with them."""
    down, up = shapes(model, site, rank)
    rows = sum(int(np.prod(shape[1:])) for shape in up)
    expected = {"A": (rank, down[0]), "B": (rows, rank)}
    if len(present) < len(site.modules):
        absent = [module for module in site.modules if module not in present]
        return [], f'{", ".join(absent)}: missing, and with shared="block" as in {present[0]}; shared="use" takes it'
    for module in present:
        for letter, shape in expected.items():
            info = by_module[module].get(letter)
            if info is None:
                return [], f"{module}: has no lora_{letter}.weight"
            if info.shape != shape:
                return [], f"{module}.lora_{letter}.weight: has shape {info.shape}, but {shape} is needed"
    first, *others = [[by_module[module][letter].read_rows(0, None) for letter in "AB"] for module in present]
    for module, other in zip(present[1:], others, strict=True):
        if not all(np.array_equal(one, two) for one, two in zip(first, other, strict=True)):
            return [], f'{module}: differs from {present[0]}, and with shared="block" it is one; shared="use" takes it'
    columns = np.split(first[1].T, np.cumsum([int(np.prod(shape[1:])) for shape in up])[:-1], axis=1)
    return [first[0].T, *(part.reshape(shape) for part, shape in zip(columns, up, strict=True))], None
