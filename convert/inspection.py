"""`inspect`: what is in a checkpoint, from the headers of its files."""

import sys
from collections import Counter
from pathlib import Path

from zamba2_jax.checkpoint.accounting import guess_architecture, settle_accounts
from zamba2_jax.checkpoint.files import is_orbax, open_tensors
from zamba2_jax.checkpoint.names import Tensor, table
from zamba2_jax.checkpoint.orbax import OrbaxParameters
from zamba2_jax.config import Zamba2Config

Row = tuple[str, str, str, str]


def inspect(directory: Path) -> int:
    """Prints the tensors and the faults of the checkpoint in `directory`; returns 1 if it has faults, else 0."""
    if is_orbax(directory):
        return _inspect_orbax(directory)
    config = Zamba2Config.from_pretrained(directory)
    files = open_tensors(directory)
    account = settle_accounts(config, guess_architecture(config, files.tensors), files)

    owner = {file_name: tensor for tensor in account.tensors for file_name in [account.source.get(tensor.name)]}
    copy_of = {copy: first for first, copy in account.copies}
    rows = []
    for name, info in sorted(files.tensors.items(), key=lambda item: _natural(item[0])):
        if name in copy_of:
            note = f"copy of {copy_of[name]}"
        elif name in account.ignored:
            note = f"ignored: {account.ignored[name]}"
        elif name in owner:
            note = _sharing(owner[name])
        else:
            note = "unexpected"
        rows.append((name, _shape(info.shape), info.dtype_name, note))
    _print_rows(rows)

    used = {info.file for info in files.tensors.values()}
    print(f"\n{account.architecture}, {len(files.tensors)} tensors in {len(used)} file{'s' if len(used) != 1 else ''}")
    _print_counts(account.config, account.tensors, Counter(info.dtype_name for info in files.tensors.values()))
    if account.copies:
        print(
            f"{len(account.copies)} tensors repeat others; inspect does not read them, loading checks that they "
            "are equal"
        )
    for message in account.warnings:
        print(f"note: {message}")
    return _print_faults(account.faults)


def _inspect_orbax(directory: Path) -> int:
    try:
        parameters = OrbaxParameters(directory)
    except ValueError as error:
        print(error)
        return 1
    rows = []
    for path, (tensor, part) in parameters.parts.items():
        if path not in parameters.new:
            rows.append((part.name, _shape(part.shape), parameters.dtype(path).name, _sharing(tensor)))
    _print_rows(rows)
    print(f"\n{parameters.architecture}, {len(rows)} arrays")
    tensors = table(parameters.config, parameters.architecture)
    _print_counts(parameters.config, tensors, Counter(dtype for _, _, dtype, _ in rows))
    return _print_faults([])


def _print_counts(config: Zamba2Config, tensors: list[Tensor], dtypes: Counter) -> None:
    stored = sum(tensor.size for tensor in tensors if not tensor.stands_for_zero)
    applied = config.num_parameters_applied_per_token()
    print(f"parameters: {stored:,} stored, {applied:,} applied to a token (shared blocks counted at each use)")
    print("dtypes: " + ", ".join(f"{dtype} {count}" for dtype, count in dtypes.most_common()))


def _print_faults(faults: list[str]) -> int:
    if not faults:
        print("no faults")
        return 0
    print(f"{len(faults)} fault{'s' if len(faults) > 1 else ''}:")
    for fault in faults:
        print(f"  {fault}")
    return 1


def _print_rows(rows: list[Row]) -> None:
    widths = [max(len(row[column]) for row in [*rows, ("tensor", "shape", "dtype", "")]) for column in range(3)]
    for row in [("tensor", "shape", "dtype", ""), *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
        sys.stdout.write("  ".join([*cells, row[3]]).rstrip() + "\n")


def _sharing(tensor: Tensor) -> str:
    if len(tensor.layers) < 2:
        return ""
    return "shared by layers " + ", ".join(map(str, tensor.layers))


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(word), "") if word.isdigit() else (1, 0, word) for word in name.split(".")]
