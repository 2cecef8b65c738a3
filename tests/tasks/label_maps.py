"""A data set of label maps that is learnt in seconds: rectangles, each class in a colour."""

import numpy as np
from PIL import Image

COLOURS = np.array([[60, 60, 60], [220, 40, 40], [40, 200, 60], [50, 80, 230]], np.uint8)
NAMES = ["ground", "red", "green", "blue"]


def picture(rng, height, width):
    """Pixels [H, W, 3] and label map [H, W], as ADE20K writes it: 0 is other, 1 the first class."""
    labels = np.ones((height, width), np.uint8)
    for number in (2, 3, 4):
        top, left = rng.integers(0, height - 12), rng.integers(0, width - 12)
        h, w = rng.integers(8, height // 2), rng.integers(8, width // 2)
        labels[top : top + h, left : left + w] = number
    pixels = COLOURS[labels - 1].astype(int) + rng.integers(-20, 20, (height, width, 3))
    labels[:2] = 0
    return pixels.clip(0, 255).astype(np.uint8), labels


def write(folder, training=12, validation=5, seed=0):
    """ADE20K's layout below `folder`, pictures of several sizes."""
    rng = np.random.default_rng(seed)
    for split, count in (("training", training), ("validation", validation)):
        for place in ("images", "annotations"):
            (folder / place / split).mkdir(parents=True)
        for i in range(count):
            height, width = 40 + 8 * (i % 3), 56 - 8 * (i % 2)
            pixels, labels = picture(rng, height, width)
            Image.fromarray(pixels).save(folder / "images" / split / f"{i}.png")
            Image.fromarray(labels).save(folder / "annotations" / split / f"{i}.png")
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return folder
