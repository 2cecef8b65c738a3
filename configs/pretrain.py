"""The paper's pretraining recipe (table 8): ImageNet, 800 epochs, batch 4096, 75 % masked.

    python -m mae_jax.main --config=configs/pretrain.py:vit_b --workdir=DIR \\
        --config.data.dir=TFDS_DIR

Variants: `vit_b` (B/16), `vit_l` (L/16), `vit_h` (H/14, state split over the mesh's fsdp axis), and
`mmselfsup`: ViT-B for 400 epochs of batch 8 x 512, which that project reports at 83.3 fine-tuned
and 62.5 probed (`configs/finetune.py:mmselfsup`, `configs/linear_probe.py:mmselfsup`).
The target is the paper's best, normalised pixels; `--config.target=pixel` is the ablation baseline
and `--config.epochs=1600` the published weights' length.

Expect a first loss of 1.80 (B, L) or 1.93 (H), about 0.95 after one epoch, 0.42 at the end of a
ViT-B run. Work for 800 epochs: B 59, L 125, H 291 GFLOP an image and step; at 45 % of peak that is
189, 400 and 936 chip-hours of TPU v5e. Fine-tuned top-1 reported for this length: B 83.3, L 85.5;
1600 epochs: B 83.6, L 85.9, H 86.9.
"""

from ml_collections import ConfigDict

from mae_jax import UserError
from mae_jax.config import default_config


def get_config(variant: str = "vit_b") -> ConfigDict:
    if variant not in ("vit_b", "vit_l", "vit_h", "mmselfsup"):
        raise UserError(
            f"--config=configs/pretrain.py:{variant}: choose vit_b, vit_l, vit_h or mmselfsup"
        )
    config = default_config()
    config.model.variant = "b" if variant == "mmselfsup" else variant.removeprefix("vit_")
    if variant == "mmselfsup":
        config.epochs = 400.0
    if variant == "vit_h":
        config.model.patch_size = 14
        config.mesh.fsdp = -1
    return config
