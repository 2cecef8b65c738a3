import pathlib
import re

import jax
import pytest
from ml_collections import ConfigDict

from mae_jax import UserError
from mae_jax import config as config_lib
from mae_jax.config import FIELDS, default_config
from mae_jax.config_checks import validate
from mae_jax.models.spec import ModelSpec

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


IMAGENET = 1_281_167  # training images
VARIANTS = {
    "quickstart.py": ("pretrain", "finetune", "scratch", "linear_probe"),
    "pretrain.py": ("vit_b", "vit_l", "vit_h", "mmselfsup", "simmim", "maskfeat"),
    "finetune.py": ("vit_b", "vit_l", "vit_h", "vit_h_448", "mmselfsup"),
    "partial.py": ("vit_b", "vit_l", "vit_h"),
    "scratch.py": ("vit_b", "vit_l", "vit_h"),
    "tokenizer.py": ("demo", "imagenet"),
    "linear_probe.py": ("vit_b", "vit_l", "vit_h", "mmselfsup"),
}


def load(name, *arguments) -> ConfigDict:
    config = config_lib.load_recipe(CONFIGS / name).get_config(*arguments)
    if config.task in ("finetune", "linear_probe"):
        config.init_from = "random"
    return config


def changed(**fields):
    config = default_config()
    for name, value in fields.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return config


def test_defaults_are_the_papers_recipe_in_steps():
    config = default_config()
    validate(config)
    # The released recipe (paper table 8): 312 steps an epoch, 249,600 in all, 12,480 of warm-up.
    assert config_lib.steps_per_epoch(config, 1_281_167) == 312
    assert config_lib.total_steps(config, 1_281_167) == 249_600
    assert config_lib.warmup_steps(config, 1_281_167) == 12_480
    assert config.optim.base_lr * config.batch_size / 256 == pytest.approx(2.4e-3)


@pytest.mark.parametrize(
    ("name", "variant"), [(name, v) for name, variants in VARIANTS.items() for v in variants]
)
def test_every_recipe_is_valid(name, variant):
    validate(load(name, variant))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_recipe_has_a_default_and_names_its_variants(name):
    validate(load(name))
    with pytest.raises(ValueError, match=VARIANTS[name][0]):
        load(name, "vit_xl")


def figures(config):
    """What a recipe comes to on ImageNet: steps of an epoch, in all, of warm-up, and peak rate."""
    return (
        config_lib.steps_per_epoch(config, IMAGENET),
        config_lib.total_steps(config, IMAGENET),
        config_lib.warmup_steps(config, IMAGENET),
        pytest.approx(config.optim.base_lr * config.batch_size / 256),
    )


def test_simmim_is_its_recipe():
    """Its code's simmim_pretrain__vit_base__img224__800ep, with 1e-4 scaled from a batch of 512."""
    config = load("pretrain.py", "simmim")
    assert figures(config) == (625, 500_000, 6250, 4e-4)
    spec = ModelSpec.from_config(config)
    masking = jax.eval_shape(
        spec.masking, jax.eval_shape(lambda: jax.random.split(jax.random.key(0)))
    )
    assert masking.ids_keep.shape == (2, (49 - 30) * 4)  # ceil(0.6 * 49) squares of 2 x 2 go
    assert (spec.loss, spec.target, spec.decoder_kind) == ("l1", "pixel", "linear")


@pytest.mark.parametrize(
    ("variant", "steps", "lr", "layer_decay", "drop_path", "group"),
    [
        ("vit_b", 125_100, 2e-3, 0.65, 0.1, 32),
        ("vit_l", 62_550, 4e-3, 0.75, 0.2, 32),
        ("vit_h", 62_550, 4e-3, 0.75, 0.3, 16),
    ],
)
def test_fine_tuning_is_the_recipe_of_the_released_weights(
    variant, steps, lr, layer_decay, drop_path, group
):
    """Paper table 9, with the values of the released weights."""
    config = load("finetune.py", variant)
    assert figures(config) == (1251, steps, 5 * 1251, lr)
    optim, augment = config.optim, config.augment
    assert (optim.layer_decay, config.model.drop_path) == (layer_decay, drop_path)
    assert (optim.b1, optim.b2, optim.eps) == (0.9, 0.999, 1e-8)
    assert (optim.weight_decay, optim.min_lr, optim.clip_norm) == (0.05, 1e-6, 0.0)
    assert (augment.mixup, augment.cutmix, augment.mix_group) == (0.8, 1.0, group)
    assert (augment.mix_probability, augment.mix_switch) == (1.0, 0.5)
    assert (augment.erasing, augment.smoothing) == (0.25, 0.1)
    assert augment.randaugment == "rand-m9-mstd0.5-inc1"
    assert tuple(config.data.scale) == (0.08, 1.0)
    assert (config.head.pool, config.head.init_std) == ("mean", 2e-5)


def test_partial_tuning_is_fine_tuning_of_some_blocks():
    whole, part = load("finetune.py", "vit_l"), load("partial.py", "vit_l")
    assert set(config_lib.differing_fields(whole.to_dict(), part)) == {"trainable_blocks"}


def test_linear_probing_is_the_recipe():
    """Paper table 10 and the released code."""
    config = load("linear_probe.py", "vit_b")
    assert figures(config) == (78, 7020, 780, 6.4)
    optim = config.optim
    assert (optim.momentum, optim.trust, optim.weight_decay) == (0.9, 0.001, 0.0)
    assert optim.min_lr == 0
    assert (config.head.pool, config.head.norm_group, config.head.init_std) == ("cls", 512, 0.01)
    assert (config.data.crop, tuple(config.data.scale)) == ("single_try", (0.08, 1.0))
    assert config.data.flip


@pytest.mark.parametrize(
    ("variant", "epochs", "drop_path"),
    [("vit_b", 300, 0.1), ("vit_l", 200, 0.2), ("vit_h", 200, 0.2)],
)
def test_training_from_scratch_is_the_recipe(variant, epochs, drop_path):
    """Paper table 11."""
    config = load("scratch.py", variant)
    assert figures(config) == (312, epochs * 312, 20 * 312, 1.6e-3)
    optim, augment = config.optim, config.augment
    assert (optim.b1, optim.b2, optim.weight_decay, optim.ema) == (0.9, 0.95, 0.3, 0.9999)
    assert (optim.layer_decay, config.model.drop_path) == (1.0, drop_path)
    assert (augment.mixup, augment.cutmix, augment.smoothing) == (0.8, 1.0, 0.1)
    assert (augment.randaugment, augment.erasing) == ("rand-m9-mstd0.5-inc1", 0.0)


def test_the_mmselfsup_setting():
    pretrain, finetune = load("pretrain.py", "mmselfsup"), load("finetune.py", "mmselfsup")
    assert (pretrain.model.variant, pretrain.batch_size, pretrain.epochs) == ("b", 8 * 512, 400)
    assert (finetune.model.variant, finetune.batch_size, finetune.epochs) == ("b", 8 * 128, 100)


@pytest.mark.parametrize(
    ("task", "field", "value"),
    [
        ("pretrain", "model.drop_path", 0.1),
        ("pretrain", "augment.mixup", 0.8),
        ("pretrain", "optim.layer_decay", 0.75),
        ("finetune", "mask.ratio", 0.5),
        ("scratch", "augment.color_jitter", 0.4),
        ("linear_probe", "data.repeat", 2),
        ("scratch", "trainable_blocks", 2.0),
        ("linear_probe", "augment.erasing", 0.25),
    ],
)
def test_a_field_that_a_task_would_ignore_is_refused(task, field, value):
    config = default_config()
    config.task = task
    config.init_from = "random" if task in ("finetune", "linear_probe") else ""
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=f"{field} = .*task {task} has no use for this field"):
        validate(config)


def test_repeated_crops_leave_a_runs_length_as_it_is():
    for repeat in (1, 2, 16):
        config = changed(data__repeat=repeat)
        assert config_lib.total_steps(config, 1_281_167) == 249_600


@pytest.mark.parametrize(
    ("task", "name", "field", "value"),
    [
        ("pretrain", "", "optim.trust", 0.1),
        ("pretrain", "lars", "optim.b1", 0.8),
        ("linear_probe", "", "optim.b2", 0.9),
        ("linear_probe", "adamw", "optim.momentum", 0.8),
    ],
)
def test_a_field_that_the_optimizer_would_ignore_is_refused(task, name, field, value):
    config = default_config()
    config.task, config.optim.name = task, name
    config.init_from = "random" if task == "linear_probe" else ""
    validate(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=f"{field} = .*the optimizer .* has no use for this field"):
        validate(config)


def test_recipes_of_the_paper_differ_in_model_only():
    for variant, letter, patch in (("vit_b", "b", 16), ("vit_l", "l", 16), ("vit_h", "h", 14)):
        config = load("pretrain.py", variant)
        assert (config.model.variant, config.model.patch_size) == (letter, patch)
        differing = config_lib.differing_fields(default_config().to_dict(), config)
        assert set(differing) <= {"model.variant", "model.patch_size"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__variant": "xl"}, "model.variant = 'xl': give one of ti, s, b, l, h"),
        ({"model__image_size": (100,)}, "height 100 is not divisible.* 96, 112"),
        ({"model__image_size": (96, 100)}, "width 100 is not divisible"),
        ({"model__image_size": (96, 96, 96)}, "one side or height,width"),
        ({"mask__ratio": 1.0}, "mask.ratio"),
        ({"mask__ratio": 0.999}, "keeps 0 of 196"),
        ({"mask__kind": "diagonal"}, "mask.kind"),
        ({"target": "tokens"}, "target = 'tokens': give one of pixel, norm_pixel"),
        ({"decoder__heads": 7}, "decoder.width = 512 is not divisible by heads = 7"),
        ({"model__width": 30, "model__heads": 3}, "multiple of 4"),
        ({"batch_size": 0}, "batch_size"),
        ({"optim__accumulate": 3}, "does not divide into optim.accumulate"),
        ({"optim__ema": 1.0}, "optim.ema"),
        ({"compute_dtype": "float16"}, "compute_dtype"),
        ({"model__channels": 1}, "data.mean has 3 value"),
        ({"data__repeat": 3}, "data.repeat = 3: batch_size = 4096 counts crops.*divisor"),
        ({"epochs": 0.0}, "steps or epochs"),
        ({"model__channels": 1, "augment__color_jitter": 0.4}, "color_jitter.*3 channels"),
        ({"mask__kind": "grid", "mask__ratio": 0.5}, "mask.ratio is 0.75, not 0.5"),
        ({"mask__kind": "grid", "model__image_size": (240,)}, "15 x 15 patches has an odd side"),
        ({"mask__kind": "block", "model__image_size": (64,)}, "4 x 4 patches has no room"),
        ({"mask__kind": "file"}, "mask.file = '': the kind file needs a file"),
        ({"mask__file": "m.npy"}, "mask.kind = 'random' and mask.file = 'm.npy'"),
        ({"mask__unit": 24}, "mask.unit = 24 is no multiple of model.patch_size = 16"),
        ({"mask__unit": 48}, "mask.unit: squares of 3 x 3 patches do not fill"),
        ({"mask__unit": 32, "mask__ratio": 0.985}, "keeps 0 of 49 squares"),
        (
            {"mask__unit": 32, "mask__kind": "file", "mask__file": "m.npy"},
            "mask.unit = 32: masks of a file say every patch",
        ),
        (
            {"loss": "l1", "target": "token", "tokenizer": "t"},
            "loss = 'l1': target token has its own; leave it l2",
        ),
        ({"decoder__kind": "linear"}, "give mask.encoder_tokens = true"),
        (
            {"decoder__kind": "linear", "mask__encoder_tokens": True, "decoder__depth": 1},
            "decoder.depth = 1: .* no use for this field; leave it 8",
        ),
        ({"mask__invalid": 0, "augment__color_jitter": 0.4}, "augment.color_jitter changes what"),
        ({"mask__invalid": 300}, "mask.invalid = 300: give an integer in -1 or"),
        ({"data__scale": (0.5,)}, r"data.scale = \(0.5,\): give two numbers, the lower first"),
        ({"data__ratio": (2.0, 1.0)}, "data.ratio"),
    ],
)
def test_impossible_values_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message):
        validate(changed(**fields))


def test_unknown_fields_are_refused():
    with pytest.raises(AttributeError, match="mask_ratio"):
        default_config().mask_ratio = 0.5
    config = default_config()
    with config.unlocked():
        config.model.deep = 3
    with pytest.raises(
        UserError, match=r"unknown config field model.deep; did you mean model.depth"
    ):
        validate(config)


def test_image_size_may_be_one_side_or_two():
    assert config_lib.image_size(changed(model__image_size=(96,))) == (96, 96)
    assert config_lib.image_size(changed(model__image_size=(96, 64))) == (96, 64)


def test_only_fields_that_change_results_forbid_continuing():
    saved = default_config().to_dict()
    config = changed(log_every=7, mesh__fsdp=4, data__workers=3, model__remat="full")
    assert config_lib.differing_fields(saved, config) == {}
    config = changed(seed=1, mask__ratio=0.5)
    assert config_lib.differing_fields(saved, config) == {
        "mask.ratio": (0.75, 0.5),
        "seed": (0, 1),
    }


def with_value(name, value):
    """A config that holds any value at all, as a recipe that unlocks it might."""
    tree = default_config().to_dict()
    *section, leaf = name.split(".")
    (tree[section[0]] if section else tree)[leaf] = value
    return ConfigDict(tree)


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_the_wrong_type_is_refused_by_the_name_of_its_field(name):
    text = isinstance(FIELDS[name].default, str)
    with pytest.raises(UserError, match=rf"^{name} = (3|'abc'): give ") as refusal:
        validate(with_value(name, 3 if text else "abc"))
    assert len(str(refusal.value).splitlines()) == 1
    if not text:
        with pytest.raises(UserError, match=rf"^{name} = 'abc': give "):
            config_lib.override(default_config(), name, "abc")


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.values])
def test_a_value_out_of_range_is_refused_by_the_name_of_its_field(name):
    default = FIELDS[name].default
    wrong = ["nonsense"] if isinstance(default, str) else [-7, float("nan"), float("inf")]
    for value in wrong[name == "data.mean" :]:  # means may be negative
        value = (value,) * len(default) if isinstance(default, tuple) else value
        with pytest.raises(UserError, match=rf"^{name} = "):
            validate(with_value(name, value))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "5", 5),
        ("epochs", "100", 100.0),
        ("optim.base_lr", "1e-3", 1e-3),
        ("data.flip", "False", False),
        ("data.flip", "1", True),
        ("data.train_split", "train[:50%]", "train[:50%]"),
        ("model.image_size", "32", (32,)),
        ("model.image_size", "(128, 64)", (128, 64)),
        ("data.scale", "0.08,1", (0.08, 1.0)),
        ("mesh.fsdp", "-1", -1),
        ("trainable_blocks", "0.5", 0.5),
        ("model.width", "0", 0),  # the variant's
    ],
)
def test_a_command_line_gives_values_of_the_fields_type(name, text, value):
    config = default_config()
    config_lib.override(config, name, text)
    found = config[name.split(".")[0]]
    found = found[name.split(".")[1]] if "." in name else found
    assert (found, type(found)) == (value, type(value))


def test_dependent_values_fit_a_shorter_run_and_a_smaller_batch():
    config = load("quickstart.py")
    assert config_lib.adjustments(config, 1000) == []
    assert config_lib.warmup_steps(config, 1000) == 40
    config.steps = 30
    assert config_lib.warmup_steps(config, 1000) == 3
    assert config_lib.adjustments(config, 1000) == [
        "optim.warmup_steps: 3 in place of the recipe's 40, to fit a run of 30 steps"
    ]
    config = load("finetune.py")
    config.epochs = 1.0
    assert config_lib.warmup_steps(config, IMAGENET) == 125  # of 1251


@pytest.mark.parametrize(
    ("batch", "norm_group", "mix_group"),
    [(1024, 512, 32), (256, 256, 32), (600, 300, 30), (24, 24, 24), (1026, 342, 18), (262, 262, 2)],
)
def test_groups_fit_the_batch(batch, norm_group, mix_group):
    probe, finetune = load("linear_probe.py"), load("finetune.py")
    for config in (probe, finetune):
        config.batch_size = batch
        validate(config)
    assert config_lib.norm_group(probe) == norm_group
    assert config_lib.mix_group(finetune) == mix_group
    told = [line.split(":")[0] for line in config_lib.adjustments(probe, IMAGENET)]
    assert told == ["head.norm_group"] * (norm_group != 512)
    told = [line.split(":")[0] for line in config_lib.adjustments(finetune, IMAGENET)]
    assert told == ["augment.mix_group"] * (mix_group != 32)


def test_what_no_group_fits_is_refused():
    probe, finetune = load("linear_probe.py"), load("finetune.py")
    probe.batch_size, finetune.batch_size = 1031, 1031  # a prime
    with pytest.raises(UserError, match=r"head.norm_group = 512: .* 0 takes the whole batch"):
        validate(probe)
    with pytest.raises(UserError, match="batch_size = 1031: mixup and cutmix need pairs"):
        validate(finetune)
    probe.head.norm_group = 0
    validate(probe)
    assert config_lib.norm_group(probe) == 1031


def test_docstrings_name_the_command_that_runs_them():
    for path in CONFIGS.glob("*.py"):
        assert re.search(rf"python -m mae_jax\.main --config=configs/{path.name}", path.read_text())
