"""Sheets [H, W, 3] uint8: reconstructions, augmentations, predictions (paper figures 2 to 4)."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GREY = 128
MIN_SIDE = 112  # pixels: small images are enlarged so that people can see them
GAP = 6
ROOM = 1200  # pixels: rows stand side by side up to this width
FONT = ImageFont.load_default(13)
LINE = 18  # pixels a line of text takes
BLACK, FAINT, GREEN, RED = "black", "dimgrey", "darkgreen", "firebrick"

Line = tuple[str, str]  # text and colour


def reconstruction_grid(
    images: np.ndarray,
    mask: np.ndarray,
    loss: np.ndarray | None = None,
    pixels: np.ndarray | None = None,
    *,
    names: Sequence[str],
    title: str,
    note: str,
) -> np.ndarray:
    """For every image the original, what the model sees, what it predicts, and both together.

    Args:
      images: [B, H, W, C] uint8. Of other channel counts than 1 and 3 the first three are shown.
      mask, loss, pixels: of `models.inference.reconstruct`; without pixels two columns remain, and
        without loss the mask alone is told of.
      note: of the model's target, shown below the title.
    """
    batch, height, width, _ = images.shape
    side = round((height * width / mask.shape[1]) ** 0.5)  # of a patch
    removed = mask.reshape(batch, height // side, width // side)
    removed = removed.repeat(side, axis=1).repeat(side, axis=2)[..., None] > 0  # [B, H, W, 1]
    masked = np.where(removed, np.uint8(GREY), images)
    shown = {"original": images, f"{mask.mean():.0%} masked": masked}
    if pixels is not None:
        shown["predicted patches"] = np.where(removed, pixels, np.uint8(GREY))
        shown["predicted + visible"] = pixels
    captions = [short_name(name) for name in names]
    if loss is not None:
        title = f"{title}   mean loss {loss.mean():.4f}"
        captions = [f"{x}   loss {value:.4f}" for x, value in zip(captions, loss, strict=True)]
    return sheet_of(
        np.stack(list(shown.values()), axis=1),
        [[[(caption, BLACK)]] for caption in captions],
        title=title,
        note=note,
        columns=tuple(shown),
    )


def image_grid(images: np.ndarray, title: str, columns: int = 8) -> np.ndarray:
    """Images [B, H, W, C] uint8 side by side, `columns` in a row."""
    return sheet_of(*_in_rows(images, [[]] * len(images), columns), title=title)


def prediction_grid(
    images: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
    *,
    names: Sequence[str],
    class_names: Sequence[str] | None,
    title: str,
    columns: int = 4,
) -> np.ndarray:
    """Images [B, H, W, C] uint8 with their class and a classifier's, green where it is right.

    `probabilities`: [B, K]; `class_names`: K, or None to show numbers.
    """
    classes = class_names or [str(k) for k in range(probabilities.shape[1])]
    best = probabilities.argmax(axis=1)  # [B]
    lines = [
        [
            (short_name(name), FAINT),
            (f"is {classes[label]}", BLACK),
            (f"taken for {classes[k]} ({scores[k]:.0%})", GREEN if k == label else RED),
        ]
        for name, label, k, scores in zip(names, labels, best, probabilities, strict=True)
    ]
    title = f"{title}   {(best == labels).sum()} of {len(labels)} right"
    pictures, lines = _in_rows(images, lines, columns)
    return sheet_of(pictures, lines, title=title, min_side=2 * MIN_SIDE)


def short_name(name: str) -> str:
    """A record's name without the folders a file lies in."""
    start, bracket, path = name.rpartition("(")
    return start.rpartition("/")[2] + bracket + path.rpartition("/")[2]


def _in_rows(
    images: np.ndarray, lines: list[list[Line]], columns: int
) -> tuple[np.ndarray, list[list[list[Line]]]]:
    """Images as [R, K, H, W, C], white where the last row is not full, and their lines."""
    columns = min(columns, len(images))
    missing = -len(images) % columns
    white = np.full((missing, *images.shape[1:]), 255, np.uint8)
    pictures = np.concatenate([images, white]).reshape(-1, columns, *images.shape[1:])
    lines = lines + [[]] * missing
    return pictures, [lines[start : start + columns] for start in range(0, len(lines), columns)]


def sheet_of(
    pictures: np.ndarray,
    lines: list[list[list[Line]]],
    *,
    title: str,
    note: str = "",
    columns: Sequence[str] = (),
    min_side: int = MIN_SIDE,
) -> np.ndarray:
    """Lays out pictures [R, K, H, W, C] uint8 above lists of lines, [R][K] or, row-wide, [R][1].

    Rows with headings, K `columns`, stand in as many blocks as there is room for.
    """
    count, across, height, width, channels = pictures.shape
    zoom = max(1, -(-min_side // max(height, width)))
    rgb = pictures[..., np.arange(3) % min(channels, 3)]
    rgb = rgb.repeat(zoom, axis=2).repeat(zoom, axis=3)
    height, width = height * zoom, width * zoom
    block = across * (width + GAP) - GAP
    blocks = max(1, min(count // 2, ROOM // block)) if columns else 1
    rows = -(-count // blocks)
    whole = blocks * (block + 3 * GAP) - 3 * GAP
    header = [(text, BLACK) for text in _wrapped(title, whole)]
    header += [(text, FAINT) for text in _wrapped(note, whole)]
    below = max(len(cell) for row in lines for cell in row) * LINE
    row_height = height + below + GAP
    top = GAP + len(header) * LINE + (LINE if columns else 0) + (GAP if header else 0)
    sheet = Image.new("RGB", (whole + 2 * GAP, top + rows * row_height), "white")
    draw = ImageDraw.Draw(sheet)

    def write(texts: Sequence[Line], left: int, y: int, room: int) -> None:
        for number, (text, colour) in enumerate(texts):
            draw.text((left, y + number * LINE), fitting(text, room), fill=colour, font=FONT)

    write(header, GAP, GAP, whole)
    for index in range(count):
        left = GAP + index // rows * (block + 3 * GAP)
        y = top + index % rows * row_height
        for column in range(across):
            place = left + column * (width + GAP)
            if columns and y == top:
                write([(columns[column], BLACK)], place, top - LINE, width)
            picture = Image.fromarray(np.ascontiguousarray(rgb[index, column]))
            sheet.paste(picture, (place, y))
        span = across // len(lines[index])  # pictures a list of lines stands below
        for number, texts in enumerate(lines[index]):
            room = span * (width + GAP) - GAP
            write(texts, left + number * (room + GAP), y + height, room)
    return np.asarray(sheet)


def _wrapped(text: str, room: int) -> list[str]:
    """Lines of at most `room` pixels."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and FONT.getlength(f"{lines[-1]} {word}") <= room:
            lines[-1] += f" {word}"
        elif text:
            lines.append(word)
    return lines


def fitting(text: str, room: int) -> str:
    """The text, without its middle where it is longer than `room` pixels."""
    short, kept = text, len(text)
    while kept > 2 and FONT.getlength(short) > room:
        kept -= 1
        short = f"{text[: kept // 2]}…{text[kept // 2 - kept :]}"
    return short
