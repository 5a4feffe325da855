"""The command line. What it does lies in `zamba2_jax.checkpoint`; here are arguments, messages and exit codes."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

import zamba2_jax
from convert.inspection import inspect
from convert.verification import verify
from zamba2_jax.checkpoint import load_pretrained, open_parameters, write_hugging_face, write_orbax
from zamba2_jax.checkpoint.files import ADAPTER, RUN, find_checkpoint, is_orbax, read_json
from zamba2_jax.checkpoint.parameters import ModelParameters
from zamba2_jax.config import Zamba2Config

_EXAMPLES = """examples:
  python -m convert from-hf Zyphra/Zamba2-1.2B zamba2-1.2b
  python -m convert from-hf ./my-finetune ./my-finetune-orbax --dtype bfloat16
  python -m convert to-hf ./my-finetune-orbax ./for-pytorch --max-shard-size 2GB
  python -m convert inspect Zyphra/Zamba2-2.7B
  python -m convert verify Zyphra/Zamba2-1.2B zamba2-1.2b --layers

exit codes: 0 done; 1 the checkpoint inspected has faults, or the two verified differ; 2 it could not be done.
"""
_DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    # Conversion is a matter of files; an accelerator that is busy training must not be claimed for it.
    jax.config.update("jax_platforms", "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
            return options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 2


def _from_hf(options: argparse.Namespace) -> int:
    source = _find(options.source, options)
    if is_orbax(source):
        raise ValueError(f"{options.source} is a zamba2_jax checkpoint already; to-hf is the other way.")
    _check_target(source, options)
    write_orbax(
        open_parameters(source),
        options.target,
        dtype=options.dtype,
        overwrite=options.overwrite,
        progress=options.progress,
    )
    print(f"wrote {options.target}; load it with Zamba2ForCausalLM.from_pretrained({options.target!r})")
    return 0


def _to_hf(options: argparse.Namespace) -> int:
    if (Path(options.source).expanduser() / ADAPTER).is_dir():
        return _merged_to_hf(Path(options.source).expanduser(), options)
    source = _find(options.source, options)
    _check_target(source, options)
    write_hugging_face(
        open_parameters(source),
        options.target,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
        progress=options.progress,
    )
    print(f"wrote {options.target}; load it with transformers' from_pretrained({options.target!r})")
    return 0


def _merged_to_hf(run: Path, options: argparse.Namespace) -> int:
    """A run that trained a LoRA: the checkpoint that it began with, in full precision whatever the LoRA was trained
    beside, and the LoRA merged into its weights."""
    _check_target(run, options)
    base = read_json(run / RUN)["options"]["model"]
    architecture = "Zamba2ForSequenceClassification" if _is_classifier(run) else "Zamba2ForCausalLM"
    with jax.default_matmul_precision("highest"):
        model = load_pretrained(
            getattr(zamba2_jax, architecture),
            _find(base, options),
            param_dtype=options.dtype,
            progress=options.progress,
        )
        if hasattr(model, "score"):
            _take_labels(model, Zamba2Config.from_pretrained(run))
        zamba2_jax.load_lora(model, run / ADAPTER)
        # Those of single uses of a block go into the uses' own adapters, whose rank that raises.
        zamba2_jax.merge_lora(model, raise_adapter_rank=True)
    parameters = ModelParameters(model)
    parameters.directory = run  # its tokenizer
    write_hugging_face(
        parameters,
        options.target,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
        progress=options.progress,
    )
    print(f"wrote {options.target}: {base} with the LoRA of {run} merged into it")
    return 0


def _take_labels(model: zamba2_jax.Zamba2ForSequenceClassification, config: Zamba2Config) -> None:
    """Gives the model the labels of another config, and a head of their number, to be loaded with the LoRA."""
    model.config = model.config.replace(id2label=config.id2label, problem_type=config.problem_type)
    kernel = model.score.kernel
    kernel.set_value(jnp.zeros((kernel.shape[0], config.num_labels), kernel.dtype))


def _is_classifier(run: Path) -> bool:
    return read_json(run / RUN)["command"] == "classify"


def _inspect(options: argparse.Namespace) -> int:
    return inspect(_find(options.source, options))


def _verify(options: argparse.Namespace) -> int:
    return verify(
        _find(options.a, options),
        _find(options.b, options),
        tolerance=options.tolerance,
        logits_tolerance=options.logits_tolerance,
        run_models=not options.parameters_only,
        layers=options.layers,
        prompt_ids=options.prompt_ids,
        progress=options.progress,
    )


def _find(name_or_path: str, options: argparse.Namespace) -> Path:
    return find_checkpoint(
        name_or_path,
        revision=options.revision,
        cache_dir=options.cache_dir,
        local_files_only=options.local_files_only,
    )


def _check_target(source: Path, options: argparse.Namespace) -> None:
    target = Path(options.target).expanduser()
    if target.exists() and target.resolve() == source.resolve():
        raise ValueError(f"source and target are the same directory, {target}.")
    if target.is_dir() and any(target.iterdir()) and not options.overwrite:
        raise ValueError(
            f"{target} is not empty; give another directory, or --overwrite to replace the checkpoint in it."
        )


def _parser() -> argparse.ArgumentParser:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Converts Zamba2 checkpoints between Hugging Face's format and zamba2_jax's, looks into them and "
        "compares them. Memory holds a few tensors at a time, whatever the size of the model.",
        epilog=_EXAMPLES,
        **style,
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run, text: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, epilog=f"example:\n  {example}", **style)
        sub.set_defaults(run=run)
        hub = sub.add_argument_group("checkpoints from the hub")
        hub.add_argument("--revision", help="branch, tag or commit; default: main")
        hub.add_argument("--cache-dir", help="where downloads are kept; default: the Hugging Face cache")
        hub.add_argument("--local-files-only", action="store_true", help="do not use the network")
        return sub

    def progress(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--progress",
            action=argparse.BooleanOptionalAction,
            help="a progress bar; default: where stderr is a terminal",
        )

    def writer(sub: argparse.ArgumentParser, kept: str) -> None:
        sub.add_argument("source", metavar="SRC", help="a directory, or a hub id such as Zyphra/Zamba2-1.2B")
        sub.add_argument("target", metavar="DST", help="the directory to make; it appears when it is complete")
        sub.add_argument("--dtype", choices=_DTYPES, help=f"store weights in this dtype; default: as they are. {kept}")
        sub.add_argument("--overwrite", action="store_true", help="replace the checkpoint in DST; its other files stay")
        progress(sub)

    sub = command(
        "from-hf",
        _from_hf,
        "Hugging Face (safetensors, sharded or not, or PyTorch pickles) to zamba2_jax (Orbax), with config and "
        "tokenizer files.",
        "python -m convert from-hf Zyphra/Zamba2-1.2B zamba2-1.2b",
    )
    writer(sub, "A_log, D and dt_bias are float32 always.")

    sub = command(
        "to-hf",
        _to_hf,
        "zamba2_jax to safetensors that transformers loads, bit for bit. A Hugging Face SRC is written anew in "
        "transformers' layout.",
        "python -m convert to-hf zamba2-1.2b for-pytorch --max-shard-size 2GB",
    )
    writer(sub, "A_log, D and dt_bias take it where that is exact, else float32.")
    sub.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file; default: 5GB")

    sub = command(
        "inspect",
        _inspect,
        "Lists tensors, sharing, parameter counts and every fault of a checkpoint, without loading it.",
        "python -m convert inspect Zyphra/Zamba2-2.7B",
    )
    sub.add_argument("source", metavar="SRC", help="a directory or a hub id, in either format")

    sub = command(
        "verify",
        _verify,
        "Compares two checkpoints of either format: every parameter, and, where one is Hugging Face's and torch "
        "is installed, "
        "the outputs of PyTorch on it and of zamba2_jax on the other, in float32.",
        "python -m convert verify Zyphra/Zamba2-1.2B zamba2-1.2b --layers",
    )
    sub.add_argument("a", metavar="A", help="a directory or a hub id, in either format")
    sub.add_argument("b", metavar="B", help="the other; it may be the same one")
    sub.add_argument("--layers", action="store_true", help="compare the hidden states after every layer too")
    sub.add_argument(
        "--prompt-ids", type=_ids, metavar="IDS", help='tokens to run, such as "1 415 2936"; default: 32 fixed ones'
    )
    sub.add_argument("--parameters-only", action="store_true", help="do not run the models")
    sub.add_argument(
        "--tolerance", type=float, default=0.0, help="largest difference of a parameter that passes; default: 0"
    )
    sub.add_argument(
        "--logits-tolerance",
        type=float,
        default=1e-3,
        help="largest difference of an output that passes; default: 0.001",
    )
    progress(sub)
    return parser


def _ids(text: str) -> list[int]:
    try:
        ids = [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        ids = []
    if not ids or min(ids) < 0:
        raise argparse.ArgumentTypeError(f'expected token ids such as "1 415 2936", got {text!r}')
    return ids
