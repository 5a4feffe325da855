"""`python -m bench`: the measurements behind every number in the README."""

import sys
from collections.abc import Callable, Sequence

HELP = """python -m bench [options]     times every case on this machine's device; --help lists them
python -m bench table FILE..  writes the README's tables from result files
python -m bench plot FILE..   draws a result file's plots again
python -m bench parity        largest differences from PyTorch, float32, on small models of every kind
python -m bench compiles      programs compiled for 20 prompts of 20 lengths
python -m bench prefix        a long prefix read again, or continued from its saved cache
python -m bench lookup        prompt-lookup decoding: tokens per call, and what such a call costs
python -m bench full-shape    the 1.2B shape from transformers' file: logits and memory; needs 12 GB of memory
python -m bench tpu           compiles the three shapes for TPU chips; needs libtpu, not a TPU
Checkpoint conversion of the large shapes: python -m bench.convert_memory --help
"""


def main(arguments: Sequence[str]) -> int:
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(HELP)
    if not name or name.startswith("-"):
        from bench import speed

        return speed.main(arguments)
    if name not in COMMANDS:
        sys.exit(f"unknown command {name!r}; there are {', '.join(COMMANDS)}, or options alone.")
    return COMMANDS[name](arguments[1:]) or 0


def _plain(module: str) -> Callable[[Sequence[str]], None]:
    """A program without options."""

    def run(arguments: Sequence[str]) -> None:
        if arguments:
            sys.exit(f"this command takes no arguments, got {' '.join(arguments)}")
        _module(module).main()

    return run


def _with_options(module: str) -> Callable[[Sequence[str]], int]:
    return lambda arguments: _module(module).main(arguments)


def _module(name: str):
    # Imported when needed: some need PyTorch, some must set up the process before JAX starts.
    import importlib

    return importlib.import_module(f"bench.{name}")


COMMANDS = {
    "table": _with_options("table"),
    "plot": _with_options("plots"),
    "parity": _plain("parity"),
    "compiles": _plain("compiles"),
    "prefix": _with_options("prefix"),
    "lookup": _with_options("lookup"),
    "full-shape": _plain("full_shape"),
    "tpu": _with_options("tpu"),
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
