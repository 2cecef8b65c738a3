import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.augment.pixels import example_keys, random_flip

KEY = jax.random.key(5)
IMAGES = np.random.default_rng(0).integers(0, 256, (64, 6, 5, 3), np.uint8)


def test_keys_do_not_depend_on_how_the_batch_is_divided():
    whole = jax.random.key_data(example_keys(KEY, 7, jnp.arange(8)))
    parts = [jnp.array([5, 1, 6]), jnp.array([0, 2, 3, 4, 7])]
    for part in parts:
        got = jax.random.key_data(example_keys(KEY, jnp.int32(7), part))
        np.testing.assert_array_equal(got, whole[part])


def test_keys_differ_between_steps_and_positions():
    keys = [jax.random.key_data(example_keys(KEY, s, jnp.arange(20))) for s in range(20)]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 400


def test_flip_mirrors_about_half_of_the_images_left_to_right():
    keys = example_keys(KEY, 0, jnp.arange(64))
    out = np.asarray(jax.jit(random_flip)(IMAGES, keys))
    assert out.dtype == np.uint8
    flipped = np.array([(o == i[:, ::-1]).all() for o, i in zip(out, IMAGES, strict=True)])
    kept = np.array([(o == i).all() for o, i in zip(out, IMAGES, strict=True)])
    assert (flipped ^ kept).all()
    assert 20 <= flipped.sum() <= 44  # 32 +- 3 standard deviations
