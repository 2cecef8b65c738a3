"""The training step of any task as one program."""

from collections.abc import Mapping
from typing import Any

import jax

from mae_jax.distributed.mesh import abstract_batch, batch_sharding, replicated
from mae_jax.distributed.sharding import shardings_of
from mae_jax.train.loop import add_totals, zero_totals
from mae_jax.train.programs import Compile, compile_ahead
from mae_jax.train.state import TrainState
from mae_jax.train.task import Task


def compile_step(task: Task, abstract: Any, others: Mapping[str, Compile] | None = None) -> Any:
    """(state, totals, batch) -> (state, totals); `others`: what is compiled at the same time."""
    programs = {"step": lambda: [lower_step(task, abstract).compile()], **(others or {})}
    [step] = compile_ahead(programs, abstract)["step"]
    return step


def lower_step(task: Task, abstract: Any) -> Any:
    """The training step, traced for the task's mesh but not compiled."""

    def step(state: TrainState, totals: Any, batch: dict) -> tuple[TrainState, Any]:
        new_state, metrics = task.train_step(state, batch)
        return new_state, add_totals(totals, metrics, state.step)

    everywhere = replicated(task.mesh)
    shardings = shardings_of(abstract)
    totals = jax.eval_shape(lambda: zero_totals(task.metric_names))
    batch = abstract_batch(task.batch_schema, task.batch_size, task.mesh)
    return jax.jit(
        step,
        in_shardings=(shardings, everywhere, batch_sharding(task.mesh)),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
        compiler_options=dict(task.compiler_options),
    ).lower(abstract, totals, batch)
