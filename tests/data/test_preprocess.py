import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.data.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    denormalize,
    example_keys,
    normalize,
    random_flip,
)


def test_normalising_is_the_references_formula_and_is_undone():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), np.uint8)
    expected = (images / 255.0 - IMAGENET_MEAN) / IMAGENET_STD
    normalised = normalize(jnp.asarray(images), IMAGENET_MEAN, IMAGENET_STD)
    np.testing.assert_allclose(normalised, expected, atol=1e-5)
    np.testing.assert_array_equal(denormalize(normalised, IMAGENET_MEAN, IMAGENET_STD), images)


def test_statistics_of_another_channel_count_are_refused():
    with pytest.raises(ValueError, match="1 channels, but mean has 3"):
        normalize(jnp.zeros((1, 2, 2, 1), jnp.uint8), IMAGENET_MEAN, IMAGENET_STD)


def test_keys_depend_on_step_and_place_alone():
    key = jax.random.key(0)
    keys = example_keys(key, 5, jnp.arange(8))
    data = jax.random.key_data(keys)
    assert len(np.unique(data, axis=0)) == 8
    part = example_keys(key, 5, jnp.asarray([6, 2]))
    np.testing.assert_array_equal(jax.random.key_data(part), data[np.asarray([6, 2])])
    other = example_keys(key, 6, jnp.arange(8))
    assert (jax.random.key_data(other) != data).any(axis=1).all()


def test_half_of_the_images_are_mirrored_each_by_its_own_key():
    images = jnp.arange(4000 * 3, dtype=jnp.uint8).reshape(4000, 1, 3, 1)
    flipped = np.asarray(random_flip(images, jax.random.split(jax.random.key(0), 4000)))
    mirrored = (flipped == np.asarray(images)[:, :, ::-1]).all(axis=(1, 2, 3))
    same = (flipped == np.asarray(images)).all(axis=(1, 2, 3))
    assert (mirrored ^ same).all()
    assert 0.46 < mirrored.mean() < 0.54  # five standard deviations
