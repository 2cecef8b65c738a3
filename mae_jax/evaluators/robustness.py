"""The robustness benchmarks of the paper's table 13: their data, their classes, their score.

| | ViT-B | ViT-L | ViT-H | ViT-H at 448 px | supervised B / L / H |
|---|---|---|---|---|---|
| `c`, mean corruption error | 51.7 | 41.8 | 33.8 | 36.8 | 45.8 / 42.3 / 41.3 |
| `a`, top-1 | 35.9 | 57.1 | 68.2 | 76.7 | 27.2 / 29.6 / 33.1 |
| `r`, top-1 | 48.3 | 59.9 | 64.4 | 66.5 | 49.4 / 50.9 / 50.3 |
| `sketch`, top-1 | 34.5 | 45.3 | 49.6 | 50.9 | 35.6 / 37.5 / 38.0 |

Models fine-tuned on ImageNet and nothing else. For `c` lower is better.
"""

import concurrent.futures
import dataclasses
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from mae_jax import UserError
from mae_jax.data.sources import Source
from mae_jax.data.tfds_source import find_dataset

# AlexNet's error, mean over the severities: what ImageNet-C measures errors in (Hendrycks and
# Dietterich, arXiv 1903.12261, section 4.1; values of the evaluation script they released).
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """How a benchmark is evaluated."""

    data: tuple[str, ...]  # TFDS data sets
    split: str
    crop: float = 0.0  # over the resized side; 0 for the usual one
    subset: bool = False  # only classes that occur in the set can be predicted


def corrupted(corruption: str) -> tuple[str, ...]:
    """The data sets of one corruption, by severity."""
    return tuple(f"imagenet2012_corrupted/{corruption}_{severity}" for severity in range(1, 6))


# ImageNet-A and -R hold 200 classes of ImageNet's 1000, and their labels are ImageNet's. The images
# of ImageNet-C are centre crops of 224 pixels already.
BENCHMARKS = {
    "a": Benchmark(("imagenet_a",), "test", subset=True),
    "r": Benchmark(("imagenet_r",), "test", subset=True),
    "sketch": Benchmark(("imagenet_sketch",), "test"),
    "c": Benchmark(sum(map(corrupted, ALEXNET_ERRORS), ()), "validation", crop=1.0),
}


def require_present(data: Sequence[str], data_dir: str) -> None:
    """Raises UserError that tells which data sets are missing and how to get them."""
    missing: dict[str, UserError] = {}
    for name in data:
        try:
            find_dataset(name, data_dir)
        except UserError as error:
            missing[name] = error
    if missing:
        first, *others = missing
        more = f"\nLikewise {len(others)} more: {', '.join(others)}" if others else ""
        raise UserError(f"{missing[first]}{more}")


def occurring_classes(source: Source, classes: int) -> np.ndarray:
    """The classes below `classes` that some record has, ascending: [S] int32; decodes nothing."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        labels = np.fromiter(pool.map(lambda i: source[i].label, range(len(source))), np.int32)
    return np.unique(labels[(labels >= 0) & (labels < classes)])


def corruption_errors(errors: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Top-1 errors at each severity in percent of AlexNet's; the mean of all is the mCE."""
    return {k: 100 * statistics.fmean(e) / ALEXNET_ERRORS[k] for k, e in errors.items()}
