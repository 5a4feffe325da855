"""Telling apart the names that a checkpoint can go by: a directory, the model that is shipped, a hub repository."""

import os
import re
from pathlib import Path

DEMO = "demo"


def demo_path() -> Path:
    """Directory of the small model that comes with this package: weights, config, tokenizer and model card.

    `from_pretrained("demo")` reads it, and `AutoTokenizer.from_pretrained(demo_path())` its tokenizer.
    """
    return Path(__file__).with_name(DEMO)


def as_path(name_or_path: str | os.PathLike[str]) -> Path:
    """The path that is meant: of the shipped model for "demo", unless something here has that name."""
    path = Path(name_or_path).expanduser()
    return demo_path() if str(name_or_path) == DEMO and not path.exists() else path


def hub_id(name_or_path: str | os.PathLike[str]) -> str | None:
    """`name_or_path` if it may be a repository, such as gpt2 or Zyphra/Zamba2-1.2B; None if it can only be a path.

    What exists on this machine is a path, the shipped model too, and so is whatever is no text, begins with a dot, or
    has more than one slash.
    """
    if not isinstance(name_or_path, str) or as_path(name_or_path).exists():
        return None
    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name_or_path, re.ASCII)
    return name_or_path if is_name else None
