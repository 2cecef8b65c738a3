"""A dVAE whose codes can be a pretraining target (`target=token`), trained here.

    python -m mae_jax.main --config=configs/tokenizer.py --workdir=runs/tokenizer
    python -m mae_jax.main --config=configs/quickstart.py --workdir=runs/token \\
        --config.target=token --config.tokenizer=runs/tokenizer

`demo`, the default, is a toy on photographs that ship with scikit-image and scikit-learn.
`imagenet` has DALL-E's 8,192 codes at a quarter of its width; nobody has run it yet. DALL-E's own
encoder is a file that `tokenizer=` reads: `pytorch_model.bin` of facebook/flava-image-codebook.

Evaluation tells the squared error of pixels in [0, 1], how many codes the split uses, and the
perplexity of their shares; pictures beside what their codes give lie in `reconstructions/`.
"""

from ml_collections import ConfigDict

from mae_jax import UserError
from mae_jax.config import default_config


def get_config(variant: str = "demo") -> ConfigDict:
    if variant not in ("demo", "imagenet"):
        raise UserError(f"--config=configs/tokenizer.py:{variant}: choose demo or imagenet")
    config = default_config()
    config.task = "tokenizer"
    config.compute_dtype = "float32"
    config.optim.weight_decay = 0.0
    if variant == "demo":
        config.data.name = "demo"
        config.model.image_size = (32,)
        config.batch_size = 64
        config.steps = 400
        config.log_every = 20
        config.dvae.codes, config.dvae.width, config.dvae.blocks = 256, 16, 1
        config.dvae.kl = 5e-4  # so that a run this short uses many of its codes
        config.optim.base_lr = 1.2e-2
        config.optim.warmup_steps = 40
        config.checkpoint.every = 100
        config.eval.every = config.pictures.every = 200
    else:
        config.model.image_size = (112,)
        config.batch_size = 512
        config.epochs = 20.0
        config.dvae.width = 64
        config.optim.base_lr = 1.5e-4
        config.optim.warmup_epochs = 1.0
    return config
