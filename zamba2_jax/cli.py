"""The command line: `python -m zamba2_jax generate …`, `chat …`, `info …`. Text goes to stdout, all else to stderr."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

_EXAMPLES = """examples:
  python -m zamba2_jax generate --model Zyphra/Zamba2-1.2B --prompt "The Roman Empire fell because"
  python -m zamba2_jax generate --model ./zamba2-1.2b --prompt-file question.txt --temperature 0.7 --top-p 0.9 --seed 1
  echo "Once upon a time" | python -m zamba2_jax generate --model ./zamba2-1.2b --prompt-file - --stats
  python -m zamba2_jax chat --model Zyphra/Zamba2-1.2B-Instruct --temperature 0.7
  python -m zamba2_jax info --model ./zamba2-1.2b

exit codes: 0 done; 2 it could not be done, with one line on stderr that says why.
"""
_DTYPES = ("bfloat16", "float32", "float16")
_QUANTIZATIONS = ("int8", "int4")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_NEW_TOKENS = 128
_EARLY_STOPPING = {"true": True, "false": False, "never": "never"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. `argv` is without the program's name; None takes `sys.argv`."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:  # --help, or an argument that cannot be read
        return int(stop.code or 0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
            options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 2
    return 0


def _generate(options: argparse.Namespace) -> None:
    prompt = _read_prompt(options)
    directory = _find(options)

    from transformers import AutoTokenizer, TextStreamer

    from zamba2_jax.models import Zamba2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer([prompt], return_tensors="np")
    began = time.perf_counter()
    model = Zamba2ForCausalLM.from_pretrained(directory, dtype=options.dtype, quantize=options.quantize)
    if options.stats:
        kind = f"{model.dtype}, {options.quantize} weights" if options.quantize else str(model.dtype)
        print(f"loaded in {time.perf_counter() - began:.2f} s: {_device()}, {kind}", file=sys.stderr)

    settings = model.generation_config or {}
    arguments = _generation_options(options, settings)
    results = [(settings | arguments).get(name) or 1 for name in ("num_beams", "num_return_sequences")]
    stream = not options.no_stream and results == [1, 1]
    text = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    clock = _Clock(text) if stream else None
    began = time.perf_counter()
    sequences = model.generate(
        inputs["input_ids"], inputs["attention_mask"], streamer=clock, seed=options.seed, **arguments
    )
    seconds = time.perf_counter() - began
    if not stream:
        continuations = tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print("\n---\n".join(continuations))
    if options.stats:
        _print_stats(inputs["input_ids"].shape[1], sequences, began, seconds, clock)


def _chat(options: argparse.Namespace) -> None:
    template = None if options.template is None else _read_text("--template", options.template)
    system = options.system
    directory = _find(options)

    from transformers import AutoTokenizer

    from zamba2_jax import chat_terminal
    from zamba2_jax.chat import ChatSession
    from zamba2_jax.models import Zamba2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = Zamba2ForCausalLM.from_pretrained(directory, dtype=options.dtype, quantize=options.quantize)
    session = ChatSession(model, tokenizer, system=system, template=template, **_given_options(options))
    if options.load is not None:
        session.load(options.load)
    chat_terminal.run(session, seed=options.seed, verbose=options.verbose)


class _Clock:
    """Hands tokens on to a streamer and notes when they came."""

    def __init__(self, streamer: Any):
        self.streamer = streamer
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        if value.ndim == 1:  # the prompt comes first, with two dimensions
            self.times.append(time.perf_counter())
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


def _print_stats(prompt_length: int, sequences: Any, began: float, seconds: float, clock: _Clock | None) -> None:
    rows, length = sequences.shape
    new = length - prompt_length
    print(
        f"prompt {prompt_length} tokens, {rows} x {new} new tokens in {seconds:.2f} s, compilation included",
        file=sys.stderr,
    )
    if clock is not None:
        first, last = clock.times[0], clock.times[-1]
        line = f"first token after {first - began:.2f} s, compilation included"
        if last > first:
            line += f"; then {(new - 1) / (last - first):.1f} tokens/s"
        print(line, file=sys.stderr)


def _given_options(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `generate` that were given on the command line."""
    names = (
        "max_new_tokens",
        "max_length",
        "min_new_tokens",
        "do_sample",
        *_SAMPLING,
        "repetition_penalty",
        "no_repeat_ngram_size",
        "prompt_lookup_num_tokens",
        "num_beams",
        "length_penalty",
        "num_return_sequences",
        "eos_token_id",
        "prefill_chunk",
    )
    given = {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}
    if any(name in given for name in _SAMPLING):
        given.setdefault("do_sample", True)
    return given


def _generation_options(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate`. An option that was not given stays with `settings`, the checkpoint's
    generation_config.json.
    """
    given = _given_options(options)
    if options.early_stopping is not None:
        given["early_stopping"] = _EARLY_STOPPING[options.early_stopping]
    if "max_length" in given:
        given["max_new_tokens"] = None  # one from the file would go before it
    elif all(lengths.get(name) is None for lengths in (given, settings) for name in ("max_new_tokens", "max_length")):
        given["max_new_tokens"] = _NEW_TOKENS
    return given


def _read_prompt(options: argparse.Namespace) -> str:
    if options.prompt is not None:
        prompt, source = options.prompt, "--prompt"
    elif options.prompt_file == "-":
        prompt, source = sys.stdin.read(), "the prompt on standard input"
    else:
        prompt = _read_text("--prompt-file", options.prompt_file, ", or - for standard input")
        source = f"--prompt-file {options.prompt_file}"
    if not prompt:
        raise ValueError(f"{source} is empty; give some text to continue.")
    return prompt


def _read_text(option: str, name: str, otherwise: str = "") -> str:
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"{option} {path} does not exist; give a text file{otherwise}.")
    return path.read_text(encoding="utf-8")


def _find(options: argparse.Namespace) -> Path:
    from zamba2_jax.checkpoint.files import find_checkpoint

    return find_checkpoint(
        options.model,
        revision=options.revision,
        cache_dir=options.cache_dir,
        local_files_only=options.local_files_only,
    )


def _info(options: argparse.Namespace) -> None:
    import flax
    import jax
    import jax.numpy as jnp
    import transformers

    import zamba2_jax
    from zamba2_jax.cache import init_cache
    from zamba2_jax.checkpoint import open_parameters
    from zamba2_jax.checkpoint.files import is_orbax

    directory = _find(options)
    parameters = open_parameters(directory)
    config = parameters.config
    dtype = jnp.dtype(options.dtype or config.dtype or parameters.common_dtype())

    def cache_bytes(slots: int) -> tuple[int, int]:
        cache = jax.eval_shape(lambda: init_cache(config, 1, slots, dtype))
        return tuple(
            sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part))
            for part in (cache.mamba, cache.attention)
        )

    state, key_values = cache_bytes(1024)
    paths = list(parameters.paths())
    stored = Counter(parameters.dtype(path).name for path in paths)
    dtypes = ", ".join(f"{count} {name}" for name, count in stored.most_common())

    _print_table(
        "config",
        {
            field.name: _short(getattr(config, field.name))
            for field in dataclasses.fields(config)
            if hasattr(config, field.name)
        },
    )
    _print_table(
        "sizes",
        {
            "parameters": f"{config.num_parameters():,}",
            "parameters applied per token": f"{config.num_parameters_applied_per_token():,} (shared blocks per use)",
            f"state per sequence, {dtype}": f"{_megabytes(state)} (SSM states in float32)",
            f"keys and values per 1024 tokens, {dtype}": _megabytes(key_values),
        },
    )
    _print_table(
        "checkpoint",
        {
            "directory": directory,
            "format": "Orbax (zamba2_jax)" if is_orbax(directory) else "Hugging Face",
            "architecture": parameters.architecture,
            "parameter arrays": f"{len(paths)} ({dtypes})",
            "generation config": parameters.generation_config or "none",
            "tokenizer": "yes" if any(directory.glob("tokenizer*")) else "no",
        },
    )
    _print_table(
        "machine",
        {
            "devices": _device(),
            "zamba2_jax": zamba2_jax.__version__,
            "jax": jax.__version__,
            "flax": flax.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    )


def _device() -> str:
    import jax

    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def _short(value: Any) -> str:
    """A config value on one line; long sequences as runs, such as 5 x mamba, 1 x hybrid."""
    if not isinstance(value, tuple) or len(value) < 2:
        return str(value)
    runs: list[list[Any]] = []
    for item in value:
        if runs and runs[-1][1] == item:
            runs[-1][0] += 1
        else:
            runs.append([1, item])
    return ", ".join(f"{count} x {item}" if count > 1 else str(item) for count, item in runs)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _print_table(title: str, rows: dict[str, Any]) -> None:
    width = max(map(len, rows))
    print(f"{title}:")
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error of the program."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m zamba2_jax",
        description="Zamba2 in JAX: continue a text, talk, or show what is in a checkpoint.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    generate = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continues a prompt and writes the new text to stdout as it comes. What is not given here is taken "
        "from the checkpoint's generation_config.json; the defaults below are for what that leaves open.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    generate.set_defaults(run=_generate)
    _add_model(generate)
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file that holds it; - is standard input")
    lengths = generate.add_mutually_exclusive_group()
    lengths.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"at most so many (default: {_NEW_TOKENS}, if the checkpoint sets no length)",
    )
    lengths.add_argument("--max-length", type=int, metavar="N", help="at most so many, those of the prompt counted")
    generate.add_argument("--no-stream", action="store_true", help="write the text when it is complete")
    generate.add_argument("--stats", action="store_true", help="times on stderr")
    generate.add_argument("--prefill-chunk", type=int, metavar="N", help="prompt tokens per call (default: by length)")

    _add_choice_of_tokens(generate)
    beams = generate.add_argument_group("beam search")
    beams.add_argument("--num-beams", type=int, metavar="K", help="beams (default: 1, no beam search)")
    beams.add_argument("--length-penalty", type=float, metavar="X", help="above 0 favours long results (default: 1)")
    beams.add_argument(
        "--early-stopping", choices=tuple(_EARLY_STOPPING), help="stop at the first K results (default: false)"
    )
    beams.add_argument(
        "--num-return-sequences",
        type=int,
        metavar="N",
        help="results, separated by a line of --- (default: 1)",
    )

    chat = commands.add_parser(
        "chat",
        help="talk with an instruct checkpoint",
        description="A conversation: every line of stdin is a message, answers go to stdout as they come. Only what is "
        "new is read in each turn. /help lists what else can be typed; Ctrl-C ends an answer, Ctrl-D the program.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chat.set_defaults(run=_chat)
    _add_model(chat)
    chat.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    chat.add_argument("--template", metavar="FILE", help="a chat template (Jinja) in place of the tokenizer's")
    chat.add_argument("--load", metavar="FILE", help="go on with a conversation that /save wrote")
    chat.add_argument("--max-new-tokens", type=int, metavar="N", help="an answer's most (default: 512)")
    chat.add_argument("--verbose", action="store_true", help="what each turn cost, on stderr")
    _add_choice_of_tokens(chat)

    info = commands.add_parser(
        "info",
        help="show what is in a checkpoint",
        description="Prints config, sizes, files and machine. Reads headers, not weights: only tensors that the files "
        "hold twice are read, because they must be equal.",
        epilog="example:\n  python -m zamba2_jax info --model Zyphra/Zamba2-2.7B",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    info.set_defaults(run=_info)
    _add_model(info)
    return parser


def _add_choice_of_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantize", choices=_QUANTIZATIONS, help="store matrices as integers: about half or a quarter of the memory"
    )
    parser.add_argument("--min-new-tokens", type=int, metavar="N", help="no end of text before so many")
    parser.add_argument("--eos-token-id", type=int, nargs="+", metavar="ID", help="tokens that end the text")
    parser.add_argument(
        "--prompt-lookup-num-tokens", type=int, metavar="N", help="guess N tokens from what was said before: same text"
    )
    sampling = parser.add_argument_group("sampling", "Any of these but --seed implies --do-sample.")
    sampling.add_argument(
        "--do-sample",
        action=argparse.BooleanOptionalAction,
        help="draw tokens instead of taking the likeliest (default: not)",
    )
    sampling.add_argument("--temperature", type=float, metavar="T", help="below 1 sharpens, above 1 flattens")
    sampling.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest (default: 50; 0: from all)")
    sampling.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest that make up P")
    sampling.add_argument("--min-p", type=float, metavar="P", help="draw from those P times as likely as the best")
    sampling.add_argument("--seed", type=int, metavar="S", help="same seed, same text (default: a fresh one)")

    shaping = parser.add_argument_group("repetition")
    shaping.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 discourages tokens said before")
    shaping.add_argument("--no-repeat-ngram-size", type=int, metavar="N", help="never say N tokens in a row twice")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID", help="a checkpoint's directory or hub id")
    parser.add_argument("--dtype", choices=_DTYPES, help="of computation (default: the checkpoint's)")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")
    parser.add_argument("--cache-dir", metavar="DIR", help="where the hub's files are kept")
    parser.add_argument("--local-files-only", action="store_true", help="do not ask the hub")
