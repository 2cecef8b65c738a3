"""Every config field with its default and meaning, and the checks made before any work starts.

Recipes in `configs/` start from `default_config()` and change fields; the command line overrides
fields of the recipe (`--config.mask.ratio=0.9`). Unknown fields are refused.
"""

import importlib.util
import json
import math
import pathlib
from typing import Any

from ml_collections import ConfigDict

from mae_jax import UserError
from mae_jax.models.classifier import POOLS
from mae_jax.models.masking import SAMPLERS, num_kept
from mae_jax.models.targets import TARGETS
from mae_jax.models.vit import REMAT_POLICIES, VARIANTS

TASKS = ("pretrain", "finetune", "scratch", "linear_probe")
DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "lars")
RESIZES = ("exact", "fast")
STACKINGS = ("unrolled", "scan")
CROPS = ("random_resized", "single_try", "centre")
BAD_RECORDS = ("stop", "skip")
INIT_PARTS = ("all", "encoder")


def default_config() -> ConfigDict:
    """The paper's pretraining recipe for ViT-B (table 8, mae.md 2.1), every field present.

    Recipes of other tasks change it; a field that a task has no use for must keep its default.
    """
    config = ConfigDict()
    config.task = "pretrain"
    config.seed = 0
    config.batch_size = 4096  # global: over all devices and accumulation steps
    config.epochs = 800.0  # of the training split; one epoch = examples // batch_size steps
    config.steps = 0  # more than 0: total steps, in place of epochs
    config.log_every = 50  # steps
    # Weights to start from: a workdir, or a file or folder of any format `mae_jax.export` writes or
    # the official code, timm and Hugging Face use. Empty: from scratch. Fine-tuning and linear
    # probing want one; `random` gives them an untrained encoder, the control of an experiment.
    config.init_from = ""
    config.init_parts = "all"  # or encoder: leave the decoder at its random start
    # Fine-tuning: how many of the last blocks to train, with all that follows them. 0.5: the last
    # MLP; 0: the head only; -1 or the depth: everything.
    config.trainable_blocks = -1.0
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
    # Of the activations between blocks. bfloat16 is faster and doubles the error of the latents.
    config.model.residual_dtype = "float32"
    config.model.drop_path = 0.0  # of the last block; the first has 0, evenly between

    config.decoder = ConfigDict()
    config.decoder.depth = 8
    config.decoder.width = 512
    config.decoder.heads = 16

    config.mask = ConfigDict()
    config.mask.kind = "random"
    config.mask.ratio = 0.75
    config.target = "norm_pixel"  # or pixel

    config.head = ConfigDict()  # of a classifier
    config.head.pool = "mean"  # of patch tokens, then a new norm; or cls, after the encoder's norm
    config.head.classes = 0  # 0: as many as the data set has
    config.head.init_std = 2e-5
    # Examples that share batch-norm statistics (linear probing): the reference's 512 of one GPU.
    # 0: the whole batch.
    config.head.norm_group = 512

    config.augment = ConfigDict()  # of fine-tuning
    config.augment.randaugment = ""  # timm's notation, e.g. rand-m9-mstd0.5-inc1
    config.augment.erasing = 0.0  # probability
    config.augment.mixup = 0.0  # alpha of the Beta distribution; 0: none
    config.augment.cutmix = 0.0
    config.augment.mix_probability = 1.0  # of either, where one is on
    config.augment.mix_switch = 0.5  # share of cutmix, where both are on
    # Neighbours in the global batch that share one lambda: the reference's batch of one GPU.
    config.augment.mix_group = 32
    config.augment.smoothing = 0.0  # of labels

    config.data = ConfigDict()
    config.data.name = "imagenet2012"  # a TFDS data set, `folder` or `demo`
    config.data.dir = ""  # TFDS data dir, or the folder of images
    config.data.train_split = "train"
    config.data.eval_split = "validation"
    config.data.crop = "random_resized"  # single_try (probing), centre (table 1e, "none")
    config.data.scale = (0.2, 1.0)  # area of the crop
    config.data.ratio = (3 / 4, 4 / 3)  # aspect of the crop
    config.data.resize = "exact"  # Pillow's bicubic; or fast: OpenCV, blurrier, half the CPU time
    config.data.flip = True
    config.data.eval_crop = 0.0  # crop over resized side; 0: 224/256 up to 224 px, else 1
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.data.bad_records = "stop"  # or skip: use the next one, and count
    config.data.workers = 0  # processes that decode; 0 decodes in threads of this one
    config.data.threads = 0  # that decode, per process; 0: one per core
    config.data.prefetch = 4  # batches made ahead

    config.optim = ConfigDict()
    config.optim.name = ""  # adamw or lars; empty: lars for linear probing, else adamw
    config.optim.reduce_dtype = "float32"  # of gradients summed over devices; or bfloat16
    config.optim.base_lr = 1.5e-4  # lr = base_lr * batch_size / 256
    config.optim.min_lr = 0.0
    config.optim.warmup_epochs = 40.0
    config.optim.warmup_steps = 0  # more than 0: in place of warmup_epochs
    config.optim.b1 = 0.9
    config.optim.b2 = 0.95
    config.optim.eps = 1e-8
    config.optim.layer_decay = 1.0  # of the learning rate, from block to block downwards
    config.optim.momentum = 0.9  # these two: LARS, the optimizer of linear probing
    config.optim.trust = 0.001
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
    config.eval.batch_size = 0  # 0: that of training

    # A closed-form linear probe of the encoder while it pretrains, beside the same probe of an
    # untrained one.
    config.probe = ConfigDict()
    config.probe.every = 0  # steps; 0: no probe
    config.probe.name = ""  # labelled data; these four: empty takes the field of `data`
    config.probe.dir = ""
    config.probe.train_split = ""
    config.probe.eval_split = ""
    config.probe.train_examples = 10000  # at most
    config.probe.eval_examples = 5000
    config.probe.pool = "cls"  # or mean, of patch tokens after the final norm
    config.probe.neighbours = 0  # k of a k-nearest-neighbour score beside it (weak for MAE); 0: off

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
    "eval.batch_size",
    "probe.every",
    "probe.name",
    "probe.dir",
    "probe.train_split",
    "probe.eval_split",
    "probe.train_examples",
    "probe.eval_examples",
    "probe.pool",
    "probe.neighbours",
    "pictures.every",
    "pictures.count",
    "data.dir",
    "data.workers",
    "data.threads",
    "data.prefetch",
    "mesh.data",
    "mesh.fsdp",
    "optim.accumulate",
    "model.stacking",
    "model.remat",
)


_CLASSIFIER_FIELDS = ("head.", "trainable_blocks", "model.drop_path", "augment.")
_MAE_FIELDS = ("mask.", "decoder.", "target", "init_parts", "probe.")
_LARS_FIELDS = ("optim.momentum", "optim.trust", "head.norm_group")
# What each task has no use for: setting it would be ignored, so it is refused.
UNUSED_FIELDS = {
    "pretrain": (*_CLASSIFIER_FIELDS, *_LARS_FIELDS, "optim.layer_decay"),
    "finetune": (*_MAE_FIELDS, *_LARS_FIELDS),
    "scratch": (*_MAE_FIELDS, *_LARS_FIELDS, "init_from", "trainable_blocks"),
    "linear_probe": (
        *_MAE_FIELDS,
        "trainable_blocks",
        "model.drop_path",
        "augment.",
        "optim.b1",
        "optim.b2",
        "optim.eps",
        "optim.clip_norm",
        "optim.layer_decay",
        "optim.ema",
        "optim.reduce_dtype",
    ),
}


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


def load_recipe(path: str | pathlib.Path) -> Any:
    """The module of a config file. Such files are run by path, from any directory, not imported."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    """Fields that forbid continuing from a checkpoint: {field: (saved, now)}.

    A field that is younger than the checkpoint had its default then, or what the program did
    before there was a choice.
    """
    saved, new = flatten(saved), flatten(config.to_dict())
    before = {
        "model.residual_dtype": saved.get("compute_dtype"),
        "optim.reduce_dtype": saved.get("compute_dtype"),
        "data.resize": "fast",
    }
    old = flatten(default_config().to_dict()) | before | saved
    return {
        field: (old.get(field), new.get(field))
        for field in sorted(old.keys() | new.keys())
        if field not in FREE_FIELDS and old.get(field) != new.get(field)
    }


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _require_choice(config: ConfigDict, field: str, choices: Any) -> None:
    value = flatten(config.to_dict())[field]
    _require(value in choices, f"{field} = {value!r}: choose one of {', '.join(choices)}")


def validate(config: ConfigDict) -> None:
    """Raises UserError for a config that no data set and no machine could run.

    Checked by their types and locks elsewhere: unknown fields (ml_collections), the data
    directory (`data.sources`), the fit of batch and mesh (`distributed.mesh`).
    """
    unknown = flatten(config.to_dict()).keys() - flatten(default_config().to_dict()).keys()
    _require(not unknown, f"unknown config field(s) {', '.join(sorted(unknown))}")
    for field, choices in {
        "task": TASKS,
        "compute_dtype": DTYPES,
        "model.residual_dtype": DTYPES,
        "optim.reduce_dtype": DTYPES,
        "optim.name": ("", *OPTIMIZERS),
        "data.resize": RESIZES,
        "init_parts": INIT_PARTS,
        "model.variant": VARIANTS,
        "model.stacking": STACKINGS,
        "model.remat": REMAT_POLICIES,
        "mask.kind": SAMPLERS,
        "target": TARGETS,
        "data.crop": CROPS,
        "data.bad_records": BAD_RECORDS,
        "head.pool": POOLS,
        "probe.pool": POOLS,
    }.items():
        _require_choice(config, field, choices)
    _validate_use(config)
    _validate_model(config)
    _validate_classifier(config)
    for field in (
        "batch_size",
        "log_every",
        "checkpoint.every",
        "checkpoint.keep",
        "optim.accumulate",
        "optim.base_lr",
        "data.prefetch",
        "pictures.count",
        "probe.train_examples",
        "probe.eval_examples",
        "head.init_std",
        "optim.layer_decay",
    ):
        value = flatten(config.to_dict())[field]
        _require(value > 0, f"{field} = {value}: must be more than 0")
    for field in (
        "data.workers",
        "data.threads",
        "eval.every",
        "eval.batches",
        "eval.batch_size",
        "pictures.every",
        "probe.every",
        "probe.neighbours",
        "head.classes",
        "head.norm_group",
        "augment.mixup",
        "augment.cutmix",
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


def _validate_use(config: ConfigDict) -> None:
    """Fields set for a task that would not look at them."""
    defaults, values = flatten(default_config().to_dict()), flatten(config.to_dict())
    for field, value in values.items():
        if value != defaults[field] and field.startswith(UNUSED_FIELDS[config.task]):
            raise UserError(
                f"{field} = {value!r}: task {config.task} has no use for this field; leave it at "
                f"{defaults[field]!r}"
            )
    needs_weights = config.task in ("finetune", "linear_probe")
    _require(
        bool(config.init_from) or not needs_weights,
        f"init_from is empty, and task {config.task} starts from an encoder: give a workdir or a "
        "file of weights, or `random` for an untrained encoder as a control"
        + (" (the supervised recipe is configs/scratch.py)" if config.task == "finetune" else ""),
    )
    _require(
        config.init_from != "random" or needs_weights,
        f"init_from = 'random' is for fine-tuning and probing; task {config.task} starts at random "
        "weights when it is empty",
    )


def _validate_classifier(config: ConfigDict) -> None:
    for field in ("augment.erasing", "augment.mix_probability", "augment.mix_switch"):
        value = flatten(config.to_dict())[field]
        _require(0 <= value <= 1, f"{field} = {value}: a probability lies in [0, 1]")
    for field in ("augment.smoothing", "model.drop_path"):
        value = flatten(config.to_dict())[field]
        _require(0 <= value < 1, f"{field} = {value}: must be in [0, 1)")
    _require(
        0 <= config.data.eval_crop <= 1,
        f"data.eval_crop = {config.data.eval_crop}: crop over resized side, in (0, 1]; 0 for auto",
    )
    _require(
        config.optim.layer_decay <= 1,
        f"optim.layer_decay = {config.optim.layer_decay}: must be in (0, 1]",
    )
    if config.augment.mixup or config.augment.cutmix:
        group = config.augment.mix_group
        _require(
            group > 0 and group % 2 == 0 and config.batch_size % group == 0,
            f"augment.mix_group = {group}: must be even and divide batch_size = "
            f"{config.batch_size}",
        )
    if config.task == "linear_probe" and config.head.norm_group:
        _require(
            config.head.norm_group > 1 and config.batch_size % config.head.norm_group == 0,
            f"head.norm_group = {config.head.norm_group}: must be above 1 and divide batch_size "
            f"= {config.batch_size}; 0 takes the whole batch",
        )
    k = config.trainable_blocks
    depth = config.model.depth or VARIANTS[config.model.variant].depth
    _require(
        k in (-1, 0.5) or (k == int(k) and 0 <= k <= depth),
        f"trainable_blocks = {k}: choose -1 (all), 0, 0.5 or a whole number up to the depth, "
        f"{depth}",
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
