"""Pictures of semantic segmentation: what training starts with, and what a model predicts."""

import colorsys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mae_jax.data.segmentation import IGNORED
from mae_jax.data.splits import Splits
from mae_jax.distributed.mesh import local_positions
from mae_jax.pictures.grids import BLACK, FAINT, GAP, GREY, MIN_SIDE, Line, _in_rows, _sheet, _short
from mae_jax.pictures.in_training import Drawing
from mae_jax.storage.files import write_png
from mae_jax.train.state import TrainState
from mae_jax.train.task import Segmenting

STRENGTH = 0.6  # of the colours laid over a picture
GOLDEN = 0.618034  # turns between the hues of two classes, so that near numbers differ most
SHADES = ((0.95, 0.9), (0.6, 1.0), (0.95, 0.6), (0.45, 0.75))  # saturation and value, in turn


def palette(classes: int) -> np.ndarray:
    """A colour for every class, the same whatever their number: uint8 [256, 3].

    Those from `classes` on, `IGNORED` among them, are grey.
    """
    colours = np.full((IGNORED + 1, 3), GREY, np.uint8)
    for k in range(classes):
        rgb = colorsys.hsv_to_rgb(k * GOLDEN % 1, *SHADES[k % len(SHADES)])
        colours[k] = np.round(np.multiply(255, rgb))
    return colours


def _laid_over(images: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Images [B, H, W, C] uint8 tinted by their label maps [B, H, W]: uint8 [B, H, W, 3]."""
    rgb = images[..., np.arange(3) % min(images.shape[3], 3)]
    return (rgb * (1 - STRENGTH) + colours[labels] * STRENGTH).round().astype(np.uint8)


def _legend(
    labels: np.ndarray, colours: np.ndarray, class_names: Sequence[str] | None, most: int
) -> list[Line]:
    """The classes of label maps, the most frequent first, in their colours; at most so many."""
    counts = np.bincount(labels.ravel(), minlength=IGNORED + 1)[:IGNORED]
    present = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    lines = [
        (f"■ {class_names[k] if class_names else k}", "#{:02x}{:02x}{:02x}".format(*colours[k]))
        for k in present[:most]
    ]
    return lines + [(f"and {len(present) - most} more", FAINT)] * (len(present) > most)
