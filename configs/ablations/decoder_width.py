"""How wide the decoder is (paper table 1b), as multiples of the base's width, the paper's 512.

    python launch/sweep.py configs/ablations/decoder_width.py --workdir=DIR \\
        --config.data.dir=TFDS_DIR

| width | 128 | 256 | 512 | 768 | 1024 |
|---|---|---|---|---|---|
| fine-tuned | 84.9 | 84.8 | 84.9 | 84.4 | 84.3 |
| probed | 69.1 | 71.3 | 73.5 | 73.1 | 73.1 |
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

TITLE = "Decoder width (paper table 1b)"
AXIS = "decoder width"
BASELINE = 512
PAPER = {
    **{128: (84.9, 69.1), 256: (84.8, 71.3), 512: (84.9, 73.5)},
    **{768: (84.4, 73.1), 1024: (84.3, 73.1)},
}


def members(base: ConfigDict) -> Iterator[dict[str, Any]]:
    for paper_width, (finetune, probe) in PAPER.items():
        width = base.decoder.width * paper_width // BASELINE
        yield {
            "name": str(width),
            "x": paper_width,
            "pretrain": {"decoder.width": width},
            "paper": {"finetune": finetune, "linear_probe": probe},
        }
