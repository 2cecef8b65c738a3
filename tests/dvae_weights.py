"""Random weights of tokenizers, by numpy: quicker than compiling what draws them."""

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.models.dvae import DVAE


def random_dvae(shape, channels=3, seed=0):
    """Parameters of a `DVAE` that keep activations and codes apart."""
    rng, x = np.random.default_rng(seed), jnp.zeros((1, 8, 8, channels))
    tree = jax.eval_shape(DVAE(shape, channels).init, jax.random.key(0), x)["params"]

    def draw(leaf):
        deviation = np.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) == 4 else 0.1
        return rng.normal(0, deviation, leaf.shape).astype(np.float32)

    return jax.tree.map(draw, tree)
