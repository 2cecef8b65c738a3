"""How fast the compiled training step is by itself, on data already on the device.

python -m mae_jax.bench step --config=configs/quickstart.py
"""

import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import config as config_lib
from mae_jax.config_checks import validate
from mae_jax.distributed import mesh as mesh_lib
from mae_jax.distributed.sharding import abstract_state, shardings_of
from mae_jax.tasks import create_task
from mae_jax.train.loop import zero_totals
from mae_jax.train.programs import keep_compiled
from mae_jax.train.step import compile_step
from mae_jax.train.throughput import peak_flops

ROUNDS = 5
SECONDS_A_ROUND = 4.0


def main(config: ConfigDict) -> None:
    """Prints images/s (median and range over rounds), model FLOP/s, and MFU on known chips."""
    mesh = open_mesh(config)
    step = Step(config, mesh)
    [rates] = rates_in_turns([step])
    rate = np.median(rates)
    flops = rate * step.flops_per_image / mesh.size
    device = mesh.devices.flat[0]
    print(f"{mesh.size} x {device.device_kind}, batch {config.batch_size}, {config.compute_dtype}")
    print(f"images/s: median {rate:.4g}, range {min(rates):.4g} to {max(rates):.4g}")
    print(f"model FLOP/s a device: {flops:.3e}")
    if peak := peak_flops(device):
        print(f"MFU: {flops / peak:.1%} of {peak:.3e}")


def open_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a config, found valid, on all devices or these."""
    validate(config, starts=False)
    keep_compiled(config.compile.cache_dir)
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    mesh_lib.check_batch(config.batch_size, config.optim.accumulate, mesh)
    return mesh


class Step:
    """The compiled training step of a config, with a state and a batch to do it on."""

    def __init__(self, config: ConfigDict, mesh: Mesh):
        self.batch_size = config.batch_size
        # No data is read: the number of examples only sets the length of the schedule.
        classes = config_lib.classes_without_data(config)
        task = create_task(config, 1000 * config.batch_size, classes, mesh)
        self.flops_per_image = task.train_flops_per_image
        abstract = abstract_state(task.init, mesh)
        self._step = compile_step(task, abstract)
        self._state = jax.jit(task.init, out_shardings=shardings_of(abstract))()
        self._totals = mesh_lib.replicate(zero_totals(task.metric_names), mesh)
        positions = mesh_lib.local_positions(config.batch_size, mesh)
        rng = np.random.default_rng(0)
        batch = {
            name: rng.integers(0, min(classes, 256), (len(positions), *shape)).astype(dtype)
            for name, (shape, dtype) in task.batch_schema.items()
        }
        self._batch = mesh_lib.global_batch(batch, positions, config.batch_size, mesh)

    def run(self, count: int) -> float:
        """Seconds that so many steps take."""
        start = time.perf_counter()
        for _ in range(count):
            self._state, self._totals = self._step(self._state, self._totals, self._batch)
        jax.block_until_ready(self._totals)
        return time.perf_counter() - start


def rates_in_turns(steps: Sequence[Step]) -> np.ndarray:
    """Images/s of each step in each round [steps, rounds]. They take turns, round by round: other
    work on the machine disturbs all. A turn begins with a step that is not timed: the first finds
    the system's memory as another left it."""
    counts = []
    for step in steps:
        step.run(2)  # warm up
        counts.append(max(1, round(SECONDS_A_ROUND / step.run(1))))
    rates = np.empty((len(steps), ROUNDS))
    for turn in range(ROUNDS):
        for i, (step, count) in enumerate(zip(steps, counts, strict=True)):
            if len(steps) > 1:
                step.run(1)
            rates[i, turn] = count * step.batch_size / step.run(count)
    return rates
