"""RandAugment on the host, one picture at a time: Pillow's pixels, and Pillow where it is quick.

Cubuk et al., arXiv 1909.13719, in timm's variant, which the MAE fine-tuning recipe uses: each op is
left out half of the time, levels are drawn about the magnitude, and pictures keep their size.
"""

import dataclasses
import re
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mae_jax import UserError

MAX_LEVEL = 10.0
APPLY_PROBABILITY = 0.5  # of each op drawn

# What an op reaches at level 10.
ROTATE_DEGREES = 30.0
SHEAR = 0.3  # pixels along one axis per pixel along the other
TRANSLATE = 0.45  # of the side
ENHANCE = 0.9  # distance of an enhancement factor from 1, "increasing" ops
POSTERIZE_BITS = 4
SOLARIZE_ADD = 110  # grey levels
GREY_LEVELS = np.arange(256)
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32)  # Pillow's, over 13

Fill = tuple[int, ...]
Op = Callable[[Image.Image, float, float, Fill | int], Image.Image]


def _moved(
    image: Image.Image, fill: Fill | int, offset: float = 0, slope: float = 0, *, down: bool = False
) -> Image.Image:
    """Moves every row along x, or with `down` every column along y: its pixel (x, y) is where the
    picture's was at x + slope * (y + 1/2) + offset.

    Pillow's `transform` by such an affine matrix with its bicubic filter, to the bit and faster:
    of its 4 x 4 pixels only the four along the movement count.
    """
    pixels = cv2.transpose(np.asarray(image)) if down else np.asarray(image)
    height, width, channels = np.atleast_3d(pixels).shape
    x, y = np.arange(width), np.arange(height)
    place = (x + 0.5) + slope * (y + 0.5)[:, None] + offset  # [H, W], added up as Pillow does
    inside = (place >= 0) & (place < width)
    result = np.empty_like(pixels)
    result.reshape(height, -1)[:] = np.tile(fill, width)
    columns = np.flatnonzero(inside.any(axis=0))
    if columns.size:
        some = slice(columns[0], columns[-1] + 1)
        place, count = place[:, some] - 0.5, columns[-1] + 1 - columns[0]
        shift = np.floor(place[:, 0]).astype(int)  # [H], to the first pixel
        edge = max(0, int(-shift.min())) + 1, max(0, int(shift.max()) + count - width) + 3
        wide = cv2.copyMakeBorder(pixels, 0, 0, *edge, cv2.BORDER_REPLICATE).reshape(height, -1)
        windows = np.lib.stride_tricks.sliding_window_view(wide, (count + 3) * channels, axis=1)
        window = windows[y, (edge[0] + shift - 1) * channels].astype(np.int16)
        a, b, c, d = (window[:, i * channels :][:, : count * channels] for i in range(4))
        t = np.repeat(place - np.arange(count) - shift[:, None], channels, axis=1)
        value = b + t * (c - a + t * (2 * (a - b) + c - d + t * (b - a + d - c)))
        moved = value.clip(0, 255).astype(np.uint8).reshape(height, count, channels)
        mask = np.ascontiguousarray(inside[:, some]).view(np.uint8)
        result[:, some] = cv2.copyTo(moved, mask, np.ascontiguousarray(result[:, some]))
    return Image.fromarray(cv2.transpose(result) if down else result)


def _sharpened(image: Image.Image, factor: float) -> Image.Image:
    """`ImageEnhance.Sharpness`, to the bit: thirteenths are never halfway between grey levels."""
    pixels = np.asarray(image)
    smooth = pixels.copy()
    inner = slice(1, -1), slice(1, -1)
    smooth[inner] = cv2.filter2D(pixels, -1, SMOOTH / 13)[inner]  # Pillow leaves the edge
    return Image.blend(Image.fromarray(smooth), image, factor)


def _mapped(image: Image.Image, table: np.ndarray) -> Image.Image:
    """Every grey level v becomes ``table[v]``."""
    return image.point(table.tolist() * len(image.getbands()))


def _posterized(image: Image.Image, bits: int) -> Image.Image:
    # ImageOps.posterize refuses to keep 0 bits (a black picture) since Pillow 13, but level 10
    # comes to that, and one draw in forty of m9-mstd0.5 is level 10.
    return _mapped(image, GREY_LEVELS & ~(2 ** (8 - bits) - 1))


def _solarize_add(image: Image.Image, share: float, *_: object) -> Image.Image:
    brighter = np.minimum(GREY_LEVELS + int(SOLARIZE_ADD * share), 255)
    return _mapped(image, np.where(GREY_LEVELS < 128, brighter, GREY_LEVELS))


def _enhanced(name: str) -> Op:
    return lambda image, share, *_: _ENHANCERS[name](image, 0.1 + 1.8 * share)


def _enhanced_increasing(name: str) -> Op:
    return lambda image, share, signed, fill: _ENHANCERS[name](image, 1 + ENHANCE * signed)


# Each takes the level as a share of the maximum, the same with a sign for ops that have two
# directions, and the grey levels of what a moved picture leaves empty.
_COMMON: dict[str, Op] = {
    "AutoContrast": lambda image, share, *_: ImageOps.autocontrast(image),
    "Equalize": lambda image, share, *_: ImageOps.equalize(image),
    "Invert": lambda image, share, *_: ImageOps.invert(image),
    "Rotate": lambda image, share, signed, fill: image.rotate(  # counterclockwise, about the centre
        ROTATE_DEGREES * signed, Image.Resampling.BICUBIC, fillcolor=fill
    ),
    "SolarizeAdd": _solarize_add,
    "ShearX": lambda image, share, signed, fill: _moved(image, fill, slope=SHEAR * signed),
    "ShearY": lambda image, share, signed, fill: _moved(
        image, fill, slope=SHEAR * signed, down=True
    ),
    "TranslateXRel": lambda image, share, signed, fill: _moved(
        image, fill, TRANSLATE * signed * image.width
    ),
    "TranslateYRel": lambda image, share, signed, fill: _moved(
        image, fill, TRANSLATE * signed * image.height, down=True
    ),
}
_ENHANCERS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "Color": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "Contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "Brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "Sharpness": _sharpened,
}
PLAIN_OPS: dict[str, Op] = _COMMON | {
    "Posterize": lambda image, share, *_: _posterized(image, int(POSTERIZE_BITS * share)),
    "Solarize": lambda image, share, *_: ImageOps.solarize(image, int(256 * share)),
    **{name: _enhanced(name) for name in _ENHANCERS},
}
INCREASING_OPS: dict[str, Op] = _COMMON | {
    "PosterizeIncreasing": lambda image, share, *_: _posterized(
        image, POSTERIZE_BITS - int(POSTERIZE_BITS * share)
    ),
    "SolarizeIncreasing": lambda image, share, *_: ImageOps.solarize(image, 256 - int(256 * share)),
    **{f"{n}Increasing": _enhanced_increasing(n) for n in _ENHANCERS},
}


def apply(name: str, image: np.ndarray, level: float, sign: int, fill: Fill) -> np.ndarray:
    """Does one op, named as timm's, to uint8 [H, W, C], C 1 or 3; level 0 to 10, sign +1 or -1."""
    op = (PLAIN_OPS | INCREASING_OPS)[name]
    picture = Image.fromarray(image if len(fill) == 3 else image[:, :, 0])
    color, share = fill if len(fill) == 3 else fill[0], level / MAX_LEVEL
    return np.asarray(op(picture, share, sign * share, color)).reshape(image.shape)


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Draws ops uniformly with replacement and does each to a picture with probability 1/2.

    The level is normally distributed and clipped to [0, 10], the direction random.
    """

    magnitude: float  # mean of the level
    deviation: float  # of the level, before clipping
    count: int  # ops drawn for a picture
    increasing: bool  # ops stronger with the level throughout, or as in the first AutoAugment code
    fill: Fill  # grey levels of what a moved picture leaves empty, one per channel

    def __post_init__(self) -> None:
        if len(self.fill) not in (1, 3) or not all(0 <= v <= 255 for v in self.fill):
            what = f"works on 1 or 3 channels, filled by grey levels 0 to 255; got {self.fill}"
            raise UserError(f"augment.randaugment: {what}. '' does without")

    @property
    def ops(self) -> tuple[str, ...]:
        """Names of the 15 ops drawn from."""
        return tuple(INCREASING_OPS if self.increasing else PLAIN_OPS)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Augments a picture, uint8 [H, W, C], C as in ``fill``; itself if no op is done."""
        for _ in range(self.count):
            name = self.ops[rng.integers(len(self.ops))]
            done = rng.random() < APPLY_PROBABILITY
            level = min(max(rng.normal(self.magnitude, self.deviation), 0.0), MAX_LEVEL)
            sign = 1 if rng.random() < 0.5 else -1
            if done:
                image = apply(name, image, level, sign, self.fill)
        return image


def parse_randaugment(spec: str, fill: Fill) -> RandAugment:
    """Reads timm's notation, e.g. ``rand-m9-mstd0.5-inc1`` (MAE fine-tuning).

    After ``rand``, in any order: ``m`` mean level, 0 to 10 (default 10); ``mstd`` its standard
    deviation, 0 to 10 (0); ``inc`` 1 for ops whose strength grows with the level, else 0 (0);
    ``n`` ops drawn (2). ``fill``: in the recipe the data's mean, (124, 116, 104).
    """
    values = {"m": 10.0, "mstd": 0.0, "inc": 0.0, "n": 2.0}
    head, *parts = spec.split("-")
    found = [re.fullmatch(r"(m|mstd|inc|n)(\d+(?:\.\d+)?)", part) for part in parts]
    if head == "rand" and all(found) and len({match[1] for match in found}) == len(found):
        m, mstd, inc, n = (values | {match[1]: float(match[2]) for match in found}).values()
        if max(m, mstd) <= MAX_LEVEL and inc in (0, 1) and n >= 1 and n.is_integer():
            return RandAugment(m, mstd, int(n), inc == 1, tuple(fill))
    raise UserError(
        f"augment.randaugment={spec!r}: write it as rand-m9-mstd0.5-inc1 with m and mstd in "
        "[0, 10], inc 0 or 1, and n (ops drawn) at least 1, each at most once; or '' for none"
    )
