"""A probe of the encoder while it pretrains: closed form, beside that of the untrained encoder."""

import math
import time
from typing import Any

import jax
import numpy as np
from absl import logging

from mae_jax import UserError
from mae_jax.data.order import example_index
from mae_jax.data.pipeline import eval_batches
from mae_jax.data.record import ArraySpec, DecodeError, Selection
from mae_jax.data.sources import open_source
from mae_jax.data.splits import Splits, common_classes
from mae_jax.distributed.sharding import abstract_state, shardings_of
from mae_jax.distributed.stopping import until_told
from mae_jax.evaluators.over_split import OverSplit, Results, rows
from mae_jax.evaluators.probes import knn_accuracy, ridge_probe
from mae_jax.models.classifier import pool_tokens
from mae_jax.train.metrics import MetricsWriter
from mae_jax.train.state import TrainState
from mae_jax.train.task import Pretraining

# Decoded pictures that take no more than this in a process are kept between probes (5,000 of
# 224 px take 0.75 GB); more are decoded again each time.
CACHE_BYTES = 2**30
LABELS_READ_AT_START = 64  # of each part


class Probe:
    """Measures the encoder by `ridge_probe` on fixed, labelled examples.

    Writes ``probe/top1``, ``probe/top1_untrained`` (the same probe on the encoder this run's seed
    initialises, computed at the first call, whatever the run started or resumed from),
    ``probe/knn`` of `neighbours` where > 0, ``probe/train_examples``, ``probe/eval_examples`` and
    ``probe/classes``. Accuracies are fractions. Every process must call it. Raises UserError: data
    that is not there or unlabelled, or splits whose classes differ.

    Args:
      data: of the run; its seed chooses the examples, loaded as its evaluation split is.
      name, dir, train_split, eval_split: the labelled data, as given to `open_source`.
      train_examples, eval_examples: at most.
      pool: of `pool_tokens`.
    """

    def __init__(
        self,
        task: Pretraining,
        data: Splits,
        writer: MetricsWriter,
        *,
        name: str,
        dir: str,
        train_split: str,
        eval_split: str,
        train_examples: int,
        eval_examples: int,
        pool: str,
        neighbours: int,
    ):
        self._writer, self._neighbours = writer, neighbours
        self._parts = [
            _Part("probe.train_split", name, dir, train_split, train_examples, data.seed),
            _Part("probe.eval_split", name, dir, eval_split, eval_examples, data.seed),
        ]
        need = "a probe needs them: name a labelled data set there, or set probe.every = 0"
        self._classes = common_classes(*(part.source for part in self._parts), "probe", need)
        if self._classes < 2:
            raise UserError(f"probe.name: {name} has 1 class; a probe tells classes apart")
        for part in self._parts:
            part.check_labels(self._classes)
        self._transform = data.eval_transform
        self._loading = {**data.loading, "classes": self._classes}
        self._untrained: float | None = None

        def initial_params() -> Any:
            return task.init().weights

        def encode(params: Any, batch: dict, _: jax.Array) -> dict:
            features = pool_tokens(task.encode(params, batch["image"]), pool)
            return {"feature": features, "label": batch["label"], "weight": batch["weight"]}

        shardings = shardings_of(abstract_state(initial_params, task.mesh))
        self._initial_params = jax.jit(initial_params, out_shardings=shardings)
        # Smaller than an evaluation batch where a part has fewer examples: padding is encoded too.
        batch_size = min(task.eval_batch_size, max(map(len, self._parts)))
        self._run = run = OverSplit(encode, task.mesh, batch_size, shardings)
        batches = sum(-(-len(part) // run.batch_size) for part in self._parts)
        bytes_kept = batches * len(run.positions) * math.prod(task.image_shape)
        self._keep = bytes_kept <= CACHE_BYTES
        self._schema = {
            "image": ArraySpec(task.image_shape, np.uint8),
            "label": ArraySpec((), np.int32),
            "weight": ArraySpec((), np.float32),
        }

    def compile(self, state: TrainState) -> list[jax.stages.Compiled]:
        """Its programs, for an abstract state, ahead of the first call."""
        self._initial_params = self._initial_params.lower().compile()
        return [self._initial_params, self._run.compile(state.weights, self._schema)]

    def __call__(self, step: int, state: TrainState) -> None:
        """Probes the best weights of `state` and writes the metrics of `step`."""
        start = time.perf_counter()
        if self._untrained is None:
            untrained = self._features(self._initial_params())
            self._untrained = ridge_probe(*untrained, self._classes)
        features = self._features(state.weights)
        scalars = {
            "probe/top1": ridge_probe(*features, self._classes),
            "probe/top1_untrained": self._untrained,
            "probe/train_examples": len(features[1]),
            "probe/eval_examples": len(features[3]),
            "probe/classes": self._classes,
        }
        knn = ""
        if self._neighbours:
            accuracy = knn_accuracy(*features, self._classes, k=self._neighbours)
            scalars["probe/knn"], knn = accuracy, f", knn {accuracy:.4f}"
        self._writer.write(step, scalars)
        logging.info(
            "step %d: probe top1 %.4f, untrained %.4f%s  (%d classes, %d + %d images, %.0f s)",
            *(step, scalars["probe/top1"], self._untrained, knn, self._classes),
            *(len(features[1]), len(features[3]), time.perf_counter() - start),
        )

    def _features(self, params: Any) -> list[np.ndarray]:
        """Features [N, D] and labels [N] of the training part, then of the evaluation part."""
        features, run = [], self._run
        for part in self._parts:
            if self._keep and part.batches is None:
                sizes = {"batch_size": run.batch_size, "positions": run.positions}
                with eval_batches(part, self._transform, **sizes, **self._loading) as batches:
                    part.batches = list(until_told(batches))
            if part.batches is not None:
                results = run(params, part.batches, examples=len(part), label="probe")
            else:
                results = run.over(params, part, self._transform, label="probe", **self._loading)
            found = rows(results)
            if not len(found["label"]):
                raise UserError(f"{part.field}: no picture of {part.name} can be decoded")
            features += [found["feature"], found["label"]]
        return features


class _Part(Selection):
    """At most `count` records of a split, spread over it: the first of its shuffled order."""

    batches: list[Results] | None = None  # decoded, where they are kept

    def __init__(self, field: str, name: str, directory: str, split: str, count: int, seed: int):
        try:
            source = open_source(name, directory or None, split)
        except UserError as error:
            raise UserError(
                f"{field}, {split!r} of {name!r} (empty probe fields take those of data): {error}"
            ) from error
        n = len(source)
        chosen = [example_index(seed, g, n) for g in range(min(count, n))]
        super().__init__(source, np.sort(chosen))  # read front to back
        self.field = field

    def check_labels(self, classes: int) -> None:
        """Raises UserError where one of a few records, spread over the part, has no class."""
        for index in range(0, len(self), -(-len(self) // LABELS_READ_AT_START)):
            try:
                record = self[index]
            except DecodeError:
                continue  # met again when its picture is wanted, and dealt with there
            if not 0 <= record.label < classes:
                raise UserError(
                    f"{self.field}: {record.name} has the label {record.label}, which is none of "
                    f"{classes} classes; give a split with labels, or probe.every = 0"
                )
