"""Label maps, and pictures cut together with them: what semantic segmentation trains on.

A label map is uint8 [H, W]: class numbers from 0, and `IGNORED` where nothing is asked. Pictures
are resized as Pillow does it (`transforms.RESIZES`), label maps by the nearest pixel, and both only
where they are cut. mmsegmentation, whose recipe this is, resizes by OpenCV's bilinear filter, which
aliases where a picture shrinks.
"""

import dataclasses
import io
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from mae_jax import UserError
from mae_jax.data.photometric import photometric_distortion
from mae_jax.data.record import ArraySpec, DecodeError, LabelError, Record
from mae_jax.data.transforms import RESIZES, Range, before_resizing, decode

IGNORED = 255  # in a label map, of pixels that count for nothing
LONGEST = 4  # times the short side: mmsegmentation's (2048, 512)
MOST_OF_A_CLASS = 0.75  # of the labelled pixels of a training crop
CROP_TRIES = 10


def label_numbers(segmentation: bytes | np.ndarray | None, name: str) -> np.ndarray:
    """The numbers in the file of a label map, integers [H, W]: of a palette its indices.

    Raises DecodeError, which begins with `name`: it is damaged, or in colours, or lossy.
    """
    if segmentation is None:
        raise DecodeError(f"{name}: the record has no label map")
    if isinstance(segmentation, np.ndarray):
        numbers = segmentation[..., 0] if segmentation.shape[2:] == (1,) else segmentation
        if numbers.ndim != 2 or not np.issubdtype(numbers.dtype, np.integer):
            got = f"{segmentation.dtype} {list(segmentation.shape)}"
            raise DecodeError(f"{name}: expected integers [H, W] for its label map, got {got}")
        return numbers
    remedy = "save class numbers as 8-bit gray or with a palette, as PNG"
    try:
        with Image.open(io.BytesIO(segmentation)) as opened:
            kind, mode = opened.format, opened.mode
            numbers = np.asarray(opened)
    except Exception as e:  # Pillow raises OSError, ValueError, SyntaxError, struct.error, ...
        size = len(segmentation)
        raise DecodeError(f"{name}: its label map cannot be decoded ({size} bytes): {e}") from e
    if numbers.ndim != 2 or mode == "F":
        raise DecodeError(f"{name}: its label map is {mode}, not one number a pixel; {remedy}")
    if kind in ("JPEG", "MPO"):
        raise DecodeError(f"{name}: its label map is a JPEG, whose numbers are not exact; {remedy}")
    if kind == "PNG" and segmentation[24:26] in (b"\2\0", b"\4\0"):
        numbers = numbers // (255 // (2 ** segmentation[24] - 1))  # Pillow spreads 2 and 4 bits
    return numbers.astype(np.uint8) if mode == "1" else numbers


@dataclasses.dataclass(frozen=True)
class _Segment:
    """What training and evaluation say of pictures and label maps."""

    size: tuple[int, int]  # height and width of a crop, pixels
    classes: int
    channels: int = 3
    ignore: int = IGNORED  # number in the files that stands for no class; -1: there is none
    zero_is_other: bool = False  # 0 stands for none either, and class k is written k + 1 (ADE20K)

    def __post_init__(self) -> None:
        if not 1 <= self.classes <= IGNORED:
            raise UserError(f"{self.classes} classes: label maps tell 1 to {IGNORED} apart")

    def decoded(self, record: Record) -> Record:
        """The record with uint8 [H, W, channels] and integers [H, W] in place of files."""
        image = decode(record.image, self.channels, record.name, upright=record.upright)
        numbers = label_numbers(record.segmentation, record.name)
        return dataclasses.replace(record, image=image, segmentation=numbers)

    def labels(self, record: Record, size: tuple[int, int]) -> np.ndarray:
        """The label map [H, W] uint8 of a picture of size H, W. See `decode_labels`."""
        return decode_labels(
            record.segmentation,
            record.name,
            size,
            classes=self.classes,
            ignore=self.ignore,
            zero_is_other=self.zero_is_other,
        )

    def crop(
        self, image: np.ndarray, new: tuple[int, int], corner: tuple[int, int], resize: str
    ) -> np.ndarray:
        """Of a picture resized to `new` what a crop with its upper left at `corner` shows."""
        shape = cropped_size(new, corner, self.size)
        box = before_resizing((*corner, *shape), image.shape[:2], new)
        return RESIZES[resize](image, box, shape)

    def padded(self, **crops: np.ndarray) -> dict[str, np.ndarray]:
        """Crops, some smaller than `size`, with zeros (labels: `IGNORED`) right and below, and
        "size", the height and width of what they show."""
        found: dict[str, np.ndarray] = {}
        for name, crop in crops.items():
            value = IGNORED if name == "segmentation" else 0
            found[name] = np.full((*self.size, *crop.shape[2:]), value, np.uint8)
            found[name][: crop.shape[0], : crop.shape[1]] = crop
            found["size"] = np.array(crop.shape[:2], np.int32)
        return found

    @property
    def schema(self) -> dict[str, ArraySpec]:
        return {
            "image": ArraySpec((*self.size, self.channels), np.uint8),
            "segmentation": ArraySpec(self.size, np.uint8),
            "size": ArraySpec((2,), np.int32),
        }


def decode_labels(
    segmentation: bytes | np.ndarray,
    name: str,
    size: tuple[int, int],
    *,
    classes: int,
    ignore: int = IGNORED,
    zero_is_other: bool = False,
) -> np.ndarray:
    """The label map, uint8 [H, W], in a picture file or an array of integers [H, W].

    `size`: H, W of the picture. With `zero_is_other` number k means class k - 1, and 0 none, as
    `ignore` does. Raises DecodeError as `label_numbers` does, or where H, W differ; LabelError: a
    number means none of the `classes`. Both begin with `name`.
    """
    numbers = label_numbers(segmentation, name)
    if numbers.shape != tuple(size):
        (h, w), (height, width) = numbers.shape, size
        what = f"its label map has {h} x {w} pixels, the picture {height} x {width}"
        raise DecodeError(f"{name}: {what}; give a map of the picture as it is shown")
    meaning = np.full(256, -1)  # of every number
    first = 1 if zero_is_other else 0
    meaning[first : first + classes] = np.arange(len(meaning[first : first + classes]))
    if zero_is_other:
        meaning[0] = IGNORED
    if 0 <= ignore <= 255:
        meaning[ignore] = IGNORED
    there = np.array([numbers.min(), numbers.max()])
    if there[0] >= 0 and there[1] <= 255:
        there = np.flatnonzero(np.bincount(numbers.ravel()))
    if wrong := [n for n in there if not 0 <= n <= 255 or meaning[n] < 0]:
        what = f"label {wrong[-1]} in its label map, where {first} to {first + classes - 1} are"
        remedy = "segment.ignore leaves one number out, segment.zero_is_other reads classes from 1"
        where = "classes.txt (or head.classes) tells how many there are"
        raise LabelError(f"{name}: {what} the {classes} classes; {remedy}, {where}")
    return meaning.astype(np.uint8)[numbers]


class View(NamedTuple):
    """A picture as it is shown to a model: resized, and mirrored or not."""

    height: int
    width: int
    mirrored: bool = False


def resized_to(height: int, width: int, short: float, longest: float) -> tuple[int, int]:
    """A picture's height and width with that short side, or a lesser one: the long one's limit."""
    scale = min(short / min(height, width), longest / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def cropped_size(
    new: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]
) -> tuple[int, int]:
    """Height and width of what a crop of `size` at `corner` shows of a picture of size `new`."""
    return min(size[0], new[0] - corner[0]), min(size[1], new[1] - corner[1])


def nearest(
    labels: np.ndarray, new: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Of a label map resized to `new` by the nearest pixel what a crop of `size` shows."""
    shape = cropped_size(new, corner, size)
    rows, columns = (
        ((start + np.arange(count) + 0.5) * (old / resized)).astype(np.int64).clip(max=old - 1)
        for start, count, old, resized in zip(corner, shape, labels.shape, new, strict=True)
    )
    return labels[rows[:, None], columns]


@dataclasses.dataclass(frozen=True)
class SegmentTrainTransform(_Segment):
    """Resize at random, crop, flip, distort the colours: {"image", "segmentation", "size"}.

    As mmsegmentation's recipe for ADE20K has it: the short side becomes that of the crop times a
    uniform number of `scale`, the long side at most 4 times the same; a crop of which one class is
    more than 3/4, or all, of what is labelled is drawn again, ten times at most.
    """

    scale: Range = (0.5, 2.0)
    flip: bool = True
    photometric: bool = True
    resize: str = "exact"  # one of `transforms.RESIZES`

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.photometric and self.channels != 3:
            what = f"pictures of {self.channels} channels have no colours to distort"
            raise UserError(f"{what}; set segment.photometric=False")

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        record = self.decoded(record)
        image, old = record.image, record.image.shape[:2]
        labels = self.labels(record, old)
        short = min(self.size) * rng.uniform(*self.scale)
        new = resized_to(*old, short, LONGEST * short)
        for tries_left in reversed(range(CROP_TRIES + 1)):
            corner = tuple(
                int(rng.integers(max(n - s, 0), endpoint=True))
                for n, s in zip(new, self.size, strict=True)
            )
            crop = nearest(labels, new, corner, self.size)
            if not tries_left or _is_mixed(crop):
                break
        image = self.crop(image, new, corner, self.resize)
        if self.flip and rng.integers(2):
            image, crop = image[:, ::-1], crop[:, ::-1]
        if self.photometric:
            image = photometric_distortion(np.ascontiguousarray(image), rng)
        return self.padded(image=image, segmentation=crop)


def _is_mixed(labels: np.ndarray) -> bool:
    """Whether no class takes more of a label map than it may."""
    counts = np.bincount(labels.ravel(), minlength=256)[:IGNORED]
    return (counts > 0).sum() > 1 and counts.max() < MOST_OF_A_CLASS * counts.sum()


@dataclasses.dataclass(frozen=True)
class SegmentEvalTransform(_Segment):
    """How pictures are shown to a model that is evaluated, and by itself the middle of each.

    The short side becomes that of a window (the long side at most 4 times that), and windows of
    `size` are cut from it `stride` pixels apart, the last at the border: see `evaluators`. With
    several `scales`, or `flip`, classes are taken from the mean probabilities of all views.
    """

    stride: tuple[int, int] = (341, 341)  # pixels; MAE builds on BEiT's (mmsegmentation's MAE: 256)
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(1 <= n <= s for n, s in zip(self.stride, self.size, strict=True)):
            what = f"windows of {self.size} pixels {self.stride} apart do not cover a picture"
            raise UserError(f"segment.stride: {what}; give 1 to the size of a window")

    def views(self, height: int, width: int) -> list[View]:
        """The views of a picture of height x width pixels."""
        sizes = (min(self.size) * scale for scale in self.scales)
        resized = [resized_to(height, width, size, LONGEST * size) for size in sizes]
        return [View(*new, bool(f)) for new in resized for f in range(1 + self.flip)]

    def corners(self, view: View) -> list[tuple[int, int]]:
        """Upper left corners of the windows of a view, row by row."""
        starts = []
        for new, size, stride in zip(view[:2], self.size, self.stride, strict=True):
            count = max(new - size + stride - 1, 0) // stride + 1
            starts.append([max(min(i * stride, new - size), 0) for i in range(count)])
        return [(top, left) for top in starts[0] for left in starts[1]]

    def window(self, record: Record, view: View, corner: tuple[int, int]) -> dict[str, np.ndarray]:
        """The window {"image", "size"} of a record; evaluation resizes exactly."""
        image = decode(record.image, self.channels, record.name, upright=record.upright)
        image = image[:, ::-1] if view.mirrored else image
        return self.padded(image=self.crop(np.ascontiguousarray(image), view[:2], corner, "exact"))

    def __call__(self, record: Record, rng: object = None) -> dict[str, np.ndarray]:
        record = self.decoded(record)
        old = record.image.shape[:2]
        new = resized_to(*old, min(self.size), LONGEST * min(self.size))
        corner = tuple(max(n - s, 0) // 2 for n, s in zip(new, self.size, strict=True))
        labels = nearest(self.labels(record, old), new, corner, self.size)
        image = self.crop(record.image, new, corner, "exact")
        return self.padded(image=image, segmentation=labels)


def window_stride(stride: int, size: tuple[int, int]) -> tuple[int, int]:
    """`SegmentEvalTransform.stride` of so many pixels; 0: two thirds of the shorter side (341)."""
    stride = stride or max(1, min(size) * 2 // 3)
    return stride, stride


def picture_size(record: Record) -> tuple[int, int]:
    """Height and width of a record's picture, from the head of its file. Raises DecodeError."""
    if isinstance(record.image, np.ndarray):
        return record.image.shape[:2]
    try:
        with Image.open(io.BytesIO(record.image)) as opened:
            width, height = opened.size
            turned = record.upright and opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except Exception as e:  # Pillow raises OSError, ValueError, SyntaxError, struct.error, ...
        raise DecodeError(f"{record.name}: cannot be decoded: {e}") from e
    return (width, height) if turned else (height, width)
