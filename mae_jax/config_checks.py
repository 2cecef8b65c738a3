"""What is wrong with a config, each in one line that names the field and the remedy.

`mae_jax/config.py` has the fields, with the type and the range of each; here is what follows from
several together.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from mae_jax import UserError
from mae_jax.config import (
    DVAE,
    FIELDS,
    MAE,
    PROBE,
    SEGMENT,
    TUNE,
    check_value,
    default_config,
    flatten,
    image_size,
    mix_group,
    norm_group,
    optimizer,
)
from mae_jax.models.dvae import STRIDE
from mae_jax.models.masking import FILE, mask_problems
from mae_jax.models.targets import TARGETS
from mae_jax.models.targets.base import Target
from mae_jax.models.targets.hog import CELL
from mae_jax.models.vit import VARIANTS
from mae_jax.train.optimizers import OPTIMIZERS, hyperparameters


def validate(config: ConfigDict, *, starts: bool = True) -> None:
    """Raises UserError for a config that no data set and no machine could run, and, if it `starts`,
    for one without the weights that its task begins with."""
    for name, value in flatten(config.to_dict()).items():
        check_value(name, value)
    for problem in _problems(config, starts):
        raise UserError(problem)


def _problems(config: ConfigDict, starts: bool) -> Iterator[str]:
    """What is wrong with fields that are each in their range."""
    task, batch, defaults = config.task, config.batch_size, flatten(default_config().to_dict())
    for name, value in flatten(config.to_dict()).items():
        if value != (default := defaults[name]) and task not in FIELDS[name].tasks:
            yield f"{name} = {value!r}: task {task} has no use for this field; leave it {default!r}"
    if starts and task in (*TUNE, *PROBE, *SEGMENT) and not config.init_from:
        recipe = " (the supervised recipe is configs/scratch.py)" * (task in TUNE)
        yield (
            f"init_from is empty, and task {task} starts from an encoder: give a workdir or a file "
            f"of weights, or `random` for an untrained encoder as a control{recipe}"
        )
    used = hyperparameters(optimizer(config))
    for name in (name for other in OPTIMIZERS for name in hyperparameters(other)):
        value, default = config.optim[name], FIELDS[f"optim.{name}"].default
        if value != default and name not in used:
            unused = f"the optimizer {optimizer(config)} has no use for this field"
            yield f"optim.{name} = {value!r}: {unused}; leave it at {default!r}"
    if task in MAE and config.init_from == "random":
        yield "init_from = 'random' is for fine-tuning and probing; leave it empty to pretrain"
    model, shape = config.model, VARIANTS[config.model.variant]
    depth, blocks = model.depth or shape.depth, config.trainable_blocks
    if blocks not in (-1, 0.5) and (blocks != int(blocks) or blocks > depth):
        yield f"trainable_blocks = {blocks}: give -1, 0, 0.5 or an integer up to the depth, {depth}"
    size, patch = image_size(config), STRIDE if task in DVAE else model.patch_size
    if len(size) != 2:
        yield f"model.image_size = {size}: give one side or height,width"
    for name, side in zip(("height", "width"), size, strict=True):
        if side % patch:
            lower = side // patch * patch
            near = f"the nearest that are: {lower or patch}, {lower + patch}"
            what = f"the tokenizer's {patch}" if task in DVAE else f"model.patch_size = {patch}"
            wrong = f"{name} {side} is not divisible by {what}"
            yield f"model.image_size: {wrong}; {near}"
    yield from _target_problems(config, patch)
    encoder = "model", model.width or shape.width, model.heads or shape.heads
    for name, width, heads in (encoder, ("decoder", config.decoder.width, config.decoder.heads)):
        if width % 4:
            yield f"{name}.width = {width}: sine-cosine positions need a multiple of 4"
        if width % heads:
            yield f"{name}.width = {width} is not divisible by heads = {heads}"
    if task in MAE:
        yield from _mask_problems(config, (size[0] // patch, size[1] // patch))
    if task in SEGMENT:
        yield from _segment_problems(config, depth)
    if not config.steps and not config.epochs:
        yield "set steps or epochs: one of them must be above 0"
    if config.augment.color_jitter and model.channels != 3:
        what = f"hue and saturation are of 3 channels, and model.channels = {model.channels}"
        yield f"augment.color_jitter = {config.augment.color_jitter}: {what}; leave it 0.0"
    if batch % config.optim.accumulate:
        parts = config.optim.accumulate
        yield f"batch_size = {batch} does not divide into optim.accumulate = {parts} equal parts"
    if batch % config.data.repeat:
        what = f"batch_size = {batch} counts crops, and holds all of a picture"
        yield f"data.repeat = {config.data.repeat}: {what}; give a divisor of it"
    if task in PROBE and not norm_group(config):
        none = f"no number from 2 to it divides batch_size = {batch}; 0 takes the whole batch"
        yield f"head.norm_group = {config.head.norm_group}: {none}"
    if (config.augment.mixup or config.augment.cutmix) and not mix_group(config):
        yield f"batch_size = {batch}: mixup and cutmix need pairs, so an even number"
    for name in ("mean", "std"):
        if (count := len(config.data[name])) != model.channels:
            yield f"data.{name} has {count} value(s) for model.channels = {model.channels}"
    for name in ("scale", "ratio"):
        if len(value := config.data[name]) != 2 or value[0] > value[1]:
            yield f"data.{name} = {value}: give two numbers, the lower first, as 0.2,1"


def _target_problems(config: ConfigDict, patch: int) -> Iterator[str]:
    """Of the target, the tokenizer that it reads, and the training of one."""
    if config.target == "token" and not config.tokenizer:
        yield (
            "target = 'token' needs a tokenizer: give tokenizer=FILE, the pytorch_model.bin of "
            "facebook/flava-image-codebook (DALL-E's), or the workdir of a run with task=tokenizer"
        )
    if config.tokenizer and config.target != "token":
        unused = f"target {config.target} has no use for it; leave it empty or give target=token"
        yield f"tokenizer = {config.tokenizer!r}: {unused}"
    if config.task in DVAE and config.compute_dtype != "float32":
        yield f"compute_dtype = {config.compute_dtype}: a tokenizer needs float32, or codes change"
    if config.dvae.width % 4:
        yield f"dvae.width = {config.dvae.width}: give a multiple of 4"
    if len(config.dvae.temperature) != 2:
        yield f"dvae.temperature = {config.dvae.temperature}: give two numbers, first,last"
    if config.target == "hog" and patch % CELL:
        lower = patch // CELL * CELL
        near = f"give {lower or CELL} or {lower + CELL}, or another target"
        yield f"model.patch_size = {patch}: target hog has cells of {CELL} pixels; {near}"


def _segment_problems(config: ConfigDict, depth: int) -> Iterator[str]:
    """What is wrong with the head and the data of a segmentation with `depth` blocks."""
    segment, size = config.segment, image_size(config)
    if (taps := tuple(segment.taps)) != (-1,) and (
        len(taps) != 4 or not set(taps) <= {*range(depth)}
    ):
        yield f"segment.taps = {taps}: give four blocks from 0 to {depth - 1}, or -1"
    if len(segment.scale) != 2 or segment.scale[0] > segment.scale[1]:
        yield f"segment.scale = {segment.scale}: give two numbers, the lower first, as 0.5,2"
    if segment.stride > min(size):
        what = f"windows of {size[0]} x {size[1]} would leave pixels out"
        yield f"segment.stride = {segment.stride}: {what}; give at most {min(size)}"
    if segment.photometric and config.model.channels != 3:
        what = f"hue and saturation are of 3 channels, and model.channels = {config.model.channels}"
        yield f"segment.photometric = True: {what}; give segment.photometric=false"


def _mask_problems(config: ConfigDict, grid: tuple[int, int]) -> Iterator[str]:
    """What is wrong with masks, decoder and loss of a pretraining on `grid` patches."""
    mask, patch = config.mask, config.model.patch_size
    if (mask.kind == FILE) != bool(mask.file):
        both = f"mask.kind = {mask.kind!r} and mask.file = {mask.file!r}"
        yield f"{both}: the kind {FILE} needs a file, the others have no use for one"
    if mask.unit % patch:
        yield f"mask.unit = {mask.unit} is no multiple of model.patch_size = {patch}; 0 is a patch"
    elif mask.kind == FILE and mask.unit:
        yield f"mask.unit = {mask.unit}: masks of a file say every patch; leave it 0"
    elif mask.kind != FILE:
        yield from mask_problems(mask.kind, grid, mask.ratio, max(1, mask.unit // patch))
    if mask.invalid >= 0 and config.augment.color_jitter:
        yield "augment.color_jitter changes what mask.invalid looks for: leave one of them out"
    if config.decoder.kind == "linear":
        if not mask.encoder_tokens:
            yield "decoder.kind = 'linear' reads all patches: give mask.encoder_tokens = true"
        for name in ("depth", "width", "heads"):
            default = FIELDS[f"decoder.{name}"].default
            if (value := config.decoder[name]) != default:
                unused = "decoder.kind = 'linear' has no use for this field"
                yield f"decoder.{name} = {value}: {unused}; leave it {default}"
    if config.loss != FIELDS["loss"].default and TARGETS[config.target].loss is not Target.loss:
        yield f"loss = {config.loss!r}: target {config.target} has its own; leave it l2"
