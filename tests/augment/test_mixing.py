import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.augment.mixing import cutmix_box, mix, random_erasing, soft_targets
from mae_jax.augment.pixels import example_keys
from mae_jax.distributed.mesh import batch_sharding, make_mesh

RECIPE = {
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "probability": 1.0,
    "switch_probability": 0.5,
}


# Compiling takes nearly all the time of these tests, so functions are compiled once per shape and
# without LLVM's optimisations.
QUICK = {"xla_backend_optimization_level": 0}
erase = jax.jit(random_erasing, compiler_options=QUICK)
mix_quickly = jax.jit(
    mix, static_argnames=("mixup_alpha", "cutmix_alpha", "group"), compiler_options=QUICK
)


def keys(count, seed=3):
    return example_keys(jax.random.key(seed), 0, jnp.arange(count))


def normal_images(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# Soft targets


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets_are_the_formula(smoothing):
    targets = soft_targets(jnp.array([2, 0]), 5, smoothing)
    off, on = smoothing / 5, 1 - smoothing + smoothing / 5
    expected = [[off, off, on, off, off], [on, off, off, off, off]]
    assert targets.dtype == jnp.float32
    np.testing.assert_allclose(targets, expected, rtol=1e-6)


# Random erasing


def erased_boxes(height, width, count, probability=1.0):
    """top, left, height, width of the erased box of each image that has one [N, 4]."""
    out = np.asarray(erase(jnp.zeros((count, height, width, 1)), keys(count), probability))
    boxes = []
    for image in out[..., 0]:
        y, x = np.nonzero(image)
        if len(y):
            box = y.min(), x.min(), np.ptp(y) + 1, np.ptp(x) + 1
            assert len(y) == box[2] * box[3]  # one box, wholly filled
            boxes.append(box)
    return np.array(boxes)


def test_erased_box_has_the_recipes_area_aspect_and_place():
    h, w, n = 90, 120, 2000
    top, left, bh, bw = erased_boxes(h, w, n).T
    assert len(top) == n  # so small a box fits within ten tries
    # A box of 33 % fits unless it is too long: below 20 % all do, so that part is uniform.
    share, aspect = bh * bw / (h * w), bh / bw
    assert share.min() == pytest.approx(0.02, abs=0.002)
    assert share.max() == pytest.approx(1 / 3, abs=0.01)
    part = share[share < 0.18]
    assert np.quantile(part, [0.25, 0.5, 0.75]) == pytest.approx([0.06, 0.1, 0.14], abs=0.008)
    log_aspect = np.log(aspect[share < 0.18]) / np.log(1 / 0.3)
    assert np.quantile(log_aspect, [0, 0.25, 0.5, 0.75, 1]) == pytest.approx(
        [-1, -0.5, 0, 0.5, 1], abs=0.09
    )
    for place, room in ((top, h - bh), (left, w - bw)):
        assert (place >= 0).all()
        assert (place <= room).all()
        assert np.quantile(place / room, [0, 0.25, 0.5, 0.75, 1]) == pytest.approx(
            [0, 0.25, 0.5, 0.75, 1], abs=0.05
        )
    small = share < 0.18
    draws = np.stack([share, np.log(aspect), top / (h - bh), left / (w - bw)])[:, small]
    correlation = np.corrcoef(draws)[~np.eye(4, dtype=bool)]
    assert np.abs(correlation).max() < 4 / np.sqrt(small.sum())


def test_erased_box_is_smaller_than_a_long_picture_in_both_directions():
    boxes = erased_boxes(6, 90, 1000)
    assert (boxes[:, 2] < 6).all()
    # A try fits if its height, sqrt(540 share aspect), rounds to at most 5: four in ten do.
    rng = np.random.default_rng(0)
    share, log_aspect = rng.uniform(0.02, 1 / 3, 10**5), rng.uniform(-1, 1, 10**5)
    heights = np.sqrt(540 * share * np.exp(log_aspect * np.log(1 / 0.3)))
    none_fits = 1000 * np.mean(np.round(heights) >= 6) ** 10
    assert 1000 - len(boxes) == pytest.approx(none_fits, abs=4 * np.sqrt(none_fits) + 1)


def test_picture_without_room_for_a_box_is_left_alone():
    images = normal_images(8, 1, 1, 3)
    np.testing.assert_array_equal(erase(images, keys(8), 1.0), images)


def test_erased_values_are_standard_normal_and_the_others_unchanged():
    images = np.full((200, 20, 20, 3), 50.0, np.float32)
    out = np.asarray(erase(images, keys(200), 1.0))
    noise = out[out != 50]
    n = len(noise)
    assert noise.mean() == pytest.approx(0, abs=4 / np.sqrt(n))
    assert noise.std() == pytest.approx(1, abs=4 / np.sqrt(2 * n))
    assert (np.abs(noise) > 1.96).mean() == pytest.approx(0.05, abs=4 * np.sqrt(0.05 / n))
    assert len(np.unique(noise)) > 0.99 * n  # a value of its own for each channel and pixel
    assert ((out != 50).all(-1) == (out != 50).any(-1)).all()


@pytest.mark.parametrize("probability", [0.0, 0.25])
def test_share_of_images_is_erased(probability):
    n = 2000
    erased = len(erased_boxes(90, 120, n, probability))
    assert erased == pytest.approx(
        n * probability, abs=4 * np.sqrt(n * probability * (1 - probability))
    )


def test_erasing_depends_on_each_images_key_alone_and_keeps_its_dtype():
    images = normal_images(6, 12, 10, 3).astype(jnp.bfloat16)
    whole = np.asarray(erase(images, keys(6), 0.7))
    assert whole.dtype == jnp.bfloat16
    order = np.array([4, 0, 5, 2, 0, 1])
    np.testing.assert_array_equal(erase(images[order], keys(6)[order], 0.7), whole[order])


# Mixup and cutmix


GROUPS, SIZE = 3000, 32


@functools.cache
def kept(**options):
    """What groups keep of their own pixels [GROUPS, SIZE, SIZE] and of their targets [GROUPS]."""
    # A group of a white and a black image shows what is kept of the white one.
    images = jnp.tile(jnp.array([1.0, 0.0])[:, None, None, None], (GROUPS, SIZE, SIZE, 1))
    targets = jnp.tile(jnp.eye(2), (GROUPS, 1))
    options = {**RECIPE, "group": 2, **options}
    mixed, mixed_targets = map(np.asarray, mix_quickly(images, targets, keys(GROUPS), **options))
    np.testing.assert_allclose(mixed[::2] + mixed[1::2], 1, atol=1e-6)
    np.testing.assert_allclose(mixed_targets.sum(1), 1, atol=1e-6)
    return mixed[::2, :, :, 0], mixed_targets[::2, 0]


def is_cutmix(pixels):
    """Groups of which pixels are kept wholly or not at all. Indistinct where nothing is mixed."""
    return ((pixels == 0) | (pixels == 1)).all((1, 2))


def test_mixup_blends_each_image_with_its_groups_reverse():
    images, targets = normal_images(12, 5, 4, 3), normal_images(12, 7, seed=1)
    options = {**RECIPE, "cutmix_alpha": 0.0, "group": 4}
    out, out_targets = map(np.asarray, mix_quickly(images, targets, keys(3), **options))
    lambdas = []
    for g in range(3):
        x, t = images[4 * g : 4 * g + 4], targets[4 * g : 4 * g + 4]
        lam = float((out_targets[4 * g, 0] - t[3, 0]) / (t[0, 0] - t[3, 0]))
        lambdas.append(lam)
        for i in range(4):
            np.testing.assert_allclose(out[4 * g + i], lam * x[i] + (1 - lam) * x[3 - i], atol=1e-5)
            np.testing.assert_allclose(
                out_targets[4 * g + i], lam * t[i] + (1 - lam) * t[3 - i], atol=1e-5
            )
    assert len({round(lam, 4) for lam in lambdas}) == 3


def test_cutmix_pastes_one_box_of_the_reverse_and_counts_its_pixels():
    images, targets = normal_images(24, 9, 7, 3), normal_images(24, 5, seed=1)
    options = {**RECIPE, "mixup_alpha": 0.0, "group": 6}
    out, out_targets = map(np.asarray, mix_quickly(images, targets, keys(4), **options))
    for g in range(4):
        rows = slice(6 * g, 6 * g + 6)
        x, t = images[rows], targets[rows]
        pasted = (out[rows] != x).all(-1)  # [6, H, W]
        assert (pasted == pasted[0]).all()
        y_in, x_in = pasted[0].any(1), pasted[0].any(0)
        assert (pasted[0] == np.outer(y_in, x_in)).all()
        assert np.abs(np.diff(y_in)).sum() <= 2  # one run of rows
        expected = np.where(pasted[..., None], x[::-1], x)
        np.testing.assert_array_equal(out[rows], expected)
        lam = 1 - pasted[0].mean()
        np.testing.assert_allclose(out_targets[rows], lam * t + (1 - lam) * t[::-1], atol=1e-5)


def test_lambda_of_mixup_has_the_beta_distribution():
    _, lam = kept(cutmix_alpha=0.0)
    variance = 1 / (4 * (2 * 0.8 + 1))
    assert lam.mean() == pytest.approx(0.5, abs=4 * np.sqrt(variance / GROUPS))
    assert lam.var() == pytest.approx(variance, rel=0.06)
    _, lam = kept(cutmix_alpha=0.0, mixup_alpha=3.0)
    assert lam.var() == pytest.approx(1 / 28, rel=0.15)


def test_mixup_and_cutmix_take_turns():
    pixels, lam = kept()
    cutmix = is_cutmix(pixels)
    assert cutmix.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(GROUPS))
    np.testing.assert_allclose(lam[cutmix], pixels[cutmix].mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(lam[~cutmix], pixels[~cutmix][:, 0, 0], atol=1e-6)
    often, _ = kept(switch_probability=0.9)
    assert is_cutmix(often).mean() == pytest.approx(0.9, abs=4 * 0.3 / np.sqrt(GROUPS))


def test_only_the_way_that_is_on_is_used():
    pixels, _ = kept(mixup_alpha=0.0)
    assert is_cutmix(pixels).all()
    pixels, _ = kept(cutmix_alpha=0.0)
    assert not is_cutmix(pixels).any()


@pytest.mark.parametrize("off", ["mixup_alpha", "cutmix_alpha", None])
def test_share_of_groups_is_mixed_and_the_others_are_untouched(off):
    options = {off: 0.0} if off else {}
    pixels, lam = kept(probability=0.3, **options)
    untouched = (pixels == 1).all((1, 2))
    assert (lam[untouched] == 1).all()
    # Cutmix with a box of less than a pixel looks untouched as well.
    cutmix_share = {"mixup_alpha": 1, "cutmix_alpha": 0, None: 0.5}[off]
    unseen = 0.3 * cutmix_share / SIZE**2
    assert untouched.mean() == pytest.approx(0.7 + unseen, abs=4 * np.sqrt(0.21 / GROUPS))
    cutmix = is_cutmix(pixels[~untouched]).mean()
    assert cutmix == pytest.approx(cutmix_share, abs=4 * 0.5 / np.sqrt(0.3 * GROUPS))
    pixels, _ = kept(probability=0.0, **options)
    assert (pixels == 1).all()


def test_cutmix_box_has_the_share_asked_for_and_stops_at_the_borders():
    box = jax.vmap(cutmix_box, in_axes=(0, 0, 0, None, None))
    lam = jnp.array([0.75, 0.75, 0.75, 0.0, 0.0, 1.0])
    y, x = jnp.array([20, 0, 39, 20, 0, 7]), jnp.array([30, 59, 0, 30, 0, 7])
    boxes = np.stack(box(lam, y, x, 40, 60), axis=1).tolist()
    assert boxes == [
        [10, 30, 15, 45],  # half of each side
        [0, 10, 44, 60],
        [29, 40, 0, 15],
        [0, 40, 0, 60],  # all of it
        [0, 20, 0, 30],
        [7, 7, 7, 7],  # nothing
    ]


def test_cutmix_boxes_are_centred_anywhere():
    pixels, _ = kept(mixup_alpha=0.0)
    pasted = 1 - pixels.mean(0)  # how often each pixel is
    # A box centred anywhere covers the middle most, and falls off alike on every side.
    for turned in (pasted[::-1], pasted[:, ::-1], pasted.T):
        np.testing.assert_allclose(pasted, turned, atol=4 * 0.5 * np.sqrt(2 / GROUPS))
    # P(pixel covered) for lambda ~ U(0, 1) and a box side of s: E of the places that cover it.
    rng = np.random.default_rng(0)
    side = (SIZE * np.sqrt(1 - rng.random(10**5))).astype(int)
    centre = rng.integers(0, SIZE, (2, 10**5))
    for y, x in ((0, 0), (16, 16), (0, 16)):
        inside = [
            (c - side // 2 <= at) & (at < c + (side + 1) // 2)
            for c, at in zip(centre, (y, x), strict=True)
        ]
        expected = np.mean(inside[0] & inside[1])
        assert pasted[y, x] == pytest.approx(expected, abs=4 * np.sqrt(expected / GROUPS))


def test_groups_do_not_know_of_each_other():
    images, targets = normal_images(12, 6, 6, 3), normal_images(12, 4, seed=1)
    run = functools.partial(mix_quickly, **RECIPE, group=4)
    out, out_targets = map(np.asarray, run(images, targets, keys(3)))
    # The second group comes third, among others, and the first last.
    rows = np.r_[8:12, 8:12, 4:8]
    moved, moved_targets = run(images[rows], targets[rows], keys(3)[np.array([0, 2, 1])])
    np.testing.assert_array_equal(moved[4:], out[rows[4:]])
    np.testing.assert_array_equal(moved_targets[4:], out_targets[rows[4:]])


@functools.cache
def compiled(group, devices):
    """Mixing (or erasing, if `group` is 0) over so many devices, and what it works on."""

    def augmented(images, pixels, labels):
        if not group:
            return (random_erasing(images, keys(32, 1), 0.5),)
        targets = soft_targets(labels, 10, 0.0)
        return mix(pixels, targets, keys(32 // group), **RECIPE, group=group)

    images = normal_images(32, 10, 8, 3)
    # Of black and white, any lambda makes lambda, 1 - lambda, 0 or 1: nothing to round.
    arrays = images, (images > 0).astype(np.float32), np.arange(32) % 10
    arrays = jax.device_put(arrays, batch_sharding(make_mesh(devices=jax.devices()[:devices])))
    return jax.jit(augmented, compiler_options=QUICK).lower(*arrays).compile(), arrays


@pytest.mark.parametrize("group", [0, 4, 16])  # none, as many as a device holds, and more
def test_result_is_the_same_on_one_device_and_on_eight(group):
    results = []
    for devices in (1, 8):
        run, arrays = compiled(group, devices)
        results.append(run(*arrays))
    for one, eight in zip(*results, strict=True):
        np.testing.assert_array_equal(one, eight)


@pytest.mark.parametrize("group", [0, 4])
def test_images_stay_on_their_device_where_devices_hold_whole_groups(group):
    run, _ = compiled(group, 8)
    moves = ("all-gather", "all-to-all", "collective-permute", "all-reduce")
    moved = [
        line
        for line in run.as_text().splitlines()
        if any(f" {op}(" in line or f" {op}-start(" in line for op in moves) and "10,8" in line
    ]
    assert moved == []


def test_images_keep_their_dtype():
    images = jax.ShapeDtypeStruct((4, 6, 6, 3), jnp.bfloat16)
    run = functools.partial(mix, **RECIPE, group=4)
    out, targets = jax.eval_shape(run, images, jnp.eye(4), keys(1))
    assert (out.dtype, targets.dtype) == (jnp.bfloat16, jnp.float32)
