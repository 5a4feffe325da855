"""README.md, CONTRIBUTING.md and docs/, executed: what a reader copies works, and what a page shows is what comes out.

The first line of a fenced block says what becomes of it:

    ```python                 run, in the page's order, in one namespace per page
    ```sh                     run line by line, in the page's order, our programs in this process
    ```output                 what the block before it must print; "..." stands for anything
    ```output example: ...    not compared: says what it comes from, such as the published weights
    ```sh not-run: ...        not run, says why, and is listed in `NOT_RUN`; names and options are checked all the same
    ```text                   nothing to run: formulas, layouts

Blocks are run as they stand, but for what `SMALLER` says. The checkpoints that pages name, such as Zyphra/Zamba2-1.2B,
are directories of that name where a page runs. They hold a random model of two layers, which compiles quickly, with
the tokenizer of the model that comes with the package; "demo" is that model itself.
"""

import ast
import contextlib
import dataclasses
import doctest
import functools
import importlib.util
import inspect
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from flax import nnx

import zamba2_jax

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]

# Training compiles its step in every command. tests/train/ runs the programs quickly; here, `make test-slow` does.
SLOW = ("docs/training.md",)

# `python -m NAME` -> where its `main(arguments)` is.
PROGRAMS = {"zamba2_jax": "zamba2_jax.cli", "convert": "convert.cli", "train": "train.cli", "bench": "bench.__main__"}

# Checkpoints by the names that pages use. An -Instruct one has a chat template, as the published ones do.
CHECKPOINTS = ("Zyphra/Zamba2-1.2B", "Zyphra/Zamba2-2.7B", "Zyphra/Zamba2-7B", "Zyphra/Zamba2-1.2B-Instruct")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

# Pages give the sizes of real runs: (pattern, what it becomes) in shell commands.
SMALLER = (
    (r"--steps (\d)000\b", r"--steps \1"),
    (r"--batch-size \d+", "--batch-size 8"),
    (r"--seq-len \d+", "--seq-len 64"),
)

# (page, reason) of every block that is not run: a new one is a line here, for a reviewer to see.
NOT_RUN = {
    ("README.md", "needs your own data"),
    ("CONTRIBUTING.md", "needs the device that is measured"),
    ("docs/generating.md", "fetches a task's data from the hub"),
    ("docs/performance.md", "minutes on an accelerator, hours for every size"),
    ("docs/training.md", "needs libtpu, and minutes"),
    ("docs/training.md", "needs TPU slices"),
    ("docs/training.md", "needs a cluster with XPK"),
    ("docs/training.md", "needs a SLURM cluster with GPUs"),
    ("docs/training.md", "needs a cloud account"),
}

# Public, and shown by no page.
NOT_SHOWN = {
    "Zamba2Model.run": "what the models with a head call once inputs are checked",
}

# Variables that are read before JAX's own settings are: by XLA's allocator.
VARIABLES = ("XLA_PYTHON_CLIENT_PREALLOCATE",)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block, the line of its fence, and what it must print (None: the page does not say)."""

    page: str
    line: int
    info: str
    text: str
    output: str | None = None

    @property
    def is_run(self) -> bool:
        return self.info in ("python", "sh")

    def __str__(self) -> str:
        return f"{self.info.split(':')[0]} block at {self.page}:{self.line}"


@functools.cache
def blocks(page: str) -> tuple[Block, ...]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found: list[Block] = []
    for match in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, flags=re.MULTILINE):
        block = Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])
        if block.info == "output":
            assert found, f"{block}: nothing is before it"
            assert found[-1].is_run, f"{block}: what is before it is not run"
            found[-1] = dataclasses.replace(found[-1], output=block.text)
        else:
            found.append(block)
    return tuple(found)


# ---- the pages, run ----


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A directory that holds a small model under each name of `CHECKPOINTS`."""
    directory = tmp_path_factory.mktemp("hub")
    config = zamba2_jax.Zamba2Config.from_pretrained("demo").replace(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        layers_block_type=("mamba", "hybrid"),
        num_mem_blocks=1,
        n_mamba_heads=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.1,  # so that scores differ by more than rounding
    )
    model = zamba2_jax.Zamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    for name in CHECKPOINTS:
        model.save_pretrained(directory / name)
        for file in zamba2_jax.demo_path().glob("tokenizer*"):
            shutil.copy(file, directory / name)
        if name.endswith("-Instruct"):
            settings = directory / name / "tokenizer_config.json"
            values = json.loads(settings.read_text(encoding="utf-8")) | {"chat_template": CHAT_TEMPLATE}
            settings.write_text(json.dumps(values), encoding="utf-8")
    return directory


@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in PAGES])
def test_page(page, hub, tmp_path, monkeypatch):
    """Every block runs, and prints what the page shows."""
    for owner in {Path(name).parent for name in CHECKPOINTS}:
        (tmp_path / owner).symlink_to(hub / owner)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in filter(lambda block: block.is_run, blocks(page)):
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                run_block(block, namespace, monkeypatch)
        except BaseException as error:
            error.add_note(f"in the {block}, which had printed:\n{printed.getvalue()}")
            raise
        if block.output is not None:
            checker, example = doctest.OutputChecker(), doctest.Example("", block.output)
            if not checker.check_output(block.output, printed.getvalue(), doctest.ELLIPSIS):
                difference = checker.output_difference(example, printed.getvalue(), doctest.REPORT_NDIFF)
                pytest.fail(f"the {block} prints something else.\n{difference}")


def run_block(block: Block, namespace: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.info == "python":
        # Moved down, so that a traceback names the page's own line.
        exec(compile("\n" * block.line + block.text, str(ROOT / block.page), "exec"), namespace)
        return
    for line in block.text.replace("\\\n", " ").splitlines():
        for pattern, smaller in SMALLER:
            line = re.sub(pattern, smaller, line)
        run_line(line, monkeypatch)


def run_line(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command: VARIABLE=value before it, `echo ... |` before that, comments; no more of a shell than this."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|<>&;")
    lexer.whitespace_split = True
    words = list(lexer)
    stdin = ""
    if "|" in words and words[0] == "echo":
        stdin = " ".join(words[1 : words.index("|")]) + "\n"
        words = words[words.index("|") + 1 :]
    variables = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, variables[name] = words.pop(0).partition("=")[::2]
    match words:
        case []:
            assert not variables, f"{line!r} sets variables for nothing; write export"
        case ["export", assignment]:
            name, _, value = assignment.partition("=")
            assert name in VARIABLES or hasattr(jax.config, name.lower()), f"JAX has no setting {name}"
            monkeypatch.setenv(name, value)
        case ["make", *arguments]:
            check_make(arguments)
        case ["python" | ".venv/bin/python", "-m", "pip", *arguments] | ["pip", *arguments]:
            check_pip(arguments)
        case ["python" | ".venv/bin/python", "-m", "pytest", *arguments]:
            check_pytest(arguments)
        case ["python" | ".venv/bin/python", "-m", program, *arguments] if program in PROGRAMS:
            run_program(program, arguments, stdin, variables)
        case _:
            pytest.fail(f"this test cannot run {line!r}: teach it, or mark the block as not-run")


def run_program(program: str, arguments: list[str], stdin: str, variables: dict[str, str]) -> None:
    """In this process; in one of its own where variables are set, which JAX reads when it starts."""
    command = f"python -m {program} {shlex.join(arguments)}"
    if variables:
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
        run = [sys.executable, "-m", program, *arguments]
        done = subprocess.run(run, input=stdin, env=environment, capture_output=True, text=True)
        print(done.stdout, end="")
        code, errors = done.returncode, done.stderr
    else:
        code, errors = call_main(program, arguments, stdin)
    assert code == 0, f"{command} returned {code} and wrote to stderr:\n{errors}"


def call_main(program: str, arguments: list[str], stdin: str = "") -> tuple[int, str]:
    """Exit code and stderr of a program."""
    errors = io.StringIO()
    before, sys.stdin = sys.stdin, io.StringIO(stdin)
    try:
        with contextlib.redirect_stderr(errors):
            code = importlib.import_module(PROGRAMS[program]).main(arguments) or 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.stdin = before
    return code, errors.getvalue()


# ---- what is looked at and not run ----


def check_make(arguments: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for target in (word for word in arguments if "=" not in word):
        assert target in targets, f"the Makefile has no target {target!r}, only {', '.join(targets)}"


def check_pip(arguments: list[str]) -> None:
    """The package itself may be installed, by extras that there are, and what pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for word in arguments:
        if extra := re.fullmatch(r"\.\[(.*)\]", word):
            unknown = set(extra[1].split(",")) - extras.keys()
            assert not unknown, f"pyproject.toml has no extras {unknown}"


def check_pytest(arguments: list[str]) -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    markers = {marker.partition(":")[0] for marker in options["markers"]}
    for index, word in enumerate(arguments):
        if word == "-m":
            names = set(re.findall(r"\w+", arguments[index + 1])) - {"not", "and", "or"}
            assert names <= markers, f"unknown markers {names - markers}"
        elif word.startswith("tests"):
            assert (ROOT / word.partition("::")[0]).exists(), f"no {word}"


@functools.cache
def help_of(program: str, command: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code, errors = call_main(program, [*filter(None, [command]), "--help"])
    assert code == 0, f"python -m {program} {command} --help returned {code}: {errors}"
    return printed.getvalue()


def check_program(command: str) -> None:
    """`python -m ...`, wherever it stands: there is such a program, and its help has the options."""
    module, *arguments = command.split()
    assert importlib.util.find_spec(module) is not None, f"there is no {module} to run"
    if module not in PROGRAMS:
        return
    name = arguments[0] if arguments and re.fullmatch(r"[a-z][a-z-]+", arguments[0]) else ""
    if (module, name) == ("bench", "speed"):  # of an earlier commit, and the README says so
        return
    assert not name or name in help_of(module, ""), f"python -m {module} has no command {name}"
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", command):
        assert re.search(rf"{option}(?![\w-])", help_of(module, name)), f"python -m {module} {name} has no {option}"


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    """Commands, run or not, by their names and options; files; links."""
    text = (ROOT / page).read_text(encoding="utf-8")
    prose = re.sub(r"^```.*\n(?:.*\n)*?```$", "", text, flags=re.MULTILINE)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    shell = [block.text.replace("\\\n", " ") for block in blocks(page) if block.info.startswith("sh")]
    for code in [*inline, *(line for text in shell for line in text.splitlines())]:
        for command in re.findall(r"python -m ((?:zamba2_jax|convert|train|bench)\b[^#|\"]*)", code):
            check_program(command)
        if code.startswith("make "):
            check_make(code.partition("#")[0].split()[1:])
    for code in inline:
        if re.fullmatch(r"(zamba2_jax|convert|train|bench|tests|docs|tools|notebooks|\.ci)/[\w./-]*", code):
            assert (ROOT / code).exists(), f"{page} names {code}, which is not there"
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose):
        if "://" not in link:
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page} links to {link}, which is not there"


def test_blocks_that_are_not_run():
    """Few, known, each with a reason; and no block escapes by a fence that nobody knows."""
    not_run = set()
    for block in (block for page in PAGES for block in blocks(page)):
        kind, _, reason = block.info.partition(":")
        assert kind in ("python", "sh", "text", "sh not-run", "output example"), f"unknown fence: {block}"
        wants_reason = kind in ("sh not-run", "output example")
        assert wants_reason == bool(reason.strip()), f"no reason, or one too many: {block}"
        if kind == "sh not-run":
            not_run.add((block.page, reason.strip()))
    print(*sorted(not_run), sep="\n")
    assert not_run == NOT_RUN


# ---- what the pages cover ----


def used_names() -> tuple[set[str], set[tuple[str, str]]]:
    """Names and attributes that the executed Python uses, and the attributes of plain names as pairs. An import alone
    is no use."""
    names, pairs = set(), set()
    for block in (block for page in PAGES for block in blocks(page) if block.info == "python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Name):
                names.add(node.id)
            elif isinstance(node, ast.Attribute):
                names.add(node.attr)
                if isinstance(node.value, ast.Name):
                    pairs.add((node.value.id, node.attr))
    return names, pairs


def public_members(kind: type) -> Iterator[tuple[str, Callable | property]]:
    """Public methods and properties that are this library's own."""
    for owner in kind.__mro__:
        if owner.__module__.startswith("zamba2_jax"):
            for name, member in vars(owner).items():
                if not name.startswith("_") and isinstance(
                    member, classmethod | property | functools.cached_property | type(test_page)
                ):
                    yield name, member


def test_every_public_name_is_shown():
    names, pairs = used_names()
    missing = [name for name in zamba2_jax.__all__ if name not in names]
    for kind in (getattr(zamba2_jax, name) for name in zamba2_jax.__all__):
        if not inspect.isclass(kind):
            continue
        family = {other for other in zamba2_jax.__all__ if is_related(getattr(zamba2_jax, other), kind)}
        for name, member in public_members(kind):
            # A constructor is another one in each class, but for those of a common base.
            shown = any((k, name) in pairs for k in family) if isinstance(member, classmethod) else name in names
            if not shown and f"{kind.__name__}.{name}" not in NOT_SHOWN:
                missing.append(f"{kind.__name__}.{name}")
    assert not missing, f"no executed block uses {', '.join(missing)}"


def is_related(one: object, other: type) -> bool:
    """Whether two classes have a base of this library in common."""
    if not inspect.isclass(one):
        return False
    bases = [{base for base in kind.__mro__ if base.__module__.startswith("zamba2_jax")} for kind in (one, other)]
    return bool(bases[0] & bases[1])


def test_the_drawing_is_what_its_script_draws():
    drawing = runpy.run_path(str(ROOT / "docs" / "draw_zamba2.py"))["drawing"]()
    assert (ROOT / "docs" / "zamba2.svg").read_text(encoding="utf-8") == drawing
