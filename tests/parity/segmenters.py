"""A small segmentation model with nothing at its initial value, and images for it."""

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from parity_models import random_params

from mae_jax.models.spec import ModelSpec

TINY_SEGMENTER = ModelSpec(
    image_size=(64, 64),
    patch_size=8,
    channels=3,
    width=48,
    depth=12,
    heads=4,
    classes=7,
    segment_taps=(3, 5, 7, 11),
    segment_width=48,
)


def random_segmenter(spec=TINY_SEGMENTER, seed=0):
    """Parameters with running `statistics`; tables, layer scales and statistics random too."""
    rng = np.random.default_rng(seed)
    flat = flatten_dict(random_params(spec, seed), sep="/")
    for path, x in flat.items():
        if path.endswith("/relative_bias"):
            flat[path] = rng.standard_normal(x.shape, np.float32)
        elif "layer_scale" in path:
            flat[path] = rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
        elif path.endswith("/var"):
            flat[path] = rng.uniform(0.5, 2, x.shape).astype(np.float32)
        elif path.endswith("/kernel") and x.ndim == 4:  # about as large as PyTorch draws them
            flat[path] = rng.standard_normal(x.shape, np.float32) / np.sqrt(np.prod(x.shape[:3]))
    return unflatten_dict(jax.tree.map(lambda x: x.astype(np.float32), flat), sep="/")
