import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.models.patches import denormalize, normalize, patchify, unpatchify

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = np.random.default_rng(0).integers(0, 256, (64, 6, 5, 3), np.uint8)


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


def test_normalize_is_the_formula_and_denormalize_its_inverse():
    out = jax.jit(lambda x: normalize(x, MEAN, STD))(IMAGES)
    assert out.dtype == jnp.float32
    expected = (IMAGES / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_array_equal(denormalize(out, MEAN, STD), IMAGES)


def test_denormalize_clips_what_no_picture_can_show():
    out = denormalize(jnp.array([[[[-9.0], [9.0]]]]), (0.5,), (0.5,))
    assert out.dtype == jnp.uint8
    assert out.ravel().tolist() == [0, 255]
