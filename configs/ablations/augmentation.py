"""How training pictures are augmented while pretraining (paper table 1e).

    python launch/sweep.py configs/ablations/augmentation.py --workdir=DIR \\
        --config.data.dir=TFDS_DIR

| augmentation | none | fixed-size crop | random-size crop | and colour jitter |
|---|---|---|---|---|
| fine-tuned | 84.0 | 84.7 | 84.9 | 84.3 |
| probed | 65.7 | 73.1 | 73.5 | 71.9 |

None is the centre without flips. The follow-ups augment as the base says.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

TITLE = "Augmentation (paper table 1e)"
AXIS = "augmentation"
MEMBERS = {
    "none": ({"data.crop": "centre", "data.flip": False}, 84.0, 65.7),
    "fixed": ({"data.crop": "fixed"}, 84.7, 73.1),
    "random_size": ({"data.crop": "random_resized"}, 84.9, 73.5),
    "color_jitter": ({"data.crop": "random_resized", "augment.color_jitter": 0.4}, 84.3, 71.9),
}


def members(base: ConfigDict) -> Iterator[dict[str, Any]]:
    for name, (fields, finetune, probe) in MEMBERS.items():
        yield {
            "name": name,
            "pretrain": fields,
            "paper": {"finetune": finetune, "linear_probe": probe},
        }
