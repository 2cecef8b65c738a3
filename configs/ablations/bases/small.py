"""For two CPU cores: a ViT of four blocks of width 96 on Imagenette at 48 pixels, 6 epochs.

    python launch/sweep.py configs/ablations/mask_ratio.py --base=small --workdir=runs/small \\
        --config.data.dir=TFDS_DIR

`imagenette96`: all of Imagenette (10 classes, 9,469 + 3,925 pictures) at 96 pixels; another TFDS
data set by `--config.data.name`, its validation split by `--config.data.eval_split`, a longer
pretraining by `--config.epochs`. Follow-ups have 3,000 labels
(`--finetune.data.train_split=train --linear_probe.data.train_split=train` for all).
"""

_MODEL = {
    "compute_dtype": "float32",
    "model.variant": "ti",
    "model.width": 96,
    "model.depth": 4,
    "model.heads": 3,
    "model.patch_size": 8,
    "model.image_size": (48,),
    "data.name": "imagenette96",
    "data.resize": "fast",
    "pictures.every": 0,
    "eval.every": 0,
    "log_every": 20,
}

BASE = {
    "pretrain": (
        "configs/pretrain.py:vit_b",
        {
            **_MODEL,
            "target": "pixel",
            "batch_size": 64,
            "epochs": 6.0,
            "decoder.width": 64,
            "decoder.depth": 2,
            "decoder.heads": 4,
            "optim.base_lr": 3e-3,
            "optim.warmup_epochs": 1.0,
        },
    ),
    "finetune": (
        "configs/finetune.py:vit_b",
        {
            **_MODEL,
            "data.train_split": "train[:3000]",
            "batch_size": 64,
            "epochs": 5.0,
            "model.drop_path": 0.0,
            "optim.base_lr": 4e-3,
            "optim.warmup_epochs": 1.0,
            "optim.layer_decay": 0.75,
            "augment.erasing": 0.0,
            "augment.mixup": 0.0,
            "augment.cutmix": 0.0,
            "augment.randaugment": "",
        },
    ),
    # The centre without flips: features are computed once.
    "linear_probe": (
        "configs/linear_probe.py:vit_b",
        {
            **_MODEL,
            "data.train_split": "train[:3000]",
            "batch_size": 500,
            "eval.batch_size": 500,
            "epochs": 90.0,
            "head.norm_group": 0,
            "optim.base_lr": 0.5,
            "optim.warmup_epochs": 10.0,
            "data.crop": "centre",
            "data.flip": False,
        },
    ),
}
