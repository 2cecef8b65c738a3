"""What a compiled TPU program does, read from the text that the compiler writes of it.

The text is scheduled and laid out: it says in which order instructions run, how their arrays are
tiled, and which lie in the chip's own memory (`S(1)`) rather than in HBM. Instructions in loops
count as often as they run.
"""

import collections
import dataclasses
import functools
import math
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from mae_jax.planning.hlo_text import BODIES, Line, computations

# By the names that modules and scopes leave in the program, forwards and backwards; first match.
PARTS = (
    (r"\bmasks\b", "masks"),
    (r"\b(encoder|decoder)\b.*\battention\b", r"\1 attention"),
    (r"\b(encoder|decoder)\b.*\bmlp\b", r"\1 MLP"),
    (r"\b(encoder|decoder)\b.*\battn\b", r"\1 projections"),
    (r"\b(encoder|decoder)\b.*(\bBlock\b|\bnorm)", r"\1 norms"),  # and residual sums
    (r"\b(encoder|decoder)\b", r"\1 embedding"),  # of the decoder also the prediction
    (r"\b(target|images|optimizer|head)\b", r"\1"),
)
REST = "rest"
COLLECTIVES = "collectives"

# Neither run nor move anything.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency"),
}
FREE_CALLS = ("ConcatBitcast", "AssumeGatherIndicesInBound", "AllocateBuffer", "Sharding")
COPIES = ("copy-start", "slice-start", "async-start")  # go on beside other instructions
SLICES = ("slice", "dynamic-slice", "gather")  # read as much of their operand as they return
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # write this operand into the first, in place
# No vector work: matrix work, or only told from where to read.
UNCOUNTED = {
    *("fusion", "dot", "convolution", "custom-call", "send", "recv", *COPIES),
    *("broadcast", "iota", "reshape", "transpose", "slice", "dynamic-slice", "pad"),
}
PASSES = {"high": 3, "highest": 6}  # of a float32 product, over factors in bfloat16


class Product(NamedTuple):
    """`count` matrix products of [m, k] by [k, n], each `passes` times over bfloat16 factors."""

    count: int
    m: int
    k: int
    n: int
    passes: int = 1

    @property
    def flops(self) -> int:
        """Two for each multiply-add."""
        return 2 * self.count * self.m * self.k * self.n


class Collective(NamedTuple):
    """An exchange between devices."""

    kind: str  # all-gather, all-reduce, ...
    size: int  # bytes of the whole: once gathered, before it is scattered
    over: str  # "ici" or "dcn"
    groups: tuple[tuple[int, ...], ...]  # of places in the mesh of a slice; none: all devices


class Kernel(NamedTuple):
    """A program within the program, which the compiler was given as it is."""

    name: str
    shape: tuple[int, ...]  # of its first argument
    bits: int  # of a number there


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Something that runs; figures are of one time on one device.

    Attributes:
      part: of the model, see `PARTS`.
      times: how often a step runs it.
      hbm_bytes: read and written there.
      vmem_bytes: loaded into registers and stored from them.
      registers: that each operation goes through, matrix products left out. Of copies only those
        that change the order of axes, by the bits of a number: "copy-8", "copy-16", "copy-32".
      estimated_cycles: the compiler's figure, 0 where it has none.
      starts: it begins a copy that goes on while others run.
      waits_for: the copy, by its name, that it waits for.
      beside: exchanges under way while it runs, by the names of the instructions that begin them.
      kernel: the one that it runs.
      cycles: that this takes on registers alone, both cores of a device at work; 0: not counted.
    """

    name: str
    opcode: str
    part: str
    times: int
    products: tuple[Product, ...] = ()
    hbm_bytes: int = 0
    vmem_bytes: int = 0
    registers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    estimated_cycles: int = 0
    collective: Collective | None = None
    starts: bool = False
    waits_for: str = ""
    beside: tuple[str, ...] = ()
    kernel: Kernel | None = None
    cycles: float = 0.0


@dataclasses.dataclass(frozen=True)
class Program:
    """Instructions in the order in which they run."""

    instructions: tuple[Instruction, ...]

    @property
    def flops(self) -> int:
        """Of matrix products, a step on one device."""
        return sum(i.times * p.flops for i in self.instructions for p in i.products)

    @property
    def estimated_cycles(self) -> int:
        """The compiler's own sum."""
        return sum(i.times * i.estimated_cycles for i in self.instructions)

    def collectives(self) -> collections.Counter[Collective]:
        """How often each is run in a step."""
        counts: collections.Counter[Collective] = collections.Counter()
        for i in self.instructions:
            if i.collective:
                counts[i.collective] += i.times
        return counts


def compile_and_read(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, Program]:
    """The executable, and its program as the TPU's compiler writes it into a file.

    `compiled.as_text()` would parse it first: in JAX 0.10.2 that fails where work, such as gathers
    on v6e and tpu7x, is handed to the sparse cores.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        [text] = pathlib.Path(folder).glob("*.after_codegen.txt")
        return compiled, read(text.read_text())


def read(text: str) -> Program:
    """The program of `text`."""
    *_, entry = computations(text).values()
    return Program(tuple(_runs(entry, 1)))


def _runs(lines: list[Line], times: int) -> Iterator[Instruction]:
    """What runs when a computation does so `times` times, in order."""
    parts = _parts(lines)
    chains: dict[str, str] = {}  # what begins an exchange that is written in several instructions
    begun: list[str] = []  # exchanges that go on until an instruction waits for them
    for line in lines:
        if line.opcode == "while":
            count = times * _trip_count(line)
            yield from _runs(line.called["body"], count)
        elif line.opcode in ("call", "conditional"):  # the longest branch
            branches = [list(_runs(body, times)) for body in line.called.values()]
            yield from max(branches, key=lambda b: (Program(tuple(b)).flops, len(b)))
        elif line.opcode not in FREE and not any(name in line.rest for name in FREE_CALLS):
            collective = _collective(line)
            waits = line if line.opcode.endswith("-done") and line.operands else None
            while waits and waits.opcode.endswith(("-done", "-update")):
                waits = waits.operands[0]
            if waits and waits.name in begun:
                begun.remove(waits.name)
            beside = tuple(begun)
            # One that goes on beside several instructions is written in each of them.
            inner = [x for x in line.everything if x.collective]
            chain = max((x.find(r'chain_id="(\d+)"') for x in inner), default="")
            if chain in chains:
                collective, beside = None, (chains[chain], *beside)
            elif chain:
                chains[chain] = line.name
            elif collective and line.opcode.endswith(("-start", "send")):
                begun.append(line.name)
            traffic = [] if collective else list(_traffic(line))
            yield Instruction(
                name=line.name,
                opcode=line.opcode,
                part=COLLECTIVES if collective else parts[line],
                times=times,
                products=tuple(product for x in line.everything for product in _product(x)),
                hbm_bytes=sum(size for size, in_hbm in traffic if in_hbm),
                vmem_bytes=0 if line.opcode in COPIES else sum(size for size, _ in traffic),
                registers=_registers(line),
                estimated_cycles=int(line.find(r'"estimated_cycles":"(\d+)"', "0")),
                collective=collective,
                starts=line.opcode in COPIES,
                waits_for=waits.name if waits else "",
                beside=beside,
                kernel=_kernel(line),
            )


def _kernel(line: Line) -> Kernel | None:
    if 'custom_call_target="tpu_custom_call"' not in line.rest:
        return None
    first = line.operands[0].arrays[0]
    return Kernel(re.sub(r"\.\d+$", "", line.name), first.dims, first.bits)


def _trip_count(line: Line) -> int:
    """How often a loop runs: what the compiler knows, or the constant its counter runs up to."""
    if known := line.find(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    constants = (x.rest for x in line.called["condition"] if x.opcode == "constant")
    limits = [int(match[1]) for value in constants if (match := re.match(r"(\d+)\)", value))]
    return max(limits, default=1)


def part_of(op_name: str) -> str:
    """The part of the model that a name in the program belongs to."""
    for pattern, part in PARTS:
        if match := re.search(pattern, op_name):
            return match.expand(part)
    return REST


def _parts(lines: list[Line]) -> dict[Line, str]:
    """The part of each line: of its heaviest product, else its own, else of who uses it first, else
    of what it comes from, as results copied out at the end do."""
    parts: dict[Line, str] = {}
    for line in reversed(lines):
        heaviest = max(line.everything, key=lambda x: sum(p.flops for p in _product(x)))
        names = [x.find(r'op_name="([^"]*)"') for x in (heaviest, *reversed(line.everything))]
        own = [part_of(name) for name in names if line.opcode not in FREE]
        found = [part for part in (*own, *(parts[user] for user in line.users)) if part != REST]
        parts[line] = found[0] if found else REST
    for line in lines:
        if parts[line] == REST and (line.opcode in FREE or "op_name" not in line.rest):
            parts[line] = next((parts[x] for x in line.operands if parts[x] != REST), REST)
    return parts


def _product(line: Line) -> Iterator[Product]:
    """The matrix products of a line, fusions not looked into."""
    if line.opcode not in ("dot", "convolution"):
        return
    passes = PASSES.get(line.find(r"operand_precision=\{(\w+)"), 1)
    left, right = (operand.arrays[0].dims for operand in line.operands[:2])
    out = line.arrays[0].dims
    if line.opcode == "convolution":
        yield _convolution(line, left, right, out, passes)
        return
    contracted, batch = (
        [left[int(i)] for i in line.find(rf"lhs_{kind}_dims=\{{([\d,]+)\}}").split(",") if i]
        for kind in ("contracting", "batch")
    )
    k, count = math.prod(contracted), math.prod(batch)
    m = math.prod(left) // (k * count)
    yield Product(count, m, k, math.prod(out) // (m * count), passes)


def _convolution(line: Line, left: tuple, right: tuple, out: tuple, passes: int) -> Product:
    """The compiler writes every product as a convolution: an axis of the window is one of m, k, n
    or of a batch, by what of it meets data that is no padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.rest)
    fields = dict(re.findall(r"(\w+)=([\dx_\-]+)", line.find(r"window=\{([^}]*)\}")))
    count, m, n = 1, out[labels[3].index("b")], out[labels[3].index("f")]
    k = right[labels[2].index("i")]
    for axis in range(len(fields.get("size", "").split("x")) if fields else 0):

        def field(name: str, default: str = "1", axis: int = axis) -> str:
            return fields[name].split("x")[axis] if name in fields else default

        given, result = left[labels[1].index(str(axis))], out[labels[3].index(str(axis))]
        size, low = int(field("size")), int(field("pad", "0_0").split("_")[0])
        steps = (int(field(name)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        met = _meetings(given, size, result, low, *steps)
        if met > result or (size == 1 and given > 1):
            k, m = k * (met // result), m * result
        elif given == 1:
            n *= result
        else:
            count *= result
    return Product(count, m, k, n, passes)


@functools.cache
def _meetings(
    given: int, size: int, result: int, low: int, stride: int, dilate: int, spread: int
) -> int:
    """Pairs of (place of the result, place of the window) that meet an element of the input."""
    places = np.add.outer(np.arange(result) * stride, np.arange(size) * spread) - low
    return int(((places % dilate == 0) & (places >= 0) & (places // dilate < given)).sum())


def _registers(line: Line) -> collections.Counter[str]:
    registers: collections.Counter[str] = collections.Counter()
    for x in line.everything if line.opcode not in COPIES else ():
        if x.opcode in FREE | UNCOUNTED or x.collective or x.opcode.endswith("-done"):
            continue
        read = x.operands[0].arrays if x.operands else x.arrays
        if x.opcode != "copy" or read[0].order != x.arrays[0].order:
            arrays = read if x.opcode == "reduce" else x.arrays
            moves = x.opcode in ("copy", "reverse")
            name = f"{x.opcode}-{arrays[0].bits}" if moves else x.opcode
            registers[name] += sum(array.registers for array in arrays)
    return registers


def _traffic(line: Line) -> Iterator[tuple[int, bool]]:
    """(bytes, whether in HBM) of all that an instruction reads and writes."""
    if line.opcode.endswith(("-done", "-update")) or line.opcode in ("send", "recv", *FREE):
        return  # counted at the start; over links
    if line.opcode in BODIES and line.opcode != "fusion" and line.body:  # also on sparse cores
        for x in line.body:
            yield from _traffic(x)
        return
    if line.opcode in COPIES:
        ends = line.arrays[:2]  # both, a slice's second the smaller
        yield from ((min(array.padded for array in ends), array.in_hbm) for array in ends)
        return
    for number, operand in enumerate(line.operands):
        if len(operand.arrays) == 1:
            taken = min(_read(line, number), operand.padded)
            yield int(taken), operand.arrays[0].in_hbm
    root = next((x for x in line.body if x.root), line)
    for array, size in zip(line.arrays, _written(root), strict=True):
        yield min(size, array.padded), array.in_hbm


def _read(line: Line, number: int) -> float:
    """Bytes that `line` takes of its operand of this number; all there is: infinity."""
    if line.opcode in SLICES and number == 0:
        return line.padded
    if (line.opcode in UPDATES and number == 0) or line.collective or line.opcode == "tuple":
        return 0
    if "AsyncCollective" in line.rest:
        return 0
    if line.opcode in ("bitcast", "get-tuple-element"):
        return sum(_read(user, user.operands.index(line)) for user in line.users)
    for x in line.body:
        if x.opcode == "parameter" and x.rest.startswith(f"{number})"):
            return sum(_read(user, user.operands.index(x)) for user in x.users)
    return math.inf


def _written(line: Line) -> list[int]:
    """Bytes that an instruction, of a fusion its root, writes of each array that it returns."""
    if line.opcode == "tuple":
        return [size for operand in line.operands for size in _written(operand)]
    if line.opcode in UPDATES:
        return [line.operands[UPDATES[line.opcode]].padded]
    if line.opcode == "bitcast" and line.operands[0].opcode in UPDATES:
        return _written(line.operands[0])
    passed_on = line.opcode == "parameter" or line.collective or "AsyncCollective" in line.rest
    return [0 if passed_on else array.padded for array in line.arrays]


def _collective(line: Line) -> Collective | None:
    if line.opcode == "send" and "xla_megascale_runtime" in line.rest:  # hosts carry it out
        kind = line.find(r'_xla_megascale_transfer_type="(\w+)"', "send")
        size = sum(array.size for array in line.operands[0].arrays)
        return Collective(kind.lower().replace("_", "-"), size, "dcn", ())
    inner = next((x for x in line.everything if x.collective), None)
    if inner is None:
        return None
    kind, groups = inner.collective, _groups(inner)
    size = sum(array.size for operand in inner.operands for array in operand.arrays)
    if kind == "all-gather":
        size *= len(groups[0]) if groups else 1
    if kind == "all-reduce" and any(x.root and x.opcode == "dynamic-slice" for x in line.body):
        kind = "reduce-scatter"  # each device keeps its share of the sum
    return Collective(kind, size, "ici", groups)


def _groups(line: Line) -> tuple[tuple[int, ...], ...]:
    """Who exchanges with whom, as listed or as `[groups,members]<=[reshape]T(transpose)`."""
    short = r"replica_groups=\[(\d+),\d+\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if match := re.search(short, line.rest):
        shape = tuple(map(int, match[2].split(",")))
        order = tuple(map(int, match[3].split(","))) if match[3] else None
        ids = np.arange(math.prod(shape)).reshape(shape).transpose(order)
        return tuple(map(tuple, ids.reshape(int(match[1]), -1).tolist()))
    listed = line.find(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}")
    groups = re.findall(r"\{([\d,]+)\}", listed)
    return tuple(tuple(map(int, group.split(","))) for group in groups)
