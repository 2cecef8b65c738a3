"""The data of a run, as its config describes them."""

import contextlib
import json

from etils import epath
from ml_collections import ConfigDict

from mae_jax import UserError
from mae_jax import config as config_lib
from mae_jax.data.color_jitter import ColorJitter
from mae_jax.data.order import Windows
from mae_jax.data.randaugment import parse_randaugment
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
    train = open_source(data.name, data.dir, data.train_split)
    evaluation = open_source(data.name, data.dir, data.eval_split)
    if config.task in config_lib.SEGMENT:
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
        seed=config.seed,
        batch_size=config.batch_size,
        classes=classes,
        windows=Windows(data.window, data.pool) if data.order == "windowed" else None,
        **{k: data[k] for k in ("bad_records", "workers", "threads", "prefetch", "repeat")},
    )


def _segmentation_splits(config: ConfigDict, train: Source, evaluation: Source) -> Splits:
    """Splits with label maps; `classes` are those of pixels."""
    data, segment, size = config.data, config.segment, config_lib.image_size(config)
    named = common_classes_of_pixels(train, evaluation)
    if config.head.classes and named not in (None, config.head.classes):
        what = f"head.classes = {config.head.classes}, but {train.name} names {named} classes"
        raise UserError(f"{what}; 0 takes the data set's")
    classes = named or config.head.classes
    if not classes:
        what = f"{train.name} does not say how many classes its label maps have"
        raise UserError(f"{what}: put classes.txt beside them, a name a line, or give head.classes")
    labels = LabelMaps(classes, segment.ignore, segment.zero_is_other)
    return Splits(
        train=train,
        eval=evaluation,
        train_transform=SegmentTrainTransform(
            size=size,
            channels=config.model.channels,
            labels=labels,
            scale=tuple(segment.scale),
            resize=data.resize,
            flip=data.flip,
            distortion=segment.distortion,
        ),
        eval_transform=None,
    )
