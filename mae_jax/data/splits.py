"""The training and evaluation split of a run, as batches of pixels."""

import numpy as np
from ml_collections import ConfigDict

from mae_jax import UserError
from mae_jax import config as config_lib
from mae_jax.data import pipeline
from mae_jax.data.randaugment import parse_randaugment
from mae_jax.data.sources import DecodeError, Source, open_source
from mae_jax.data.transforms import EvalTransform, TrainTransform


class Splits:
    """The two splits of `config.data`, each with its transform to the model's input.

    Attributes:
      classes: number of classes of a labelled set whose labels the task reads, else None.

    Raises:
      ValueError: missing or unprepared data, or labels that do not fit, naming the field and the
        remedy.
    """

    def __init__(self, config: ConfigDict):
        data = config.data
        size = config_lib.image_size(config)
        self.train: Source = open_source(data.name, data.dir or None, data.train_split)
        self.eval: Source = open_source(data.name, data.dir or None, data.eval_split)
        self.classes = None if config.task == "pretrain" else _classes(config, self)
        spec = config.augment.randaugment
        fill = tuple(round(255 * mean) for mean in data.mean)
        self.train_transform = TrainTransform(
            size=size,
            channels=config.model.channels,
            scale=tuple(data.scale),
            ratio=tuple(data.ratio),
            crop=data.crop,
            resize=data.resize,
            randaugment=parse_randaugment(spec, fill) if spec else None,
        )
        self.eval_transform = EvalTransform(
            size=size, channels=config.model.channels, crop_ratio=data.eval_crop or None
        )
        self.seed = config.seed
        self._batch_size = config.batch_size
        self._loading = {
            "bad_records": data.bad_records,
            "classes": self.classes,
            "threads": data.threads,
            "prefetch": data.prefetch,
        }
        self._workers = data.workers

    def train_batches(
        self, positions: np.ndarray, start_step: int, end_step: int
    ) -> pipeline.Batches:
        """This process's rows of the batches of steps `start_step` to `end_step`."""
        return pipeline.train_batches(
            self.train,
            self.train_transform,
            seed=self.seed,
            batch_size=self._batch_size,
            positions=positions,
            start_step=start_step,
            end_step=end_step,
            workers=self._workers,
            **self._loading,
        )

    def eval_batches(self, positions: np.ndarray, batch_size: int) -> pipeline.Batches:
        """This process's rows of the evaluation split, every example once."""
        return self.in_order(self.eval, positions, batch_size)

    def in_order(self, source: Source, positions: np.ndarray, batch_size: int) -> pipeline.Batches:
        """Every example of `source` once, cropped for evaluation."""
        return pipeline.eval_batches(
            source,
            self.eval_transform,
            batch_size=batch_size,
            positions=positions,
            **self._loading,
        )

    def eval_examples(self, count: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Images [count, H, W, C] uint8 of the evaluation split, labels [count], record names."""
        count = min(count, len(self.eval))
        # Spread over the split: neighbours are often of one class.
        indices = np.linspace(0, len(self.eval) - 1, count).astype(int)
        images, labels, names = zip(*(self._eval_example(int(i)) for i in indices), strict=True)
        return np.stack(images), np.asarray(labels, np.int32), list(names)

    def _eval_example(self, index: int) -> tuple[np.ndarray, int, str]:
        for i in range(len(self.eval)):
            try:
                record = self.eval[(index + i) % len(self.eval)]
                return self.eval_transform.image(record), record.label, record.name
            except DecodeError:
                if self._loading["bad_records"] != "skip":
                    raise
        raise DecodeError(f"none of the {len(self.eval)} evaluation records can be decoded")


def _classes(config: ConfigDict, splits: Splits) -> int:
    """The number of classes, the same in both splits and in the config."""
    train, evaluation = splits.train, splits.eval
    for source in (train, evaluation):
        if source.num_classes is None:
            raise UserError(
                f"data.name: {source.name}, split {source.split}, has no labels, and task "
                f"{config.task} learns from labels. Choose a labelled data set; a folder needs one "
                "sub-folder a class: FOLDER/train/CLASS/*.jpg, FOLDER/validation/CLASS/*.jpg"
            )
    if train.num_classes != evaluation.num_classes or train.class_names != evaluation.class_names:
        ours, theirs = set(train.class_names or ()), set(evaluation.class_names or ())
        odd = sorted(ours ^ theirs)[:5]
        raise UserError(
            f"data.eval_split: {evaluation.split} has {evaluation.num_classes} classes, "
            f"{train.split} has {train.num_classes}"
            + (f"; in one of them only: {', '.join(odd)}" if odd else "")
            + ". Labels would not mean the same; give splits with equal classes"
        )
    if config.head.classes not in (0, train.num_classes):
        raise UserError(
            f"head.classes = {config.head.classes}, but {train.name} has {train.num_classes} "
            "classes; 0 takes the data set's"
        )
    return train.num_classes
