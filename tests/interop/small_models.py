"""A small random model for the tests of this folder."""

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.interop.build import build_mae
from mae_jax.interop.description import Description
from mae_jax.models.masking import masking_from_scores, num_kept

SMALL = Description((32, 32), 8, 3, 32, 2, 4, 16, 1, 2, "norm_pixel", 0.75)


def random_params(d=SMALL, seed=0):
    """Every parameter random."""
    model = build_mae(d)
    patches = d.grid[0] * d.grid[1]
    masking = masking_from_scores(jnp.zeros((1, patches)), num_kept(patches, 0.75))
    images = jnp.zeros((1, *d.image_size, d.channels))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images, masking)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), shapes)


def classifier_params(d, seed=0):
    """A fine-tuned tree: trained positions, a head, and `fc_norm` in place of the final norm."""
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
