"""`python -m train tokenize`: text to an ArrayRecord file of token ids, which trains without being tokenised again."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from train.data.tokenizing import tokenize


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeOptions:
    """Writes documents as token ids, into one ArrayRecord file.

    python -m train tokenize --data text.jsonl --tokenizer Zyphra/Zamba2-1.2B --output text.array_record
    """

    data: tuple[str, ...]
    """Files or directories, in the forms of pretrain's --data, one after the other."""
    tokenizer: str
    """A directory or hub id: the model's."""
    output: Path
    """The file to write, named .array_record. It must not exist."""
    text_field: str = "text"
    """Where a record has its text."""
    data_format: Literal["text", "chat", "completion"] | None = None
    """As for finetune; default: by the fields that there are."""


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code.

    Raises:
        ValueError, OSError: as `train.data.tokenize`, and for a tokenizer that cannot be loaded.
    """
    options = tyro.cli(TokenizeOptions, args=list(arguments), prog="python -m train tokenize")
    from transformers import AutoTokenizer

    count = tokenize(
        options.data,
        AutoTokenizer.from_pretrained(options.tokenizer),
        options.output,
        text_field=options.text_field,
        format=options.data_format,
    )
    print(f"wrote {count} documents to {options.output}; train on it with --data {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
