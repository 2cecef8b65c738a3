"""How fast the compiled training step is by itself, on data already on the device.

python -m mae_jax.bench step --config=configs/quickstart.py
"""

import statistics
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from mae_jax import config as config_lib
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
    config_lib.validate(config)
    keep_compiled(config.compile.cache_dir)
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.fsdp)
    mesh_lib.check_batch(config.batch_size, config.optim.accumulate, mesh)
    # No data is read: the number of examples only sets the length of the schedule.
    classes = config.head.classes or 1000
    task = create_task(config, 1000 * config.batch_size, classes, mesh)
    abstract = abstract_state(task.init, mesh)
    step = compile_step(task, abstract)
    state = jax.jit(task.init, out_shardings=shardings_of(abstract))()
    totals = mesh_lib.replicate(zero_totals(task.metric_names), mesh)
    positions = mesh_lib.local_positions(config.batch_size, mesh)
    rng = np.random.default_rng(0)
    batch = {
        name: rng.integers(0, min(classes, 256), (len(positions), *shape)).astype(dtype)
        for name, (shape, dtype) in task.batch_schema.items()
    }
    batch = mesh_lib.global_batch(batch, positions, config.batch_size, mesh)

    def run(count: int) -> float:
        nonlocal state, totals
        start = time.perf_counter()
        for _ in range(count):
            state, totals = step(state, totals, batch)
        jax.block_until_ready(totals)
        return time.perf_counter() - start

    run(2)  # warm up
    steps = max(1, round(SECONDS_A_ROUND / run(1)))
    rates = [steps * config.batch_size / run(steps) for _ in range(ROUNDS)]
    rate = statistics.median(rates)
    flops = rate * task.train_flops_per_image / mesh.size
    device = mesh.devices.flat[0]
    print(f"{mesh.size} x {device.device_kind}, batch {config.batch_size}, {config.compute_dtype}")
    print(f"images/s: median {rate:.1f}, range {min(rates):.1f} to {max(rates):.1f}")
    print(f"model FLOP/s a device: {flops:.3e}")
    if peak := peak_flops(device):
        print(f"MFU: {flops / peak:.1%} of {peak:.3e}")
