"""From a record to pixels, on the host: decode, crop, resize. Numpy in, uint8 out.

The horizontal flip and the normalisation happen on the device (`mae_jax.augment.pixels`).
"""

import dataclasses
import io
import math

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from mae_jax import UserError
from mae_jax.data.color_jitter import ColorJitter
from mae_jax.data.randaugment import RandAugment
from mae_jax.data.record import ArraySpec, DecodeError, Record

# Many pictures are worked on at once, one thread each; OpenCV's own threads would only fight them.
cv2.setNumThreads(0)

Box = tuple[float, float, float, float]  # top, left, height, width, in pixels
Range = tuple[float, float]  # low, high

CROP_TRIES = 10  # torchvision.transforms.RandomResizedCrop
# Width of the blur before shrinking by s, as Gaussian sigma / s, pixels: the best fit to Pillow's
# bicubic on 14 ImageNet photographs shrunk by 1.03 to 3 (best sigma 0.35 at 1.03, 0.8 at 2).
BLUR_PER_SHRINK = 0.39


def decode(
    image: bytes | np.ndarray | Image.Image, channels: int, name: str, *, upright: bool = False
) -> np.ndarray:
    """Decodes a picture (see `Record`) to uint8 [H, W, channels].

    JPEG goes through libjpeg-turbo, everything else through Pillow. Gray becomes RGB and RGB gray
    as ``channels`` (1 or 3; any other count only for an array that has it) asks; 16 bits become the
    upper 8; what is transparent is laid on white. ``upright`` turns and mirrors as EXIF asks; else
    pixels stay as they lie, as TFDS and torchvision leave them. Raises DecodeError, which begins
    with ``name``: truncated or damaged file, unknown format, or channels that cannot be had.
    """
    if isinstance(image, np.ndarray):
        return _array_channels(image, channels, name)
    if channels not in (1, 3):
        remedy = "store such pictures as .npy, uint8 [H, W, C], and use data.name='folder'"
        what = f"model.channels={channels}, but picture files are read as 1 or 3 channels"
        raise DecodeError(f"{name}: {what}; {remedy}")
    if isinstance(image, Image.Image):
        pixels = _pillow_channels(image, channels)
        return _turned(pixels, image) if upright else pixels
    pixels = _decode_jpeg(image, channels, name) if image.startswith(b"\xff\xd8") else None
    # EXIF is one of the first segments of a JPEG file, each 64 kB at most.
    if pixels is not None and not (upright and image.find(b"Exif\0\0", 0, 2**17) >= 0):
        return pixels
    try:
        with Image.open(io.BytesIO(image)) as opened:
            pixels = _pillow_channels(opened, channels) if pixels is None else pixels
            return _turned(pixels, opened) if upright else pixels
    except Exception as e:  # Pillow raises OSError, ValueError, SyntaxError, struct.error, ...
        raise DecodeError(f"{name}: cannot be decoded ({len(image)} bytes): {e}") from e


def _turned(pixels: np.ndarray, opened: Image.Image) -> np.ndarray:
    """The picture [H, W, C] as the EXIF orientation of its file shows it."""
    try:
        orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises several kinds; damaged EXIF does not spoil the pixels
        return pixels
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    down = -1 if orientation in (3, 4, 7, 8) else 1
    across = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(pixels[::down, ::across])


def _decode_jpeg(image: bytes, channels: int, name: str) -> np.ndarray | None:
    """None where Pillow has to do it: CMYK and other colour spaces, stray bytes."""
    try:
        _, _, colorspace, _ = simplejpeg.decode_jpeg_header(image)
        if colorspace not in ("YCbCr", "Gray"):
            return None
        # libjpeg-turbo's shortcuts stay off: on ImageNet photographs its fast DCT costs 1.2 grey
        # levels and its plain chroma upsampling saves no time.
        return simplejpeg.decode_jpeg(image, colorspace="RGB" if channels == 3 else "GRAY")
    except ValueError as e:
        # Stray bytes between two segments lose nothing, and ImageNet has such files; any other
        # complaint means that part of the picture would be made up.
        if "extraneous bytes before marker" in str(e):
            return None
        raise DecodeError(f"{name}: damaged JPEG ({len(image)} bytes): {e}") from e


def _pillow_channels(image: Image.Image, channels: int) -> np.ndarray:
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):  # 16-bit gray; convert() would clip
        gray = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], channels, axis=2)
    if image.mode == "F":
        raise ValueError("its pixels are floating point; integers of 8 or 16 bits can be read")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("1", "L"):  # CMYK and YCCK reach gray by way of RGB
        image = image.convert("RGB")
    pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _array_channels(image: np.ndarray, channels: int, name: str) -> np.ndarray:
    if image.ndim != 3 or image.dtype != np.uint8 or 0 in image.shape:
        got = f"{image.dtype} {list(image.shape)}"
        raise DecodeError(f"{name}: expected uint8 [H, W, C], got {got}")
    if image.shape[2] == channels:
        return image
    if image.shape[2] == 1 and channels == 3:
        return np.repeat(image, 3, axis=2)
    if image.shape[2] == 3 and channels == 1:
        return cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)[:, :, None]
    raise DecodeError(f"{name}: has {image.shape[2]} channels, model.channels={channels}")


def random_resized_crop_box(
    rng: np.random.Generator, height: int, width: int, scale: Range, ratio: Range
) -> Box:
    """Draws a crop of whole pixels as torchvision's RandomResizedCrop does.

    Ten tries of a share of the area uniform in ``scale`` and a log-uniform width / height in
    ``ratio``; if none fits, the largest centred crop within ``ratio``.
    """
    for _ in range(CROP_TRIES):
        h, w = _crop_sides(rng, height, width, scale, ratio)
        if 0 < w <= width and 0 < h <= height:
            return _placed(rng, height, width, h, w)
    # A one-pixel side times an extreme ratio rounds to nothing: a crop has at least one pixel.
    h = max(1, min(height, round(width / ratio[0])))
    w = max(1, min(width, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def single_try_crop_box(
    rng: np.random.Generator, height: int, width: int, scale: Range, ratio: Range
) -> Box:
    """Draws one crop, its sides cut to the picture's: what MAE's linear probes train on."""
    h, w = _crop_sides(rng, height, width, scale, ratio)
    return _placed(rng, height, width, max(1, min(h, height)), max(1, min(w, width)))


def _crop_sides(
    rng: np.random.Generator, height: int, width: int, scale: Range, ratio: Range
) -> tuple[int, int]:
    """Height and width of a crop, pixels; they may not fit."""
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    return round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))


def _placed(rng: np.random.Generator, height: int, width: int, h: int, w: int) -> Box:
    """A box of h x w pixels anywhere in the picture."""
    top = int(rng.integers(0, height - h, endpoint=True))
    left = int(rng.integers(0, width - w, endpoint=True))
    return top, left, h, w


RANDOM_CROPS = {"random_resized": random_resized_crop_box, "single_try": single_try_crop_box}


def resize_exact(image: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    """Crops and resizes [H, W, C] to [*size, C], uint8, with Pillow's antialiased bicubic.

    That is the paper's resampling. No short cut: on photographs shrunk 4 to 6 times, halving in
    libjpeg costs 1.1 grey levels and 8 % of the power near the highest frequency,
    ``reducing_gap=2`` 0.6 to 0.9 and 10 %; on those shrunk less, they cost more or do nothing.
    """
    top, left, h, w = box
    corners = (left, top, left + w, top + h)
    # Pillow holds 1 or 3 channels; others go one by one.
    planes = [image] if image.shape[2] == 3 else np.moveaxis(image, 2, 0)
    shape, bicubic, pictures = size[::-1], Image.Resampling.BICUBIC, map(Image.fromarray, planes)
    resized = [np.asarray(p.resize(shape, bicubic, box=corners)) for p in pictures]
    return resized[0] if image.shape[2] == 3 else np.stack(resized, axis=2)


def resize_fast(image: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    """Crops and resizes, antialiased, with OpenCV: near Pillow's bicubic, five times as fast.

    OpenCV's cubic looks at 4 x 4 pixels however much a picture shrinks, so a side that shrinks is
    first blurred. On ImageNet photographs at 224 px the result is 0.9 grey levels (mean absolute
    difference) from Pillow's, with four fifths of its power at half the highest frequency where it
    shrinks and a tenth more where it enlarges. The box is rounded to whole pixels.
    """
    top, left = int(box[0]), int(box[1])
    h = max(1, min(round(box[2]), image.shape[0] - top))
    w = max(1, min(round(box[3]), image.shape[1] - left))
    crop = image[top : top + h, left : left + w]
    x, y = max(1.0, w / size[1]), max(1.0, h / size[0])  # times that it shrinks
    if max(x, y) > 1:
        taps = 2 * math.ceil(x) - 1, 2 * math.ceil(y) - 1  # 1 tap: left as it is
        sigma, edge = BLUR_PER_SHRINK, cv2.BORDER_REPLICATE
        crop = cv2.GaussianBlur(crop, taps, sigma * x, sigmaY=sigma * y, borderType=edge)
    out = cv2.resize(crop, size[::-1], interpolation=cv2.INTER_CUBIC)
    return out.reshape(*size, image.shape[2])  # OpenCV drops a single channel


RESIZES = {"exact": resize_exact, "fast": resize_fast}


def centre_box(
    height: int, width: int, size: tuple[int, int], crop_ratio: float | None = None
) -> Box:
    """The part of a picture that "resize the short side, then crop the centre" shows.

    ``crop_ratio``: crop over resized short side; None: MAE's, 224 / 256 up to 224 px, else 1.
    """
    new = _resized(height, width, size, crop_ratio or (224 / 256 if max(size) <= 224 else 1.0))
    top, left = (round((full - out) / 2) for full, out in zip(new, size, strict=True))
    return before_resizing((top, left, *size), (height, width), new)


def fixed_crop_box(rng: np.random.Generator, height: int, width: int, size: tuple[int, int]) -> Box:
    """Draws the part that "resize the short side, then crop anywhere" shows (paper, table 1e).

    The short side becomes 256 for a crop of 224, in proportion for other sizes. The paper does not
    say to what it resizes: this is the scale of its evaluation.
    """
    new = _resized(height, width, size, 224 / 256)
    box = _placed(rng, *new, *size)
    return before_resizing(box, (height, width), new)


def _resized(height: int, width: int, size: tuple[int, int], crop_ratio: float) -> tuple[int, int]:
    """The smallest resized picture that covers size / crop_ratio; whole pixels as torchvision's."""
    full_h, full_w = int(size[0] / crop_ratio), int(size[1] / crop_ratio)
    if height * full_w <= width * full_h:
        return full_h, max(full_w, int(full_h * width / height))
    return max(full_h, int(full_w * height / width)), full_w


def before_resizing(box: Box, old: tuple[int, int], new: tuple[int, int]) -> Box:
    """A box of a picture resized from `old` to `new`, in pixels of the old one."""
    dy, dx = old[0] / new[0], old[1] / new[1]
    top, left, h, w = box
    return top * dy, left * dx, h * dy, w * dx


@dataclasses.dataclass(frozen=True)
class _Crop:
    """A decoded picture's part, resized to what a model takes."""

    size: tuple[int, int]  # height and width of the result, pixels
    channels: int = 3

    @property
    def schema(self) -> dict[str, ArraySpec]:
        return {"image": ArraySpec((*self.size, self.channels), np.uint8)}

    def decoded(self, record: Record) -> Record:
        """The record with uint8 [H, W, channels] for its picture; raises DecodeError."""
        image = decode(record.image, self.channels, record.name, upright=record.upright)
        return dataclasses.replace(record, image=image)


@dataclasses.dataclass(frozen=True)
class TrainTransform(_Crop):
    """Decode, random crop, resize: what MAE pretrains on, but for the flip (MAE, Table 8).

    ``crop="single_try"`` draws the crop once (linear probing); ``crop="fixed"`` keeps the scale and
    draws the place; ``crop="centre"`` takes the evaluation crop (MAE, Table 1e, "none").
    """

    scale: Range = (0.2, 1.0)  # share of the picture's area
    ratio: Range = (3 / 4, 4 / 3)  # width over height
    crop: str = "random_resized"  # one of `RANDOM_CROPS`, `fixed` or `centre`
    resize: str = "exact"  # one of `RESIZES`
    randaugment: RandAugment | None = None  # done to the resized crop (fine-tuning)
    color_jitter: ColorJitter | None = None  # likewise (MAE, Table 1e)

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = self.decoded(record).image
        crop = RESIZES[self.resize](image, self.box(rng, *image.shape[:2]), self.size)
        return {"image": self.augmented(crop, rng)}

    def augmented(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A resized crop, uint8 [*size, C], with what is done to it on the host."""
        if self.color_jitter is not None:  # pixel by pixel: as good before the flip as after it
            crop = self.color_jitter(crop, rng)
        # The recipe flips before RandAugment; here the device flips after it, which is equal in
        # distribution: mirrored, an op is the same with the other sign, which is as likely. But
        # ShearY holds the left edge in place: half of its results are mirrored ones here.
        return crop if self.randaugment is None else self.randaugment(crop, rng)

    def box(self, rng: np.random.Generator, height: int, width: int) -> Box:
        """The crop of a picture of height x width pixels; consumes ``rng`` if it is random."""
        if self.crop == "centre":
            return centre_box(height, width, self.size)
        if self.crop == "fixed":
            return fixed_crop_box(rng, height, width, self.size)
        return RANDOM_CROPS[self.crop](rng, height, width, self.scale, self.ratio)


@dataclasses.dataclass(frozen=True)
class EvalTransform(_Crop):
    """Decode, resize short side (256 for 224 px), crop the centre; Pillow's antialiased bicubic."""

    crop_ratio: float | None = None  # of `centre_box`

    def __post_init__(self) -> None:
        if not 0 < (self.crop_ratio or 1) <= 1:
            raise UserError(f"crop_ratio={self.crop_ratio}: needs 0 < crop_ratio <= 1")

    def __call__(self, record: Record, rng: object = None) -> dict[str, np.ndarray]:
        return {"image": self.image(record)}

    def image(self, record: Record) -> np.ndarray:
        """The picture as the model sees it, uint8 [*size, channels]."""
        image = self.decoded(record).image
        box = centre_box(*image.shape[:2], self.size, self.crop_ratio)
        return resize_exact(image, box, self.size)
