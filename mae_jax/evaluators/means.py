"""Mean metrics of a task over its evaluation split."""

import itertools
from typing import Any

import jax
import numpy as np
from absl import logging

from mae_jax.data.record import ArraySpec
from mae_jax.evaluators.over_split import OverSplit, means
from mae_jax.train.metrics import MetricsWriter
from mae_jax.train.state import TrainState
from mae_jax.train.task import Averaging


class Evaluation:
    """Mean metrics over the evaluation split of `inputs`, each example once; max_batches 0: all."""

    def __init__(
        self, task: Averaging, inputs: Any, writer: MetricsWriter, shardings: Any, max_batches: int
    ):
        self._inputs, self._writer, self._max_batches = inputs, writer, max_batches or None
        self._scalars = task.scalars
        self._run = OverSplit(task.eval_step, task.mesh, task.eval_batch_size, shardings)

        self._schema = {**task.batch_schema, "weight": ArraySpec((), np.float32)}

    def compile(self, state: TrainState) -> list[jax.stages.Compiled]:
        """Its program, for an abstract state, ahead of the first call."""
        return [self._run.compile(state, self._schema)]

    def __call__(self, step: int, state: TrainState) -> None:
        """Evaluates `state` and writes `eval/...` metrics of `step`."""
        run, examples = self._run, len(self._inputs.eval)
        if self._max_batches:
            examples = min(examples, self._max_batches * run.batch_size)
        with self._inputs.eval_batches(run.positions, run.batch_size) as batches:
            some = itertools.islice(batches, self._max_batches)
            metrics, count = means(run(state, some, examples=examples, label="evaluation"))
        metrics = self._scalars(metrics)
        scalars = {f"eval/{name}": mean for name, mean in metrics.items()}
        self._writer.write(step, {**scalars, "eval/examples": count})
        text = "  ".join(f"{name} {mean:.4f}" for name, mean in metrics.items())
        logging.info("step %d: eval %s  (%d images)", step, text, count)
