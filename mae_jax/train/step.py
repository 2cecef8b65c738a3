"""The compiled training step of any task."""

import time
from typing import Any

import jax
from absl import logging

from mae_jax.distributed.mesh import batch_sharding, replicated
from mae_jax.distributed.sharding import shardings_of
from mae_jax.train.loop import add_totals, zero_totals
from mae_jax.train.progress import with_clock
from mae_jax.train.state import TrainState
from mae_jax.train.task import Task


def compile_step(task: Task, abstract: Any) -> Any:
    """(state, totals, batch) -> (state, totals), for a state laid out as the `abstract_state`."""
    logging.info("compiling the step (usually 20 to 60 s) ...")
    start = time.time()
    compiled = with_clock("compiling", lower_step(task, abstract).compile)
    memory = compiled.memory_analysis()
    size = (
        f"; {memory.temp_size_in_bytes / 1e9:.2f} GB of working memory a device" if memory else ""
    )
    logging.info("compiled the step in %.0f s%s", time.time() - start, size)
    return compiled


def lower_step(task: Task, abstract: Any) -> Any:
    """The training step, traced for the task's mesh but not compiled."""

    def step(state: TrainState, totals: Any, batch: dict) -> tuple[TrainState, Any]:
        new_state, metrics = task.train_step(state, batch)
        return new_state, add_totals(totals, metrics, state.step)

    everywhere = replicated(task.mesh)
    sharding = batch_sharding(task.mesh)
    shardings = shardings_of(abstract)
    totals = jax.eval_shape(lambda: zero_totals(task.metric_names))
    batch = {
        name: jax.ShapeDtypeStruct((task.batch_size, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in task.batch_schema.items()
    }
    return jax.jit(
        step,
        in_shardings=(shardings, everywhere, sharding),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    ).lower(abstract, totals, batch)
