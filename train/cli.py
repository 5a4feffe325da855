"""The command line: which subcommand, its options, and what is said when they do not do."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import tyro

from train.options import ClassifyOptions, EvalOptions, FinetuneOptions, PretrainOptions, check_options
from train.preset_file import PRESETS, defaults_from_preset, take_preset

_OPTIONS = {options.command: options for options in (PretrainOptions, FinetuneOptions, ClassifyOptions, EvalOptions)}

_USAGE = """usage: python -m train COMMAND [--preset NAME|FILE.toml] [OPTIONS]

  pretrain   a model from random weights
  finetune   a checkpoint, all of it or a LoRA, on text or conversations
  classify   a checkpoint with a classification head, on texts and labels
  eval       loss and perplexity of a checkpoint on text
  plan       compiles a training step for devices that are not there: does it fit?
  tokenize   text to ArrayRecord files of token ids

python -m train COMMAND --help lists a command's options. A preset fills in what the command line leaves out; those
shipped: {presets}.

exit codes: 0 done, or stopped by SIGTERM with everything saved; 1 the losses were not finite any more; 2 it could not
be done as asked.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(_USAGE.format(presets=", ".join(sorted(path.stem for path in PRESETS.glob("*.toml"))) or "none"), end="")
        return 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
            return _run(command, rest)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 2


def _run(command: str, arguments: list[str]) -> int:
    # A command's modules are imported when it runs: plan, say, must set the platform before JAX looks for one.
    if command == "plan":
        from train.plan import main as plan

        return plan(arguments)
    if command == "tokenize":
        from train.data.__main__ import main as tokenize

        return tokenize(arguments)
    if command not in _OPTIONS:
        known = ", ".join([*_OPTIONS, "plan", "tokenize"])
        raise ValueError(f"there is no command {command}; there are {known}")
    options = parse(command, arguments)
    if command == "eval":
        from train.evaluation import evaluate_checkpoint

        return evaluate_checkpoint(options)

    from train.run import DivergedError, train

    if command == "classify":
        from train.classification import ClassificationTask as Task
    else:
        from train.language import LanguageTask as Task
    try:
        train(options, Task)
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(command: str, arguments: Sequence[str]) -> Any:
    """The options of a command, checked.

    Raises:
        ValueError, OSError: they, or the preset, do not do. SystemExit: an option that there is not, or one that is
            missing; tyro has said so.
    """
    preset, rest = take_preset(list(arguments))
    options_class = _OPTIONS[command]
    options = tyro.cli(
        options_class,
        prog=f"python -m train {command}",
        default=defaults_from_preset(options_class, preset),
        args=rest,
    )
    check_options(options)
    return options
