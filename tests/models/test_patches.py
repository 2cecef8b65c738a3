import jax.numpy as jnp
import numpy as np

from mae_jax.models.patches import patchify, unpatchify


def test_patches_are_row_major_with_channels_last():
    images = np.random.default_rng(0).normal(size=(2, 6, 9, 4)).astype(np.float32)
    patches = np.asarray(patchify(jnp.asarray(images), 3))
    assert patches.shape == (2, 6, 36)
    for row in range(2):
        for column in range(3):
            crop = images[:, row * 3 : row * 3 + 3, column * 3 : column * 3 + 3]
            np.testing.assert_array_equal(patches[:, row * 3 + column], crop.reshape(2, 36))


def test_unpatchify_inverts_patchify_on_rectangles():
    images = np.random.default_rng(0).normal(size=(2, 8, 12, 1)).astype(np.float32)
    restored = unpatchify(patchify(jnp.asarray(images), 4), 4, (8, 12))
    np.testing.assert_array_equal(restored, images)
