"""The paper's pretraining recipe (table 8): ImageNet, 800 epochs, batch 4096, 75 % masked.

    python -m mae_jax.main --config=configs/pretrain.py:vit_b --workdir=DIR \\
        --config.data.dir=TFDS_DIR

Variants: `vit_b` (B/16), `vit_l` (L/16), `vit_h` (H/14), the latter two with parameters and
optimizer split over the devices of a slice, faster and smaller by plan (docs/plan.md), and
`mmselfsup`: ViT-B for 400 epochs of batch 8 x 512, which that project reports at 83.3 fine-tuned
and 62.5 probed (`configs/finetune.py:mmselfsup`, `configs/linear_probe.py:mmselfsup`).

Two other methods in this trainer's terms. Their encoder sees whole images, mask tokens in place of
the removed patches, and one linear layer predicts; the work is 1.8 times that of `vit_b`.
`simmim` (arXiv 2111.09886; 83.8 fine-tuned, of its code's ViT-B): pixels by absolute error, 60 %
hidden in squares of 32 pixels. Not as there: positions are absolute, added to the patches (there
relative, in every attention); the rate falls as a cosine (there to a tenth, at epoch 700);
no paths are dropped (there 0.1).
`maskfeat` (arXiv 2112.09133; 83.4 fine-tuned, of mmpretrain's 300 epochs): histograms of gradients,
40 % hidden in BEiT's blocks, filled up here with random patches to one number in every image.

The target of the others is the paper's best, normalised pixels; `--config.target=pixel` is the
ablation baseline and `--config.epochs=1600` the published weights' length.

Expect a first loss of 1.80 (B, L) or 1.93 (H), about 0.95 after one epoch, 0.42 at the end of a
ViT-B run. Work for 800 epochs: B 59, L 125, H 291 GFLOP an image and step; at 45 % of peak that is
189, 400 and 936 chip-hours of TPU v5e. Fine-tuned top-1 reported for this length: B 83.3, L 85.5;
1600 epochs: B 83.6, L 85.9, H 86.9.
"""

from ml_collections import ConfigDict

from mae_jax import UserError
from mae_jax.config import default_config


def get_config(variant: str = "vit_b") -> ConfigDict:
    if variant not in ("vit_b", "vit_l", "vit_h", "mmselfsup", "simmim", "maskfeat"):
        raise UserError(
            f"--config=configs/pretrain.py:{variant}: choose vit_b, vit_l, vit_h, mmselfsup, "
            "simmim or maskfeat"
        )
    config = default_config()
    if variant.startswith("vit_"):
        config.model.variant = variant.removeprefix("vit_")
    if variant in ("simmim", "maskfeat"):
        config.mask.encoder_tokens, config.decoder.kind = True, "linear"
        config.batch_size, config.optim.b2 = 2048, 0.999
    if variant == "simmim":
        config.target, config.loss = "pixel", "l1"
        config.mask.unit, config.mask.ratio = 32, 0.6
        config.data.scale = (0.67, 1.0)
        config.optim.base_lr = 1e-4 * 256 / 512  # they scale from 512
        config.optim.warmup_epochs, config.optim.clip_norm = 10.0, 5.0
    if variant == "maskfeat":
        config.epochs, config.target = 300.0, "hog"
        config.mask.kind, config.mask.ratio = "block", 0.4
        config.data.scale = (0.5, 1.0)
        config.optim.base_lr = 2e-4
        config.optim.warmup_epochs, config.optim.clip_norm = 30.0, 0.02
    if variant == "mmselfsup":
        config.epochs = 400.0
    if variant == "vit_h":
        config.model.patch_size = 14
    if variant in ("vit_l", "vit_h"):
        config.mesh.fsdp = -1
    return config
