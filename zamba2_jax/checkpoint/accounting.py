"""Strict accounting: every tensor of a checkpoint is used, ignored by a rule, or a fault; every parameter is filled
exactly once.

All faults are gathered and reported together, so that a broken file is understood in one go.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from zamba2_jax.checkpoint.files import TensorFiles
from zamba2_jax.checkpoint.names import (
    ARCHITECTURES,
    HEADS,
    Tensor,
    is_rotary_buffer,
    is_unused_adapter,
    table,
)
from zamba2_jax.checkpoint.safetensors import TensorInfo
from zamba2_jax.config import Zamba2Config

NEW_HEAD = "{name} is not in the checkpoint: it is newly initialised, so train the model before you trust its classes."
IGNORED_HEAD = "{name} is ignored: {architecture} does not have this head."


def faults_error(directory: Path, faults: Iterable[str]) -> ValueError:
    """One readable error of all faults."""
    faults = list(dict.fromkeys(faults))
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return ValueError(f"the checkpoint in {directory} has {count}:\n  " + "\n  ".join(faults))


@dataclass
class Account:
    """What becomes of each tensor of a checkpoint.

    Attributes:
        config: the checkpoint's, corrected where the tensors show that it must be (convolution biases).
        architecture: the model that is to be filled.
        tensors: the tensors of that model (`names.table`).
        source: name in the table -> name in the file.
        copies: (name in the file, name of a copy in the file), whose values must be equal.
        new: names in the table that the file lacks and that are initialised instead: a classification head.
        ignored: names in the file -> why they are not needed.
        faults, warnings: for the reader.
    """

    config: Zamba2Config
    architecture: str
    tensors: list[Tensor] = field(default_factory=list)
    source: dict[str, str] = field(default_factory=dict)
    copies: list[tuple[str, str]] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def guess_architecture(config: Zamba2Config, names: Iterable[str]) -> str:
    """The model class that a file was saved from: the config's, or what its tensors' names show."""
    for name in config.architectures or ():
        if name in ARCHITECTURES:
            return name
    names = set(names)
    if "score.weight" in names:
        return "Zamba2ForSequenceClassification"
    if any(name.startswith("model.") for name in names):
        return "Zamba2ForCausalLM"
    return "Zamba2Model"


def settle_accounts(config: Zamba2Config, architecture: str, files: TensorFiles) -> Account:
    """Assigns every tensor of `files` to the model `architecture`; reads no values but convolution biases that the
    config denies."""
    names = _canonical_names(architecture, files.tensors)
    account = Account(config, architecture)
    account.faults += files.faults
    _settle_conv_bias(account, names, files)
    account.tensors = table(account.config, architecture)

    by_name = {name: tensor for tensor in account.tensors for name in (tensor.name, *tensor.copies)}
    found: dict[str, dict[str, str]] = {}
    for name, file_name in names.items():
        tensor = by_name.get(name)
        if tensor is None:
            _settle_other(account, name, file_name)
            continue
        info = files.tensors[file_name]
        if info.dtype is None:
            account.faults.append(
                f"{file_name}: is {info.dtype_name} in {info.file}; only F32, BF16, F16 and F64 can be loaded, "
                "not quantised weights."
            )
        elif info.shape != tensor.shape:
            account.faults.append(
                f"{file_name}: has shape {info.shape} in {info.file}, but the config asks for {tensor.shape}."
            )
        found.setdefault(tensor.name, {})[name] = file_name

    lost = _canonical_names(architecture, files.lost)
    for tensor in account.tensors:
        here = found.get(tensor.name, {})
        places = [here[name] for name in (tensor.name, *tensor.copies) if name in here]
        if places:
            account.source[tensor.name] = places[0]
            account.copies += [(places[0], copy) for copy in places[1:]]
        elif tensor.name == "score.weight":
            account.new.append(tensor.name)
            account.warnings.append(NEW_HEAD.format(name=tensor.name))
        elif not tensor.stands_for_zero and not any(name in lost for name in (tensor.name, *tensor.copies)):
            where = (
                ""
                if len(tensor.layers) < 2
                else f", nor under another layer that shares it ({_layers(tensor.layers[1:])})"
            )
            account.faults.append(f"{tensor.name}: missing; shape {tensor.shape} is needed{where}.")
    # A file of which nothing could be read is not made clearer by the list of all that it should have held.
    if files.faults and not files.tensors:
        account.faults = list(files.faults)

    unused = Counter(account.ignored.values())[_UNUSED_ADAPTER]
    if unused:
        account.warnings.append(f"{unused} adapter tensors in slots that their shared block never uses are ignored.")
    return account


_UNUSED_ADAPTER = "an adapter in a slot that its shared block never uses"


def _layers(layers: tuple[int, ...]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def _canonical_names(architecture: str, names: Iterable[str]) -> dict[str, str]:
    """Name as the table of `architecture` spells it -> name in the file, which may have or lack the prefix "model."."""
    names = list(names)
    prefix, _ = ARCHITECTURES[architecture]
    in_file = "model" if any(name.startswith("model.") for name in names) else ""
    if prefix == in_file:
        return {name: name for name in names}
    if prefix:
        return {name if name.split(".")[0] in HEADS else f"{prefix}.{name}": name for name in names}
    return {name.removeprefix(f"{in_file}."): name for name in names}


def _settle_conv_bias(account: Account, names: dict[str, str], files: TensorFiles) -> None:
    """transformers has convolution biases whatever `use_conv_bias` says. Biases that are not zero overrule it."""
    if account.config.use_conv_bias or files.faults:  # of damaged files no values can be read
        return
    biases = [name for name in names.values() if name.endswith("mamba.conv1d.bias")]
    readable = [name for name in biases if files.tensors[name].dtype is not None]
    if not any(np.any(files.tensors[name].read_rows(0, None)) for name in readable):
        return
    account.config = account.config.replace(use_conv_bias=True)
    account.warnings.append(
        f"the config says use_conv_bias=False, but the checkpoint holds {len(biases)} convolution biases, which "
        "transformers applies "
        "whatever the config says: loaded with use_conv_bias=True."
    )


def _settle_other(account: Account, name: str, file_name: str) -> None:
    """A tensor that the model has no parameter for."""
    head = name.removesuffix(".weight")
    if head in HEADS:
        account.ignored[file_name] = f"a head that {account.architecture} does not have"
        account.warnings.append(IGNORED_HEAD.format(name=file_name, architecture=account.architecture))
    elif is_rotary_buffer(name):
        account.ignored[file_name] = "rotary frequencies, which the config determines"
    elif is_unused_adapter(name.removeprefix("model."), account.config):
        account.ignored[file_name] = _UNUSED_ADAPTER
    else:
        account.faults.append(f"{file_name}: unexpected; {account.architecture} of this config has no such tensor.")


def compare_copies(account: Account, files: TensorFiles) -> list[str]:
    """Reads every tensor that the checkpoint holds more than once; the faults are those that are not equal bit for
    bit. Of damaged files nothing is read."""
    faults = []
    for first, copy in account.copies if not files.faults else ():
        one, other = files.tensors[first], files.tensors[copy]
        if one.shape != other.shape or one.dtype is None or other.dtype is None:
            continue  # a fault of its own
        difference = _largest_difference(one, other)
        if difference is None:
            continue
        if copy == "lm_head.weight":
            faults.append(
                f"{copy}: differs from {first} ({one.file}, {other.file}) by up to {difference:.6g}, but the "
                "config ties them; set "
                "tie_word_embeddings=false if the head is its own."
            )
        else:
            faults.append(
                f"{copy} (in {other.file}): differs from {first} (in {one.file}) by up to {difference:.6g}, but "
                "both are the same shared "
                "block."
            )
    return faults


def _largest_difference(one: TensorInfo, other: TensorInfo) -> float | None:
    """None if the values are equal bit for bit, else the largest absolute difference; infinite where a NaN meets a
    number."""
    largest = None
    for start, stop in one.row_blocks(1 << 24):
        mine, yours = one.read_rows(start, stop), other.read_rows(start, stop)
        if mine.dtype != yours.dtype:
            mine, yours = mine.astype(np.float64), yours.astype(np.float64)
        if np.array_equal(mine.reshape(-1).view(np.uint8), yours.reshape(-1).view(np.uint8)):
            continue
        with np.errstate(invalid="ignore"):
            difference = np.abs(mine.astype(np.float64) - yours.astype(np.float64))
        largest = max(largest or 0.0, float("inf") if np.isnan(difference).any() else float(difference.max()))
    return largest
