"""The data of a run, as its config describes them."""

import contextlib
import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mae_jax import UserError
from mae_jax import config as config_lib
from mae_jax.data.color_jitter import ColorJitter
from mae_jax.data.order import Windows
from mae_jax.data.randaugment import parse_randaugment
from mae_jax.data.record import Source
from mae_jax.data.segmentation import SegmentEvalTransform, SegmentTrainTransform, window_stride
from mae_jax.data.sources import open_source
from mae_jax.data.splits import Splits, common_classes
from mae_jax.data.transforms import EvalTransform, TrainTransform
from mae_jax.interop.tokenizer_file import read_tokenizer
from mae_jax.storage.checkpoints import read_newest


def tokenizer_shape(path: str, channels: int, workdir: epath.Path | None = None) -> tuple[int, ...]:
    """The architecture of the tokenizer in `path`, or that of a run whose checkpoints hold one."""
    if workdir is not None:
        with contextlib.suppress(UserError):  # a new run, or one that is begun again
            _, record, _ = read_newest(workdir / "checkpoints", ("step",))
            if known := json.loads(record.get("model", "{}")).get("tokenizer"):
                return tuple(known)
    return tuple(read_tokenizer(path, channels)[0])


def open_splits(config: ConfigDict) -> Splits:
    """The two splits of `config.data`; raises UserError for missing data or unfit labels."""
    data, size = config.data, config_lib.image_size(config)
    label_maps = config.task in config_lib.SEGMENT
    train, evaluation = (
        open_source(data.name, data.dir, split, segmentation=label_maps)
        for split in (data.train_split, data.eval_split)
    )
    if label_maps:
        return _segmentation_splits(config, train, evaluation)
    classes = None
    if config.task in config_lib.LABELS:
        need = f"task {config.task} learns from labels: choose a labelled data set"
        classes = common_classes(train, evaluation, "data", need)
        if config.head.classes not in (0, classes):
            what = f"head.classes = {config.head.classes}, but {train.name} has {classes} classes"
            raise UserError(f"{what}; 0 takes the data set's")
    spec, jitter = config.augment.randaugment, config.augment.color_jitter
    fill = tuple(round(255 * mean) for mean in data.mean)
    return Splits(
        train=train,
        eval=evaluation,
        train_transform=TrainTransform(
            size=size,
            channels=config.model.channels,
            scale=tuple(data.scale),
            ratio=tuple(data.ratio),
            crop=data.crop,
            resize=data.resize,
            randaugment=parse_randaugment(spec, fill) if spec else None,
            color_jitter=ColorJitter(jitter) if jitter else None,
        ),
        eval_transform=EvalTransform(size, config.model.channels, data.eval_crop or None),
        classes=classes,
        **_loading(config),
    )


def _segmentation_splits(config: ConfigDict, train: Source, evaluation: Source) -> Splits:
    """Splits of pictures with label maps; `classes`, of pictures, they have none."""
    data, segment = config.data, config.segment
    classes = pixel_classes(config, train, evaluation)
    what = {
        "size": config_lib.image_size(config),
        "classes": classes,
        "channels": config.model.channels,
        "ignore": segment.ignore,
        "zero_is_other": segment.zero_is_other,
    }
    return Splits(
        train=train,
        eval=evaluation,
        train_transform=SegmentTrainTransform(
            **what,
            scale=tuple(segment.scale),
            flip=data.flip,
            photometric=segment.photometric,
            resize=data.resize,
        ),
        eval_transform=SegmentEvalTransform(
            **what,
            stride=window_stride(segment.stride, what["size"]),
            scales=tuple(segment.eval_scales),
            flip=segment.eval_flip,
        ),
        classes=None,
        pixel_classes=classes,
        **_loading(config),
    )


def pixel_classes(config: ConfigDict, train: Source, evaluation: Source) -> int:
    """How many classes label maps have; UserError where nobody says, or not all say the same."""
    if train.class_names != evaluation.class_names:
        raise UserError(f"data.eval_split: its classes are not those of {train.split}")
    named, given = train.num_classes, config.head.classes
    if not (named or given):
        what = f"{train.name} does not say how many classes its label maps have"
        raise UserError(f"{what}: put classes.txt beside them, a name a line, or give head.classes")
    if named and given not in (0, named):
        what = f"head.classes = {given}, but {train.name} has {named} classes"
        raise UserError(f"{what}; 0 takes the data set's")
    return named or given


def _loading(config: ConfigDict) -> dict[str, Any]:
    """What `Splits` takes from the config whatever the records hold."""
    data = config.data
    return {
        "seed": config.seed,
        "batch_size": config.batch_size,
        "windows": Windows(data.window, data.pool) if data.order == "windowed" else None,
        **{k: data[k] for k in ("bad_records", "workers", "threads", "prefetch", "repeat")},
    }
