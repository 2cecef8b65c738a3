"""A small random model for the tests of this folder."""

import jax
import numpy as np

from mae_jax.models.spec import ModelSpec

SMALL = ModelSpec((32, 32), 8, 3, 32, 2, 4, 16, 1, 2, "norm_pixel", 0.75)


def random_params(d=SMALL, seed=0):
    """Every parameter random, position tables included."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), d.abstract_params()
    )


def classifier_params(d, seed=0):
    """A fine-tuned tree: trained positions, a head, `fc_norm` in place of the final norm."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.standard_normal(shape, np.float32)

    encoder = dict(random_params(SMALL, seed)["encoder"])
    patches = d.grid[0] * d.grid[1]
    encoder["pos_embed"] = draw(1, 1 + patches, d.width)
    head = {"kernel": draw(d.width, d.classes), "bias": draw(d.classes)}
    if d.pool == "cls":
        return {"encoder": encoder, "head": head}
    del encoder["norm"]
    norm = {"scale": draw(d.width), "bias": draw(d.width)}
    return {"encoder": encoder, "fc_norm": norm, "head": head}


def assert_same_tree(a, b):
    """Bit for bit, names included."""
    jax.tree.map(np.testing.assert_array_equal, a, b)
