"""A probe of the encoder while it pretrains: closed form, beside that of the untrained encoder."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from mae_jax import UserError
from mae_jax.data import pipeline
from mae_jax.data.record import DecodeError, Selection, Source
from mae_jax.data.sources import open_source
from mae_jax.data.splits import common_classes
from mae_jax.data.transforms import EvalTransform
from mae_jax.distributed.sharding import abstract_state, shardings_of
from mae_jax.evaluators.over_split import OverSplit, rows
from mae_jax.evaluators.probes import knn_accuracy, ridge_probe
from mae_jax.models.classifier import pool_tokens
from mae_jax.train.metrics import MetricsWriter
from mae_jax.train.state import TrainState

# Decoded pictures that take no more than this in a process are kept between probes (5,000 of
# 224 px take 0.75 GB); more are decoded again each time.
CACHE_BYTES = 2**30
LABELS_READ_AT_START = 64  # of each part


class Probe:
    """Measures the encoder by `ridge_probe` on fixed, labelled examples.

    Writes ``probe/top1``, ``probe/top1_untrained`` (the same probe on the encoder this run's seed
    initialises, computed at the first call, whatever the run started or resumed from),
    ``probe/knn`` where `probe.neighbours` > 0, ``probe/train_examples``, ``probe/eval_examples``
    and ``probe/classes``. Accuracies are fractions. Every process must call it.

    Args:
      config: its `probe.*` fields say where and how; an empty one takes the field of `data`.
      task: gives `mesh`, `image_shape`, `eval_batch_size`, `init() -> TrainState` and
        `encode(params, images [B, H, W, C] uint8) -> [B, 1 + L, D]`.

    Raises:
      UserError: data that is not there or unlabelled, or splits whose classes differ.
    """

    def __init__(self, config: ConfigDict, task: Any, writer: MetricsWriter):
        self._writer = writer
        mesh = task.mesh
        self._neighbours = config.probe.neighbours
        self._train = _select(config, "train_split", config.probe.train_examples)
        self._eval = _select(config, "eval_split", config.probe.eval_examples)
        self.classes = _classes(self._train.source, self._eval.source)
        for part in (self._train, self._eval):
            part.check_labels(self.classes)
        self._transform = EvalTransform(
            size=task.image_shape[:2],
            channels=task.image_shape[2],
            crop_ratio=config.data.eval_crop or None,
        )
        # Smaller than an evaluation batch where a part has fewer examples: padding is encoded too.
        batch_size = min(task.eval_batch_size, max(len(self._train), len(self._eval)))
        self._loading = {
            "bad_records": config.data.bad_records,
            "classes": self.classes,
            "threads": config.data.threads,
            "prefetch": config.data.prefetch,
        }
        self._kept: dict[str, list[dict[str, np.ndarray]]] = {}
        self._untrained: float | None = None

        def initial_params() -> Any:
            return task.init().weights

        def encode(params: Any, batch: dict, _: jax.Array) -> dict:
            features = pool_tokens(task.encode(params, batch["image"]), config.probe.pool)
            return {"feature": features, "label": batch["label"], "weight": batch["weight"]}

        shardings = shardings_of(abstract_state(initial_params, mesh))
        self._initial_params = jax.jit(initial_params, out_shardings=shardings)
        self._run = run = OverSplit(encode, mesh, batch_size, shardings)
        batches = sum(-(-len(part) // run.batch_size) for part in (self._train, self._eval))
        bytes_kept = batches * len(run.positions) * math.prod(task.image_shape)
        self._keep = bytes_kept <= CACHE_BYTES

    def __call__(self, step: int, state: TrainState) -> None:
        """Probes the best weights of `state` and writes the metrics of `step`."""
        start = time.perf_counter()
        if self._untrained is None:
            untrained = self._initial_params()
            self._untrained = ridge_probe(*self._features(untrained), self.classes)
        features = self._features(state.weights)
        scalars = {
            "probe/top1": ridge_probe(*features, self.classes),
            "probe/top1_untrained": self._untrained,
            "probe/train_examples": len(features[1]),
            "probe/eval_examples": len(features[3]),
            "probe/classes": self.classes,
        }
        if self._neighbours:
            scalars["probe/knn"] = knn_accuracy(*features, self.classes, k=self._neighbours)
        self._writer.write(step, scalars)
        logging.info(
            "step %d: probe top1 %.4f, untrained %.4f%s  (%d classes, %d + %d images, %.0f s)",
            *(step, scalars["probe/top1"], self._untrained),
            f", knn {scalars['probe/knn']:.4f}" if self._neighbours else "",
            *(self.classes, len(features[1]), len(features[3]), time.perf_counter() - start),
        )

    def _features(self, params: Any) -> list[np.ndarray]:
        """Features [N, D] and labels [N] of the training part, then of the evaluation part."""
        features = []
        for part in (self._train, self._eval):
            with self._batches(part) as batches:
                found = rows(self._run(params, batches, examples=len(part), label="probe"))
            if not len(found["label"]):
                raise UserError(f"probe.{part.field}: no picture of {part.name} can be decoded")
            features += [found["feature"], found["label"]]
        return features

    @contextlib.contextmanager
    def _batches(self, part: "_Part") -> Iterator[Any]:
        """This process's rows: image [b, H, W, C] uint8, label [b] int32, weight [b] float32."""
        if part.field in self._kept:
            yield self._kept[part.field]
            return
        loading = pipeline.eval_batches(
            part,
            self._transform,
            batch_size=self._run.batch_size,
            positions=self._run.positions,
            **self._loading,
        )
        with loading as batches:
            if self._keep:
                self._kept[part.field] = batches = list(batches)
            yield batches


class _Part(Selection):
    """`count` records of a split, spread over it: the first ones of its shuffled order."""

    def __init__(self, source: Source, field: str, count: int, seed: int):
        n = len(source)
        chosen = (pipeline.example_index(seed, g, n) for g in range(min(count, n)))
        super().__init__(source, np.sort(np.fromiter(chosen, np.int64)))  # read front to back
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
                    f"probe.{self.field}: {record.name} has the label {record.label}, which is "
                    f"none of {classes} classes; give a split with labels, or probe.every = 0"
                )


def _select(config: ConfigDict, field: str, count: int) -> _Part:
    name, directory, split = (
        config.probe[key] or config.data[key] for key in ("name", "dir", field)
    )
    try:
        source = open_source(name, directory or None, split)
    except UserError as error:
        raise UserError(
            f"probe.{field}, {split!r} of {name!r} (empty probe fields take those of data): {error}"
        ) from error
    return _Part(source, field, count, config.seed)


def _classes(train: Source, evaluation: Source) -> int:
    """The number of classes, the same in both splits."""
    need = "a probe needs them: name a labelled data set there, or set probe.every = 0"
    common_classes(train, evaluation, "probe", need)
    if train.num_classes < 2:
        raise UserError(
            f"probe.name: {train.name} has {train.num_classes} class; a probe tells classes apart"
        )
    return train.num_classes
