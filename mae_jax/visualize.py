"""What a model reconstructs, as pictures (paper figures 2 to 4)."""

import os
import pathlib

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
) -> np.ndarray:
    """Four pictures a row, see `COLUMNS`, for every image.

    Args:
      images: [B, H, W, C] uint8. Of other channel counts than 1 and 3 the first three are shown.
      predictions: [B, L, p*p*C], the decoder's output in the space of `target`.
      mask: [B, L], 1 = removed.
      mean, std: channel statistics the model's input is normalised with.

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
    return _sheet(_as_rgb(rows.astype(np.uint8)))


def _as_rgb(rows: np.ndarray) -> np.ndarray:
    channels = rows.shape[-1]
    if channels == 1:
        return np.repeat(rows, 3, axis=-1)
    if channels == 2:
        return np.concatenate([rows, rows[..., :1]], axis=-1)
    return rows[..., :3]


def _sheet(rows: np.ndarray) -> np.ndarray:
    """Lays out [B, 4, H, W, 3] with the names of the columns above."""
    count, columns, height, width, _ = rows.shape
    zoom = max(1, -(-MIN_SIDE // max(height, width)))
    rows = rows.repeat(zoom, axis=2).repeat(zoom, axis=3)
    cell_h, cell_w = height * zoom + GAP, width * zoom + GAP
    sheet = Image.new("RGB", (columns * cell_w + GAP, HEADER + count * cell_h + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(COLUMNS):
        draw.text((GAP + column * cell_w, 3), name, fill="black")
        for row in range(count):
            corner = (GAP + column * cell_w, HEADER + row * cell_h)
            sheet.paste(Image.fromarray(rows[row, column]), corner)
    return np.asarray(sheet)


def save_png(sheet: np.ndarray, path: str | pathlib.Path) -> None:
    """Writes [height, width, 3] uint8 as PNG; the file appears complete or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    Image.fromarray(sheet).save(temporary, format="PNG")
    os.replace(temporary, path)
