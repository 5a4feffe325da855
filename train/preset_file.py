"""`--preset`: options from a TOML file, for what the command line leaves out."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

import tyro

from train.options import flag

PRESETS = Path(__file__).with_name("presets")


def take_preset(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of `--preset` among `arguments`, and the others.

    Raises:
        ValueError: it is given twice, or without a value.
    """
    rest, found = [], []
    position = 0
    while position < len(arguments):
        word = arguments[position]
        if word == "--preset":
            if position + 1 == len(arguments) or arguments[position + 1].startswith("--"):
                raise ValueError("--preset needs a name or a .toml file")
            found.append(arguments[position + 1])
            position += 1
        elif word.startswith("--preset="):
            found.append(word.removeprefix("--preset="))
        else:
            rest.append(word)
        position += 1
    if len(found) > 1:
        raise ValueError(f"--preset is given {len(found)} times; one preset can be used")
    return (found[0] if found else None), rest


def find_preset(name: str) -> Path:
    """The file of a preset: one that is shipped, by its name, or any other.

    Raises:
        FileNotFoundError: neither; says which are shipped.
    """
    shipped = PRESETS / f"{name}.toml"
    if shipped.is_file():
        return shipped
    if Path(name).is_file():
        return Path(name)
    names = ", ".join(sorted(path.stem for path in PRESETS.glob("*.toml")))
    raise FileNotFoundError(f"--preset {name} is neither a file nor one of those shipped: {names or 'none'}.")


def read_preset(name: str) -> dict[str, Any]:
    """The keys and values of a preset's file.

    Raises:
        FileNotFoundError: there is none. ValueError: it is not TOML, or not flat.
    """
    path = find_preset(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    tables = [key for key, value in values.items() if isinstance(value, dict)]
    if tables:
        raise ValueError(f"{path} holds the table [{tables[0]}]; a preset is flat: one `option = value` a line.")
    return values


def defaults_from_preset(options_class: type, name: str | None) -> Any:
    """What tyro takes as default: the preset's values, the class's own, and for what neither has, a demand.

    Keys are the options' names with - or _. `command = "pretrain"` says which subcommand the preset is for.

    Raises:
        FileNotFoundError, ValueError: as `read_preset`; a key that is no option of this subcommand; a value of another
            type; a preset for another subcommand.
    """
    values = {key.replace("-", "_"): value for key, value in read_preset(name).items()} if name else {}
    command = values.pop("command", None)
    if command not in (None, options_class.command):
        raise ValueError(f"--preset {name} is for {command}, not for {options_class.command}.")
    hints = typing.get_type_hints(options_class)
    fields = {field.name: field for field in dataclasses.fields(options_class)}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--preset {name} sets {key}, which is no option of {options_class.command}{hint}")
        values[key] = _converted(name, key, value, hints[key])
    filled = {}
    for field in fields.values():
        required = field.default is dataclasses.MISSING
        filled[field.name] = values.get(field.name, tyro.MISSING if required else field.default)
    return options_class(**filled)


def _converted(preset: str | None, key: str, value: Any, hint: Any) -> Any:
    """A TOML value as the option's type."""
    wanted = [kind for kind in typing.get_args(hint) if kind is not type(None)] if _is_union(hint) else [hint]
    for kind in wanted:
        origin = typing.get_origin(kind)
        if origin is typing.Literal and value in typing.get_args(kind):
            return value
        if origin is tuple and isinstance(value, str | list):
            return (value,) if isinstance(value, str) else tuple(value)
        if kind is Path and isinstance(value, str):
            return Path(value)
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if kind in (int, str, bool) and type(value) is kind:
            return value
    names = " or ".join(str(getattr(kind, "__name__", kind)).removeprefix("typing.") for kind in wanted)
    raise ValueError(f"--preset {preset}: {key} = {value!r} does not do for {flag(key)}, which takes {names}")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
