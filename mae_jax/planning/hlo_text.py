"""The text that the TPU's compiler writes of a program, as lines that refer to one another."""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

# The attribute that names what an instruction does.
BODIES = {
    **{"fusion": "calls", "async-start": "calls"},
    **{"call": "to_apply", "custom-call": "called_computations"},
}
ON_ICI = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Array(NamedTuple):
    """An array as it lies in memory."""

    dims: tuple[int, ...]
    order: str  # of its axes, the fastest first
    size: int  # bytes, without padding
    padded: int  # bytes, with the padding of its tiles
    in_hbm: bool

    @property
    def bits(self) -> int:
        """Of a number in it."""
        return 8 * self.size // max(1, math.prod(self.dims))

    @property
    def registers(self) -> float:
        """Vector registers that it fills, each of 1,024 numbers whatever their type."""
        return 8 * self.padded / self.bits / 1024 if self.bits else 0.0


def computations(text: str) -> dict[str, list["Line"]]:
    """The lines of each computation of `text`; the entry is the last."""
    _, *parts = re.split(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", text, flags=re.MULTILINE)
    found: dict[str, list[Line]] = {}
    for name, body in zip(parts[::2], parts[1::2], strict=True):  # callers behind the called
        lines: dict[str, Line] = {}
        for row in body.split("\n}")[0].splitlines():
            if line := _line(row, lines, found):
                lines[line.name] = line
        found[name] = list(lines.values())
    return found


@dataclasses.dataclass(eq=False)
class Line:
    """A line of the text, with the lines that it refers to."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # what it returns, tuples flat
    operands: list["Line"]
    rest: str  # attributes; of parameters and constants also their number or value
    root: bool
    called: dict[str, list["Line"]]  # computations by the attribute that names them
    users: list["Line"] = dataclasses.field(default_factory=list)

    @property
    def body(self) -> list["Line"]:
        """What a fusion, a call or something begun does."""
        return self.called.get(BODIES.get(self.opcode, ""), [])

    @functools.cached_property
    def everything(self) -> list["Line"]:
        """The line and all that it does, fusions in fusions included."""
        return [self, *(inner for line in self.body for inner in line.everything)]

    @property
    def collective(self) -> str:
        """Which it is, if one; the second half of a pair is none."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in ON_ICI else ""

    @property
    def padded(self) -> int:
        return sum(array.padded for array in self.arrays)

    def find(self, pattern: str, default: str = "") -> str:
        """What the group of `pattern` matches in the attributes."""
        match = re.search(pattern, self.rest)
        return match[1] if match else default


def _line(text: str, lines: dict[str, Line], computations: dict[str, list[Line]]) -> Line | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", text)
    if not head:
        return None
    start = head.end()
    end = _closing(text, start) if text[start] == "(" else text.index(" ", start)
    opcode = re.compile(r"\s*([\w\-]+)\(").match(text, end)
    close = _closing(text, opcode.end() - 1)
    names = re.findall(r"%([\w.\-]+)", text[opcode.end() : close])
    rest = text[opcode.end() :] if opcode[1] in ("constant", "parameter") else text[close:]
    called = {
        attribute: computations[name]
        for attribute, name in re.findall(r"(\w+)=\{?%?([\w.\-]+)", rest)
        if name in computations
    }
    if branches := re.search(r"branch_computations=\{([^}]*)\}", rest):
        called = {name: computations[name.strip(" %")] for name in branches[1].split(",")}
    arrays = _arrays(text[start:end])
    operands = [lines[name] for name in names]
    line = Line(head[2], opcode[1], arrays, operands, rest, bool(head[1]), called)
    for operand in operands:
        operand.users.append(line)
    return line


def _closing(text: str, start: int) -> int:
    """Just behind the bracket that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"not a line of a compiled program: {text[:200]}")


@functools.cache
def _arrays(shape: str) -> tuple[Array, ...]:
    arrays = []
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", shape):
        bits = re.search(r"\d+", dtype)
        width = int(bits[0]) / 8 if bits else {"pred": 1}.get(dtype, 0)  # 0: a token
        dims = tuple(map(int, dims.split(","))) if dims else ()
        order, _, tiling = layout.partition(":")
        physical = [dims[int(i)] for i in reversed(order.split(","))] if order else list(dims)
        if tile := re.search(r"T\(([\d,]+)\)", tiling):
            sides = list(map(int, tile[1].split(",")))
            physical = [1] * (len(sides) - len(dims)) + physical
            for i, side in enumerate(reversed(sides), 1):
                physical[-i] = _up(physical[-i], side)
        size, padded = int(math.prod(dims) * width), int(math.prod(physical) * width)
        arrays.append(Array(dims, order, size, padded, "S(" not in tiling))
    return tuple(arrays)


def _up(size: int, to: int) -> int:
    return math.ceil(size / to) * to
