"""The recipes of configs/transfer.py, and that they fit the data sets they name."""

import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mae_jax import UserError
from mae_jax import config as config_lib
from mae_jax.config_checks import validate
from mae_jax.tasks.inputs import open_splits

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


transfer, finetune = (
    config_lib.load_recipe(CONFIGS / f"{name}.py") for name in ("transfer", "finetune")
)
VARIANTS = [f"{name}_{model}" for name in transfer.SETS for model in transfer.MODELS]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_the_imagenet_recipe_on_other_data(variant):
    config = transfer.get_config(variant)
    with pytest.raises(UserError, match="init_from is empty"):
        validate(config)
    config.init_from = "pretrained"
    validate(config)
    name, _, model = variant.partition("_")
    config.init_from = ""
    imagenet = config_lib.flatten(finetune.get_config(model).to_dict())
    changed = {k for k, v in config_lib.flatten(config.to_dict()).items() if v != imagenet[k]}
    assert changed <= {"data.name", "data.eval_split", "head.classes", "eval.every"}
    epoch = config_lib.steps_per_epoch(config, transfer.SETS[name].train_examples)
    assert config.eval.every == epoch


def test_the_default_and_unknown_variants():
    assert transfer.get_config().data.name == "i_naturalist2018"
    for variant in ("inat2018", "vit_b", "inat2020_vit_b", "inat2018_vit_s", "inat2018_mmselfsup"):
        with pytest.raises(ValueError, match=r"choose one of inat2017.*as in inat2018_vit_b"):
            transfer.get_config(variant)


def test_tfds_has_the_sets_under_these_names_with_so_many_classes(tmp_path):
    for name, chosen in transfer.SETS.items():
        if chosen.data == "folder":
            continue
        assert tfds.builder_cls(chosen.data)  # raises where there is none
        if name == "inat2021":  # its class names are not in the package
            continue
        info = tfds.builder(chosen.data, data_dir=tmp_path, try_gcs=False).info
        assert info.features["label"].num_classes == chosen.classes
        assert info.supervised_keys[:2] == ("image", "label")
    for name in ("i_naturalist2019", "places205"):
        with pytest.raises(tfds.core.load.registered.DatasetNotFoundError):
            tfds.builder_cls(name)


def test_other_data_than_the_recipe_names_is_refused(tmp_path):
    config = transfer.get_config("inat2019_vit_b")
    config.init_from = "random"
    config.data.dir = str(tmp_path)
    for split in ("train", "validation"):
        for name in ("Birds", "Plants"):  # the archive's own folders, one level too high
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            np.save(folder / "0.npy", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"head\.classes = 1010, but folder has 2 classes"):
        open_splits(config)
