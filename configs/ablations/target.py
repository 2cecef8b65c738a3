"""What the decoder predicts (paper table 1d), and HOG, which the paper did not try (MaskFeat).

    python launch/sweep.py configs/ablations/target.py --workdir=DIR \\
        --config.data.dir=TFDS_DIR --config.tokenizer=TOKENIZER

`tokenizer` is for the member `token` alone; without one that member is refused, and the others run.

| target | pixel | norm_pixel | pca | token | hog |
|---|---|---|---|---|---|
| fine-tuned | 84.9 | 85.4 | 84.6 | 85.3 | - |
| probed | 73.5 | 73.9 | 72.3 | 71.6 | - |
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

TITLE = "Reconstruction target (paper table 1d)"
AXIS = "target"
PAPER = {
    "pixel": (84.9, 73.5),
    "norm_pixel": (85.4, 73.9),
    "pca": (84.6, 72.3),
    "token": (85.3, 71.6),
    "hog": (None, None),
}


def members(base: ConfigDict) -> Iterator[dict[str, Any]]:
    for target, (finetune, probe) in PAPER.items():
        yield {
            "name": target,
            "pretrain": {"target": target},
            "paper": {"finetune": finetune, "linear_probe": probe},
        }
