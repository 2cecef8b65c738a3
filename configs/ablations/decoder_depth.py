"""How deep the decoder is (paper table 1a).

    python launch/sweep.py configs/ablations/decoder_depth.py --workdir=DIR \\
        --config.data.dir=TFDS_DIR

| blocks | 1 | 2 | 4 | 8 | 12 |
|---|---|---|---|---|---|
| fine-tuned | 84.8 | 84.9 | 84.9 | 84.9 | 84.4 |
| probed | 65.5 | 70.0 | 71.9 | 73.5 | 73.3 |
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

TITLE = "Decoder depth (paper table 1a)"
AXIS = "decoder blocks"
PAPER = {1: (84.8, 65.5), 2: (84.9, 70.0), 4: (84.9, 71.9), 8: (84.9, 73.5), 12: (84.4, 73.3)}


def members(base: ConfigDict) -> Iterator[dict[str, Any]]:
    for depth, (finetune, probe) in PAPER.items():
        yield {
            "name": str(depth),
            "x": depth,
            "pretrain": {"decoder.depth": depth},
            "paper": {"finetune": finetune, "linear_probe": probe},
        }
