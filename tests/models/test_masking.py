import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.masking import (
    SAMPLERS,
    block_mask,
    choose_masking,
    mask_problems,
    masking_from_scores,
    num_kept,
    random_scores,
    sample_masking,
    scatter_tokens,
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


def test_scattered_tokens_lie_at_their_places_and_get_the_gradients_of_these():
    masking = sample_masking("random", jax.random.split(jax.random.key(0), 3), (2, 4), 0.6)
    rng = np.random.default_rng(0)
    tokens, weights = rng.normal(size=(3, 3, 5)), rng.normal(size=(3, 8, 5))
    kept = (masking.mask == 0)[:, :, None]
    expected, gradient = np.zeros((3, 8, 5)), np.zeros((3, 3, 5))
    for image, ids in enumerate(np.asarray(masking.ids_keep)):
        expected[image, ids], gradient[image] = tokens[image], weights[image, ids]
    place = lambda tokens: jnp.where(kept, scatter_tokens(tokens, masking), 0)  # noqa: E731
    placed, back = jax.vjp(place, jnp.asarray(tokens))
    np.testing.assert_allclose(placed, expected, rtol=1e-6)
    np.testing.assert_allclose(back(jnp.asarray(weights, placed.dtype))[0], gradient, rtol=1e-6)
    assert "scatter-add" not in str(
        jax.make_jaxpr(jax.grad(lambda x: place(x).sum()))(placed[:, :3])
    )


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


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize("unit", [1, 2])
@pytest.mark.parametrize(("kind", "grid"), [("random", (6, 10)), ("block", (10, 14))])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.6, 0.75, 0.95])
def test_every_mask_removes_exactly_as_many_squares_as_asked(kind, grid, ratio, unit):
    size = (grid[0] * unit, grid[1] * unit)
    assert not list(mask_problems(kind, size, ratio, unit))
    sample = jax.jit(lambda keys: sample_masking(kind, keys, size, ratio, unit).mask)
    mask = np.asarray(sample(keys_of(40)))
    kept = int(grid[0] * grid[1] * (1 - ratio))
    assert (mask.sum(axis=1) == (grid[0] * grid[1] - kept) * unit**2).all()
    squares = mask.reshape(40, grid[0], unit, grid[1], unit).transpose(0, 1, 3, 2, 4)
    squares = squares.reshape(40, -1, unit**2)
    np.testing.assert_array_equal(squares.min(axis=2), squares.max(axis=2))
    # Of independent draws hardly any two are alike.
    assert len(np.unique(mask, axis=0)) >= 35


def beit_mask(rng, height, width, removed):
    """BEiT's procedure, written from its description: rectangles of area U(16, room)."""
    mask, count = np.zeros((height, width), bool), 0
    while count < removed:
        room, new = removed - count, 0
        for _ in range(10):
            area = rng.uniform(*sorted((16, room)))
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
                block = mask[top : top + h, left : left + w]
                new = h * w - block.sum()
                if 0 < new <= room:
                    block[:] = True
                    count += new
                    break
                new = 0
        if not new:
            break
    return mask


@pytest.mark.parametrize(
    ("grid", "removed", "mean"),
    # Of 3,000 masks that BEiT's own code made on 14 x 14: 74.5 of 75 and 146.4 of 147.
    [((14, 14), 75, 74.5), ((14, 14), 147, 146.4), ((8, 16), 64, None)],
)
def test_blocks_are_distributed_as_beits(grid, removed, mean):
    sample = jax.jit(jax.vmap(lambda key: block_mask(key, grid, removed)))
    ours = np.asarray(sample(keys_of(3000)))
    rng = np.random.default_rng(0)
    theirs = np.stack([beit_mask(rng, *grid, removed) for _ in range(1000)])
    a, b = ours.sum(axis=(1, 2)), theirs.sum(axis=(1, 2))
    assert a.max() == removed
    error = math.hypot(a.std() / 3000**0.5, b.std() / 1000**0.5)
    assert abs(a.mean() - b.mean()) < 4 * error
    if mean:
        assert abs(a.mean() - mean) < 0.15
    # Where a patch lies decides how often it is hidden: rarely in a corner.
    assert abs(ours.mean(axis=0) - theirs.mean(axis=0)).max() < 4.5 * math.hypot(
        0.5 / 3000**0.5, 0.5 / 1000**0.5
    )
    assert ours[:, 0, 0].mean() < 0.8 * ours[:, grid[0] // 2, grid[1] // 2].mean()
    # Both are of one piece as much: pairs of hidden neighbours.
    pairs = [(x[:, 1:] & x[:, :-1]).sum(axis=(1, 2)) for x in (ours, theirs)]
    error = math.hypot(pairs[0].std() / 3000**0.5, pairs[1].std() / 1000**0.5)
    assert abs(pairs[0].mean() - pairs[1].mean()) < 4 * error


def test_a_block_mask_is_its_blocks_and_random_patches_up_to_the_number():
    # 14 x 14 at 75 %: `block_scores` splits a key, the first half of it places the blocks.
    keys = keys_of(50)
    place = jax.jit(jax.vmap(lambda key: block_mask(jax.random.split(key)[0], (14, 14), 147)))
    blocks = np.asarray(place(keys)).reshape(50, -1)
    mask = np.asarray(jax.jit(lambda k: sample_masking("block", k, (14, 14), 0.75).mask)(keys))
    assert (mask[blocks] == 1).all()
    assert 0 < (mask.sum(axis=1) - blocks.sum(axis=1)).max() < 40


def test_grid_keeps_the_same_corner_of_every_2_by_2_patches():
    mask = np.asarray(sample_masking("grid", keys_of(3), (4, 6), 0.75).mask).reshape(3, 4, 6)
    expected = np.ones((4, 6))
    expected[::2, ::2] = 0
    np.testing.assert_array_equal(mask, np.stack([expected] * 3))


def test_masks_of_a_file_are_each_drawn_as_often():
    masks = np.random.default_rng(0).permuted(np.arange(12) < 5, axis=0)
    masks = np.stack([np.roll(masks, i) for i in range(4)])
    masking = choose_masking(keys_of(4000), masks)
    mask = np.asarray(masking.mask)
    which = (mask[:, None] == masks[None]).all(axis=2)  # [4000, 4]
    assert which.any(axis=1).all()
    np.testing.assert_allclose(which.mean(axis=0), 0.25, atol=0.03)  # 4 standard deviations
    visible = np.take_along_axis(mask, np.asarray(masking.ids_keep), axis=1)
    assert visible.shape == (4000, 7)
    assert not visible.any()


@pytest.mark.parametrize(
    ("kind", "grid", "ratio", "unit", "message"),
    [
        ("grid", (3, 4), 0.75, 1, "3 x 4 patches has an odd side"),
        ("grid", (6, 6), 0.75, 2, "3 x 3 squares has an odd side"),
        ("grid", (4, 4), 0.5, 1, "mask.ratio is 0.75, not 0.5"),
        ("block", (4, 14), 0.5, 1, "4 x 14 patches has no room, BEiT's blocks take 16 or more"),
        ("random", (6, 6), 0.99, 2, "mask.ratio = 0.99 keeps 0 of 9 squares"),
        ("random", (6, 5), 0.5, 2, "squares of 2 x 2 patches do not fill a grid of 6 x 5 patches"),
    ],
)
def test_masks_that_cannot_be_drawn_are_named(kind, grid, ratio, unit, message):
    assert any(message in problem for problem in mask_problems(kind, grid, ratio, unit))
