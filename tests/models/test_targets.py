import jax.numpy as jnp
import numpy as np

from mae_jax.models.targets import norm_pixel, patchify, to_pixels, unpatchify


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


def test_norm_pixel_uses_the_unbiased_variance_of_the_whole_patch():
    patches = np.random.default_rng(0).normal(3, 5, size=(2, 4, 48)).astype(np.float32)
    mean = patches.mean(-1, keepdims=True)
    deviation = np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm_pixel(patches), (patches - mean) / deviation, atol=1e-5)


def test_all_zero_prediction_scores_just_below_one():
    # Section 1.6 of the reference digest: 0.9987 at 16 pixels, 0.9983 at 14.
    for patch_size, expected in ((16, 0.9987), (14, 0.9983)):
        patches = np.random.default_rng(0).normal(size=(1, 64, 3 * patch_size**2))
        loss = np.square(norm_pixel(patches.astype(np.float32))).mean()
        np.testing.assert_allclose(loss, expected, atol=5e-5)


def test_norm_pixel_predictions_return_to_pixels_by_the_true_patch_statistics():
    patches = np.random.default_rng(0).normal(3, 5, size=(2, 4, 48)).astype(np.float32)
    restored = to_pixels("norm_pixel", norm_pixel(patches), jnp.asarray(patches))
    np.testing.assert_allclose(restored, patches, atol=1e-4)
    np.testing.assert_array_equal(to_pixels("pixel", jnp.asarray(patches), None), patches)
