import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.masking import (
    SAMPLERS,
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
    assert random_scores(jax.random.key(0), (3, 5), 0.75).shape == (15,)


def test_take_tokens_picks_rows_per_image():
    tokens = np.random.default_rng(1).normal(size=(3, 6, 4)).astype(np.float32)
    ids = np.asarray([[5, 0], [1, 1], [2, 4]])
    picked = take_tokens(jnp.asarray(tokens), jnp.asarray(ids))
    np.testing.assert_array_equal(picked, np.stack([tokens[i][ids[i]] for i in range(3)]))


def test_a_sampler_may_depend_on_the_ratio(monkeypatch):
    """As many neighbouring columns as are removed, at a random place (as block masks need it)."""

    def columns(key, grid, ratio):
        hidden = round(grid[1] * ratio)
        start = jax.random.randint(key, (), 0, grid[1] - hidden + 1)
        column = jnp.arange(grid[1])
        removed = (column >= start) & (column < start + hidden)
        return jnp.broadcast_to(removed.astype(jnp.float32), grid).reshape(-1)

    monkeypatch.setitem(SAMPLERS, "columns", columns)
    masks = sample_masking("columns", jax.random.split(jax.random.key(0), 20), (3, 4), 0.5).mask
    masks = np.asarray(masks).reshape(20, 3, 4)
    assert (masks.sum(axis=(1, 2)) == 6).all()
    assert (masks == masks[:, :1]).all()
    assert len(np.unique(masks, axis=0)) == 3
