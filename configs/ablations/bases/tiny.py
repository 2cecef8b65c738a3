"""Seconds a run, on the embedded data: to see sweeps work, and for tests. Its numbers mean nothing.

python launch/sweep.py configs/ablations/mask_ratio.py --base=tiny --workdir=runs/tiny
"""

_MODEL = {
    "compute_dtype": "float32",
    "model.width": 32,
    "model.depth": 2,
    "model.heads": 2,
    "model.image_size": (48,),  # 6 x 6 patches: room for blocks of 16
    "data.threads": 1,
    "checkpoint.every": 8,
    "eval.every": 0,
    "pictures.every": 0,
    "pictures.count": 2,
    "log_every": 4,
}
_CLASSIFIER = {**_MODEL, "batch_size": 32, "steps": 8, "optim.warmup_steps": 2}

BASE = {
    "pretrain": (
        "configs/quickstart.py",
        {
            **_MODEL,
            "target": "pixel",
            "batch_size": 16,
            "steps": 24,
            "decoder.width": 16,
            "decoder.depth": 1,
            "decoder.heads": 2,
            "optim.warmup_steps": 2,
            "eval.batches": 1,
        },
    ),
    "finetune": ("configs/quickstart.py:finetune", _CLASSIFIER),
    "linear_probe": ("configs/quickstart.py:linear_probe", _CLASSIFIER),
}
