"""Runs the PTX of a small kernel on a CPU, so that what a compiler made of it can be checked without a GPU.

The threads of a block go through the program in step, each register an array of one number a thread. Copies are done
when they are asked for and barriers do nothing: results are checked, orders of events are not. Of PTX it has what
Triton makes of the decode kernels' products; anything else is refused by name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

SHARED_BYTES = 232_448
_COMPARE = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
_COMPARE |= {"eq": np.equal, "ne": np.not_equal}
_BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum}
# Instructions that order events.
_ORDER = ("bar.", "barrier.", "griddepcontrol.", "cp.async.commit", "cp.async.wait", "fence.")


@dataclasses.dataclass(frozen=True)
class Memory:
    """An operand [base + offset]."""

    base: str
    offset: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`operands`: registers and numbers as written, lists of them, and `Memory`. `unless`: of the negated predicate."""

    name: str
    operands: tuple[Any, ...]
    predicate: str | None
    unless: bool


class Kernel:
    """The program of PTX's only entry."""

    def __init__(self, text: str):
        entry = text[text.index(".entry") :]
        head, _, body = entry.partition("{")
        self.threads = int(re.search(r"\.(?:req|max)ntid\s+(\d+)", head)[1])
        self.parameters = re.findall(r"(\w+_param_\d+)", head)
        self.program: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self._parse(re.sub(r"//[^\n]*", "", body))

    def run(self, arrays: Sequence[np.ndarray], grid: Sequence[int]) -> list[np.ndarray]:
        """The arrays, inputs and then outputs, after all blocks of the grid."""
        places, size = [], 4096
        for array in arrays:
            places.append(size)
            size += -(-array.nbytes // 256) * 256
        memory = np.zeros(size + 4096, np.uint8)
        for array, place in zip(arrays, places, strict=True):
            memory[place : place + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        addresses = dict.fromkeys(self.parameters, 0) | dict(zip(self.parameters, places, strict=False))
        for block in np.ndindex(*grid):
            _Block(self, block, addresses, memory).run()
        return [
            memory[place : place + array.nbytes].view(array.dtype).reshape(array.shape).copy()
            for array, place in zip(arrays, places, strict=True)
        ]

    def _parse(self, body: str) -> None:
        scopes: list[dict[str, str]] = []
        statement, depth = "", 1
        for character in body:
            blank = not statement.strip()
            if character == "{" and blank:  # inline assembly, whose registers are its own
                scopes.append({"": f"@{len(self.program)}"})
                depth += 1
            elif character == "}" and blank:
                depth -= 1
                if depth == 0:
                    return
                scopes.pop()
            elif character == ":" and re.fullmatch(r"\s*[\w$]+", statement):
                self.labels[statement.strip()] = len(self.program)
                statement = ""
            elif character == ";":
                self._statement(" ".join(statement.split()), scopes)
                statement = ""
            else:
                statement += character

    def _statement(self, text: str, scopes: list[dict[str, str]]) -> None:
        text = re.sub(r"^\.loc [\d ,a-z_$.+]*?(?=[@a-z]\w*[. ])", "", text)
        if text.startswith(".reg") and scopes:
            names = (name.strip() for name in text.split(" ", 2)[2].split(","))
            scopes[-1].update({name: name + scopes[-1][""] for name in names})
        if not text or text.startswith("."):
            return
        match = re.fullmatch(r"(?:@(!?)(%?\w+) )?([a-z][\w.:]*)(?: (.*))?", text)
        if match is None:
            raise ValueError(f"no PTX instruction: {text!r}")

        def named(name: str) -> str:
            return next((scope[name] for scope in reversed(scopes) if name in scope), name)

        def operand(part: str) -> Any:
            if part[0] == "{":
                return [named(name.strip()) for name in part[1:-1].split(",")]
            if part[0] == "[":
                base, _, offset = part[1:-1].partition("+")
                return Memory(named(base.strip()), int(offset or "0", 0))
            return named(part)

        parts = (part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", match[4] or ""))
        operands = tuple(operand(part) for part in parts if part)
        self.program.append(Instruction(match[3], operands, match[2] and named(match[2]), bool(match[1])))


class _Block:
    def __init__(self, kernel: Kernel, block: tuple[int, ...], addresses: dict[str, int], memory: np.ndarray):
        self.kernel, self.block, self.addresses, self.memory = kernel, block, addresses, memory
        self.shared = np.zeros(SHARED_BYTES, np.uint8)
        self.registers: dict[str, np.ndarray] = {}
        self.count = kernel.threads

    def run(self) -> None:
        at, program = 0, self.kernel.program
        while program[at].name != "ret":
            instruction = program[at]
            at += 1
            active = np.ones(self.count, bool)
            if instruction.predicate is not None:
                active = (self.registers[instruction.predicate] != 0) != instruction.unless
            if instruction.name.startswith("bra"):
                if active.any() != active.all():
                    raise NotImplementedError("threads that branch apart")
                if active.all():
                    at = self.kernel.labels[instruction.operands[0]]
            elif not instruction.name.startswith(_ORDER):
                self._execute(instruction, active)

    def _execute(self, instruction: Instruction, active: np.ndarray) -> None:
        name, operands = instruction.name, instruction.operands
        if name.startswith("mma."):
            results = self._matrix_product(name, *operands[1:])
        elif name.startswith("ldmatrix."):
            results = self._load_matrices(name, operands[1], len(operands[0]))
        elif name.startswith("stmatrix."):
            return self._store_matrices(name, *operands)
        elif name.startswith("cp.async."):
            return self._copy(operands, active)
        elif name.startswith("ld.param"):
            results = np.full(self.count, self.addresses[operands[1].base], np.uint64)
        elif name.startswith("ld."):
            results = self._load(name, operands, active)
        elif name.startswith("st."):
            return self._store(name, operands, active)
        else:
            results = self._compute(name, operands)
        names = operands[0] if isinstance(operands[0], list) else [operands[0]]
        for register, values in zip(names, results if isinstance(results, list) else [results], strict=True):
            before = self.registers.get(register, values)
            self.registers[register] = np.where(active, values, before)
        return None

    def _compute(self, name: str, operands: tuple[Any, ...]) -> np.ndarray | list[np.ndarray]:
        base, *kinds = name.split(".")
        kind = kinds[-1] if kinds else ""
        width = int(re.sub(r"\D", "", kind) or 32) if kind != "pred" else 64
        if base == "mov":
            return self._move(operands, width)
        values = [self._value(operand) for operand in operands[1:]]
        if kind in ("f32", "bf16", "bf16x2") and base in (*_ARITHMETIC, "fma"):
            return _float_arithmetic(base, kind, values)
        if base == "cvta":
            return values[0]
        if base == "cvt":
            return _convert(kinds, values)
        if base == "mul" and kinds[0] == "wide":
            one, other = (_signed(v, 32) if kind[0] == "s" else _bits(v, 32).view(np.int64) for v in values)
            return (one * other).view(np.uint64)
        if base in ("min", "max") and kind[0] == "s":
            return _bits(_ARITHMETIC[base](*(_signed(v, width) for v in values)).view(np.uint64), width)
        if base in _ARITHMETIC:
            return _bits(_ARITHMETIC[base](*(_bits(v, width) for v in values)), width)
        if base in _BITWISE:
            return _bits(_BITWISE[base](*values), width)
        if base == "mad":
            return _bits(values[0] * values[1] + values[2], width)
        if base == "neg":
            return _bits((-_signed(values[0], width)).view(np.uint64), width)
        if base == "not":
            return (values[0] == 0).astype(np.uint64) if kind == "pred" else _bits(~values[0], width)
        if base == "shl":
            return _bits(values[0] << values[1], width)
        if base == "shr":
            if kind[0] == "s":
                return _bits((_signed(values[0], width) >> values[1].view(np.int64)).view(np.uint64), width)
            return _bits(values[0], width) >> values[1]
        if base == "bfe":
            length = int(values[2][0])
            field = _bits(_bits(values[0], 32) >> values[1], length)
            return _bits(_signed(field, length).view(np.uint64), 32) if kind == "s32" else field
        if base == "prmt":
            return _permute(*values)
        if base == "lop3":
            return _of_three(*values)
        if base == "selp":
            return np.where(values[2] != 0, _bits(values[0], width), _bits(values[1], width))
        if base == "setp" and kind[0] in "usb":
            one, other = (_signed(v, width) if kind[0] == "s" else _bits(v, width) for v in values)
            return _COMPARE[kinds[0]](one, other).astype(np.uint64)
        raise NotImplementedError(f"{name} is not among what this runs of PTX")

    def _value(self, operand: str) -> np.ndarray:
        if operand in self.registers:
            return self.registers[operand]
        if operand == "%tid.x":
            return np.arange(self.count, dtype=np.uint64)
        if operand.startswith("%ctaid."):
            return np.full(self.count, self.block["xyz".index(operand[-1])], np.uint64)
        if re.fullmatch(r"0f[\da-fA-F]{8}", operand):
            return np.full(self.count, int(operand[2:], 16), np.uint64)
        if re.fullmatch(r"-?(\d+|0x[\da-fA-F]+)U?", operand):
            return np.full(self.count, int(operand.removesuffix("U"), 0) & (2**64 - 1), np.uint64)
        if operand.startswith("global_smem"):  # the shared memory's symbol
            return np.zeros(self.count, np.uint64)
        raise KeyError(f"{operand} is read before it is written")

    def _address(self, memory: Memory) -> np.ndarray:
        return self._value(memory.base).view(np.int64) + memory.offset

    def _move(self, operands: tuple[Any, ...], width: int) -> np.ndarray | list[np.ndarray]:
        to, source = operands
        if isinstance(source, list):
            part = width // len(source)
            return sum(_bits(self._value(s), part) << np.uint64(part * i) for i, s in enumerate(source))
        values = self._value(source)
        if isinstance(to, list):
            part = width // len(to)
            return [_bits(values >> np.uint64(part * i), part) for i in range(len(to))]
        return _bits(values, width)

    def _space(self, name: str) -> np.ndarray:
        return self.memory if ".global" in name else self.shared

    def _load(self, name: str, operands: tuple[Any, ...], active: np.ndarray) -> list[np.ndarray]:
        size = int(re.search(r"(\d+)$", name)[1]) // 8
        address = np.where(active, self._address(operands[1]), 0)
        count = len(operands[0]) if isinstance(operands[0], list) else 1
        index = address[:, None] + np.arange(size * count)
        loaded = np.ascontiguousarray(self._space(name)[index]).view(f"u{size}").astype(np.uint64)
        return [loaded[:, number] for number in range(count)]

    def _store(self, name: str, operands: tuple[Any, ...], active: np.ndarray) -> None:
        size = int(re.search(r"(\d+)$", name)[1]) // 8
        to, source = operands
        source = source if isinstance(source, list) else [source]
        values = np.stack([self._value(register) for register in source], axis=1).astype(f"u{size}")
        index = self._address(to)[:, None] + np.arange(size * len(source))
        self._space(name)[index[active]] = np.ascontiguousarray(values[active]).view(np.uint8)

    def _copy(self, operands: tuple[Any, ...], active: np.ndarray) -> None:
        to, source, size = operands[:3]
        size = int(size, 0)
        taken = self._value(operands[3]) if len(operands) > 3 else np.full(self.count, size)
        for thread in np.flatnonzero(active):
            target, origin = self._address(to)[thread], self._address(source)[thread]
            self.shared[target : target + size] = 0
            read = int(taken[thread])
            self.shared[target : target + read] = self.memory[origin : origin + read]

    def _rows_of_matrices(self, memory: Memory, number: int) -> np.ndarray:
        """(warps, 8): the addresses of 8 rows of 16 bytes, which lanes 8 n to 8 n + 7 give for the n-th matrix."""
        return self._address(memory).reshape(-1, 32)[:, 8 * number : 8 * number + 8]

    def _load_matrices(self, name: str, memory: Memory, count: int) -> list[np.ndarray]:
        results = []
        for number in range(count):
            index = self._rows_of_matrices(memory, number)[..., None] + np.arange(16)
            matrices = np.ascontiguousarray(self.shared[index]).view(np.uint16)
            matrices = matrices.swapaxes(1, 2) if ".trans." in name else matrices
            pairs = np.ascontiguousarray(matrices).view(np.uint32)  # (warps, 8, 4): one for each lane
            results.append(pairs.reshape(-1).astype(np.uint64))
        return results

    def _store_matrices(self, name: str, memory: Memory, registers: list[str]) -> None:
        for number, register in enumerate(registers):
            pairs = self._value(register).astype(np.uint32).reshape(-1, 8, 4)
            matrices = pairs.view(np.uint16)
            matrices = matrices.swapaxes(1, 2) if ".trans." in name else matrices
            index = self._rows_of_matrices(memory, number)[..., None] + np.arange(16)
            self.shared[index] = np.ascontiguousarray(matrices).view(np.uint8)

    def _matrix_product(self, name: str, left: list[str], right: list[str], added: list[str]) -> list[np.ndarray]:
        if "m16n8k16.row.col.f32.bf16.bf16.f32" not in name:
            raise NotImplementedError(f"{name} is not among what this runs of PTX")
        # In each register of 32 bits lane 4 g + q has two neighbours, which begin at column 2 q: of row g, of row
        # g + 8, then both 8 columns on. The right operand lies turned.
        quarters = [self._pairs(register) for register in left]
        a = np.block([[quarters[0], quarters[2]], [quarters[1], quarters[3]]])
        b = np.concatenate([self._pairs(register) for register in right], axis=2)
        halves = [np.stack([_float(self._value(added[i + j])) for j in range(2)], axis=1) for i in (0, 2)]
        c = np.concatenate([half.reshape(-1, 8, 8) for half in halves], axis=1)
        result = (a.astype(np.float64) @ b.swapaxes(1, 2) + c).astype(np.float32)
        parts = [half.reshape(-1, 2) for half in (result[:, :8], result[:, 8:])]
        return [_of_float(part[:, column]) for part in parts for column in range(2)]

    def _pairs(self, register: str) -> np.ndarray:
        """(warps, 8, 8) of bfloat16, as float32."""
        values = self._value(register)
        both = np.stack([_bfloat16(values), _bfloat16(values >> np.uint64(16))], axis=1)
        return both.reshape(-1, 8, 8)


def _bits(values: np.ndarray, width: int) -> np.ndarray:
    return values.astype(np.uint64) & np.uint64(2**width - 1)


def _signed(values: np.ndarray, width: int) -> np.ndarray:
    spare = np.int64(64 - width)
    return (values.astype(np.uint64).view(np.int64) << spare) >> spare


def _float(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint32).view(np.float32)


def _of_float(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    return _float(_bits(values, 16) << np.uint64(16))


def _of_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, halves to the even one."""
    wide = _of_float(values)
    return _bits((wide + np.uint64(0x7FFF) + ((wide >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16), 16)


def _float_arithmetic(base: str, kind: str, values: list[np.ndarray]) -> np.ndarray:
    def rounded_once(*numbers: np.ndarray) -> np.ndarray:
        numbers = [number.astype(np.float64) for number in numbers]
        return numbers[0] * numbers[1] + numbers[2] if base == "fma" else _ARITHMETIC[base](*numbers)

    if kind == "f32":
        return _of_float(rounded_once(*map(_float, values)).astype(np.float32))
    result = np.zeros(len(values[0]), np.uint64)
    for shift in (0, 16) if kind == "bf16x2" else (0,):
        half = rounded_once(*(_bfloat16(value >> np.uint64(shift)) for value in values))
        result |= _of_bfloat16(half.astype(np.float32)) << np.uint64(shift)
    return result


def _convert(kinds: list[str], values: list[np.ndarray]) -> np.ndarray:
    to, source = kinds[-2:]
    if (to, source) == ("bf16x2", "f32"):
        return _of_bfloat16(_float(values[0])) << np.uint64(16) | _of_bfloat16(_float(values[1]))
    if (to, source) == ("bf16", "f32"):
        return _of_bfloat16(_float(values[0]))
    if (to, source) == ("f32", "bf16"):
        return _of_float(_bfloat16(values[0]))
    if to[0] in "us" and source[0] in "us":
        width = int(source[1:])
        wide = _signed(values[0], width).view(np.uint64) if source[0] == "s" else _bits(values[0], width)
        return _bits(wide, int(to[1:]))
    raise NotImplementedError(f"a conversion from {source} to {to} is not among what this runs of PTX")


def _permute(one: np.ndarray, other: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = _bits(one, 32) | _bits(other, 32) << np.uint64(32)
    result = np.zeros(len(both), np.uint64)
    for byte in range(4):
        chosen = _bits(selector >> np.uint64(4 * byte), 4)
        if (chosen > 7).any():
            raise NotImplementedError("prmt with signs")
        result |= _bits(both >> (chosen * np.uint64(8)), 8) << np.uint64(8 * byte)
    return result


def _of_three(one: np.ndarray, other: np.ndarray, third: np.ndarray, table: np.ndarray) -> np.ndarray:
    result = np.zeros(len(one), np.uint64)
    for case in range(8):
        if int(table[0]) >> case & 1:
            taken = [v if case >> shift & 1 else ~v for v, shift in ((one, 2), (other, 1), (third, 0))]
            result |= taken[0] & taken[1] & taken[2]
    return _bits(result, 32)
