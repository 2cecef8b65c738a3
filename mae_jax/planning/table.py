"""Plans as a person reads them."""

from collections.abc import Iterable, Sequence

from mae_jax.planning.chips import GIB
from mae_jax.planning.figures import TIGHT, Plan

# Of machines with TPUs, as virtual CPUs are counted: v5e; v6e; v5e with eight chips, tpu7x.
HOSTS_CORES = (112, 180, 224)


def describe(plan: Plan) -> str:
    """One plan, from what it is of to what it takes."""
    lines = [*_machine(plan), *_memory(plan)]
    if plan.fits:
        lines += [*_parts(plan), *_exchange(plan), *_schedule(plan), *_data(plan)]
    return "\n".join(lines)


def _section(name: str, *rows: str) -> list[str]:
    return [f"{name:<10} {rows[0]}", *(f"{'':<10} {row}" for row in rows[1:])]


def _machine(plan: Plan) -> list[str]:
    pod, layout = plan.pod, plan.layout
    grid = "x".join(map(str, pod.grid))
    rings = f"{sum(pod.wrap)} of {len(pod.wrap)} sides rings"
    devices = f", {pod.devices} devices" * (pod.devices != pod.chips)
    return _section(
        "pod",
        f"{pod.name}: {pod.chips} chips {pod.chip.kinds[0]}{devices}; "
        f"hosts {pod.hosts}; slices of {grid}, {rings}",
        f"data {layout.data} x fsdp {layout.fsdp}; {layout.images} images a device at a time, "
        f"batch {layout.batch_size}",
    )


def _memory(plan: Plan) -> list[str]:
    room, peak = plan.pod.chip.device_bytes / GIB, plan.peak_bytes / GIB
    if not plan.fits:
        return _section("memory", f"does not fit: {needs(plan)}")
    left = room - peak
    barely = "barely " * (left < 0.05 * room)
    return _section(
        "memory",
        f"{barely}fits: {peak:.2f} of {room:.2f} GiB a device at its peak, {left:.2f} GiB "
        f"({left / room:.0%}) to spare; parameters and optimizer {plan.state_bytes / GIB:.2f} GiB",
    )


def needs(plan: Plan) -> str:
    """Why a plan does not fit, and what may help."""
    room, peak = plan.pod.chip.device_bytes / GIB, plan.peak_bytes / GIB
    return f"needs {peak:.1f} of {room:.2f} GiB: try " + ", or ".join(plan.advice)


def _parts(plan: Plan) -> list[str]:
    clock, rows = plan.pod.chip.clock, []
    for name, part in sorted(plan.parts.items(), key=lambda item: -item[1].seconds):
        busy = (part.matmul_seconds, part.vector_seconds, part.hbm_seconds)
        cells = [f"{1e3 * seconds:.2f}" for seconds in busy]
        share = f"{part.seconds / plan.compute_seconds:.0%}"
        compiler = f"{1e3 * part.estimated_cycles / clock:.2f}"
        rows.append((name, f"{1e3 * part.seconds:.2f}", share, *cells, compiler))
    total = sum(part.estimated_cycles for part in plan.parts.values()) / clock
    rows.append(("all", f"{1e3 * plan.compute_seconds:.2f}", *[""] * 4, f"{1e3 * total:.2f}"))
    head = ("ms a step", "takes", "share", "matrices", "vectors", "memory", "compiler says")
    return ["", *columns([head, *rows])]


def _exchange(plan: Plan) -> list[str]:
    if not plan.exchanged:
        return ["", "no exchange between devices"]
    head = ("exchange", "over", "times", "MB a chip", "ms")
    rows = [
        (one.kind, one.over, str(one.count), f"{one.bytes / 1e6:.1f}", f"{1e3 * one.seconds:.2f}")
        for one in plan.exchanged
    ]
    return ["", *columns([head, *rows])]


def _schedule(plan: Plan) -> list[str]:
    hidden, scheduled, exposed = (amount(1e3 * x) for x in plan.step_seconds.values())
    rows = [
        f"{scheduled} ms a step as the compiler schedules it ({hidden} with all exchange hidden "
        f"behind compute, {exposed} with none); MFU {plan.mfu:.1%}",
        f"{plan.steps:,} steps: {amount(plan.hours)} h, {amount(plan.chip_hours)} chip-hours; "
        "starts, evaluation, saving, waiting and repeated steps come on top",
    ]
    if plan.dollars is not None:
        rows.append(
            f"${amount(plan.dollars)} at ${plan.price:g} a chip-hour ({plan.price_source}): "
            "an estimate, no offer"
        )
    return ["", *_section("estimate", *rows)]


def _data(plan: Plan) -> list[str]:
    need, have = plan.cores_needed_per_host, plan.cores_per_host
    rows = [
        f"each host decodes {plan.images_per_second_per_host:,.0f} images/s: {amount(need)} of "
        f"its {have:.0f} cores at {plan.decode_ms:g} CPU-ms an image (measure yours: `bench data`)",
        f"all {have:.0f} decode {amount(plan.decodable_per_host)} images/s; hosts of "
        + ", ".join(f"{cores} {amount(plan.decodable(cores))}" for cores in HOSTS_CORES),
    ]
    if plan.starves:
        rows.append(
            f"too few: the devices wait, {amount(plan.hours_with_data)} h in all; "
            "try --config.data.resize=fast, or slower chips"
        )
    elif need > TIGHT * have:
        rows.append("that is tight: a host has other work too")
    return _section("data", *rows)


def compared(plans: Iterable[Plan]) -> str:
    """Plans side by side."""
    plans = list(plans)
    priced = any(plan.price is not None for plan in plans)
    head = ("pod", "images", "remat", "fsdp", "accum.", "GiB", "ms a step", "MFU", "hours")
    head += ("chip-hours", *["dollars"] * priced, "hosts' cores")
    rows = []
    for plan in plans:
        layout = plan.layout
        room, peak = plan.pod.chip.device_bytes / GIB, plan.peak_bytes / GIB
        row = [plan.pod.name + " *" * bool(plan.modelled_from), str(layout.images), layout.remat]
        row += [str(layout.fsdp), str(layout.accumulate), f"{peak:.1f} of {room:.1f}"]
        if plan.fits:
            dollars = "-" if plan.dollars is None else amount(plan.dollars)
            row += [
                "{1} ({0} to {2})".format(*(amount(1e3 * x) for x in plan.step_seconds.values())),
                f"{plan.mfu:.1%}",
            ]
            row += [amount(plan.hours), amount(plan.chip_hours), *[dollars] * priced]
            row += [
                f"{amount(plan.cores_needed_per_host)} of {plan.cores_per_host:.0f}"
                + " starve" * plan.starves
            ]
        else:
            row += ["does not fit", *[""] * (len(head) - 7)]
        rows.append(row)
    lines = columns([head, *rows])
    modelled = {plan.modelled_from for plan in plans} - {""}
    if modelled:
        lines.append(f"* modelled from what was compiled for {', '.join(sorted(modelled))}")
    return "\n".join(lines)


def amount(number: float) -> str:
    """With as many digits as such an estimate deserves."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, the first column to the left, others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
