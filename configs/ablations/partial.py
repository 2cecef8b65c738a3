"""How many of the last blocks are fine-tuned (paper figure 9), all after one pretraining.

    python launch/sweep.py configs/ablations/partial.py --workdir=DIR \\
        --config.data.dir=TFDS_DIR

| blocks | 0 | 0.5 | 1 | 2 | 4 | 6 | 12 | 18 | 24 |
|---|---|---|---|---|---|---|---|---|---|
| MAE | 73.5 | 79.1 | 81.0 | 83.1 | 84.2 | 84.4 | 84.6 | 84.7 | 84.9 |
| MoCo v3 | 77.6 | - | 79.9 | 80.8 | 81.6 | 81.9 | 83.2 | 83.8 | 84.1 |

0 is linear probing, 0.5 the MLP of the last block, 24 all of a ViT-L: `all`, whatever the depth of
the base. The paper takes the best of 50, 100 and 200 epochs for each number of blocks; here all
fine-tune as the base says (`--finetune.epochs=100` for another).
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from mae_jax.models.vit import VARIANTS

TITLE = "Partial fine-tuning (paper figure 9)"
AXIS = "blocks fine-tuned"
SCALE = "even"
PAPER = {0.5: 79.1, 1: 81.0, 2: 83.1, 4: 84.2, 6: 84.4, 12: 84.6, 18: 84.7}


def members(base: ConfigDict) -> Iterator[dict[str, Any]]:
    depth = base.model.depth or VARIANTS[base.model.variant].depth
    yield {"name": "0", "x": 0, "finetune": None, "paper": {"linear_probe": 73.5}}
    for blocks, top1 in PAPER.items():
        if blocks < depth:
            yield {
                "name": str(blocks),
                "x": blocks,
                "finetune": {"trainable_blocks": float(blocks)},
                "linear_probe": None,
                "paper": {"finetune": top1},
            }
    yield {"name": "all", "x": 24, "linear_probe": None, "paper": {"finetune": 84.9}}
