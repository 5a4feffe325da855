"""`python -m train.demo.corpus DIR`: the source of Python's standard library as documents, every twentieth held out.

Every machine that runs this has the text, and the PSF licence allows its use. The files differ between Python versions,
and so do the figures of a model trained on them.
"""

import argparse
import ast
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Tables rather than text: character maps, and test data that is no program or nothing but numbers.
LEFT_OUT = ("encodings", "site-packages", "dist-packages", "lib2to3/tests/data", "test/encoded_modules")
LARGEST = 300_000  # characters of one file; longer ones are generated
HELD_OUT = 20  # one file in so many


def documents(root: Path) -> Iterator[tuple[str, str]]:
    """(path relative to root, text) of every Python file that parses, in the order of the paths."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(tuple(f"{folder}/" for folder in LEFT_OUT)):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
            ast.parse(text)
        except (ValueError, SyntaxError):  # tests of the parser and of other encodings
            continue
        if text.strip() and len(text) <= LARGEST:
            yield name, text


def is_held_out(name: str) -> bool:
    """By the path alone, so that a file stays on its side whatever else there is."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0


def write_corpus(directory: Path, root: Path) -> dict[str, tuple[int, int]]:
    """Writes train.jsonl and heldout.jsonl; returns (documents, characters) of each."""
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {"train": (0, 0), "heldout": (0, 0)}
    files = {side: (directory / f"{side}.jsonl").open("w", encoding="utf-8") for side in sizes}
    for name, text in documents(root):
        side = "heldout" if is_held_out(name) else "train"
        files[side].write(json.dumps({"path": name, "text": text}) + "\n")
        count, characters = sizes[side]
        sizes[side] = count + 1, characters + len(text)
    for file in files.values():
        file.close()
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.demo.corpus", description=__doc__)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    root = Path(sysconfig.get_paths()["stdlib"])
    for side, (count, characters) in write_corpus(arguments.directory, root).items():
        files = f"{count:,} files of Python {sys.version.split()[0]}"
        print(f"{arguments.directory / side}.jsonl: {files}, {characters:,} characters")


if __name__ == "__main__":
    main()
