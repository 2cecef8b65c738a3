"""What a compiled step says of a whole run on a pod."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from mae_jax.planning.chips import CHIPS_A_HOST, GIB, Pod
from mae_jax.planning.cost import Communication, PartCost
from mae_jax.planning.program import Program

# Of a plan's figures in JSON, by whether those of a step that does not fit are null.
ALWAYS = ("steps", "state_bytes", "peak_bytes", "decode_ms", "cores_per_host", "price")
ALWAYS += ("decodable_per_host", "price_source", "advice", "compile_seconds", "modelled_from")
WHERE_IT_FITS = ("compute_seconds", "communication_seconds", "waiting_seconds", "mfu", "hours")
WHERE_IT_FITS += ("collective_bytes", "chip_hours", "dollars", "images_per_second")
WHERE_IT_FITS += ("images_per_second_per_host", "cores_needed_per_host", "starves")
WHERE_IT_FITS += ("hours_with_data",)
TIGHT = 0.8  # of a host's cores; the rest feeds the device, saves, and serves the network


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a step is spread over a pod."""

    batch_size: int  # global, of one update
    accumulate: int  # parts that a device runs its share of the batch in
    remat: str
    data: int  # sides of the mesh
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
    """A run on a pod; seconds are of one step and estimates."""

    pod: Pod
    layout: Layout
    steps: int  # of the schedule
    flops: float  # of the model, a step on all devices
    state_bytes: int  # parameters and optimizer, on a device
    peak_bytes: int = 0  # that the program takes of a device, or would take
    parts: Mapping[str, PartCost] = dataclasses.field(default_factory=dict)  # if it fits
    exchanged: tuple[Communication, ...] = ()
    waiting_seconds: float = 0.0  # of the exchange, beside which nothing runs
    program: Program | None = None  # that these are of
    decode_ms: float = 0.0  # CPU time of an image on a host
    price: float | None = None  # dollars a chip-hour
    price_source: str = ""
    advice: tuple[str, ...] = ()  # where it does not fit: what to try, likeliest first
    compile_seconds: float = 0.0
    modelled_from: str = ""  # the pod whose program this is calculated from; empty: its own

    @property
    def fits(self) -> bool:
        """Whether the memory of a device suffices."""
        return bool(self.parts) and self.peak_bytes <= self.pod.chip.device_bytes

    @property
    def compute_seconds(self) -> float:
        """Seconds of all parts, one after the other."""
        return sum(part.seconds for part in self.parts.values())

    @property
    def communication_seconds(self) -> float:
        """Seconds of all exchange."""
        return sum(one.seconds for one in self.exchanged)

    @property
    def hidden(self) -> float:
        """Seconds of a step, exchange behind compute as far as it goes."""
        return max(self.compute_seconds, self.communication_seconds)

    @property
    def exposed(self) -> float:
        """Seconds of a step that waits for all exchange."""
        return self.compute_seconds + self.communication_seconds

    @property
    def scheduled(self) -> float:
        """Seconds of a step, exchange behind what the compiler lets run beside it."""
        return self.compute_seconds + self.waiting_seconds

    @property
    def step_seconds(self) -> dict[str, float]:
        """The three of these."""
        return {name: getattr(self, name) for name in ("hidden", "scheduled", "exposed")}

    @property
    def mfu(self) -> float:
        """Share of the chips' peak that the model's matrix products take, as scheduled."""
        return self.flops / (self.scheduled * self.pod.chips * self.pod.chip.flops)

    @property
    def hours(self) -> float:
        """Of all steps as the compiler schedules each; no start, evaluation, saving or input."""
        return self.steps * self.scheduled / 3600

    @property
    def chip_hours(self) -> float:
        """Of all chips."""
        return self.hours * self.pod.chips

    @property
    def collective_bytes(self) -> int:
        """That a chip sends in a step, over links and networks."""
        return sum(one.bytes for one in self.exchanged)

    @property
    def images_per_second(self) -> float:
        """Exchange hidden."""
        return self.layout.batch_size / self.hidden

    @property
    def images_per_second_per_host(self) -> float:
        """That a host decodes so that the devices never wait."""
        return self.images_per_second / self.pod.hosts

    @property
    def cores_needed_per_host(self) -> float:
        """Of a host, for that."""
        return self.images_per_second_per_host * self.decode_ms / 1e3

    @property
    def cores_per_host(self) -> float:
        """Of a host, as its virtual CPUs are counted."""
        return self.pod.chip.vcpus * min(1, self.pod.chips_a_slice / CHIPS_A_HOST)

    def decodable(self, cores: float) -> float:
        """Images/s that so many cores decode when they do nothing else."""
        return cores * 1e3 / self.decode_ms

    @property
    def decodable_per_host(self) -> float | None:
        """The same of all that a host has."""
        return self.decodable(self.cores_per_host) if self.decode_ms else None

    @property
    def starves(self) -> bool:
        """Whether the devices wait for pictures."""
        return self.cores_needed_per_host > self.cores_per_host

    @property
    def hours_with_data(self) -> float:
        """As `hours`, at the speed of the hosts where that is less."""
        of_hosts = (
            self.layout.batch_size / self.pod.hosts * self.decode_ms / 1e3 / self.cores_per_host
        )
        return self.steps * max(self.scheduled, of_hosts) / 3600

    @property
    def dollars(self) -> float | None:
        """Of `chip_hours`, where a price is given."""
        return None if self.price is None else self.chip_hours * self.price

    def as_json(self) -> dict[str, Any]:
        """The contract of `plan --json`; null where a step that does not fit has no figure."""
        pod, chip = self.pod, self.pod.chip
        steps = self.step_seconds
        return {
            **{name: getattr(self, name) for name in ("fits", *ALWAYS)},
            **{name: getattr(self, name) if self.fits else None for name in WHERE_IT_FITS},
            **{
                name: getattr(pod, name) for name in ("grid", "slices", "chips", "devices", "hosts")
            },
            **{"topology": pod.name, "device_kind": chip.kinds[0], **vars(self.layout)},
            "images_per_device": self.layout.images,
            "available_bytes": chip.device_bytes,
            "margin_bytes": chip.device_bytes - self.peak_bytes,
            "step_seconds": steps if self.fits else dict.fromkeys(steps),
            "collectives": [dataclasses.asdict(one) for one in self.exchanged],
            "parts": {name: dataclasses.asdict(part) for name, part in self.parts.items()},
            "estimate": "seconds, hours and dollars are estimates; nothing was run",
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
    layout, pod, found = plan.layout, plan.pod, []
    working, whole = plan.peak_bytes - plan.state_bytes, plan.state_bytes * layout.fsdp
    ways = [n for n in _divisors(pod.devices // pod.slices) if n > layout.fsdp]
    enough = [n for n in ways if working + whole / n < pod.chip.device_bytes]
    if enough or (ways and whole > working):
        split = f"(splits the state of {plan.state_bytes / GIB:.1f} GiB)"
        found.append(f"--config.mesh.data=-1 --config.mesh.fsdp={(enough or ways[-1:])[0]} {split}")
    if stronger := {"none": "dots", "dots": "full"}.get(layout.remat):
        found.append(f"--config.model.remat={stronger} (keeps less, computes more)")
    share = layout.batch_size // pod.devices
    if parts := [n for n in _divisors(share) if n > layout.accumulate]:
        fewer = f"({share // parts[0]} in place of {layout.images} images a device at a time)"
        found += [f"--config.optim.accumulate={parts[0]} {fewer}", "more chips"]
    return tuple(found) or ("a chip with more memory",)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
