"""TPU chips, the slices they are sold in, and pods of one or several slices."""

import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Iterator
from typing import Any

from mae_jax import UserError

GIB = 2**30
CHIPS_A_HOST = 4
# Google's list prices in us-central1 (v4: us-central2) as the catalog of SkyPilot
# (skypilot-org/skypilot-catalog, v8, gcp/vms.csv) had them. Other zones and later days differ.
PRICES_OF = "us-central1, v4 us-central2, in 2025"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation; figures are of a whole chip unless they say otherwise.

    Sources: Google's data sheets (cloud.google.com/tpu/docs), JAX's `tpu_info`, the "How to Scale
    Your Model" book (jax-ml/scaling-book) for links, Jouppi et al. 2020 (CACM 63.7) for v2 and v3;
    `device_bytes`: what a forced out-of-memory error of libtpu 0.0.52 says.
    """

    name: str  # as libtpu spells it
    kinds: tuple[str, ...]  # what JAX calls its devices
    flops: float  # bf16, dense, a second
    hbm_bytes: int  # as sold
    device_bytes: int  # that the compiler gives a program on one device
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s of one ICI link in one direction
    axes: int  # of the torus, with two links a chip along each
    # The side from which an axis is a ring; of three axes all are, or none.
    wraps_at: int
    dcn_bandwidth: float  # bytes/s to other slices; 0: these cannot be joined
    clock: float  # of the core, Hz
    mxu: int  # side of its matrix units
    vcpus: int  # of a host with four chips
    largest: int  # chips of the largest slice that one job can have
    cores: int = 1  # that a product's name counts for one chip
    devices: int = 1  # that JAX sees of one chip
    on_demand: float = 0.0  # dollars a chip-hour, see `PRICES_OF`; 0: not known
    spot: float = 0.0  # the same of a chip that may be taken away


def _gib(number: float) -> int:
    return round(number * GIB)


# fmt: off
_CHIPS = (
    Chip("v2", ("TPU v2",), 45e12, _gib(16), _gib(7.48), 700e9, 62e9, 2, 16,
         0, 0.70e9, 128, 96, 256, cores=2, devices=2),
    Chip("v3", ("TPU v3",), 123e12, _gib(32), _gib(15.48), 900e9, 82e9, 2, 32,
         0, 0.94e9, 128, 96, 1024, cores=2, devices=2),
    Chip("v4", ("TPU v4",), 275e12, _gib(32), _gib(30.75), 1228e9, 45e9, 3, 4,
         6.25e9, 1.05e9, 128, 240, 4096, cores=2, on_demand=3.22, spot=0.92),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, _gib(16), _gib(15.75), 819e9, 45e9, 2, 16,
         3.125e9, 1.50e9, 128, 112, 256, on_demand=1.20, spot=0.245),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, _gib(96), _gib(95.73), 2765e9, 90e9, 3, 4,
         6.25e9, 1.75e9, 128, 208, 6144, cores=2, on_demand=4.20, spot=0.84),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, _gib(32), _gib(31.24), 1638e9, 90e9, 2, 16,
         12.5e9, 1.75e9, 256, 180, 256, on_demand=2.70, spot=0.544),
    Chip("tpu7x", ("TPU7x",), 2307e12, _gib(192), _gib(94.74), 7380e9, 100e9, 3, 4,
         12.5e9, 2.20e9, 256, 224, 9216, cores=2, devices=2),
)
# fmt: on
CHIPS = {chip.name: chip for chip in _CHIPS}
SPELLINGS = {"v5litepod": "v5e", "v5lite": "v5e", "v5 lite": "v5e", "v5": "v5p"}
# Grids that are sold. In three axes, larger slices are put together from cubes of side 4.
SMALL = {
    "v2": ((2, 2), (4, 4), (8, 8), (8, 16), (16, 16)),
    "v3": ((2, 2), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32)),
    "v5e": ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    "v4": ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)),
}
SMALL |= {"v6e": SMALL["v5e"], "v5p": SMALL["v4"], "tpu7x": ((1, 1, 1), *SMALL["v4"])}
CUBE = 4
COMPILER_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
LONGEST_SIDE = 256


@dataclasses.dataclass(frozen=True)
class Pod:
    """`slices` slices of one shape, each a grid of chips joined by ICI, one another by DCN."""

    chip: Chip
    grid: tuple[int, ...]
    slices: int = 1

    @property
    def chips_a_slice(self) -> int:
        """Chips that ICI joins."""
        return math.prod(self.grid)

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slices * self.chips_a_slice

    @property
    def devices(self) -> int:
        """What `jax.device_count()` says there."""
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        """Machines of four chips, or of one."""
        return self.slices * math.ceil(self.chips_a_slice / CHIPS_A_HOST)

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which axes of the grid are rings."""
        at = self.chip.wraps_at
        if self.chip.axes == 3:
            return (all(side % at == 0 for side in self.grid),) * 3
        return tuple(side >= at for side in self.grid)

    @property
    def name(self) -> str:
        """As products are called."""
        one = f"{self.chip.name}-{self.chips_a_slice * self.chip.cores}"
        return one if self.slices == 1 else f"{self.slices}x{one}"

    def topology(self) -> Any:
        """What JAX compiles for: the topology's devices have no memory and run nothing."""
        from jax.experimental import topologies

        # There is no TPU here: its compiler need not look for one, or guard it.
        for name, value in COMPILER_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        options: dict[str, Any] = {"num_slices": self.slices}
        if self.chips_a_slice == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        if self.chip.name == "v4":  # as pods of it run: both cores of a chip are one device
            options["chip_config_name"] = "megacore"
        grid = "x".join(map(str, self.grid))
        return topologies.get_topology_desc(f"{self.chip.name}:{grid}", "tpu", **options)


def parse_pod(text: str, slices: int = 1) -> Pod:
    """The pod that `text` names: as products are (`v4-128`, `v5litepod-256`) or libtpu's grids
    (`v5e:4x4`), `2x` before it for two slices. Names count cores for v2 to v4, v5p and tpu7x,
    chips for v5e and v6e."""
    name = r"(?:(\d+)x(?=[a-z]))?([a-z][a-z0-9 ]*?)(?:-(\d+)|[:=](\d+(?:x\d+)*))"
    match = re.fullmatch(name, text.strip().lower())
    chip = CHIPS.get(SPELLINGS.get(match[2], match[2])) if match else None
    if match is None or chip is None:
        known = ", ".join(CHIPS)
        raise UserError(f"{text!r} names no TPU: give CHIP-SIZE or CHIP:GRID, CHIP one of {known}")
    if match[1] and (slices > 1 or int(match[1]) < 1):
        raise UserError(f"{text!r}: give the slices once, from 1")
    slices = int(match[1] or slices)
    if match[3]:
        size = int(match[3]) / chip.cores
        grid = next((grid for grid in products(chip) if math.prod(grid) == size), ())
    else:
        grid = tuple(map(int, match[4].split("x")))
        size = math.prod(grid)
        sides = (*grid, 1, 1)
        grid = sides[: chip.axes] if set(sides[chip.axes :]) <= {1} else ()
        grid = grid if _is_product(chip, grid) else ()
    if not grid:
        near = _nearest(chip, size)
        counted = f" (names count {chip.cores} cores a chip)" * bool(match[3] and chip.cores > 1)
        raise UserError(f"{text!r}: {chip.name} has no such slice{counted}; near it: {near}")
    if slices > 1 and not chip.dcn_bandwidth:
        raise UserError(f"{slices} slices of {chip.name} cannot be joined; give v4 or later")
    return Pod(chip, grid, slices)


@functools.cache
def products(chip: Chip) -> tuple[tuple[int, ...], ...]:
    """The grids a slice can have, small to large; of one size the most compact."""
    return SMALL[chip.name] + (tuple(_cubes(chip)) if chip.axes == 3 else ())


def _cubes(chip: Chip) -> Iterator[tuple[int, ...]]:
    for count in range(1, chip.largest // CUBE**3 + 1):
        shapes = [
            (a, b, count // (a * b))
            for a, b in itertools.product(range(1, math.isqrt(count) + 1), repeat=2)
            if a <= b and count % (a * b) == 0 and count // (a * b) >= b
        ]
        shape = min(shapes, key=sum)
        if shape[-1] * CUBE <= LONGEST_SIDE:
            yield tuple(side * CUBE for side in shape)


def _is_product(chip: Chip, grid: tuple[int, ...]) -> bool:
    """Whether a slice can have this grid, turned as it may be."""
    if grid in SMALL[chip.name]:
        return True
    if chip.axes == 2:
        return grid[::-1] in SMALL[chip.name]
    whole = grid and all(side % CUBE == 0 and 0 < side <= LONGEST_SIDE for side in grid)
    return bool(whole) and math.prod(grid) <= chip.largest


def _nearest(chip: Chip, size: float) -> str:
    """Names and grids of the slices about as large."""
    below = [grid for grid in products(chip) if math.prod(grid) <= size][-1:]
    above = [grid for grid in products(chip) if math.prod(grid) > size][:1]
    pods = [Pod(chip, grid) for grid in below + above]
    return ", ".join(f"{p.name} ({chip.name}:{'x'.join(map(str, p.grid))})" for p in pods)
