"""Supervised training from scratch on ImageNet (paper table 11): the baseline of every table.

    python -m mae_jax.main --config=configs/scratch.py:vit_b --workdir=DIR \\
        --config.data.dir=TFDS_DIR

Batch 4096, AdamW (0.9, 0.95) with weight decay 0.3, the augmentations of fine-tuning but random
erasing, and a moving average of the weights, which is what is evaluated and exported.

| variant | epochs | drop path | top-1 with / without the average |
|---|---|---|---|
| `vit_b` (B/16) | 300 | 0.1 | 82.3 / 82.1 |
| `vit_l` (L/16) | 200 | 0.2 | 82.6 / 81.5 |
| `vit_h` (H/14) | 200 | 0.2 | 83.1 / 80.9 |

Work as in `configs/finetune.py`: 126, 295 and 804 chip-hours of TPU v5e at 45 % of peak.
"""

from ml_collections import ConfigDict

from mae_jax import UserError
from mae_jax.config import default_config


def get_config(variant: str = "vit_b") -> ConfigDict:
    if variant not in ("vit_b", "vit_l", "vit_h"):
        raise UserError(f"--config=configs/scratch.py:{variant}: choose vit_b, vit_l or vit_h")
    config = default_config()
    config.task = "scratch"
    config.model.variant = variant.removeprefix("vit_")
    config.batch_size = 4096
    config.epochs = 300.0 if variant == "vit_b" else 200.0
    config.optim.base_lr = 1e-4
    config.optim.warmup_epochs = 20.0
    config.optim.weight_decay = 0.3
    config.optim.ema = 0.9999
    config.model.drop_path = 0.1 if variant == "vit_b" else 0.2
    config.data.scale = (0.08, 1.0)
    config.augment.randaugment = "rand-m9-mstd0.5-inc1"
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
    config.augment.smoothing = 0.1
    if variant == "vit_h":
        config.model.patch_size = 14
        config.mesh.fsdp = -1
        config.model.remat = "dots"
    config.eval.every = 3120
    return config
