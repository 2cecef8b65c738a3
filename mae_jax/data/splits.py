"""The training and evaluation split of a run, as batches of arrays."""

import contextlib
import dataclasses
import hashlib
import os
from typing import Any

import numpy as np

from mae_jax import UserError
from mae_jax.data import pipeline
from mae_jax.data.order import Windows
from mae_jax.data.record import DecodeError, Selection, Source


@dataclasses.dataclass(frozen=True)
class Splits:
    """Two splits, each with its transform to what a step takes."""

    train: Source
    eval: Source
    train_transform: pipeline.Transform
    eval_transform: pipeline.Transform  # `EvalTransform` where a task asks nothing else
    seed: int
    batch_size: int
    classes: int | None  # of a labelled set whose labels are read, else None
    pixel_classes: int | None = None  # of label maps that are read
    bad_records: str = "stop"  # this and what follows: see `pipeline.train_batches`
    workers: int = 0  # for training
    threads: int = 0
    prefetch: int = 2
    windows: Windows | None = None
    repeat: int = 1

    @property
    def head_classes(self) -> int | None:
        """How many classes a head on these data tells apart, of pictures or of pixels."""
        return self.classes or self.pixel_classes

    def train_batches(
        self, positions: np.ndarray, start_step: int, end_step: int
    ) -> pipeline.Batches:
        """This process's rows of the batches of steps `start_step` to `end_step`."""
        options = {"seed": self.seed, "batch_size": self.batch_size, "positions": positions}
        options |= {"start_step": start_step, "end_step": end_step, "workers": self.workers}
        options |= {"windows": self.windows, "repeat": self.repeat}
        return pipeline.train_batches(self.train, self.train_transform, **options, **self.loading)

    def eval_batches(self, positions: np.ndarray, batch_size: int) -> pipeline.Batches:
        """This process's rows of the evaluation split, every example once."""
        options = {"batch_size": batch_size, "positions": positions, **self.loading}
        return pipeline.eval_batches(self.eval, self.eval_transform, **options)

    def crops(self) -> pipeline.Batches:
        """An epoch of training crops, in whole batches of 64 at most, all in every process."""
        size = min(64, len(self.train))
        options = {"seed": self.seed, "batch_size": size, "positions": np.arange(size)}
        options |= {"end_step": -(-len(self.train) // size), **self.loading}
        return pipeline.train_batches(self.train, self.train_transform, **options)

    @property
    def loading(self) -> dict:
        """How `pipeline` is to load batches of either split."""
        names = ("bad_records", "classes", "threads", "prefetch")
        return {name: getattr(self, name) for name in names}

    def facts(self) -> dict[str, Any]:
        """What tells these data from others, of a few records of each split: as JSON."""
        sources = {"data.train_split": self.train, "data.eval_split": self.eval}
        found: dict[str, Any] = {f"records in {k}": len(source) for k, source in sources.items()}
        for field, source in sources.items():
            for index in {0, len(source) // 3, len(source) - 1}:
                with contextlib.suppress(DecodeError):  # met again when it is wanted
                    record = source[index]
                    file = os.path.basename(record.name)  # its folder may be another on each host
                    found[f"record {index} of {field}"] = f"{file}, label {record.label}"
                    if (label_map := record.segmentation) is not None:
                        data = label_map if isinstance(label_map, bytes) else label_map.tobytes()
                        found[f"label map {index} of {field}"] = hashlib.sha256(data).hexdigest()
        return found

    def examples(self, source: Source, count: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Images [n, H, W, C] uint8, labels [n], names of n <= count records, spread over it."""
        arrays, names = self.example_arrays(source, count)
        return arrays["image"], arrays["label"], names

    def example_arrays(self, source: Source, count: int) -> tuple[dict[str, np.ndarray], list[str]]:
        """What evaluation makes of n <= count records, spread over the source: arrays [n, ...] of
        the transform's schema, "label" and "id"; and their names."""
        count = min(count, len(source))
        chosen = Selection(source, np.linspace(0, len(source) - 1, count).astype(int))
        transform, positions = self.eval_transform, np.arange(count)
        with pipeline.eval_batches(
            chosen, transform, batch_size=count, positions=positions, **self.loading
        ) as batches:
            batch = next(batches)
        real = batch.pop("weight") > 0
        if not real.any():
            raise DecodeError(f"none of {count} records of {source.split} can be decoded")
        names = [source[int(index)].name for index in chosen.indices[real]]
        return {name: values[real] for name, values in batch.items()}, names


def common_classes(train: Source, evaluation: Source, fields: str, need: str) -> int:
    """The number of classes of two splits; raises UserError where their labels differ.

    `fields`: part of the config that names them; `need`: who needs labels, and what else to do.
    """
    for source in (train, evaluation):
        if source.num_classes is None:
            what = f"{source.name}, split {source.split}, has no labels, and {need}"
            remedy = "A folder needs train/CLASS/*.jpg and validation/CLASS/*.jpg"
            raise UserError(f"{fields}.name: {what}. {remedy}")
    if (train.num_classes, train.class_names) != (evaluation.num_classes, evaluation.class_names):
        odd = sorted(set(train.class_names or ()) ^ set(evaluation.class_names or ()))[:5]
        how = ", in another order" * (train.num_classes == evaluation.num_classes)
        how = f"; in one of them only: {', '.join(odd)}" if odd else how
        raise UserError(
            f"{fields}.eval_split: {evaluation.split} has {evaluation.num_classes} classes, "
            f"{train.split} has {train.num_classes}{how}. Labels would not mean the same; give "
            "splits with equal classes"
        )
    return train.num_classes
