"""Which patches are hidden (paper table 1f).

    python launch/sweep.py configs/ablations/mask_kind.py --workdir=DIR \\
        --config.data.dir=TFDS_DIR

| mask | random 75 % | block 50 % | block 75 % | grid 75 % |
|---|---|---|---|---|
| fine-tuned | 84.9 | 83.9 | 82.8 | 84.0 |
| probed | 73.5 | 72.3 | 63.9 | 66.0 |
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

TITLE = "Mask sampling (paper table 1f)"
AXIS = "mask"
PAPER = {
    ("random", 75): (84.9, 73.5),
    ("block", 50): (83.9, 72.3),
    ("block", 75): (82.8, 63.9),
    ("grid", 75): (84.0, 66.0),
}


def members(base: ConfigDict) -> Iterator[dict[str, Any]]:
    for (kind, percent), (finetune, probe) in PAPER.items():
        yield {
            "name": f"{kind}{percent}",
            "pretrain": {"mask.kind": kind, "mask.ratio": percent / 100},
            "paper": {"finetune": finetune, "linear_probe": probe},
        }
