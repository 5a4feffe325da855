"""`python -m bench`: every measurement that a CPU can make in a few minutes; `python -m bench NAME` one of them;
`--help` lists them."""

import argparse
import sys

from bench import compiles, full_shape, parity, speed, tpu

CASES = {
    "parity": (parity.main, "largest differences from PyTorch, float32, on small models of every kind"),
    "speed": (speed.main, "prefill and decoding of a 100 M model against PyTorch, one process each"),
    "compiles": (compiles.main, "programs compiled for 20 prompts of 20 lengths"),
    "full-shape": (full_shape.main, "the 1.2B shape from transformers' file: logits and memory; needs 12 GB of memory"),
    "tpu": (tpu.main, "compiles the 1.2B shape for a v5e chip; needs libtpu, not a TPU"),
}
QUICK = ("parity", "speed", "compiles")


def main() -> int:
    listing = "\n".join(f"  {name:12s} {text}" for name, (_, text) in CASES.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"{__doc__}\n\n{listing}\n\n"
        "Checkpoint conversion of the large shapes: python -m bench.convert_memory --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", metavar="NAME", help=f"default: {' '.join(QUICK)}")
    names = parser.parse_args().cases or QUICK
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; there are {', '.join(CASES)}")
    for name in names:
        print(f"\n== {name}: {CASES[name][1]}", flush=True)
        CASES[name][0]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
