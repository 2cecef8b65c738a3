import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.masking import (
    masking_from_scores,
    num_kept,
    random_scores,
    sample_masking,
    take_tokens,
)


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"),
    [
        (196, 0.75, 49),
        (196, 0.8, 39),
        (196, 0.9, 19),
        (196, 0.7, 58),
        (784, 0.9, 78),
        (200, 0.8, 39),
        (200, 0.9, 19),
        (256, 0.75, 64),
    ],
)
def test_number_of_visible_patches_truncates_like_the_reference(patches, ratio, kept):
    assert num_kept(patches, ratio) == kept


def test_lowest_scores_stay_and_ids_restore_inverts_the_shuffle():
    scores = np.random.default_rng(0).random((5, 12)).astype(np.float32)
    masking = masking_from_scores(jnp.asarray(scores), 4)
    for row in range(5):
        order = np.argsort(scores[row])
        np.testing.assert_array_equal(masking.ids_keep[row], order[:4])
        np.testing.assert_array_equal(order[np.asarray(masking.ids_restore[row])], np.arange(12))
        visible = np.flatnonzero(np.asarray(masking.mask[row]) == 0)
        assert set(visible) == set(order[:4])


def test_every_image_has_its_own_mask_and_every_patch_the_same_chance():
    keys = jax.random.split(jax.random.key(0), 4000)
    masking = sample_masking("random", keys, (4, 4), 0.75)
    mask = np.asarray(masking.mask)
    np.testing.assert_array_equal(mask.sum(axis=1), 12)
    # 4000 draws of probability 0.75: standard deviation 0.0068.
    np.testing.assert_allclose(mask.mean(axis=0), 0.75, atol=0.03)
    assert len(np.unique(mask, axis=0)) > 1000  # of 1820 possible


def test_mask_depends_on_the_images_key_alone():
    keys = jax.random.split(jax.random.key(7), 6)
    together = sample_masking("random", keys, (3, 5), 0.6)
    alone = sample_masking("random", keys[4:5], (3, 5), 0.6)
    np.testing.assert_array_equal(together.ids_keep[4], alone.ids_keep[0])


def test_random_scores_have_one_entry_a_patch():
    assert random_scores(jax.random.key(0), (3, 5)).shape == (15,)


def test_take_tokens_picks_rows_per_image():
    tokens = np.random.default_rng(1).normal(size=(3, 6, 4)).astype(np.float32)
    ids = np.asarray([[5, 0], [1, 1], [2, 4]])
    picked = take_tokens(jnp.asarray(tokens), jnp.asarray(ids))
    np.testing.assert_array_equal(picked, np.stack([tokens[i][ids[i]] for i in range(3)]))
