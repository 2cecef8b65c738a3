"""A few steps of any task on part of the simulated devices."""

import jax
import numpy as np

from mae_jax.distributed import mesh as mesh_lib
from mae_jax.distributed.sharding import abstract_state, shardings_of
from mae_jax.tasks import create_task
from mae_jax.tasks.inputs import open_splits


def make(config, devices=1, data=-1, fsdp=1):
    """Task, its data, and a state at step 0 laid out for the mesh."""
    mesh = mesh_lib.make_mesh(data, fsdp, jax.devices()[:devices])
    splits = open_splits(config)
    task = create_task(config, len(splits.train), splits.head_classes, mesh)
    shardings = shardings_of(abstract_state(task.init, mesh))
    return task, splits, jax.jit(task.init, out_shardings=shardings)()


def run_steps(config, devices=1, data=-1, fsdp=1, steps=4):
    """Losses of the first steps, and the state after them."""
    task, splits, state = make(config, devices, data, fsdp)
    shardings = shardings_of(abstract_state(task.init, task.mesh))
    step = jax.jit(task.train_step, out_shardings=(shardings, mesh_lib.replicated(task.mesh)))
    positions = mesh_lib.local_positions(config.batch_size, task.mesh)
    losses = []
    with splits.train_batches(positions, 0, steps) as batches:
        for batch in batches:
            arrays = {name: batch[name] for name in task.batch_schema}
            arrays = mesh_lib.global_batch(arrays, positions, config.batch_size, task.mesh)
            state, metrics = step(state, arrays)
            losses.append(float(metrics["loss"]))
    return losses, state


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), a, b)
