"""Which layout of a step, and which size of pod, suits a recipe best."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

from mae_jax.distributed.mesh import make_mesh
from mae_jax.planning import cost
from mae_jax.planning.chips import Pod, products
from mae_jax.planning.figures import Layout, Plan, advice
from mae_jax.planning.program import Collective, Program

LIMIT = 8  # compilations: each takes minutes
SMALLER = 3  # of them at most for smaller slices
LARGER = 3  # sizes that are modelled
# What saves memory, and about what share of a step it costs: the order of trying.
REMAT = {"none": 0.0, "dots": 0.08, "full": 0.3}
ACCUMULATE = {1: 0.0, 2: 0.05, 4: 0.1}
FIXED = ("optimizer", "collectives")  # parts whose time does not follow the images on a device


def layouts(base: Layout, pod: Pod) -> Iterator[Layout]:
    """Ways to spread the batch of `base` over `pod`, `base` and then likely the fastest first."""
    yield base
    share = base.batch_size // pod.devices
    parts = [n for n in sorted({*ACCUMULATE, base.accumulate}) if share % n == 0]
    pairs = sorted(
        itertools.product(parts, REMAT), key=lambda p: ACCUMULATE.get(p[0], 1) + REMAT[p[1]]
    )
    for (accumulate, remat), fsdp in itertools.product(pairs, _ways(base, pod)):
        layout = Layout(base.batch_size, accumulate, remat, pod.devices // fsdp, fsdp)
        if layout != base:
            yield layout


def _ways(layout: Layout, pod: Pod) -> list[int]:
    """To split the state: not, as the layout does, over a whole slice."""
    return sorted({1, layout.fsdp, pod.devices // pod.slices})


def resized(layout: Layout, pod: Pod, other: Pod) -> Layout:
    """The layout of the same batch on another size; a state split over all a slice stays so."""
    whole = layout.fsdp == pod.devices // pod.slices > 1
    fsdp = other.devices // other.slices if whole else layout.fsdp
    return dataclasses.replace(layout, data=other.devices // fsdp, fsdp=fsdp)


def sizes(layout: Layout, pod: Pod) -> list[Pod]:
    """Other sizes of slices that the batch divides over, small to large."""
    pods = [Pod(pod.chip, grid, pod.slices) for grid in products(pod.chip)]
    micro = layout.batch_size // layout.accumulate
    fitting = [p for p in pods if p != pod and micro % p.devices == 0]
    whole = layout.fsdp == pod.devices // pod.slices
    return [p for p in fitting if whole or p.devices // p.slices % layout.fsdp == 0]


def hopeless(layout: Layout, pod: Pod, tried: Sequence[Plan]) -> bool:
    """Whether plans that were made tell that one with `layout` is slower than they, or too large.

    Splitting the state costs less than computing twice or in parts.
    """
    for plan in tried:
        old = plan.layout
        leaner = REMAT[layout.remat] >= REMAT[old.remat] and layout.accumulate >= old.accumulate
        if plan.fits and leaner:
            return True  # saves memory that is not needed
        same = (layout.remat, layout.accumulate) == (old.remat, old.accumulate)
        working = plan.peak_bytes - plan.state_bytes
        if not plan.fits and same and working > pod.chip.device_bytes:
            return True  # however the state is split
    return False


def search(base: Layout, pod: Pod, compiled: Callable[[Layout, Pod], Plan]) -> list[Plan]:
    """Plans of `base`'s batch, those for `pod` first, the shortest run first.

    Compiles layouts for the pod until none is left that might be faster, then the best of them on
    smaller slices; larger ones are modelled.
    """
    plans: list[Plan] = []
    for layout in layouts(base, pod):
        if len(plans) < LIMIT and not hopeless(layout, pod, plans):
            plans.append(compiled(layout, pod))
    best = min(plans, key=order)
    for fsdp in _ways(best.layout, pod) if best.fits else ():
        layout = dataclasses.replace(best.layout, data=pod.devices // fsdp, fsdp=fsdp)
        if len(plans) < LIMIT and layout not in [plan.layout for plan in plans]:
            plans.append(compiled(layout, pod))
    plans.sort(key=order)
    best, others = plans[0], []
    layout, others_sizes = best.layout, sizes(best.layout, pod) if best.fits else []
    for size in reversed([size for size in others_sizes if size.chips < pod.chips]):
        room = len(others) < min(SMALLER, LIMIT - len(plans))
        if room and all(plan.fits for plan in others):
            others.append(compiled(resized(layout, pod, size), size))
    larger = [size for size in others_sizes if size.chips > pod.chips and pod.slices == 1]
    others += [modelled(best, size, resized(layout, pod, size)) for size in larger[:LARGER]]
    return plans + sorted(others, key=order)


def order(plan: Plan) -> tuple[bool, float]:
    """Sorts plans: those that fit first, the shortest run first; else what lacks least memory."""
    return not plan.fits, plan.hours_with_data if plan.fits else plan.peak_bytes


def cheapest(plans: Sequence[Plan]) -> Plan | None:
    """Of plans that fit the one that costs least, without prices the shortest; None: none fits."""
    fitting = [plan for plan in plans if plan.fits]
    priced = [plan for plan in fitting if plan.price is not None]
    if priced:
        return min(priced, key=spent)
    return min(fitting, key=order, default=None)


def spent(plan: Plan) -> float:
    """Dollars with the time that devices wait for data."""
    return (plan.price or 0.0) * plan.hours_with_data * plan.pod.chips


def modelled(plan: Plan, pod: Pod, layout: Layout) -> Plan:
    """`plan` with another layout on a slice of another size of the same chip, calculated.

    Parts of the model take time by the images on a device, the optimizer by the state it updates;
    exchange is that of the compiled program between the other pod's devices.
    """
    old, more = plan.layout, layout.images / plan.layout.images
    parts = {
        name: part if name in FIXED else _times(part, more) for name, part in plan.parts.items()
    }
    state = round(plan.state_bytes * old.fsdp / layout.fsdp)
    peak = state + round((plan.peak_bytes - plan.state_bytes) * max(1, more))  # an upper bound
    program = _between(plan.program, old, layout)
    mesh = make_mesh(layout.data, layout.fsdp, list(pod.topology().devices))
    devices = list(mesh.devices.flat)
    changes = {
        "flops": plan.flops * layout.batch_size / old.batch_size,
        "parts": parts,
        "exchanged": tuple(cost.communication(program, pod, devices)),
        "waiting_seconds": cost.waiting(program, pod, devices, work=more),
        "program": program,
        "state_bytes": state,
        "peak_bytes": peak,
        "compile_seconds": 0.0,
        "modelled_from": plan.modelled_from or plan.pod.name,
    }
    made = dataclasses.replace(plan, pod=pod, layout=layout, **changes)
    return made if made.fits else dataclasses.replace(made, advice=advice(made))


def _times(part: cost.PartCost, factor: float) -> cost.PartCost:
    return cost.PartCost(**{k: v * factor for k, v in dataclasses.asdict(part).items()})


def _between(program: Program, old: Layout, new: Layout) -> Program:
    """The program with its exchange over the same axes of another mesh."""
    seen: dict[Collective, Collective] = {}

    def over(collective: Collective) -> Collective:
        if collective.over != "ici" or not collective.groups:
            return collective
        if collective not in seen:
            members = collective.groups[0]
            rows = new.data if len({i // old.fsdp for i in members}) > 1 else 1
            ways = new.fsdp if len({i % old.fsdp for i in members}) > 1 else 1
            group = tuple(row * new.fsdp + way for row in range(rows) for way in range(ways))
            seen[collective] = collective._replace(groups=(group,))
        return seen[collective]

    return Program(
        tuple(
            dataclasses.replace(i, collective=over(i.collective)) if i.collective else i
            for i in program.instructions
        )
    )
