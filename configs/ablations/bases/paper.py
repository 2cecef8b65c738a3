"""The paper's baseline of table 1: ViT-L, raw pixels, 800 epochs; 84.9 fine-tuned, 73.5 probed.

Follow-ups as in its tables 9 and 10, for the raw-pixel baseline: drop path 0.1, and 90 epochs of
probing, where `configs/finetune.py` and `linear_probe.py` have the released weights' values.
Pretraining takes 15.4 hours on 128 TPU v3 cores (table 2).
"""

BASE = {
    "pretrain": ("configs/pretrain.py:vit_l", {"target": "pixel", "epochs": 800.0}),
    "finetune": ("configs/finetune.py:vit_l", {"model.drop_path": 0.1}),
    "linear_probe": ("configs/linear_probe.py:vit_l", {"epochs": 90.0}),
}
