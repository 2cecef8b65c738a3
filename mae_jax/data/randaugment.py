"""RandAugment on the host, one picture at a time: Pillow's pixels, and Pillow where it is quick.

Cubuk et al., arXiv 1909.13719, in timm's variant, which the MAE fine-tuning recipe uses: each op is
left out half of the time, levels are drawn about the magnitude, and pictures keep their size.
"""

import dataclasses
import re
from collections.abc import Callable

import cv2
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
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
GREY_LEVELS = np.arange(256, dtype=np.uint8)
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32)  # Pillow's, over 13
DOUBT = 1e-3  # grey levels; four times what float32 may be off by in `_between`

Fill = tuple[int, ...]
Op = Callable[[np.ndarray, float, float, Fill], np.ndarray]  # of uint8 [H, W, C]


def _moved(
    image: np.ndarray, fill: Fill, offset: float = 0, slope: float = 0, *, down: bool = False
) -> np.ndarray:
    """Moves every row along x, or with `down` every column along y: its pixel (x, y) is where the
    picture's was at x + slope * (y + 1/2) + offset.

    Pillow's `transform` by such an affine matrix with its bicubic filter, to the bit and faster: of
    its 4 x 4 pixels only the four along the movement count.
    """
    pixels = np.atleast_3d(cv2.transpose(image)) if down else image
    height, width = pixels.shape[:2]
    x, y = np.arange(width), np.arange(height)
    place = (x + 0.5) + slope * (y + 0.5)[:, None]  # [H, W], added up as Pillow does
    place += offset
    inside = (place >= 0) & (place < width)
    place -= 0.5
    result = np.empty_like(pixels)
    result.reshape(height, -1)[:] = np.tile(np.array(fill, np.uint8), width)
    columns = np.flatnonzero(inside.any(axis=0))
    if columns.size:
        some = slice(columns[0], columns[-1] + 1)
        kept, mask = result[:, some], np.ascontiguousarray(inside[:, some]).view(np.uint8)
        moved = _between(pixels, place[:, some]).reshape(kept.shape)
        kept[:] = cv2.copyTo(moved, mask, np.ascontiguousarray(kept)).reshape(kept.shape)
    return cv2.transpose(result).reshape(image.shape) if down else result


def _between(pixels: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Bicubic grey levels [H, M * C] of rows of pixels [H, W, C] at places [H, M], each a pixel
    right of the one before; cut off to whole levels.

    By float32; by float64, in Pillow's order, those that this leaves in doubt.
    """
    (height, count), channels = place.shape, pixels.shape[2]
    first = np.floor(place[:, 0]).astype(int)  # [H], the pixel left of a row's first place
    left, right = max(0, -first.min()) + 2, max(0, first.max() + count - pixels.shape[1]) + 4
    wide = cv2.copyMakeBorder(pixels, 0, 0, left, right, cv2.BORDER_REPLICATE).reshape(height, -1)
    windows = sliding_window_view(wide, (count + 3) * channels, axis=1)
    window = windows[np.arange(height), (left + first - 1) * channels]  # [H, (M + 3) * C]
    t = place[:, 0] - first
    weights = [-t * (1 - t) ** 2, 1 - t**2 * (2 - t), t * (1 + t * (1 - t)), -(t**2) * (1 - t)]
    taps = sliding_window_view(window.astype(np.float32), count * channels, axis=1)[:, ::channels]
    values = np.einsum("hkn,kh->hn", taps, np.array(weights, np.float32))
    values += DOUBT
    whole = np.floor(values)
    values -= whole
    same = window[:, channels:] == window[:, :-channels]  # as the pixel before
    flat = same[:, channels:-channels] & same[:, : -2 * channels] & same[:, 2 * channels :]
    doubtful = np.flatnonzero((values < 2 * DOUBT) & ~flat)
    result = whole.clip(0, 255, out=whole).astype(np.uint8)
    row, x, channel = np.unravel_index(doubtful, (height, count, channels))
    before = np.floor(place[row, x])
    t, start = place[row, x] - before, (left + before.astype(int) - 1) * channels + channel
    a, b, c, d = (wide[row, start + i * channels].astype(np.int16) for i in range(4))
    exact = b + t * (c - a + t * (2 * (a - b) + c - d + t * (b - a + d - c)))
    result.flat[doubtful] = exact.clip(0, 255)
    return result


def _by_pillow(op: Callable[[Image.Image], Image.Image], image: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0])
    return np.asarray(op(picture)).reshape(image.shape)


def _mapped(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Every grey level v becomes ``table[v]``."""
    return cv2.LUT(image, table).reshape(image.shape)


def _rotated(image: np.ndarray, fill: Fill, degrees: float) -> np.ndarray:
    """Counterclockwise, about the centre."""
    bicubic, color = Image.Resampling.BICUBIC, fill if len(fill) == 3 else fill[0]
    return _by_pillow(lambda picture: picture.rotate(degrees, bicubic, fillcolor=color), image)


def _posterized(image: np.ndarray, bits: int) -> np.ndarray:
    # ImageOps.posterize refuses to keep 0 bits (a black picture) since Pillow 13, but level 10
    # comes to that, and one draw in forty of m9-mstd0.5 is level 10.
    return image & np.uint8(256 - 2 ** (8 - bits))


def _solarized(image: np.ndarray, threshold: int) -> np.ndarray:
    return _mapped(image, np.where(threshold > GREY_LEVELS, GREY_LEVELS, 255 - GREY_LEVELS))


def _solarize_add(image: np.ndarray, share: float, *_: object) -> np.ndarray:
    brighter = GREY_LEVELS + np.uint8(SOLARIZE_ADD * share)
    return _mapped(image, np.where(GREY_LEVELS < 128, brighter, GREY_LEVELS))


def _with_color(image: np.ndarray, factor: float) -> np.ndarray:
    return _by_pillow(lambda picture: ImageEnhance.Color(picture).enhance(factor), image)


def _with_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    return _by_pillow(lambda picture: ImageEnhance.Contrast(picture).enhance(factor), image)


def _brightened(image: np.ndarray, factor: float) -> np.ndarray:
    """`ImageEnhance.Brightness`, done to each grey level once."""
    levels = ImageEnhance.Brightness(Image.fromarray(GREY_LEVELS[None]))
    return _mapped(image, np.asarray(levels.enhance(factor)))


def _sharpened(image: np.ndarray, factor: float) -> np.ndarray:
    """`ImageEnhance.Sharpness`, to the bit: thirteenths are never halfway between grey levels."""
    smooth, inner = image.copy(), (slice(1, -1), slice(1, -1))  # Pillow leaves the edge
    smooth[inner] = cv2.filter2D(image, -1, SMOOTH / 13).reshape(image.shape)[inner]
    pictures = (Image.fromarray(x.reshape(len(x), -1)) for x in (smooth, image))
    return np.asarray(Image.blend(*pictures, factor)).reshape(image.shape)


# Each takes the level as a share of the maximum, the same with a sign for ops that have two
# directions, and the grey levels of what a moved picture leaves empty.
_COMMON: dict[str, Op] = {
    "AutoContrast": lambda image, *_: _by_pillow(ImageOps.autocontrast, image),
    "Equalize": lambda image, *_: _by_pillow(ImageOps.equalize, image),
    "Invert": lambda image, *_: 255 - image,
    "Rotate": lambda image, share, signed, fill: _rotated(image, fill, ROTATE_DEGREES * signed),
    "SolarizeAdd": _solarize_add,
    "ShearX": lambda image, share, signed, fill: _moved(image, fill, slope=SHEAR * signed),
    "ShearY": lambda image, share, signed, fill: _moved(
        image, fill, slope=SHEAR * signed, down=True
    ),
    "TranslateXRel": lambda image, share, signed, fill: _moved(
        image, fill, TRANSLATE * signed * image.shape[1]
    ),
    "TranslateYRel": lambda image, share, signed, fill: _moved(
        image, fill, TRANSLATE * signed * image.shape[0], down=True
    ),
}
_ENHANCERS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "Color": _with_color,
    "Contrast": _with_contrast,
    "Brightness": _brightened,
    "Sharpness": _sharpened,
}


def _enhanced(name: str) -> Op:
    return lambda image, share, *_: _ENHANCERS[name](image, 0.1 + 1.8 * share)


def _enhanced_increasing(name: str) -> Op:
    return lambda image, share, signed, fill: _ENHANCERS[name](image, 1 + ENHANCE * signed)


PLAIN_OPS: dict[str, Op] = _COMMON | {
    "Posterize": lambda image, share, *_: _posterized(image, int(POSTERIZE_BITS * share)),
    "Solarize": lambda image, share, *_: _solarized(image, int(256 * share)),
    **{name: _enhanced(name) for name in _ENHANCERS},
}
INCREASING_OPS: dict[str, Op] = _COMMON | {
    "PosterizeIncreasing": lambda image, share, *_: _posterized(
        image, POSTERIZE_BITS - int(POSTERIZE_BITS * share)
    ),
    "SolarizeIncreasing": lambda image, share, *_: _solarized(image, 256 - int(256 * share)),
    **{f"{n}Increasing": _enhanced_increasing(n) for n in _ENHANCERS},
}


def apply(name: str, image: np.ndarray, level: float, sign: int, fill: Fill) -> np.ndarray:
    """Does one op, named as timm's, to uint8 [H, W, C], C 1 or 3; level 0 to 10, sign +1 or -1."""
    share = level / MAX_LEVEL
    return (PLAIN_OPS | INCREASING_OPS)[name](image, share, sign * share, fill)


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
