"""Partial fine-tuning on ImageNet (paper section 4.3, figure 9): the last blocks only.

    python -m mae_jax.main --config=configs/partial.py:vit_l --workdir=DIR \\
        --config.init_from=PRETRAINED --config.data.dir=TFDS_DIR --config.trainable_blocks=4

`trainable_blocks`: how many of the last blocks are trained, with the norm and head that follow. 0.5
is the MLP of the last block, 0 the norm and head alone, -1 everything. The rest of the recipe is
`configs/finetune.py` (variants as there); the paper takes the best of 50, 100 and 200 epochs for
each number of blocks, fewer blocks wanting more (`--config.epochs=100`). Frozen blocks keep nothing
for the backward pass and have no optimizer state.

ViT-L, 800 epochs of pretraining (figure 9; 0 is linear probing, `configs/linear_probe.py`):

| blocks | 0 | 0.5 | 1 | 2 | 4 | 6 | 12 | 18 | 24 |
|---|---|---|---|---|---|---|---|---|---|
| top-1 | 73.5 | 79.1 | 81.0 | 83.1 | 84.2 | 84.4 | 84.6 | 84.7 | 84.9 |
"""

import pathlib

from ml_collections import ConfigDict

from mae_jax.config import load_recipe

_FINETUNE = load_recipe(pathlib.Path(__file__).with_name("finetune.py"))


def get_config(variant: str = "vit_l") -> ConfigDict:
    config = _FINETUNE.get_config(variant)
    config.trainable_blocks = 1.0
    return config
