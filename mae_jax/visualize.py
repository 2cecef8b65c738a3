r"""What a model reconstructs, as pictures (paper figures 2 to 4).

On one's own pictures, from a workdir, an official full checkpoint or a Hugging Face folder:

    python -m mae_jax.visualize --weights=W --images a.jpg b.png --mask_ratio=0.5,0.9 \
        --output=grid.png
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from mae_jax.models.masking import sample_masking
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


def save_png(sheet: np.ndarray, path: str | pathlib.Path) -> None:
    """Writes [height, width, 3] uint8 as PNG; the file appears complete or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    Image.fromarray(sheet).save(temporary, format="PNG")
    os.replace(temporary, path)


def reconstruct_files(
    weights: str, files: Sequence[str], ratios: Sequence[float], *, seed: int, **known: object
) -> np.ndarray:
    """Reconstructions of picture files at several mask ratios, one block of rows a ratio.

    Args:
      weights: with a decoder; see `interop.checkpoint.open_checkpoint`.
      seed: of the masks.
      known: what the weights do not tell of themselves.

    Returns:
      [height, width, 3] uint8.

    Raises:
      ValueError, OSError: bad weights, no decoder, or a picture that cannot be read, by name.
    """
    # The trainer draws with this module too, and needs neither of these for it.
    from mae_jax.data.record import Record
    from mae_jax.data.transforms import EvalTransform
    from mae_jax.interop.build import build_mae
    from mae_jax.interop.checkpoint import open_checkpoint

    for ratio in ratios:
        if not 0 < ratio < 1:
            raise ValueError(f"--mask_ratio={ratio:g}: must lie between 0 and 1")
    checkpoint = open_checkpoint(weights, **known)
    d = checkpoint.description
    model, params = build_mae(d), checkpoint.params()
    transform = EvalTransform(size=d.image_size, channels=d.channels)
    pictures = [transform(Record(pathlib.Path(f).read_bytes(), -1, str(f))) for f in files]
    images = np.stack(pictures)  # [B, H, W, C] uint8
    x = ((images / 255.0 - np.asarray(d.mean)) / np.asarray(d.std)).astype(np.float32)
    keys = jax.random.split(jax.random.key(seed), len(files))
    sheets = []
    for ratio in ratios:
        masking = sample_masking("random", keys, d.grid, ratio)
        output = jax.jit(model.apply)({"params": params}, x, masking)
        sheets.append(
            reconstruction_grid(
                images,
                np.asarray(output.predictions),
                np.asarray(masking.mask),
                patch_size=d.patch_size,
                target=d.target,
                mean=d.mean,
                std=d.std,
                columns=(COLUMNS[0], f"masked {100 * ratio:g} %", *COLUMNS[2:]),
            )
        )
    return np.concatenate(sheets)


def main(argv: list[str] | None = None) -> None:
    """Entry point; bad input ends with its message and exit status 2, not with a traceback."""
    from mae_jax.interop import arguments

    parser = argparse.ArgumentParser(
        prog="python -m mae_jax.visualize", description="Draws what a model reconstructs."
    )
    parser.add_argument("--weights", required=True, help="workdir, file or folder, with decoder")
    parser.add_argument("--images", required=True, nargs="+", help="picture files")
    parser.add_argument("--output", required=True, help="the .png to write")
    parser.add_argument(
        "--mask_ratio", type=arguments.numbers, default=(0.75,), help="e.g. 0.5,0.75,0.9"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    arguments.add_known(parser)
    args = parser.parse_args(argv)
    try:
        if not args.output.endswith(".png"):
            raise ValueError(f"--output={args.output}: the result is a .png file")
        known = arguments.known(args)
        sheet = reconstruct_files(
            args.weights, args.images, args.mask_ratio, seed=args.seed, **known
        )
        save_png(sheet, args.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
