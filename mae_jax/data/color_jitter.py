"""Colour jitter on the host, one picture at a time: torchvision's ColorJitter on Pillow pictures.

The paper finds that it hurts (table 1e): it is there for that experiment.
"""

import dataclasses

import numpy as np
from PIL import Image, ImageEnhance

HUE_SHARE = 1 / 4  # of the strength: ColorJitter(0.4, 0.4, 0.4, 0.1), as SimCLR and others have it


def _turned(picture: Image.Image, turns: float) -> Image.Image:
    """Every colour moved on the circle of hues, which Pillow divides into 256."""
    hue, saturation, value = picture.convert("HSV").split()
    hue = hue.point([(h + int(255 * turns)) % 256 for h in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


# Each with what it takes: a factor, 1 for no change; of the hue, turns of the circle.
_OPS = (
    lambda picture, factor: ImageEnhance.Brightness(picture).enhance(factor),
    lambda picture, factor: ImageEnhance.Contrast(picture).enhance(factor),
    lambda picture, factor: ImageEnhance.Color(picture).enhance(factor),
    _turned,
)


@dataclasses.dataclass(frozen=True)
class ColorJitter:
    """Changes brightness, contrast, saturation and hue, in random order, by random amounts.

    Factors of the first three are uniform in [max(0, 1 - s), 1 + s], turns of the hue in
    [-s / 4, s / 4]: torchvision's ColorJitter(s, s, s, s / 4).
    """

    strength: float  # s, 0 to 2

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Augments a picture, uint8 [H, W, 3]."""
        s = self.strength
        factors = rng.uniform(max(0.0, 1 - s), 1 + s, 3)
        amounts = *factors, rng.uniform(-s * HUE_SHARE, s * HUE_SHARE)
        picture = Image.fromarray(image)
        for op in rng.permutation(len(_OPS)):
            picture = _OPS[op](picture, amounts[op])
        return np.asarray(picture)
