"""Mean metrics of a task over its evaluation split."""

import itertools
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from mae_jax.distributed.mesh import batch_sharding, global_batch, local_positions, replicated
from mae_jax.train.metrics import MetricsWriter
from mae_jax.train.state import TrainState


class Evaluation:
    """Mean metrics over the evaluation split, every example once."""

    def __init__(
        self,
        task: Any,
        inputs: Any,
        mesh: Mesh,
        writer: MetricsWriter,
        shardings: Any,
        *,
        max_batches: int,
    ):
        self._task = task
        self._inputs = inputs
        self._mesh = mesh
        self._writer = writer
        self._max_batches = max_batches or None
        self._positions = local_positions(task.eval_batch_size, mesh)
        everywhere = replicated(mesh)
        self._step = jax.jit(
            task.eval_step,
            in_shardings=(shardings, batch_sharding(mesh), everywhere),
            out_shardings=everywhere,
        )

    def __call__(self, step: int, state: TrainState) -> None:
        """Evaluates `state` and writes `eval/...` metrics of `step`."""
        size = self._task.eval_batch_size
        sums: dict[str, Any] = {}
        with self._inputs.eval_batches(self._positions, size) as batches:
            for index, batch in enumerate(itertools.islice(batches, self._max_batches)):
                arrays = {name: batch[name] for name in (*self._task.batch_schema, "weight")}
                arrays = global_batch(arrays, self._positions, size, self._mesh)
                part = self._step(state, arrays, np.int32(index))
                sums = jax.tree.map(lambda a, b: a + b, sums, part) if sums else part
        sums = jax.device_get(sums)
        examples = float(sums.pop("weight"))
        means = {name: float(total) / examples for name, total in sums.items()}
        scalars = {f"eval/{name}": mean for name, mean in means.items()}
        self._writer.write(step, {**scalars, "eval/examples": examples})
        text = "  ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        logging.info("step %d: eval %s  (%d images)", step, text, examples)
