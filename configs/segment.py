"""Semantic segmentation by UperNet (paper table 5): what the encoder knows of pixels.

    python -m mae_jax.main --config=configs/segment.py:ade20k_vit_b --workdir=DIR \\
        --config.init_from=PRETRAINED --config.data.dir=ADEChallengeData2016

PRETRAINED as for `configs/finetune.py`. The data are two folders below `data.dir`, of images and of
label maps (`mae_jax/data/segmentation_folder.py` says which names and layouts are read), here those
of ADEChallengeData2016.zip. `--config.data.name` may be a TFDS set with label maps instead.

| variant | iterations | batch | lr | layer decay | drop path | mIoU, MAE 1600 epochs / supervised |
|---|---|---|---|---|---|---|
| `ade20k_vit_b` | 160,000 | 16 | 1e-4 | 0.65 | 0.1 | 48.1 / 47.4 |
| `ade20k_vit_l` | 160,000 | 16 | 1e-4 | 0.65 | 0.2 | 53.6 / 49.9 |

The recipe of B is that of mmsegmentation, whose authors reproduced the paper's; none was published
for L, which takes B's with BEiT's drop path. Evaluation slides windows of 512 over pictures whose
short side is 512, 341 pixels at a time (`segment.stride`; mmsegmentation's MAE has 256). Nobody has
run either variant here to the end yet. Planned for 16 chips of TPU v5e (`mae-jax plan`): B takes 42
to 55 ms a step, 3.6 GiB a chip, two and a half hours.

`quick` is a small encoder on small pictures, for two CPU cores, to see it work on one's own data:

    python -m mae_jax.main --config=configs/segment.py:quick --workdir=DIR \\
        --config.init_from=PRETRAINED --config.data.dir=DATA

with PRETRAINED of the same sizes (`configs/quickstart.py`, its image size aside).
"""

from ml_collections import ConfigDict

from mae_jax import UserError
from mae_jax.config import default_config

DROP_PATH = {"ade20k_vit_b": 0.1, "ade20k_vit_l": 0.2}


def get_config(variant: str = "ade20k_vit_b") -> ConfigDict:
    if variant not in ("quick", *DROP_PATH):
        known = ", ".join(("quick", *DROP_PATH))
        raise UserError(f"--config=configs/segment.py:{variant}: choose one of {known}")
    config = default_config()
    config.task = "segment"
    config.data.name = "segmentation_folder"
    config.batch_size = 16
    config.optim.schedule = "linear"
    config.optim.b2 = 0.999
    config.optim.layer_decay = 0.65
    if variant == "quick":
        config.log_every = 20
        config.compute_dtype = "float32"
        config.model.variant = "ti"
        config.model.depth = 4
        config.model.patch_size = 8
        config.model.image_size = (128,)
        config.segment.width = 64
        config.steps = 400
        config.optim.base_lr = 1e-3 * 256 / 16
        config.optim.layer_decay = 0.75
        config.optim.warmup_steps = 40
        config.checkpoint.every = 100
        config.eval.every = config.pictures.every = 200
        return config
    config.model.variant = variant[-1]
    config.model.image_size = (512,)
    config.model.drop_path = DROP_PATH[variant]
    config.steps = 160_000
    config.optim.base_lr = 1e-4 * 256 / 16  # the rate of a batch of 16
    config.optim.warmup_steps = 1500
    config.checkpoint.every = 2000
    config.eval.every = config.pictures.every = 16_000
    return config
