import colorsys

import numpy as np
import pytest

from mae_jax.data import demo
from mae_jax.data.color_jitter import ColorJitter
from mae_jax.data.record import Record
from mae_jax.data.transforms import TrainTransform

PHOTOGRAPHS = demo._parts("train")
IMAGE = np.ascontiguousarray(PHOTOGRAPHS[2][40:104:2, 60:140:2])  # [32, 40, 3]
GRAY = (0.299, 0.587, 0.114)  # ITU-R 601


def reference(image, order, factors, turns):
    """torchvision's formulas of colours in [0, 1], in floating point."""
    x = image / 255

    def blended(x, other, factor):
        return (other + factor * (x - other)).clip(0, 1)

    for op in order:
        if op == 0:
            x = blended(x, 0, factors[0])
        elif op == 1:
            x = blended(x, (x @ GRAY).mean(), factors[1])
        elif op == 2:
            x = blended(x, (x @ GRAY)[:, :, None], factors[2])
        else:
            hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in x.reshape(-1, 3)]
            turned = [colorsys.hsv_to_rgb((h + turns) % 1, s, v) for h, s, v in hsv]
            x = np.reshape(turned, x.shape)
    return 255 * x


@pytest.mark.parametrize("strength", [0.1, 0.4, 1.0, 2.0])
def test_it_is_torchvisions_formulas_in_the_order_drawn(strength):
    orders, distances = set(), []  # [60, 3]: of the formulas, of two wrong ones
    for seed in range(60):
        rng = np.random.default_rng(seed)
        factors = rng.uniform(max(0, 1 - strength), 1 + strength, 3)
        turns = rng.uniform(-strength / 4, strength / 4)
        order = tuple(rng.permutation(4))
        out = ColorJitter(strength)(IMAGE, np.random.default_rng(seed))
        assert (out.dtype, out.shape) == (np.uint8, IMAGE.shape)
        ways = (order, turns), (order, -turns), (order[::-1], turns)
        others = [reference(IMAGE, order, factors, turns) for order, turns in ways]
        distances.append([np.abs(out - other).mean() for other in others])
        orders.add(order)
    assert len(orders) > 18  # of 24
    # Pillow rounds colours down after each op, and has 256 hues.
    assert np.max(distances, axis=0)[0] < 8
    right, other_sign, other_order = np.mean(distances, axis=0)
    assert right < 2.5 < other_sign
    assert right < other_order
    assert strength < 0.4 or other_order > 5


def test_factors_fill_their_range_and_never_turn_colours_over():
    white, black = np.full((2, 2, 3), 255, np.uint8), np.zeros((2, 2, 3), np.uint8)
    grey = np.full((2, 2, 3), 100, np.uint8)  # of which only brightness changes anything
    values = [ColorJitter(0.4)(grey, np.random.default_rng(seed))[0, 0, 0] for seed in range(400)]
    assert np.quantile(values, [0, 0.5, 1]) == pytest.approx([60, 100, 140], abs=6)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert (ColorJitter(2.0)(black, rng) == 0).all()
        assert (ColorJitter(0.4)(white, rng) >= 255 * 0.6 - 1).all()


def test_a_jittered_crop_is_the_same_crop():
    record = Record(PHOTOGRAPHS[0], 0, "x")
    plain = TrainTransform((32, 32))
    transform = TrainTransform((32, 32), color_jitter=ColorJitter(0.4))
    changed = set()
    for seed in range(10):
        rng = np.random.default_rng(seed)
        crop = plain(record, rng)["image"]
        out = transform(record, np.random.default_rng(seed))["image"]
        np.testing.assert_array_equal(out, ColorJitter(0.4)(crop, rng))
        changed.add(bool((out != crop).any()))
    assert changed == {True}
