"""Pictures of semantic segmentation: what training starts with, and what a model predicts."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image, ImageDraw

from mae_jax.data.segmentation import IGNORED
from mae_jax.data.splits import Splits
from mae_jax.distributed.mesh import local_positions
from mae_jax.models.segmenter import pixel_classes
from mae_jax.pictures.grids import (
    BLACK,
    FAINT,
    FONT,
    GAP,
    GREY,
    LINE,
    MIN_SIDE,
    fitting,
    image_grid,
    sheet_of,
    short_name,
)
from mae_jax.pictures.in_training import Drawing
from mae_jax.storage.files import write_png
from mae_jax.train.state import TrainState
from mae_jax.train.task import Segmenting

STRENGTH = 0.6  # of the colours laid over a picture
LEVELS = 8  # of red, green and blue, that colours of classes are chosen from


@functools.cache
def palette(classes: int) -> np.ndarray:
    """A colour for every class, the same whatever their number: uint8 [256, 3].

    Each is as far as can be from all before it, from black, white and grey. Grey are those from
    `classes` on, `IGNORED` among them.
    """
    levels = np.linspace(0, 255, LEVELS).round()
    choice = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    taken = choice[:, None] - np.array([[0], [GREY], [255]])
    distance = np.linalg.norm(taken, axis=-1).min(axis=1)  # [LEVELS ** 3], of the nearest taken
    colours = np.full((IGNORED + 1, 3), GREY, np.uint8)
    for k in range(classes):
        colours[k] = choice[distance.argmax()]
        distance = np.minimum(distance, np.linalg.norm(choice - colours[k], axis=-1))
    return colours


def _laid_over(images: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Images [B, H, W, C] uint8 tinted by their label maps [B, H, W]: uint8 [B, H, W, 3]."""
    rgb = images[..., np.arange(3) % min(images.shape[3], 3)]
    return (rgb * (1 - STRENGTH) + colours[labels] * STRENGTH).round().astype(np.uint8)


def _legend(
    labels: np.ndarray, size: tuple[int, int], colours: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    """The classes of some label maps, the most frequent first, as a picture: uint8 [*size, 3]."""
    counts = np.bincount(labels.ravel(), minlength=IGNORED + 1)[:IGNORED]
    present = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    room = size[0] // LINE
    shown = present if len(present) <= room else present[: room - 1]
    legend = Image.new("RGB", size[::-1], "white")
    draw = ImageDraw.Draw(legend)
    for number, k in enumerate(shown):
        y, square = number * LINE, LINE - GAP
        draw.rectangle((0, y, square, y + square), fill=tuple(map(int, colours[k])))
        draw.text((LINE, y), fitting(names[k], size[1] - LINE), fill=BLACK, font=FONT)
    if len(shown) < len(present):
        text = f"and {len(present) - len(shown)} more"
        draw.text((LINE, len(shown) * LINE), text, fill=FAINT, font=FONT)
    return np.asarray(legend)


def segmentation_grid(
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    *,
    names: Sequence[str],
    classes: int,
    class_names: Sequence[str] | None,
    title: str,
) -> np.ndarray:
    """For every image itself, its label map, the predicted one, and what the colours mean.

    Args:
      images: [B, H, W, C] uint8.
      labels, predictions: class numbers [B, H, W]; `IGNORED` shows as grey.
      class_names: of the `classes`, or None to show numbers.
    """
    zoom = max(1, -(-2 * MIN_SIDE // max(images.shape[1:3])))  # here, for the text of the legend
    images, labels, predictions = (
        x.repeat(zoom, axis=1).repeat(zoom, axis=2) for x in (images, labels, predictions)
    )
    texts, colours = class_names or [str(k) for k in range(classes)], palette(classes)
    legends = [
        _legend(np.stack(pair), labels.shape[1:], colours, texts)
        for pair in zip(labels, predictions, strict=True)
    ]
    real = labels != IGNORED
    right = (real & (labels == predictions)).sum(axis=(1, 2)) / real.sum(axis=(1, 2)).clip(min=1)
    shown = {
        "image": images[..., np.arange(3) % min(images.shape[3], 3)],
        "labels": _laid_over(images, labels, colours),
        "predicted": _laid_over(images, predictions, colours),
        "": np.stack(legends),
    }
    lines = [
        [[(f"{short_name(name)}   {share:.1%} of the pixels right", BLACK)]]
        for name, share in zip(names, right, strict=True)
    ]
    return sheet_of(np.stack([*shown.values()], axis=1), lines, title=title, columns=tuple(shown))


def draw_segmentations(
    task: Segmenting, data: Splits, count: int, directory: epath.Path
) -> Drawing:
    """What a model takes the pixels of `count` pictures of the evaluation split for, of each the
    middle. The transform of that split is `SegmentEvalTransform`."""
    arrays, names = data.example_arrays(data.eval, count)
    images, labels, sizes = arrays["image"], arrays["segmentation"], arrays["size"]
    rows, columns = (np.arange(n) for n in labels.shape[1:])
    inside = (rows[:, None] < sizes[:, 0, None, None]) & (columns < sizes[:, 1, None, None])
    classes, class_names = data.eval_transform.classes, data.train.class_names

    def function(state: TrainState, images: jax.Array) -> jax.Array:
        logits = task.windows_logits(state, images, jnp.asarray(sizes))
        return pixel_classes(logits, labels.shape[1:]).astype(jnp.uint8)

    def draw(title: str, found: np.ndarray) -> np.ndarray:
        found = np.where(inside, found, np.uint8(IGNORED))
        texts = {"names": names, "classes": classes, "class_names": class_names}
        return segmentation_grid(images, labels, found, title=title, **texts)

    return Drawing(function, images, draw, directory, task.mesh)


def draw_crops(task: Segmenting, data: Splits, path: epath.Path, count: int = 16) -> None:
    """Training crops of step 0, of the first process, each left of its label map."""
    positions = local_positions(task.batch_size, task.mesh)
    with data.train_batches(positions, 0, 1) as batches:
        batch = next(batches)
    if jax.process_index() == 0:
        images, labels = batch["image"][:count], batch["segmentation"][:count]
        images = images[..., np.arange(3) % min(images.shape[3], 3)]
        tinted = _laid_over(images, labels, palette(data.eval_transform.classes))
        pairs = np.stack([images, tinted], axis=1).reshape(-1, *images.shape[1:])
        title = f"step 0: {len(images)} of {task.batch_size} crops, and right of each its labels"
        write_png(path, image_grid(pairs, f"{title} (grey: none)"))
