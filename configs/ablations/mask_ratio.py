"""How much is hidden (paper figure 5).

    python launch/sweep.py configs/ablations/mask_ratio.py --workdir=DIR \\
        --config.data.dir=TFDS_DIR

| masked, % | 10 | 20 | 30 | 40 | 50 | 60 | 70 | 75 | 80 | 90 |
|---|---|---|---|---|---|---|---|---|---|---|
| fine-tuned | 83.2 | 83.4 | 83.4 | 84.7 | 84.9 | 85.0 | 84.9 | 84.9 | 84.5 | 83.0 |
| probed | 54.6 | 58.9 | 61.7 | 67.0 | 69.9 | 71.8 | 73.2 | 73.5 | 71.8 | 66.1 |
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

TITLE = "Mask ratio (paper figure 5)"
AXIS = "masked, %"
PAPER = {
    **{10: (83.2, 54.6), 20: (83.4, 58.9), 30: (83.4, 61.7), 40: (84.7, 67.0), 50: (84.9, 69.9)},
    **{60: (85.0, 71.8), 70: (84.9, 73.2), 75: (84.9, 73.5), 80: (84.5, 71.8), 90: (83.0, 66.1)},
}


def members(base: ConfigDict) -> Iterator[dict[str, Any]]:
    for percent, (finetune, probe) in PAPER.items():
        yield {
            "name": str(percent),
            "x": percent,
            "pretrain": {"mask.ratio": percent / 100},
            "paper": {"finetune": finetune, "linear_probe": probe},
        }
