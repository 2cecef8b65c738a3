"""What a compiled step says of a whole run on a pod."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from mae_jax.planning.chips import CHIPS_A_HOST, GIB, Pod
from mae_jax.planning.cost import Communication, PartCost
from mae_jax.planning.program import Program

TIGHT = 0.8  # of a host's cores; the rest feeds the device, saves, and serves the network


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a step is spread over a pod.

    Attributes:
      batch_size: global, of one update.
      accumulate: parts that a device runs its share of the batch in.
      data, fsdp: sides of the mesh.
    """

    batch_size: int
    accumulate: int
    remat: str
    data: int
    fsdp: int

    @property
    def images(self) -> int:
        """On a device at a time."""
        return self.batch_size // (self.data * self.fsdp * self.accumulate)

    def __str__(self) -> str:
        parts = f" in {self.accumulate} parts" if self.accumulate > 1 else ""
        return f"batch {self.batch_size}{parts}, remat {self.remat}, fsdp {self.fsdp}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a pod; seconds are of one step and estimates.

    Attributes:
      steps: of the schedule.
      flops: model FLOPs of a step, of all devices.
      state_bytes: parameters and optimizer, a device.
      peak_bytes: what the program takes of a device; where it does not fit, what it would take.
      parts: of the model, and what each takes; empty where the step does not fit.
      exchanged: between devices.
      program: that the figures are of.
      decode_ms: CPU time of an image on a host.
      price: dollars a chip-hour.
      price_source: whose and of when it is.
      advice: what to try where it does not fit, likeliest first.
      modelled_from: the pod whose program this is calculated from; empty: its own was compiled.
    """

    pod: Pod
    layout: Layout
    steps: int
    flops: float
    state_bytes: int
    peak_bytes: int = 0
    parts: Mapping[str, PartCost] = dataclasses.field(default_factory=dict)
    exchanged: tuple[Communication, ...] = ()
    program: Program | None = None
    decode_ms: float = 0.0
    price: float | None = None
    price_source: str = ""
    advice: tuple[str, ...] = ()
    compile_seconds: float = 0.0
    modelled_from: str = ""

    @property
    def fits(self) -> bool:
        """Whether the memory of a device suffices."""
        return bool(self.parts) and self.peak_bytes <= self.pod.chip.device_bytes

    @property
    def compute(self) -> float:
        """Seconds of all parts, one after the other."""
        return sum(part.seconds for part in self.parts.values())

    @property
    def communication(self) -> float:
        """Seconds of all exchange."""
        return sum(one.seconds for one in self.exchanged)

    @property
    def hidden(self) -> float:
        """Seconds of a step, exchange behind compute as far as it goes."""
        return max(self.compute, self.communication)

    @property
    def exposed(self) -> float:
        """Seconds of a step that waits for all exchange."""
        return self.compute + self.communication

    @property
    def mfu(self) -> float:
        """Share of the chips' peak that the model's matrix products take, exchange exposed."""
        return self.flops / (self.exposed * self.pod.chips * self.pod.chip.flops)

    @property
    def hours(self) -> float:
        """Of the schedule's steps, exchange exposed; no start, evaluation, saving or waiting."""
        return self.steps * self.exposed / 3600

    @property
    def chip_hours(self) -> float:
        """Of all chips."""
        return self.hours * self.pod.chips

    @property
    def images_per_host(self) -> float:
        """A second, that a host decodes so that the devices never wait, exchange hidden."""
        return self.layout.batch_size / self.hidden / self.pod.hosts

    @property
    def cores_needed(self) -> float:
        """Of a host, for that."""
        return self.images_per_host * self.decode_ms / 1e3

    @property
    def cores(self) -> float:
        """Of a host, as its virtual CPUs are counted."""
        return self.pod.chip.vcpus * min(1, self.pod.chips_a_slice / CHIPS_A_HOST)

    @property
    def starves(self) -> bool:
        """Whether the devices wait for pictures."""
        return self.cores_needed > self.cores

    @property
    def hours_with_data(self) -> float:
        """As `hours`, at the speed of the hosts where that is less."""
        of_hosts = self.layout.batch_size / self.pod.hosts * self.decode_ms / 1e3 / self.cores
        return self.steps * max(self.exposed, of_hosts) / 3600

    @property
    def dollars(self) -> float | None:
        """Of `chip_hours`, where a price is given."""
        return None if self.price is None else self.chip_hours * self.price

    def as_json(self) -> dict[str, Any]:
        """The contract of `plan --json`; null where a step that does not fit has no figure."""
        layout, pod, fits = self.layout, self.pod, self.fits

        def known(value: float | None) -> float | None:
            return value if fits else None

        return {
            "fits": fits,
            "estimate": "seconds, hours and dollars are estimates; nothing was run",
            "topology": pod.name,
            "device_kind": pod.chip.kinds[0],
            "grid": pod.grid,
            "slices": pod.slices,
            "chips": pod.chips,
            "devices": pod.devices,
            "hosts": pod.hosts,
            "mesh": {"data": layout.data, "fsdp": layout.fsdp},
            "batch_size": layout.batch_size,
            "accumulate": layout.accumulate,
            "images_per_device": layout.images,
            "remat": layout.remat,
            "peak_bytes": self.peak_bytes,
            "available_bytes": pod.chip.device_bytes,
            "state_bytes": self.state_bytes,
            "step_seconds": {"hidden": known(self.hidden), "exposed": known(self.exposed)},
            "compute_seconds": known(self.compute),
            "communication_seconds": known(self.communication),
            "mfu": known(fits and self.mfu),
            "steps": self.steps,
            "hours": known(self.hours),
            "chip_hours": known(self.chip_hours),
            "price_per_chip_hour": self.price,
            "price_source": self.price_source,
            "dollars": known(self.dollars),
            "collective_bytes": known(sum(one.bytes for one in self.exchanged)),
            "collectives": [dataclasses.asdict(one) for one in self.exchanged],
            "images_per_second": known(fits and layout.batch_size / self.hidden),
            "images_per_second_per_host": known(fits and self.images_per_host),
            "decode_ms": self.decode_ms,
            "cores_needed_per_host": known(fits and self.cores_needed),
            "cores_per_host": self.cores,
            "starves": fits and self.starves,
            "hours_with_data": known(self.hours_with_data),
            "parts": {name: dataclasses.asdict(part) for name, part in self.parts.items()},
            "advice": self.advice,
            "compile_seconds": self.compile_seconds,
            "modelled_from": self.modelled_from,
        }


def out_of_memory(plan: Plan, error: str) -> Plan | None:
    """`plan` where the compiler's error says that it does not fit, None where it says otherwise."""
    size = r"([\d.]+)([KMGT])"
    temporaries = re.search(rf"for HLO temporaries \({size}\) exceeds", error)
    found = temporaries or re.search(rf"Used {size} of {size} hbm", error)
    if not found:
        return None
    peak = round(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1))
    peak += plan.state_bytes if temporaries else 0  # which stays where it is
    plan = dataclasses.replace(plan, peak_bytes=peak)
    return dataclasses.replace(plan, advice=advice(plan))


def advice(plan: Plan) -> tuple[str, ...]:
    """What a step that does not fit may try, cheapest in time first."""
    layout, pod = plan.layout, plan.pod
    devices = pod.devices
    working, room = plan.peak_bytes - plan.state_bytes, pod.chip.device_bytes
    found = []
    inside = devices // pod.slices
    if layout.fsdp < inside:
        whole = plan.state_bytes * layout.fsdp  # nearly: what is small is never split
        ways = [n for n in _divisors(inside) if n > layout.fsdp]
        enough = [n for n in ways if working + whole / n < room]
        if enough or whole > working:
            ways = (enough or ways[-1:])[0]
            found.append(
                f"--config.mesh.data=-1 --config.mesh.fsdp={ways} (splits the state of "
                f"{plan.state_bytes / GIB:.1f} GiB)"
            )
    stronger = {"none": "dots", "dots": "full"}.get(layout.remat)
    if stronger:
        found.append(f"--config.model.remat={stronger} (keeps less, computes more)")
    share = layout.batch_size // devices
    parts = [n for n in _divisors(share) if n > layout.accumulate]
    if parts:
        found.append(
            f"--config.optim.accumulate={parts[0]} ({share // parts[0]} in place of "
            f"{layout.images} images a device at a time)"
        )
        found.append("more chips")
    return tuple(found) or ("a chip with more memory",)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
