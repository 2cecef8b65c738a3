"""Whether the encoder sees mask tokens (paper table 1c).

    python launch/sweep.py configs/ablations/mask_token.py --workdir=DIR \\
        --config.data.dir=TFDS_DIR

| encoder | fine-tuned | probed | FLOPs |
|---|---|---|---|
| with mask tokens | 84.2 | 59.6 | 3.3 x |
| without | 84.9 | 73.5 | 1 x |
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

TITLE = "Mask tokens in the encoder (paper table 1c)"
AXIS = "encoder"
PAPER = {"with": (84.2, 59.6), "without": (84.9, 73.5)}


def members(base: ConfigDict) -> Iterator[dict[str, Any]]:
    for name, (finetune, probe) in PAPER.items():
        yield {
            "name": name,
            "pretrain": {"mask.encoder_tokens": name == "with"},
            "paper": {"finetune": finetune, "linear_probe": probe},
        }
