import pathlib
import re

import pytest
from ml_collections import ConfigDict

from mae_jax import config as config_lib
from mae_jax.config import ConfigError, default_config, validate

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def load(name, *arguments) -> ConfigDict:
    namespace = {}
    exec((CONFIGS / name).read_text(), namespace)
    return namespace["get_config"](*arguments)


def changed(**fields):
    config = default_config()
    for name, value in fields.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return config


def test_defaults_are_the_papers_recipe_in_steps():
    config = default_config()
    validate(config)
    # Section 2.1 of the reference digest: 312 steps an epoch, 249,600 in all, 12,480 of warm-up.
    assert config_lib.steps_per_epoch(config, 1_281_167) == 312
    assert config_lib.total_steps(config, 1_281_167) == 249_600
    assert config_lib.warmup_steps(config, 1_281_167) == 12_480
    assert config.optim.base_lr * config.batch_size / 256 == pytest.approx(2.4e-3)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("quickstart.py", ()),
        ("pretrain.py", ("vit_b",)),
        ("pretrain.py", ("vit_l",)),
        ("pretrain.py", ("vit_h",)),
    ],
)
def test_every_recipe_is_valid(name, arguments):
    validate(load(name, *arguments))


def test_recipes_of_the_paper_differ_in_model_only():
    for variant, letter, patch in (("vit_b", "b", 16), ("vit_l", "l", 16), ("vit_h", "h", 14)):
        config = load("pretrain.py", variant)
        assert (config.model.variant, config.model.patch_size) == (letter, patch)
        differing = config_lib.differing_fields(default_config().to_dict(), config)
        assert set(differing) <= {"model.variant", "model.patch_size"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__variant": "xl"}, "model.variant = 'xl': choose one of ti, s, b, l, h"),
        ({"model__image_size": (100,)}, "height 100 is not divisible.* 96, 112"),
        ({"model__image_size": (96, 100)}, "width 100 is not divisible"),
        ({"model__image_size": (96, 96, 96)}, "one side or height,width"),
        ({"mask__ratio": 1.0}, "mask.ratio"),
        ({"mask__ratio": 0.999}, "keeps 0 of 196"),
        ({"mask__kind": "diagonal"}, "mask.kind"),
        ({"target": "tokens"}, "target = 'tokens': choose one of pixel, norm_pixel"),
        ({"decoder__heads": 7}, "decoder.width = 512 is not divisible by heads = 7"),
        ({"model__width": 30, "model__heads": 3}, "multiple of 4"),
        ({"batch_size": 0}, "batch_size"),
        ({"optim__accumulate": 3}, "does not divide into optim.accumulate"),
        ({"optim__ema": 1.0}, "optim.ema"),
        ({"compute_dtype": "float16"}, "compute_dtype"),
        ({"model__channels": 1}, "data.mean has 3 value"),
        ({"epochs": 0.0}, "steps or epochs"),
    ],
)
def test_impossible_values_are_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        validate(changed(**fields))


def test_unknown_fields_are_refused():
    with pytest.raises(AttributeError, match="mask_ratio"):
        default_config().mask_ratio = 0.5
    config = default_config()
    with config.unlocked():
        config.model.deep = 3
    with pytest.raises(ConfigError, match=r"unknown config field\(s\) model.deep"):
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


def test_every_free_field_exists():
    assert set(config_lib.FREE_FIELDS) <= set(config_lib.flatten(default_config().to_dict()))


def test_docstrings_name_the_command_that_runs_them():
    for path in CONFIGS.glob("*.py"):
        assert re.search(rf"python -m mae_jax\.main --config=configs/{path.name}", path.read_text())
