"""What a compiled program says of itself: its bytes, its fused kernels, and what its devices send to each other."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import Any

_KERNEL = re.compile(r'^\s*(?:ROOT )?%([\w-]+?)(?:\.\d+)* = [^\n]*custom_call_target="tpu_custom_call"', re.MULTILINE)
_TOO_LARGE = (
    re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm"),
    re.compile(r"memory required[^(]*\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"),
)


def program_bytes(memory: Any) -> int:
    """Bytes of HBM that a program needs on a chip: the most that lives at once, arguments included, and its code.

    Args:
        memory: `compiled.memory_analysis()`. Its `temp_size_in_bytes` is no measure of this: libtpu, which refuses
            programs whose temporaries are more than a chip has, compiles some of which it says so there.
    """
    return memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes


def kernels(text: str) -> dict[str, int]:
    """The Pallas kernels in a program compiled for TPUs, by name, and how often each stands in its text (a kernel in a
    loop stands once)."""
    return dict(sorted(collections.Counter(_KERNEL.findall(text)).items()))


@dataclasses.dataclass(frozen=True)
class Refusal:
    """The compiler's word on a program that does not fit."""

    needed_bytes: int
    usable_bytes: int
    text: str


def refusal(error: str) -> Refusal | None:
    """What the text of a compiler's exception says of memory; None if it is about something else."""
    text = " ".join(error.split())
    found = next(filter(None, (pattern.search(text) for pattern in _TOO_LARGE)), None)
    if found is None:
        return None
    needed, usable = (round(float(found[i]) * 1024.0 ** " KMGT".index(found[i + 1])) for i in (1, 3))
    return Refusal(needed, usable, found[0])


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a program.

    Attributes:
        kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute".
        count: how many the program has.
        runs: how many are run, those in loops as often as the loop.
        bytes: that a device receives in one run of the program, if each is done as a ring would.
    """

    kind: str
    count: int
    runs: int
    bytes: float


@dataclasses.dataclass(frozen=True)
class Collectives:
    """Of a program, by kind; and the loops around some whose number of turns cannot be read (they count as one)."""

    kinds: tuple[Collective, ...]
    unread_loops: int


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(
    r"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) "
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute)(-start)?\("
)
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_INTEGER = re.compile(r"%?([\w.-]+) = [su]\d+\[\]\S* constant\((\d+)\)")
_LESS = re.compile(r"ROOT .* compare\((?:\S+ )?%?([\w.-]+), (?:\S+ )?%?([\w.-]+)\).*direction=LT")
_COUNTER = re.compile(r"%?([\w.-]+) = \S+ get-tuple-element\(.*index=(\d+)")
_SHAPE = re.compile(r"\b(pred|bf16|[sufc]\d+\w*)\[([\d,]*)\]")


def collectives(text: str) -> Collectives:
    """Reads them from `compiled.as_text()`.

    A collective that the compiler splits into a beginning, steps between other work, and an end stands there several
    times under one channel id: it counts once. TPU programs spell a reduce-scatter as an all-reduce inside a fusion of
    that name.
    """
    computations, entry = _computations(text)
    found: dict[Any, tuple[str, int, float]] = {}
    unread = set()

    def visit(name: str, times: int, inside: tuple[str, ...]) -> None:
        if name in inside:
            return
        for number, line in enumerate(computations.get(name, ())):
            if loop := _WHILE.search(line):
                turns = _turns(line, computations.get(loop[1], []), computations.get(loop[2], []))
                if turns is None and _holds_collective(computations, loop[2]):
                    unread.add(loop[2])
                visit(loop[2], times * (turns or 1), (*inside, name))
                continue
            if match := _COLLECTIVE.match(line):
                kind, received = _received(match, line, name)
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[1] if channel else (name, number)
                if key not in found or found[key][1] < times:
                    found[key] = (kind, times, received)
            for called in _CALLED.findall(line):
                visit(called, times, (*inside, name))
            if branches := _BRANCHES.search(line):
                for called in branches[1].replace("%", "").split(","):
                    visit(called.strip(), times, (*inside, name))

    visit(entry, 1, ())
    kinds: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
    for kind, times, received in found.values():
        kinds[kind].append((times, received))
    return Collectives(
        tuple(
            Collective(kind, len(runs), sum(times for times, _ in runs), sum(times * size for times, size in runs))
            for kind, runs in sorted(kinds.items())
        ),
        len(unread),
    )


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the one that is run."""
    computations: dict[str, list[str]] = {}
    entry = ""
    lines: list[str] = []
    for line in text.splitlines():
        if line[:1] not in ("", " ", "}") and (head := _COMPUTATION.match(line)):
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif "(" in line or "ROOT" in line:
            lines.append(line)
    return computations, entry


def _turns(line: str, condition: list[str], body: list[str]) -> int | None:
    """How often a loop turns, whose counter begins at 0: from what the compiler says, or from what the counter is
    compared with and by how much it grows. None if neither can be read."""
    if known := _TRIP_COUNT.search(line):
        return int(known[1])
    constants = dict(_INTEGER.findall("\n".join(condition)))
    compared = next(filter(None, map(_LESS.search, condition)), None)
    if compared is None or compared[2] not in constants:
        return None
    counters = dict(_COUNTER.findall("\n".join(condition)))
    step = 1
    if compared[1] in counters:
        step = _growth(body, int(counters[compared[1]]))
    return None if step is None else -(-int(constants[compared[2]]) // step)


def _growth(body: list[str], index: int) -> int | None:
    """By how much a loop's counter, the element `index` of what it carries, grows each turn."""
    root = next((line for line in body if line.lstrip().startswith("ROOT")), "")
    operands = re.search(r" tuple\((.*?)\)(?:,|$)", root)
    if operands is None:
        return None
    names = [part.split("%")[-1].strip() for part in operands[1].split(", ")]
    if index >= len(names):
        return None
    constants = {name: int(value) for name, value in _INTEGER.findall("\n".join(body))}
    definitions = {}
    for line in body:
        if match := re.match(r"\s*%?([\w.-]+) = \S+ (\w[\w-]*)\((.*?)\)", line):
            definitions[match[1]] = (match[2], [part.split("%")[-1].strip() for part in match[3].split(", ")])
    name, growth = names[index], 0
    for _ in range(64):  # add(add(counter, 1), 1), and copies between
        operation, operands = definitions.get(name, (None, []))
        if operation == "get-tuple-element":
            return growth or None
        if operation == "copy":
            name = operands[0]
        elif operation == "add" and any(operand in constants for operand in operands):
            constant = next(operand for operand in operands if operand in constants)
            growth += constants[constant]
            name = next((operand for operand in operands if operand != constant), constant)
        else:
            return None
    return None


def _holds_collective(computations: dict[str, list[str]], name: str) -> bool:
    seen, left = set(), [name]
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in computations.get(name, ()):
            if _COLLECTIVE.match(line):
                return True
            left += re.findall(r"(?:calls|to_apply|body)=%?([\w.-]+)", line)
    return False


def _received(match: re.Match, line: str, computation: str) -> tuple[str, float]:
    """Kind and bytes that a device receives, as a ring does it."""
    result, kind, is_start = match[1], match[2], match[3]
    sizes = [_bytes(dtype, dimensions) for dtype, dimensions in _SHAPE.findall(result)]
    if kind == "collective-permute":
        return kind, sizes[0]
    if is_start and kind in ("all-gather", "reduce-scatter") and len(sizes) > 1:
        sizes = sizes[len(sizes) // 2 :]  # (operands, results)
    size = sum(sizes)
    group = _group_size(line)
    share = 1.0 if group is None else (group - 1) / group
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        return "reduce-scatter", size * share
    if kind == "all-reduce":
        return kind, 2 * size * share
    if kind == "reduce-scatter":
        return kind, size * (1 if group is None else group - 1)
    return kind, size * share


def _group_size(line: str) -> int | None:
    """Of how many devices each group of a collective is; None if all, or not understood."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return None


def _bytes(dtype: str, dimensions: str) -> float:
    bits = 8 if dtype == "pred" or dtype.startswith("f8") else int(re.search(r"\d+", dtype)[0])
    return math.prod(int(size) for size in dimensions.split(",") if size) * bits / 8
