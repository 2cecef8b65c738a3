"""Sheets of pictures: reconstructions, augmentations, predictions (paper figures 2 to 4)."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from mae_jax.models.targets import patchify, to_pixels, unpatchify

COLUMNS = ("original", "masked", "reconstruction", "reconstruction + visible")
GREY = 128
MIN_SIDE = 112  # pixels: small images are enlarged so that people can see them
GAP = 4
HEADER = 18


def reconstruction_grid(
    images: np.ndarray,
    predictions: np.ndarray,
    mask: np.ndarray,
    *,
    patch_size: int,
    target: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    columns: tuple[str, ...] = COLUMNS,
) -> np.ndarray:
    """Four pictures a row, see `COLUMNS`, for every image.

    Args:
      images: [B, H, W, C] uint8. Of other channel counts than 1 and 3 the first three are shown.
      predictions: [B, L, p*p*C], the decoder's output in the space of `target`.
      mask: [B, L], 1 = removed.
      mean, std: channel statistics the model's input is normalised with.
      columns: what is written above the four pictures.

    Returns:
      [height, width, 3] uint8.
    """
    _, height, width, channels = images.shape
    mean_array, std_array = np.asarray(mean), np.asarray(std)
    normalised = (images / 255.0 - mean_array) / std_array
    patches = patchify(jnp.asarray(normalised, jnp.float32), patch_size)  # [B, L, p*p*C]
    pixels = to_pixels(target, jnp.asarray(predictions), patches)
    pixels = np.asarray(unpatchify(pixels, patch_size, (height, width)))  # [B, H, W, C]
    reconstruction = np.clip((pixels * std_array + mean_array) * 255, 0, 255).round()

    removed = np.repeat(np.asarray(mask)[:, :, None], patch_size**2 * channels, axis=2)
    removed = np.asarray(unpatchify(jnp.asarray(removed), patch_size, (height, width)))
    masked = np.where(removed > 0, GREY, images)
    pasted = np.where(removed > 0, reconstruction, images)
    rows = np.stack([images, masked, reconstruction, pasted], axis=1)  # [B, 4, H, W, C]
    return _sheet(_as_rgb(rows.astype(np.uint8)), columns)


def image_grid(images: np.ndarray, columns: int = 8) -> np.ndarray:
    """Images [B, H, W, C] uint8 side by side, `columns` in a row: [height, width, 3] uint8."""
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    blank = np.full_like(rows[-1][:1], 255)
    missing = min(columns, len(images)) - len(rows[-1])
    rows[-1] = np.concatenate([rows[-1], *[blank] * missing])
    return _sheet(_as_rgb(np.stack(rows)), ("",) * rows[0].shape[0])


def prediction_grid(
    images: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str] | None,
    columns: int = 4,
) -> np.ndarray:
    """Images with their class and the one a classifier takes them for, green where it is right.

    Args:
      images: [B, H, W, C] uint8, with labels [B].
      probabilities: [B, K].
      class_names: K names; None shows numbers.

    Returns:
      [height, width, 3] uint8.
    """
    side = max(images.shape[1:3])
    zoom = max(1, -(-2 * MIN_SIDE // side))
    pictures = _as_rgb(images).repeat(zoom, axis=1).repeat(zoom, axis=2)
    height, width = pictures.shape[1:3]
    cell_h, cell_w = height + 2 * HEADER + GAP, width + GAP
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (columns * cell_w + GAP, rows * cell_h + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    name = [str(k) for k in range(probabilities.shape[1])] if class_names is None else class_names
    for i, (picture, label, scores) in enumerate(zip(pictures, labels, probabilities, strict=True)):
        left, top = GAP + i % columns * cell_w, GAP + i // columns * cell_h
        best = int(scores.argmax())
        sheet.paste(Image.fromarray(picture), (left, top))
        draw.text((left, top + height + 2), f"is {name[label]}", fill="black")
        text = f"taken for {name[best]} ({scores[best]:.0%})"
        colour = "darkgreen" if best == label else "firebrick"
        draw.text((left, top + height + HEADER), text, fill=colour)
    return np.asarray(sheet)


def _as_rgb(rows: np.ndarray) -> np.ndarray:
    channels = rows.shape[-1]
    if channels == 1:
        return np.repeat(rows, 3, axis=-1)
    if channels == 2:
        return np.concatenate([rows, rows[..., :1]], axis=-1)
    return rows[..., :3]


def _sheet(rows: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Lays out [B, 4, H, W, 3] with the names of the columns above."""
    count, columns, height, width, _ = rows.shape
    zoom = max(1, -(-MIN_SIDE // max(height, width)))
    rows = rows.repeat(zoom, axis=2).repeat(zoom, axis=3)
    cell_h, cell_w = height * zoom + GAP, width * zoom + GAP
    sheet = Image.new("RGB", (columns * cell_w + GAP, HEADER + count * cell_h + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(names):
        draw.text((GAP + column * cell_w, 3), name, fill="black")
        for row in range(count):
            corner = (GAP + column * cell_w, HEADER + row * cell_h)
            sheet.paste(Image.fromarray(rows[row, column]), corner)
    return np.asarray(sheet)
