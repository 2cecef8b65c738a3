"""Every config field: its default, type, range, meaning, and which tasks use it.

Recipes in `configs/` start from `default_config()` and change fields; the command line overrides
fields of the recipe (`--config.mask.ratio=0.9`). Unknown fields are refused.
"""

import contextlib
import difflib
import functools
import pathlib
import runpy
import textwrap
import traceback
import types
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

import mae_jax
from mae_jax import UserError
from mae_jax.models.attention import ATTENTION
from mae_jax.models.classifier import POOLS
from mae_jax.models.masking import KINDS
from mae_jax.models.spec import DECODERS
from mae_jax.models.targets import TARGETS
from mae_jax.models.targets.base import LOSSES
from mae_jax.models.vit import REMAT_POLICIES, VARIANTS
from mae_jax.train.optimizers import OPTIMIZERS, SCHEDULES

# Module and class in `tasks/`.
TASKS = {
    "pretrain": "pretrain.Pretrain",
    "finetune": "finetune.Finetune",
    "scratch": "finetune.Finetune",
    "linear_probe": "linear_probe.LinearProbe",
    "tokenizer": "tokenizer.Tokenizer",
    "segment": "segment.Segment",
}
MAE = ("pretrain",)
TUNE = ("finetune",)
CLASSIFY = ("finetune", "scratch")
PROBE = ("linear_probe",)
DVAE = ("tokenizer",)
SEGMENT = ("segment",)
LABELS = (*CLASSIFY, *PROBE)
SUPERVISED = (*LABELS, *SEGMENT)
STARTS = (*MAE, *TUNE, *PROBE, *SEGMENT)  # from weights
VIT = (*MAE, *SUPERVISED)
TUNED = (*CLASSIFY, *SEGMENT)  # encoders, with labels
CROPS = (*MAE, *LABELS, *DVAE)  # of one size from anywhere in a picture
AVERAGED = (*MAE, *CLASSIFY, *DVAE)
WHOLE = (*AVERAGED, *SEGMENT)  # models, not a head alone
DTYPES = ("float32", "bfloat16")
ANY = ()


class Field(NamedTuple):
    """One field of the config.

    Attributes:
      default: its type is the field's. A float takes an integer too; a tuple's entries are alike.
      values: choices of a text; range of a number or a tuple's entries, as "-1 or [1, inf)".
      tasks: that use it; the others refuse any value but the default.
      free: changes how the run is carried out, not what it computes: may change on resume.
    """

    default: Any
    values: str | Collection[str]
    doc: str
    tasks: Collection[str] = TASKS
    free: bool = False


Free = functools.partial(Field, free=True)

# The defaults are the paper's pretraining recipe for ViT-B (table 8).
FIELDS = {
    "task": Field("pretrain", TASKS, "what is trained, and how"),
    "seed": Field(0, "[0, inf)", "of everything random"),
    "batch_size": Field(4096, "[1, inf)", "global: over all devices and accumulation steps"),
    "epochs": Field(800.0, "[0, inf)", "of the training split, each examples // batch_size steps"),
    "steps": Field(0, "[0, inf)", "more than 0: total steps, in place of epochs"),
    "log_every": Free(50, "[1, inf)", "steps"),
    # A workdir, or weights in any format that is read. Empty: from scratch. Fine-tuning and probing
    # want some; `random` gives them an untrained encoder, the control of an experiment.
    "init_from": Field("", ANY, "weights to start from, or random", STARTS),
    "init_parts": Field("all", ("all", "encoder"), "encoder: a new decoder", MAE),
    # 0.5: the MLP of the last block and what follows; 0: the head only; -1: everything.
    "trainable_blocks": Field(-1.0, "-1 or 0.5 or [0, inf)", "how many of the last blocks", TUNE),
    "compute_dtype": Field("bfloat16", DTYPES, "parameters, softmax, norms, loss stay float32"),
    "target": Field("norm_pixel", TARGETS, "what the decoder predicts", MAE),
    "tokenizer": Field("", ANY, "file or workdir of the dVAE whose codes target=token is", MAE),
    "loss": Field("l2", LOSSES, "of a prediction: its squared or absolute error", MAE),
    "model.variant": Field("b", tuple(VARIANTS), "size of the ViT", VIT),
    "model.patch_size": Field(16, "[1, inf)", "pixels", VIT),
    "model.image_size": Field((224,), "[1, inf)", "pixels: one side, or height,width"),
    "model.channels": Field(3, "[1, inf)", "of the images"),
    "model.width": Field(0, "[0, inf)", "0 takes the variant's", VIT),
    "model.depth": Field(0, "[0, inf)", "0 takes the variant's", VIT),
    "model.heads": Field(0, "[0, inf)", "0 takes the variant's", VIT),
    "model.stacking": Free(
        "unrolled", ("unrolled", "scan"), "scan compiles faster, runs slower", VIT
    ),
    "model.attention": Free("plain", ATTENTION, "kernel: our own, for TPUs", (*MAE, *CLASSIFY)),
    "model.remat": Free("none", tuple(REMAT_POLICIES), "dots, full: less memory, more work", VIT),
    # bfloat16 here and in optim.reduce_dtype takes 8 % fewer cycles and as much memory (`plan`:
    # ViT-L, 512 images on v5e:4x4), and the latents' error doubles (9.5e-3 for 4.9e-3).
    "model.residual_dtype": Field("float32", DTYPES, "of activations between blocks", VIT),
    "model.drop_path": Field(0.0, "[0, 1)", "of the last block, falling to 0 below it", TUNED),
    "decoder.kind": Field("blocks", DECODERS, "linear: one layer on the encoder's tokens", MAE),
    "decoder.depth": Field(8, "[1, inf)", "blocks", MAE),
    "decoder.width": Field(512, "[1, inf)", "of its tokens", MAE),
    "decoder.heads": Field(16, "[1, inf)", "of its attention", MAE),
    # The tokenizer that task=tokenizer trains; target=token takes its numbers from the file.
    "dvae.codes": Field(8192, "[2, inf)", "in its vocabulary", DVAE),
    "dvae.width": Field(256, "[4, inf)", "of the first of its four groups", DVAE),
    "dvae.blocks": Field(2, "[1, inf)", "in each group", DVAE),
    "dvae.kl": Field(1e-4, "[0, inf)", "weight of the codes' divergence from all alike", DVAE),
    "dvae.temperature": Field((1.0, 1 / 16), "(0, inf)", "of its softmax: first,last", DVAE),
    "mask.kind": Field("random", KINDS, "which patches are hidden", MAE),
    "mask.ratio": Field(0.75, "(0, 1)", "share of the patches that is hidden", MAE),
    "mask.file": Field("", ANY, "masks of kind file: .npy, [h, w] or [n, h, w], 1 = hidden", MAE),
    "mask.unit": Field(0, "[0, inf)", "pixels: side of squares that are hidden; 0: a patch", MAE),
    "mask.encoder_tokens": Field(False, ANY, "mask tokens pass the encoder", MAE),
    "mask.loss": Field("masked", ("masked", "all"), "patches that the loss is over", MAE),
    # Value of pixels where there are no data, as beyond the edge of a satellite's swath: patches of
    # nothing else count in no loss, and images of no other patches in no mean.
    "mask.invalid": Field(-1, "-1 or [0, 255]", "pixels without data; -1: there are none", MAE),
    # mean: of the patch tokens, then a new norm; cls: the class token, after the encoder's norm.
    "head.pool": Field("mean", tuple(POOLS), "what the head reads", LABELS),
    "head.classes": Field(0, "[0, inf)", "0: as many as the data set has", SUPERVISED),
    "head.init_std": Field(2e-5, "(0, inf)", "of its random start", LABELS),
    # Examples that share batch-norm statistics: the reference's 512 of one GPU.
    "head.norm_group": Field(512, "[0, inf)", "examples normalised together; 0: all", PROBE),
    # Semantic segmentation by UperNet. Taps: after which blocks, counted from 0, the pyramid reads;
    # -1: a third, half, two thirds and all of the way, which is 3,5,7,11 of B and 7,11,15,23 of L.
    "segment.taps": Field((-1,), "-1 or [0, inf)", "four blocks that the pyramid reads", SEGMENT),
    "segment.width": Field(0, "[0, inf)", "channels of UperNet; 0: the encoder's width", SEGMENT),
    "segment.ignore": Field(255, "-1 or [0, 255]", "label left out; -1: none", SEGMENT),
    "segment.zero_is_other": Field(True, ANY, "label 0 is left out, 1 is class 0", SEGMENT),
    "segment.scale": Field((0.5, 2.0), "(0, inf)", "of the short side, over the crop's", SEGMENT),
    "segment.photometric": Field(True, ANY, "brightness, contrast and hue distorted", SEGMENT),
    # Of evaluation. Two thirds are BEiT's 341 of 512; mmsegmentation's MAE has 256.
    "segment.stride": Free(0, "[0, inf)", "pixels between windows; 0: two thirds", SEGMENT),
    "segment.eval_scales": Free((1.0,), "(0, inf)", "averaged over, as 0.5,1,1.5", SEGMENT),
    "segment.eval_flip": Free(False, ANY, "averaged with the mirrored picture", SEGMENT),
    "augment.randaugment": Field("", ANY, "timm's notation, as rand-m9-mstd0.5-inc1", CLASSIFY),
    # Brightness, contrast and saturation by up to 1 - s to 1 + s, hue by s / 4 of its circle.
    "augment.color_jitter": Field(0.0, "[0, 2]", "strength s; 0: none, 0.4 is usual", MAE),
    "augment.erasing": Field(0.0, "[0, 1]", "probability", CLASSIFY),
    "augment.mixup": Field(0.0, "[0, inf)", "alpha of the Beta distribution; 0: none", CLASSIFY),
    "augment.cutmix": Field(0.0, "[0, inf)", "alpha of the Beta distribution; 0: none", CLASSIFY),
    "augment.mix_probability": Field(1.0, "[0, 1]", "of either, where one is on", CLASSIFY),
    "augment.mix_switch": Field(0.5, "[0, 1]", "share of cutmix, where both are on", CLASSIFY),
    # The reference's batch of one GPU shares one lambda.
    "augment.mix_group": Field(32, "[2, inf)", "neighbours in the batch mixed alike", CLASSIFY),
    "augment.smoothing": Field(0.0, "[0, 1)", "of labels", CLASSIFY),
    "data.name": Field("imagenet2012", ANY, "a TFDS data set, `folder` or `demo`"),
    "data.dir": Free("", ANY, "TFDS data dir, or the folder of images"),
    "data.train_split": Field("train", ANY, "as TFDS spells it"),
    "data.eval_split": Field("validation", ANY, "as TFDS spells it"),
    # `single_try` is for linear probing. Table 1e: `fixed`, 256 px cut to 224 anywhere, and with
    # data.flip=False `centre`, its "none". These two have a scale of their own.
    "data.crop": Field(
        "random_resized",
        ("random_resized", "single_try", "fixed", "centre"),
        "of training pictures",
        CROPS,
    ),
    "data.scale": Field((0.2, 1.0), "(0, 1]", "area of the crop: lowest,highest", CROPS),
    "data.ratio": Field((3 / 4, 4 / 3), "(0, inf)", "aspect of the crop: lowest,highest", CROPS),
    # Pillow's bicubic; or OpenCV's, blurrier, in half the CPU time.
    "data.resize": Field("exact", ("exact", "fast"), "of training pictures"),
    "data.flip": Field(True, ANY, "left to right, every other picture"),
    # An epoch stays len(split) crops, of len(split) / repeat pictures.
    "data.repeat": Field(1, "[1, inf)", "crops of a decoded picture, each counted", MAE),
    "data.eval_crop": Field(
        0.0, "[0, 1]", "of the resized side; 0: 224/256 up to 224 px, else 1", CROPS
    ),
    "data.mean": Field((0.485, 0.456, 0.406), "(-inf, inf)", "of the channels, pixels in [0, 1]"),
    "data.std": Field((0.229, 0.224, 0.225), "(0, inf)", "of the channels, pixels in [0, 1]"),
    # windowed, for buckets: records side by side are read at once; see mae_jax/data/order.py.
    "data.order": Field("shuffled", ("shuffled", "windowed"), "of training pictures", WHOLE),
    "data.window": Field(64, "[1, inf)", "records read at once, if windowed", WHOLE),
    "data.pool": Field(65536, "[1, inf)", "examples mixed at a time, if windowed", WHOLE),
    "data.bad_records": Field("stop", ("stop", "skip"), "skip: use the next one, and count"),
    "data.workers": Free(0, "[0, inf)", "processes that decode; 0: threads of this one do"),
    "data.threads": Free(0, "[0, inf)", "that decode, per process; 0: one per core"),
    "data.prefetch": Free(4, "[1, inf)", "batches made ahead"),
    "optim.name": Field("", ("", *OPTIMIZERS), "empty: lars for linear probing, else adamw"),
    "optim.reduce_dtype": Field("float32", DTYPES, "of gradients summed over devices", WHOLE),
    "optim.base_lr": Field(1.5e-4, "(0, inf)", "learning rate = base_lr * batch_size / 256"),
    "optim.schedule": Field("cosine", SCHEDULES, "of the learning rate after its warm-up"),
    "optim.min_lr": Field(0.0, "[0, inf)", "learning rate at the end"),
    "optim.warmup_epochs": Field(40.0, "[0, inf)", "in which the learning rate rises from 0"),
    "optim.warmup_steps": Field(0, "[0, inf)", "more than 0: in place of warmup_epochs"),
    "optim.b1": Field(0.9, "[0, 1)", "AdamW: decay of the gradients' mean"),
    "optim.b2": Field(0.95, "[0, 1)", "AdamW: decay of the mean of their squares"),
    "optim.eps": Field(1e-8, "[0, inf)", "AdamW: added to the root of that mean"),
    "optim.layer_decay": Field(1.0, "(0, 1]", "of the rate, block by block downwards", TUNED),
    "optim.momentum": Field(0.9, "[0, 1)", "of LARS"),
    "optim.trust": Field(0.001, "(0, inf)", "coefficient of LARS"),
    "optim.weight_decay": Field(0.05, "[0, inf)", "of matrices; vectors have none"),
    "optim.clip_norm": Field(0.0, "[0, inf)", "largest norm of the gradient; 0: any"),
    "optim.accumulate": Free(1, "[1, inf)", "gradient accumulation: parts the batch is run in"),
    "optim.ema": Field(0.0, "[0, 1)", "decay of the weights' moving average; 0: none", AVERAGED),
    "mesh.data": Free(-1, "-1 or [1, inf)", "ways to split the batch; -1: what fsdp leaves"),
    "mesh.fsdp": Free(1, "-1 or [1, inf)", "ways to split batch and state; -1: a slice"),
    "mesh.overlap": Free(False, ANY, "TPU v5e, v6e: sums over devices beside other work"),
    # A folder or bucket. Empty: JAX_COMPILATION_CACHE_DIR, or mae_jax/compiled in ~/.cache.
    "compile.cache_dir": Free("", ANY, "where compiled programs are kept; none: nowhere"),
    "profile.start": Free(10, "[0, inf)", "steps before those that JAX's profiler traces"),
    "profile.steps": Free(0, "[0, inf)", "that it traces, to WORKDIR/profile; 0: none"),
    "checkpoint.every": Free(1000, "[1, inf)", "steps"),
    # Asked at log intervals, by the clock of the first process.
    "checkpoint.minutes": Free(15.0, "[0, inf)", "since the last; 0: only by steps"),
    "checkpoint.starts": Free(
        10, "[0, inf)", "that may fail before a newer checkpoint; 0: any number"
    ),
    "checkpoint.keep": Free(3, "[1, inf)", "of the newest"),
    "watchdog.minutes": Free(15.0, "[0, inf)", "without progress end the run; 0: never"),
    "eval.every": Free(5000, "[0, inf)", "steps; 0: only at the end"),
    "eval.batches": Free(0, "[0, inf)", "at most so many; 0: the whole split"),
    "eval.batch_size": Free(0, "[0, inf)", "0: that of training"),
    # A closed-form linear probe of the encoder while it pretrains, beside the same probe of an
    # untrained one. Empty texts take the field of `data`.
    "probe.every": Free(0, "[0, inf)", "steps; 0: no probe", MAE),
    "probe.name": Free("", ANY, "of labelled data", MAE),
    "probe.dir": Free("", ANY, "of labelled data", MAE),
    "probe.train_split": Free("", ANY, "of labelled data", MAE),
    "probe.eval_split": Free("", ANY, "of labelled data", MAE),
    "probe.train_examples": Free(10000, "[2, inf)", "at most", MAE),
    "probe.eval_examples": Free(5000, "[1, inf)", "at most", MAE),
    "probe.pool": Free("cls", tuple(POOLS), "of tokens after the final norm", MAE),
    "probe.neighbours": Free(0, "[0, inf)", "k of a k-nearest-neighbour score; 0: none", MAE),
    "pictures.every": Free(5000, "[0, inf)", "steps; 0: only at the end"),
    "pictures.count": Free(8, "[1, inf)", "images in the grid"),
}
# What may differ between the hosts of a run.
OF_A_HOST = ("data.dir", "data.workers", "data.threads", "data.prefetch", "probe.dir")
OF_A_HOST = (*OF_A_HOST, "compile.cache_dir")
FREE_FIELDS = tuple(name for name, field in FIELDS.items() if field.free)


def default_config() -> ConfigDict:
    """The paper's pretraining recipe for ViT-B, every field present. Other recipes change it."""
    defaults = {name: field.default for name, field in FIELDS.items()}
    return ConfigDict(unflatten_dict(defaults, sep=".")).lock()


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Nested fields as {"optim.base_lr": value}; tuples as lists, as JSON gives them back."""
    flat = flatten_dict(tree, sep=".")
    return {k: list(value) if isinstance(value, tuple) else value for k, value in flat.items()}


def from_json(saved: Mapping[str, Any]) -> ConfigDict:
    """The config of a run from what its record or config.json holds; fields that are younger than
    the run have their defaults. UserError: a field that this version does not know."""
    config = default_config()
    for name, value in flatten(saved).items():
        many = isinstance(_field(name).default, tuple)
        entries = value if isinstance(value, list) else [value]
        config.update_from_flattened_dict({name: tuple(entries) if many else value})
    return config


def differing_fields(saved: dict[str, Any], config: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Fields that forbid continuing from a checkpoint: {field: (saved, now)}."""
    saved, new = flatten(saved), flatten(config.to_dict())
    before = {  # there was a choice; any other field that was not saved had its default
        "model.residual_dtype": saved.get("compute_dtype"),
        "optim.reduce_dtype": saved.get("compute_dtype"),
        "data.resize": "fast",
    }
    old = flatten(default_config().to_dict()) | before | saved
    compared = sorted((old.keys() | new.keys()) - set(FREE_FIELDS))
    pairs = {field: (old.get(field), new.get(field)) for field in compared}
    return {field: (was, now) for field, (was, now) in pairs.items() if was != now}


# Recipes and overrides.


def load_recipe(path: str | pathlib.Path) -> Any:
    """The module of a config file. Such files are run by path, from any directory, not imported."""
    return types.SimpleNamespace(**runpy.run_path(str(path)))


def recipe_folder() -> pathlib.Path:
    """Where this project's recipes are: in the installed package, or beside it in a checkout."""
    package = pathlib.Path(mae_jax.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def load_config(recipe: str) -> ConfigDict:
    """The config of FILE or FILE:VARIANT; FILE is a path, or the name of a recipe in `configs/`."""
    name, _, variant = recipe.partition(":")
    shipped = recipe_folder()
    own = shipped / name.removeprefix("configs/")
    path = next((p for p in (pathlib.Path(name), own, own.with_suffix(".py")) if p.is_file()), None)
    if path is None:
        names = ", ".join(sorted(p.stem for p in shipped.glob("*.py")))
        raise UserError(f"--config={recipe}: no such file, and no recipe of that name ({names})")
    try:
        recipe_module = load_recipe(path)
        if not hasattr(recipe_module, "get_config"):
            raise UserError(f"--config={recipe}: {path} has no function get_config()")
        config = recipe_module.get_config(*[variant] * bool(variant))
    except UserError:
        raise
    except Exception as error:  # the user's own code: its line says what a traceback would
        frames, message = traceback.extract_tb(error.__traceback__), str(error)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        if isinstance(error, SyntaxError):
            lines, message = [error.lineno], error.msg
        place = f"{path}, line {lines[-1]}" if lines else path
        message = f"{type(error).__name__}: {textwrap.shorten(message, 160)}"
        raise UserError(f"--config={recipe}: {place}: {message}") from error
    if not isinstance(config, ConfigDict) or FIELDS.keys() - flatten(config.to_dict()).keys():
        raise UserError(f"--config={recipe}: get_config() has to return a changed default_config()")
    return config


def override(config: ConfigDict, name: str, text: str) -> None:
    """Gives a field the value that a command line spells as `text`."""
    default, value = _field(name).default, text
    with contextlib.suppress(ValueError):  # the check below refuses the text by its field's name
        if isinstance(default, bool):
            value = {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
        elif isinstance(default, tuple):
            parts = text.strip("()[]").rstrip(",").split(",")
            value = tuple(type(default[0])(part) for part in parts)
        else:
            value = type(default)(text)
    check_value(name, value)
    config.update_from_flattened_dict({name: value})


def _field(name: str) -> Field:
    if name not in FIELDS:
        likely = " or ".join(difflib.get_close_matches(name, FIELDS, 3, 0.5))
        hint = f"did you mean {likely}? " if likely else ""
        raise UserError(f"unknown config field {name}; {hint}Every field is in mae_jax/config.py")
    return FIELDS[name]


# Where a recipe's value does not go with a shorter run or a smaller batch, the one in its place
# follows from config and data alone, so that it is the same on resume.


def image_size(config: ConfigDict) -> tuple[int, int]:
    """`model.image_size` as (height, width)."""
    size = tuple(config.model.image_size)
    return size * 2 if len(size) == 1 else size


def classes_without_data(config: ConfigDict) -> int:
    """`head.classes`, or those of ImageNet or ADE20K: where no data are opened."""
    return config.head.classes or (150 if config.task in SEGMENT else 1000)


def steps_per_epoch(config: ConfigDict, examples: int) -> int:
    """Whole batches in the training split, at least one (312 for ImageNet at 4096)."""
    return max(1, examples // config.batch_size)


def total_steps(config: ConfigDict, examples: int) -> int:
    """Optimizer steps of the whole run."""
    return config.steps or max(1, round(config.epochs * steps_per_epoch(config, examples)))


def warmup_steps(config: ConfigDict, examples: int) -> int:
    """Optimizer steps of linear warm-up; a tenth of a run that would end before it does."""
    steps, total = _recipe_warmup(config, examples), total_steps(config, examples)
    return steps if steps < total else total // 10


def _recipe_warmup(config: ConfigDict, examples: int) -> int:
    optim = config.optim
    return optim.warmup_steps or round(optim.warmup_epochs * steps_per_epoch(config, examples))


def optimizer(config: ConfigDict) -> str:
    """`optim.name`, or the optimizer of the paper's recipe for the task."""
    return config.optim.name or ("lars" if config.task in PROBE else "adamw")


def norm_group(config: ConfigDict) -> int:
    """`head.norm_group`, or the largest number below it that divides the batch; all of it for 0."""
    return _largest_divisor(config.batch_size, config.head.norm_group or config.batch_size, 1)


def mix_group(config: ConfigDict) -> int:
    """`augment.mix_group`, or the largest even number below it that divides the batch."""
    return _largest_divisor(config.batch_size, config.augment.mix_group, 2)


def _largest_divisor(number: int, limit: int, step: int) -> int:
    """The largest divisor of `number` from `limit` down to 2 that `step` divides; 0 for none."""
    return next((n for n in range(limit // step * step, 1, -step) if number % n == 0), 0)


def adjustments(config: ConfigDict, examples: int) -> list[str]:
    """Where the run departs from the recipe because values depend on each other, for the log."""
    run, batch = f"{total_steps(config, examples)} steps", f"batch_size = {config.batch_size}"
    warmup = _recipe_warmup(config, examples), warmup_steps(config, examples)
    used = [("optim.warmup_steps", *warmup, f"a run of {run}")]
    if config.task in PROBE and config.head.norm_group:
        used.append(("head.norm_group", config.head.norm_group, norm_group(config), batch))
    if config.augment.mixup or config.augment.cutmix:
        used.append(("augment.mix_group", config.augment.mix_group, mix_group(config), batch))
    return [
        f"{name}: {now} in place of the recipe's {recipe}, to fit {what}"
        for name, recipe, now, what in used
        if now != recipe
    ]


def check_value(name: str, value: Any) -> None:
    """Raises UserError where a value is not of the field's type or not in its range."""
    default, allowed, doc, *_ = _field(name)
    many = isinstance(default, tuple)
    entries = list(value) if many and isinstance(value, (tuple, list)) else [value]
    kind = type(default[0] if many else default)
    kinds = (int, float) if kind is float else (kind,)  # no bool, which isinstance takes for an int
    fits = bool(entries) and all(type(entry) in kinds for entry in entries)
    remedy = {bool: "true or false", str: "a text", int: "an integer", float: "a number"}[kind]
    if isinstance(allowed, str):
        fits = fits and all(_in_range(entry, allowed) for entry in entries)
        remedy += f" in {allowed}" + ", or several with commas between" * many
    elif allowed:
        fits = fits and value in allowed
        remedy = f"one of {', '.join(choice or 'empty' for choice in allowed)}"
    if not fits:
        raise UserError(f"{name} = {value!r}: give {remedy} ({doc})")


def _in_range(value: float, ranges: str) -> bool:
    """Whether a number lies in "-1 or [1, inf)" or the like."""
    for text in ranges.split(" or "):
        low, _, high = text.strip("[(])").partition(", ")
        low, high = float(low), float(high or low)
        open_ends = [low] * text.startswith("(") + [high] * text.endswith(")")
        if low <= value <= high and value not in open_ends:
            return True
    return False
