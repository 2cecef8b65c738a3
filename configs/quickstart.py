"""See it work: a small MAE on photographs that ship with scikit-image and scikit-learn.

    python -m mae_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

About three minutes on two CPU cores, no download. The data is a toy: a handful of photographs, cut
at random; the encoder it leaves is not worth using. What it shows is the whole path: loss falling
well below 1 (what predicting every patch by its mean scores), pictures filling in
`runs/quickstart/reconstructions/`, checkpoints, and an encoder in `runs/quickstart/export/`.

What the encoder is worth, in a minute or two each, by the same protocols as the real recipes; the
labels tell which photograph a cut is from:

    python -m mae_jax.main --config=configs/quickstart.py:finetune --workdir=runs/finetune \\
        --config.init_from=runs/quickstart
    python -m mae_jax.main --config=configs/quickstart.py:scratch --workdir=runs/scratch
    python -m mae_jax.main --config=configs/quickstart.py:linear_probe --workdir=runs/probe \\
        --config.init_from=runs/quickstart
    python -m mae_jax.results runs/finetune runs/scratch runs/probe
"""

from ml_collections import ConfigDict

from mae_jax import UserError
from mae_jax.config import default_config


def get_config(task: str = "pretrain") -> ConfigDict:
    config = default_config()
    config.task = task
    config.log_every = 20
    config.compute_dtype = "float32"
    config.model.variant = "ti"
    config.model.depth = 4
    config.model.patch_size = 8
    config.model.image_size = (64,)
    config.data.name = "demo"
    config.batch_size = 64
    if task == "pretrain":
        config.steps = 400
        config.decoder.depth = 2
        config.decoder.width = 128
        config.decoder.heads = 4
        config.optim.base_lr = 6e-3
        config.optim.warmup_steps = 40
        config.checkpoint.every = 100
        config.eval.every = 200
        config.pictures.every = 200
    elif task in ("finetune", "scratch"):
        config.steps = 100
        config.optim.base_lr = 4e-3
        config.optim.warmup_steps = 20
        config.optim.b2 = 0.999
        config.augment.randaugment = "rand-m9-mstd0.5-inc1"
        config.augment.mixup = 0.8
        config.augment.cutmix = 1.0
        config.augment.smoothing = 0.1
        if task == "finetune":
            config.optim.layer_decay = 0.75
            config.augment.erasing = 0.25
    elif task == "linear_probe":
        config.batch_size = 256
        config.steps = 300
        config.head.pool = "cls"
        config.head.init_std = 0.01
        config.head.norm_group = 0
        config.optim.base_lr = 3.0
        config.optim.weight_decay = 0.0
        config.optim.warmup_steps = 30
        config.data.crop = "centre"  # with flips off: features are computed once
        config.data.flip = False
    else:
        raise UserError(
            f"--config=configs/quickstart.py:{task}: choose pretrain, finetune, scratch or "
            "linear_probe"
        )
    return config
