"""What people and dashboards see of a run: rates, losses, evaluations."""

import itertools
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from mae_jax.data import pipeline
from mae_jax.distributed.mesh import batch_sharding, global_batch, local_positions, replicated
from mae_jax.train.loop import Interval
from mae_jax.train.metrics import MetricsWriter
from mae_jax.train.state import TrainState
from mae_jax.train.throughput import peak_flops


class Reporter:
    """Turns finished log intervals into metrics and a line for people."""

    def __init__(
        self,
        task: Any,
        mesh: Mesh,
        writer: MetricsWriter,
        examples: int,
        batches: pipeline.Batches,
    ):
        self._task = task
        self._writer = writer
        self._examples = examples
        self._batches = batches
        self._devices = mesh.size
        self._peak = peak_flops(mesh.devices.flat[0])

    def __call__(self, interval: Interval) -> str:
        task = self._task
        rate = interval.steps * task.batch_size / interval.seconds
        flops = rate * task.train_flops_per_image / self._devices
        scalars = {f"train/{name}": value for name, value in interval.metrics.items()}
        scalars |= {
            "train/epoch": interval.step * task.batch_size / self._examples,
            "train/images_per_second": rate,
            "train/data_wait": interval.data_seconds / interval.seconds,
            "train/skipped_records": self._batches.skipped,  # by this process, since its start
            "train/model_flops_per_second_per_device": flops,
        }
        line = (
            f"loss {interval.metrics['loss']:.4f}  lr {interval.metrics['lr']:.2e}  "
            f"{rate:.0f} img/s  data wait {scalars['train/data_wait']:.0%}"
        )
        if self._peak is not None:
            scalars["train/mfu"] = flops / self._peak
            line += f"  MFU {scalars['train/mfu']:.1%}"
        self._writer.write(interval.step, scalars)
        return line


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
                arrays = {name: batch[name] for name in (*self._task.batch_arrays, "weight")}
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
