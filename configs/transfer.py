"""Fine-tuning on iNaturalist and Places (paper section 5, table 6).

    python -m mae_jax.main --config=configs/transfer.py:inat2018_vit_b --workdir=DIR \\
        --config.init_from=PRETRAINED --config.data.dir=DATA

Variants are SET_MODEL, with `vit_b`, `vit_l`, `vit_h` and `vit_h_448` of `configs/finetune.py`.
Top-1 reported for the released weights (1600 epochs of pretraining on ImageNet):

| set | classes | images: training / validation | B | L | H | H, 448 px | DATA |
|---|---|---|---|---|---|---|---|
| `inat2017` | 5,089 | 579,184 / 95,986 | 70.5 | 75.7 | 79.3 | 83.4 | TFDS `i_naturalist2017` |
| `inat2018` | 8,142 | 437,513 / 24,426 | 75.4 | 80.1 | 83.0 | 86.8 | TFDS `i_naturalist2018` |
| `inat2019` | 1,010 | 265,213 / 3,030 | 80.5 | 83.4 | 85.7 | 88.3 | a folder |
| `inat2021` | 10,000 | 2,686,843 / 100,000 | - | - | - | - | TFDS `i_naturalist2021` |
| `places205` | 205 | 2,448,873 / 20,500 | 63.9 | 65.8 | 65.9 | 66.8 | a folder |
| `places365` | 365 | 1,803,460 / 36,500 | 57.9 | 59.4 | 59.8 | 60.3 | TFDS `places365_small` |

The paper tuned learning rate and epochs for each set; the values were never published. Everything
here is the ImageNet recipe of `configs/finetune.py`, a starting point: search `optim.base_lr` and
`epochs`, the small sets wanting more epochs (DeiT trained 360 on iNaturalist). `places365_small`
has images of 256 px; which size the paper took is not said.

For a TFDS set DATA is the folder given to `tfds build --data_dir`. TFDS has no iNaturalist 2019 and
no Places205: there DATA is a folder of pictures (links will do), DATA/train/CLASS/*.jpg and
DATA/validation/CLASS/*.jpg, divided as train2019.json and val2019.json, or train_places205.csv and
val_places205.csv, of the original archives say. The package of TFDS 4.9.10 lacks the class names
that building `i_naturalist2021` needs; the archives of that set are such folders already
(`--config.data.name=folder --config.data.eval_split=validation`).

Work as in `configs/finetune.py` for each image and epoch.
"""

import pathlib
from typing import NamedTuple

from ml_collections import ConfigDict

from mae_jax import UserError
from mae_jax.config import load_recipe

_FINETUNE = load_recipe(pathlib.Path(__file__).with_name("finetune.py"))


class Set(NamedTuple):
    data: str
    eval_split: str
    classes: int
    train_examples: int


SETS = {
    "inat2017": Set("i_naturalist2017", "validation", 5_089, 579_184),
    "inat2018": Set("i_naturalist2018", "validation", 8_142, 437_513),
    "inat2019": Set("folder", "validation", 1_010, 265_213),
    "inat2021": Set("i_naturalist2021", "val", 10_000, 2_686_843),
    "places205": Set("folder", "validation", 205, 2_448_873),
    "places365": Set("places365_small", "validation", 365, 1_803_460),
}
MODELS = ("vit_b", "vit_l", "vit_h", "vit_h_448")


def get_config(variant: str = "inat2018_vit_b") -> ConfigDict:
    name, _, model = variant.partition("_")
    if name not in SETS or model not in MODELS:
        raise UserError(
            f"--config=configs/transfer.py:{variant}: choose one of {', '.join(SETS)}, then one of "
            f"{', '.join(MODELS)}, as in inat2018_vit_b"
        )
    config = _FINETUNE.get_config(model)
    chosen = SETS[name]
    config.data.name = chosen.data
    config.data.eval_split = chosen.eval_split
    config.head.classes = chosen.classes  # so that other data is refused
    config.eval.every = chosen.train_examples // config.batch_size  # an epoch
    return config
