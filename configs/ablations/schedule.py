"""How long pretraining lasts (paper figure 7), as multiples of the base's length, the paper's 800
epochs. Each member is a whole schedule of its own.

    python launch/sweep.py configs/ablations/schedule.py --workdir=DIR \\
        --config.data.dir=TFDS_DIR

| epochs | 100 | 200 | 400 | 800 | 1600 |
|---|---|---|---|---|---|
| fine-tuned | 82.3 | 83.3 | 84.3 | 84.9 | 85.1 |
| probed | 57.3 | 64.4 | 69.7 | 73.5 | 75.1 |
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

TITLE = "Schedule length (paper figure 7)"
AXIS = "epochs"
SCALE = "log"
BASELINE = 800
PAPER = {100: (82.3, 57.3), 200: (83.3, 64.4), 400: (84.3, 69.7), 800: (84.9, 73.5)}
PAPER |= {1600: (85.1, 75.1)}


def members(base: ConfigDict) -> Iterator[dict[str, Any]]:
    for epochs, (finetune, probe) in PAPER.items():
        share = epochs / BASELINE
        if base.steps:
            length = {"steps": max(1, round(base.steps * share))}
        else:
            length = {"epochs": base.epochs * share}
        yield {
            "name": f"{next(iter(length.values())):g}",
            "x": epochs,
            "pretrain": length,
            "paper": {"finetune": finetune, "linear_probe": probe},
        }
