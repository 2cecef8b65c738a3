"""Every config field with its default and meaning, and the checks made before any work starts.

Recipes in `configs/` start from `default_config()` and change fields; the command line overrides
fields of the recipe (`--config.mask.ratio=0.9`). Unknown fields are refused.
"""

import json
import math
from typing import Any

from ml_collections import ConfigDict

from mae_jax.models.masking import SAMPLERS, num_kept
from mae_jax.models.targets import TARGETS
from mae_jax.models.vit import REMAT_POLICIES, VARIANTS

TASKS = ("pretrain",)
COMPUTE_DTYPES = ("float32", "bfloat16")
STACKINGS = ("unrolled", "scan")
CROPS = ("random_resized", "centre")
BAD_RECORDS = ("stop", "skip")
INIT_PARTS = ("all", "encoder")


class ConfigError(ValueError):
    """A config that cannot run; the message names the field and the remedy."""


def default_config() -> ConfigDict:
    """The paper's pretraining recipe for ViT-B (tables 8 and mae.md 2.1), every field present."""
    config = ConfigDict()
    config.task = "pretrain"
    config.seed = 0
    config.batch_size = 4096  # global: over all devices and accumulation steps
    config.epochs = 800.0  # of the training split; one epoch = examples // batch_size steps
    config.steps = 0  # more than 0: total steps, in place of epochs
    config.log_every = 50  # steps
    # Weights to start from: a workdir, or a file or folder of any format `mae_jax.export` writes or
    # the official code, timm and Hugging Face use. Empty: from scratch.
    config.init_from = ""
    config.init_parts = "all"  # or encoder: leave the decoder at its random start
    config.compute_dtype = "bfloat16"  # parameters, softmax, norms and loss stay float32

    config.model = ConfigDict()
    config.model.variant = "b"  # ti s b l h
    config.model.patch_size = 16
    config.model.image_size = (224,)  # pixels: (side,) or (height, width)
    config.model.channels = 3
    config.model.width = 0  # these three: 0 takes the variant's
    config.model.depth = 0
    config.model.heads = 0
    config.model.stacking = "unrolled"  # or scan: compiles faster, runs slower
    config.model.remat = "none"  # dots, full: less memory, more work

    config.decoder = ConfigDict()
    config.decoder.depth = 8
    config.decoder.width = 512
    config.decoder.heads = 16

    config.mask = ConfigDict()
    config.mask.kind = "random"
    config.mask.ratio = 0.75
    config.target = "norm_pixel"  # or pixel

    config.data = ConfigDict()
    config.data.name = "imagenet2012"  # a TFDS data set, `folder` or `demo`
    config.data.dir = ""  # TFDS data dir, or the folder of images
    config.data.train_split = "train"
    config.data.eval_split = "validation"
    config.data.crop = "random_resized"  # or centre (table 1e, "none")
    config.data.scale = (0.2, 1.0)  # area of the crop
    config.data.ratio = (3 / 4, 4 / 3)  # aspect of the crop
    config.data.flip = True
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.data.bad_records = "stop"  # or skip: use the next one, and count
    config.data.workers = 0  # processes that decode; 0 decodes in threads of this one
    config.data.threads = 0  # that decode, per process; 0: one per core
    config.data.prefetch = 4  # batches made ahead

    config.optim = ConfigDict()
    config.optim.base_lr = 1.5e-4  # lr = base_lr * batch_size / 256
    config.optim.min_lr = 0.0
    config.optim.warmup_epochs = 40.0
    config.optim.warmup_steps = 0  # more than 0: in place of warmup_epochs
    config.optim.b1 = 0.9
    config.optim.b2 = 0.95
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.05
    config.optim.clip_norm = 0.0  # 0: no clipping
    config.optim.accumulate = 1  # gradient accumulation: parts the batch is run in
    config.optim.ema = 0.0  # decay of the weights' moving average; 0: none

    config.mesh = ConfigDict()
    config.mesh.data = -1  # -1: whatever fsdp leaves
    config.mesh.fsdp = 1  # ways to split parameters and optimizer; -1: all devices

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 1000  # steps
    config.checkpoint.keep = 3

    config.eval = ConfigDict()
    config.eval.every = 5000  # steps; 0: only at the end
    config.eval.batches = 0  # at most so many batches; 0: the whole split

    config.pictures = ConfigDict()
    config.pictures.every = 5000  # steps; 0: only at the end
    config.pictures.count = 8  # images in the grid
    return config.lock()


# May differ between a checkpoint and the run that continues from it: they change how the run is
# carried out, not what it computes. Everything else must be equal.
FREE_FIELDS = (
    "log_every",
    "checkpoint.every",
    "checkpoint.keep",
    "eval.every",
    "eval.batches",
    "pictures.every",
    "pictures.count",
    "data.dir",
    "data.workers",
    "data.threads",
    "data.prefetch",
    "mesh.data",
    "mesh.fsdp",
    "model.stacking",
    "model.remat",
)


def image_size(config: ConfigDict) -> tuple[int, int]:
    """`model.image_size` as (height, width)."""
    size = config.model.image_size
    if isinstance(size, int):
        return size, size
    return tuple(size) * 2 if len(size) == 1 else tuple(size)


def total_steps(config: ConfigDict, examples: int) -> int:
    """Optimizer steps of the whole run."""
    if config.steps:
        return config.steps
    return max(1, round(config.epochs * steps_per_epoch(config, examples)))


def warmup_steps(config: ConfigDict, examples: int) -> int:
    """Optimizer steps of linear warm-up."""
    if config.optim.warmup_steps:
        return config.optim.warmup_steps
    return round(config.optim.warmup_epochs * steps_per_epoch(config, examples))


def steps_per_epoch(config: ConfigDict, examples: int) -> int:
    """Whole batches in the training split, at least one (312 for ImageNet at 4096)."""
    return max(1, examples // config.batch_size)


def to_json(config: ConfigDict) -> str:
    """The config as it is written to `config.json`."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields as {"optim.base_lr": value}; tuples as lists, as JSON gives them back."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def differing_fields(saved: dict[str, Any], config: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Fields that forbid continuing from a checkpoint: {field: (saved, now)}."""
    old, new = flatten(saved), flatten(config.to_dict())
    return {
        field: (old.get(field), new.get(field))
        for field in sorted(old.keys() | new.keys())
        if field not in FREE_FIELDS and old.get(field) != new.get(field)
    }


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_choice(config: ConfigDict, field: str, choices: Any) -> None:
    value = flatten(config.to_dict())[field]
    _require(value in choices, f"{field} = {value!r}: choose one of {', '.join(choices)}")


def validate(config: ConfigDict) -> None:
    """Raises ConfigError for a config that no data set and no machine could run.

    Checked by their types and locks elsewhere: unknown fields (ml_collections), the data
    directory (`data.sources`), the fit of batch and mesh (`distributed.mesh`).
    """
    unknown = flatten(config.to_dict()).keys() - flatten(default_config().to_dict()).keys()
    _require(not unknown, f"unknown config field(s) {', '.join(sorted(unknown))}")
    for field, choices in {
        "task": TASKS,
        "compute_dtype": COMPUTE_DTYPES,
        "init_parts": INIT_PARTS,
        "model.variant": VARIANTS,
        "model.stacking": STACKINGS,
        "model.remat": REMAT_POLICIES,
        "mask.kind": SAMPLERS,
        "target": TARGETS,
        "data.crop": CROPS,
        "data.bad_records": BAD_RECORDS,
    }.items():
        _require_choice(config, field, choices)
    _validate_model(config)
    for field in (
        "batch_size",
        "log_every",
        "checkpoint.every",
        "checkpoint.keep",
        "optim.accumulate",
        "optim.base_lr",
        "data.prefetch",
        "pictures.count",
    ):
        value = flatten(config.to_dict())[field]
        _require(value > 0, f"{field} = {value}: must be more than 0")
    for field in (
        "data.workers",
        "data.threads",
        "eval.every",
        "eval.batches",
        "pictures.every",
        "steps",
    ):
        value = flatten(config.to_dict())[field]
        _require(value >= 0, f"{field} = {value}: must not be negative")
    _require(
        config.steps > 0 or config.epochs > 0, "set steps or epochs: one of them must be above 0"
    )
    _require(
        config.batch_size % config.optim.accumulate == 0,
        f"batch_size = {config.batch_size} does not divide into optim.accumulate = "
        f"{config.optim.accumulate} equal parts",
    )
    _require(0 <= config.optim.ema < 1, f"optim.ema = {config.optim.ema}: must be in [0, 1)")
    for field in ("mean", "std"):
        count = len(config.data[field])
        _require(
            count == config.model.channels,
            f"data.{field} has {count} value(s) for model.channels = {config.model.channels}",
        )


def _validate_model(config: ConfigDict) -> None:
    size = config.model.image_size
    _require(
        isinstance(size, int) or len(size) in (1, 2),
        f"model.image_size = {size}: give one side or height,width",
    )
    height, width = image_size(config)
    patch = config.model.patch_size
    _require(patch > 0, f"model.patch_size = {patch}: must be more than 0")
    for name, side in (("height", height), ("width", width)):
        lower = side // patch * patch
        _require(
            side > 0 and side % patch == 0,
            f"model.image_size: {name} {side} is not divisible by model.patch_size = {patch}; "
            f"the nearest that are: {lower or patch}, {lower + patch}",
        )
    _require(config.model.channels > 0, "model.channels must be more than 0")
    shape = VARIANTS[config.model.variant]
    stacks = (
        ("model", config.model.width or shape.width, config.model.heads or shape.heads),
        ("decoder", config.decoder.width, config.decoder.heads),
    )
    for name, dim, heads in stacks:
        _require(dim % 4 == 0, f"{name}.width = {dim}: sine-cosine positions need a multiple of 4")
        _require(dim % heads == 0, f"{name}.width = {dim} is not divisible by heads = {heads}")
    _require(config.decoder.depth > 0, "decoder.depth must be at least 1")
    ratio = config.mask.ratio
    patches = height * width // patch**2
    _require(0 < ratio < 1, f"mask.ratio = {ratio}: must lie between 0 and 1")
    kept = num_kept(patches, ratio)
    _require(
        math.isfinite(ratio) and 0 < kept < patches,
        f"mask.ratio = {ratio} keeps {kept} of {patches} patches: at least one patch must stay "
        "and at least one must go",
    )
