"""See it work: a small MAE on photographs that ship with scikit-image and scikit-learn.

    python -m mae_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

About three minutes on two CPU cores, no download. The data is a toy: a handful of photographs, cut
at random; the encoder it leaves is not worth using. What it shows is the whole path: loss falling
well below 1 (what predicting every patch by its mean scores), pictures filling in
`runs/quickstart/reconstructions/`, checkpoints, and an encoder in `runs/quickstart/export/`.
"""

from ml_collections import ConfigDict

from mae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.batch_size = 64
    config.steps = 400
    config.log_every = 20
    config.compute_dtype = "float32"
    config.model.variant = "ti"
    config.model.depth = 4
    config.model.patch_size = 8
    config.model.image_size = (64,)
    config.decoder.depth = 2
    config.decoder.width = 128
    config.decoder.heads = 4
    config.data.name = "demo"
    config.optim.base_lr = 6e-3
    config.optim.warmup_steps = 40
    config.checkpoint.every = 100
    config.eval.every = 200
    config.pictures.every = 200
    return config
