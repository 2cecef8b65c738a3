"""How long a compiled program takes on a chip it was compiled for, by what is known of the chip.

An instruction takes as long as the slowest of what it keeps busy: matrix units, vector units, HBM.
Copies to and from HBM that go on beside other instructions take what bandwidth those leave. The
compiler's own `estimated_cycles` know neither the type nor the operation of elementwise work and
nothing of what devices exchange; they are handed on for comparison.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from mae_jax.planning.chips import Chip, Pod
from mae_jax.planning.program import Collective, Instruction, Product, Program

ROWS = 8  # of a tile: what streams through a matrix unit is padded to them
REGISTER_BYTES = 4096  # of a vector register, and of one access to the chip's memory
# Cycles for a register of 1,024 numbers; of other operations four are done at once. Slopes of the
# instruction bundles that libtpu 0.0.52 makes of chains of one operation for v5e.
VECTOR_CYCLES = {
    **{"exponential": 1.6, "exponential-minus-one": 2.0, "log": 2.0, "log-plus-one": 2.5},
    **{"tanh": 1.6, "logistic": 2.5, "divide": 2.0, "power": 6.0, "sqrt": 3.4, "rsqrt": 2.7},
    **{"erf": 9.7, "sine": 20.0, "cosine": 20.0, "sort": 350.0},
    **{"copy-8": 23.0, "copy-16": 4.5, "copy-32": 8.5, "reverse-8": 13.0, "reverse-32": 8.5},
}
ERF_CYCLES = 2.3  # of chips with larger matrix units: they have an instruction for it
PLAIN_CYCLES = 0.25
HBM_LATENCY = 0.8e-6  # seconds until an instruction's first data arrive, by the same bundles
SCALARS = 2048  # bytes; single numbers and what is computed from them take no such time
HOP = 1e-6  # seconds from chip to chip


@dataclasses.dataclass(frozen=True)
class PartCost:
    """Seconds of a step on one device for one part of the model.

    Attributes:
      seconds: what it takes, instruction by instruction the longest of the others.
      matmul_seconds: of its products at peak, factors padded to the matrix unit.
      vector_seconds: of elementwise work and of moving data within the chip; of kernels of all
        that they do there.
      hbm_seconds: of all its traffic at full bandwidth.
      estimated_cycles: the compiler's figure.
    """

    seconds: float = 0.0
    matmul_seconds: float = 0.0
    vector_seconds: float = 0.0
    hbm_seconds: float = 0.0
    estimated_cycles: int = 0


def estimate(program: Program, chip: Chip) -> dict[str, PartCost]:
    """The time of each part of the model, exchange between devices left out.

    Args:
      program: as `program.read` gives it.
      chip: that it was compiled for.
    """
    sums: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    under_way: dict[str, float] = {}  # seconds of HBM that copies begun still need, oldest first
    times = 1
    for i in program.instructions:
        if i.times != times:  # at a loop's border copies have come to an end
            under_way, times = {}, i.times
        cost = _cost(i, chip)
        if i.starts:
            under_way[i.name] = cost["hbm_seconds"]
            cost["seconds"] = 0.0
        elif i.waits_for in under_way:
            while i.waits_for in under_way:
                cost["seconds"] += under_way.pop(next(iter(under_way)))
        else:
            spare = cost["seconds"] - cost["hbm_seconds"]
            for name, needed in under_way.items():
                under_way[name] -= min(spare, needed)
                spare -= min(spare, needed)
        for name, value in cost.items():
            sums[i.part][name] += value * i.times
    return {part: PartCost(**total) for part, total in sums.items()}


def _cost(i: Instruction, chip: Chip) -> dict[str, float]:
    cores = chip.cores / chip.devices  # that share the work of one device
    matmul = sum(padded_flops(p, chip.mxu) for p in i.products) * chip.devices / chip.flops
    vector = max(vector_cycles(i, chip) / cores, i.cycles) / chip.clock
    hbm = i.hbm_bytes * chip.devices / chip.hbm_bandwidth
    hbm += HBM_LATENCY if i.hbm_bytes > SCALARS and not i.starts else 0.0
    cost = {"matmul_seconds": matmul, "vector_seconds": vector, "hbm_seconds": hbm}
    return cost | {"seconds": max(matmul, vector, hbm), "estimated_cycles": i.estimated_cycles}


def padded_flops(product: Product, side: int) -> int:
    """FLOPs that a matrix unit of `side` x `side` spends: one factor lies in it, [k, n] or [k, m],
    and is padded to its sides, the other streams through."""

    def up(size: int, to: int) -> int:
        return math.ceil(size / to) * to

    m, n = product.m, product.n
    lying = min(up(m, ROWS) * up(n, side), up(n, ROWS) * up(m, side))
    return 2 * product.count * product.passes * lying * up(product.k, side)


def vector_cycles(i: Instruction, chip: Chip) -> float:
    """Cycles of a core's vector units: arithmetic, or loads and stores if these take longer."""
    table = VECTOR_CYCLES | ({"erf": ERF_CYCLES} if chip.mxu > 128 else {})
    work = sum(n * table.get(opcode, PLAIN_CYCLES) for opcode, n in i.registers.items())
    return max(work, i.vmem_bytes / REGISTER_BYTES)


@dataclasses.dataclass(frozen=True)
class Communication:
    """One kind of exchange in a step.

    Attributes:
      kind: all-reduce, all-gather, reduce-scatter, ...
      over: "ici", the links of a slice, or "dcn", the network between slices.
      bytes: that a chip sends.
      count: how often.
      seconds: of all of them, one after the other.
    """

    kind: str
    over: str
    bytes: int
    count: int
    seconds: float


def communication(
    program: Program, pod: Pod, devices: Sequence[Any] | None = None
) -> list[Communication]:
    """What devices exchange in a step, and how long that takes at the speed of the links.

    Args:
      program: as `program.read` gives it.
      pod: that it was compiled for.
      devices: in the order of the mesh (`mesh.devices.flat`); None: in the topology's own.
    """
    places = _places(pod, devices)
    sums: dict[tuple[str, str], list[float]] = {}
    for collective, count in program.collectives().items():
        sent, seconds = _exchange(collective, pod, places)
        total = sums.setdefault((collective.kind, collective.over), [0.0, 0, 0.0])
        for i, value in enumerate((sent * count, count, seconds * count)):
            total[i] += value
    return [
        Communication(kind, over, round(sent), int(count), seconds)
        for (kind, over), (sent, count, seconds) in sums.items()
    ]


def waiting(
    program: Program, pod: Pod, devices: Sequence[Any] | None = None, *, work: float = 1.0
) -> float:
    """Seconds of a step in which a device does nothing but exchange, as the program is scheduled.

    An exchange takes what the instructions that run beside it leave of its time. Some run beside
    none: they are waited for from their first byte to their last.

    Args:
      program, pod, devices: as for `communication`.
      work: that instructions take so many times as long as in `program`.
    """
    places = _places(pod, devices)
    left: dict[str, float] = {}
    for i in program.instructions:
        if i.collective:
            left[i.name] = i.times * _exchange(i.collective, pod, places)[1]
        if i.beside and not i.starts:
            spare = i.times * work * _cost(i, pod.chip)["seconds"]
            for name in i.beside:
                taken = min(spare, left[name])
                left[name], spare = left[name] - taken, spare - taken
    return sum(left.values())


def _places(pod: Pod, devices: Sequence[Any] | None) -> list[tuple[int, ...]]:
    devices = pod.topology().devices if devices is None else devices
    return [tuple(device.coords) for device in devices]


def _exchange(
    collective: Collective, pod: Pod, places: Sequence[tuple[int, ...]]
) -> tuple[float, float]:
    """(bytes that a chip sends, seconds) of one exchange among devices at `places`."""
    if collective.over == "dcn":
        return _over_dcn(collective, pod)
    group = [places[i] for i in collective.groups[0]] if collective.groups else places
    return _over_ici(collective, group, pod)


def _over_ici(
    collective: Collective, group: Sequence[tuple[int, ...]], pod: Pod
) -> tuple[float, float]:
    """(bytes that a chip sends, seconds) of an exchange among the chips at places `group`."""
    chips = len(set(group))
    if chips == 1:
        return 0.0, 0.0  # two devices of one chip
    groups_a_chip = pod.chip.devices * chips / len(group)
    sent = groups_a_chip * _share(collective.kind, collective.size, chips)
    links, hops = _links(group, pod)
    crossing = chips / 4 if collective.kind == "all-to-all" else 1  # hops of the average byte
    phases = 2 if collective.kind == "all-reduce" else 1  # a reduce-scatter and an all-gather
    seconds = sent * crossing / (links * pod.chip.link_bandwidth)
    return sent, max(seconds, phases * hops * HOP)


def _over_dcn(collective: Collective, pod: Pod) -> tuple[float, float]:
    """The same of an exchange between slices, in which all their chips take part."""
    sent = pod.chip.devices * _share(collective.kind, collective.size, pod.slices)
    return sent, sent / pod.chip.dcn_bandwidth if sent else 0.0


def _share(kind: str, size: int, members: int) -> float:
    """Bytes that each of `members` must send to exchange `size`."""
    if kind in ("collective-permute", "send"):
        return size
    return size * (members - 1) / members * (2 if kind == "all-reduce" else 1)


def _links(places: Sequence[tuple[int, ...]], pod: Pod) -> tuple[int, int]:
    """Links that every chip of a group can send on, and hops around or across it.

    Along a whole ring a chip has two; without wrap-around, as at the edge, one (Austin et al.,
    "How to Scale Your Model", part 3). What spans several axes uses the links of all.
    """
    links = hops = 0
    axes = zip(*places, strict=True)  # of JAX always three
    for values, side, wraps in zip(axes, pod.grid, pod.wrap, strict=False):
        spanned = len(set(values))
        if spanned > 1:
            ring = wraps and spanned == side
            links += 2 if ring else 1
            hops += side // 2 if ring else spanned - 1
    return max(links, 1), hops
