"""Telling names on the Hugging Face hub from paths."""

import os
import re
from pathlib import Path


def hub_id(name_or_path: str | os.PathLike[str]) -> str | None:
    """`name_or_path` if it may be a repository, such as gpt2 or Zyphra/Zamba2-1.2B; None if it can only be a path.

    What exists on this machine is a path, and so is whatever is no text, begins with a dot, or has more than one slash.
    """
    if not isinstance(name_or_path, str) or Path(name_or_path).exists():
        return None
    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name_or_path, re.ASCII)
    return name_or_path if is_name else None
