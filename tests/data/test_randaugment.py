from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from mae_jax.data import randaugment
from mae_jax.data.randaugment import INCREASING_OPS, PLAIN_OPS, apply, parse_randaugment

FILL = (124, 116, 104)
RECIPE = "rand-m9-mstd0.5-inc1"
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (20, 40, 3), np.uint8)
# Smooth, with a range of its own in each channel, none of them whole.
Y, X = np.mgrid[:48, :64] / 64
SMOOTH = np.stack([40 + 150 * X, 60 + 120 * Y, 90 + 60 * np.sin(5 * X + 3 * Y)], 2).astype(np.uint8)


def do(name, image, level, sign=1, fill=None):
    return apply(name, image, level, sign, fill or FILL[: image.shape[2]])


def shifted(image, dy, dx, fill=FILL):
    """`image` seen dy further down and dx further right, by hand."""
    out = np.empty_like(image)
    out[:] = fill
    h, w = image.shape[:2]
    to_y, from_y = slice(max(0, -dy), h - max(0, dy)), slice(max(0, dy), h + min(0, dy))
    to_x, from_x = slice(max(0, -dx), w - max(0, dx)), slice(max(0, dx), w + min(0, dx))
    out[to_y, to_x] = image[from_y, from_x]
    return out


@pytest.mark.parametrize(("level", "bits"), [(0, 4), (2.4, 4), (2.6, 3), (9, 1), (10, 0)])
def test_posterize_increasing_keeps_fewer_bits_up_to_none(level, bits):
    expected = IMAGE // 2 ** (8 - bits) * 2 ** (8 - bits) if bits else 0 * IMAGE
    np.testing.assert_array_equal(do("PosterizeIncreasing", IMAGE, level), expected)


@pytest.mark.parametrize(
    ("name", "level", "sign", "factor"),
    [
        ("BrightnessIncreasing", 10, 1, 1.9),
        ("BrightnessIncreasing", 9, -1, 0.19),
        ("BrightnessIncreasing", 0, -1, 1.0),
        ("Brightness", 9, 1, 1.72),
        ("Brightness", 0, -1, 0.1),
    ],
)
def test_brightness_multiplies(name, level, sign, factor):
    expected = np.clip(factor * IMAGE, 0, 255)
    assert np.abs(do(name, IMAGE, level, sign) - expected).max() <= 1


@pytest.mark.parametrize("sign", [1, -1])
def test_translation_moves_by_a_share_of_the_side_and_fills(sign):
    x = do("TranslateXRel", IMAGE, 10, sign)
    np.testing.assert_array_equal(x, shifted(IMAGE, 0, sign * 18))  # 0.45 of 40
    y = do("TranslateYRel", IMAGE, 10, sign)
    np.testing.assert_array_equal(y, shifted(IMAGE, sign * 9, 0))  # 0.45 of 20


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [5, 9])
def test_shear_moves_each_line_by_its_distance_from_the_edge(sign, level):
    shear = sign * 0.03 * level
    line = np.zeros((60, 60, 1), np.uint8)
    line[:, 28:32] = 255
    out = do("ShearX", line, level, sign, fill=(0,)).astype(float)[:, :, 0]
    centre = (out * np.arange(60)).sum(1) / out.sum(1)
    moved = 29.5 - shear * (np.arange(60) + 0.5)
    np.testing.assert_allclose(centre, moved, atol=0.05)
    transposed = do("ShearY", line.transpose(1, 0, 2), level, sign, fill=(0,))
    np.testing.assert_array_equal(transposed[:, :, 0].T, out)


@pytest.mark.parametrize("gray", [False, True])
def test_what_pillow_does_slowly_is_done_to_the_bit(gray):
    rng = np.random.default_rng(0)
    for trial in range(60):
        height, width = rng.integers(4, 100, 2)
        picture = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        if trial % 4 == 0:
            picture[:] = picture[0, 0]  # values between grey levels are cut off, not rounded
        elif trial % 4 == 1:
            picture[:] = picture // 128 * 255  # flat in places, black and white beside each other
        elif trial % 4 == 2:
            picture = np.sort(picture, axis=trial // 4 % 2)  # neighbours alike
        image, fill = Image.fromarray(picture).convert("L" if gray else "RGB"), (124, 116, 104)
        fill, n = (fill[0], 1) if gray else (fill, 3)
        sign, level = int(rng.choice([-1, 1])), float(rng.choice([0, 10, rng.uniform(0, 10)]))
        signed = sign * (level / 10)
        enhance = {
            f"{name}Increasing": getattr(ImageEnhance, name)(image).enhance(1 + 0.9 * signed)
            for name in ("Sharpness", "Brightness", "Contrast", "Color")
        }
        expected = enhance | {
            "Invert": ImageOps.invert(image),
            "Solarize": ImageOps.solarize(image, int(25.6 * level)),
            "SolarizeAdd": image.point([v + int(11 * level) * (v < 128) for v in range(256)] * n),
        }
        if bits := 4 - int(0.4 * level):
            expected["PosterizeIncreasing"] = ImageOps.posterize(image, bits)
        for name, matrix in {
            "ShearX": (1, 0.3 * signed, 0, 0, 1, 0),
            "ShearY": (1, 0, 0, 0.3 * signed, 1, 0),
            "TranslateXRel": (1, 0, 0.45 * signed * width, 0, 1, 0),
            "TranslateYRel": (1, 0, 0, 0, 1, 0.45 * signed * height),
        }.items():
            kind, bicubic = Image.Transform.AFFINE, Image.Resampling.BICUBIC
            expected[name] = image.transform(image.size, kind, matrix, bicubic, fillcolor=fill)
        pixels = np.asarray(image).reshape(height, width, -1)
        for name, result in expected.items():
            got = apply(name, pixels, level, sign, (fill,) if gray else fill)
            wanted = np.asarray(result).reshape(pixels.shape)
            np.testing.assert_array_equal(got, wanted, err_msg=name)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [5, 10])
def test_rotation_is_counterclockwise_about_the_centre(sign, level):
    spot = np.zeros((101, 101, 1), np.uint8)
    spot[48:53, 78:83] = 255  # 30 px right of the centre (50, 50)
    out = do("Rotate", spot, level, sign, fill=(0,)).astype(float)[:, :, 0]
    y, x = (np.indices(out.shape) * out).sum((1, 2)) / out.sum()
    angle = np.radians(sign * 3 * level)
    np.testing.assert_allclose((y, x), (50 - 30 * np.sin(angle), 50 + 30 * np.cos(angle)), atol=0.1)


@pytest.mark.parametrize("name", sorted(PLAIN_OPS | INCREASING_OPS))
def test_every_op_treats_one_channel_as_three_equal_ones(name):
    gray = SMOOTH[:, :, :1]
    one = apply(name, gray, 8.3, -1, (90,))
    three = apply(name, np.repeat(gray, 3, axis=2), 8.3, -1, (90, 90, 90))
    assert (one.shape, one.dtype) == ((48, 64, 1), np.uint8)
    np.testing.assert_array_equal(np.repeat(one, 3, axis=2), three)


@pytest.mark.parametrize("name", sorted(set(INCREASING_OPS) - {"ShearY"}))
def test_mirroring_a_picture_turns_the_sign_at_most(name):
    mirrored = do(name, IMAGE[:, ::-1], 9, 1)[:, ::-1]
    geometric = ("Rotate", "ShearX", "TranslateXRel")
    expected = do(name, IMAGE, 9, -1 if name in geometric else 1)
    np.testing.assert_array_equal(mirrored, expected)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 30, 1), (2, 3, 3)])
def test_tiny_pictures_work(shape):
    image = np.full(shape, 77, np.uint8)
    for name in PLAIN_OPS | INCREASING_OPS:
        for level in (0, 9, 10):
            assert do(name, image, level, -1).shape == shape


def drawn(monkeypatch, spec, count):
    """[(name, level, sign)] of the ops done to `count` pictures."""
    done = []
    monkeypatch.setattr(
        randaugment,
        "apply",
        lambda name, image, level, sign, fill: done.append((name, level, sign)) or image,
    )
    augment, rng = parse_randaugment(spec, FILL), np.random.default_rng(1)
    for _ in range(count):
        augment(IMAGE, rng)
    return done


def test_ops_are_drawn_evenly_and_done_half_of_the_time(monkeypatch):
    n = 12000  # each op done n * 2 / 15 / 2 = 800 times on average
    done = Counter(name for name, _, _ in drawn(monkeypatch, RECIPE, n))
    assert set(done) == set(INCREASING_OPS)
    assert len(done) == 15
    assert sum(done.values()) == pytest.approx(n, abs=4 * np.sqrt(2 * n / 4))
    for count in done.values():
        assert count == pytest.approx(n / 15, abs=4.5 * np.sqrt(n / 15))


def test_pictures_keep_both_one_or_none_of_two_ops_drawn_with_replacement(monkeypatch):
    n = 4000
    done = drawn(monkeypatch, "rand-m9-n2", 1)
    per_picture, twice = Counter(), 0
    rng = np.random.default_rng(2)
    augment = parse_randaugment("rand-m9-n2", FILL)
    monkeypatch.setattr(randaugment, "apply", lambda name, image, *_: done.append(name) or image)
    for _ in range(n):
        done.clear()
        augment(IMAGE, rng)
        per_picture[len(done)] += 1
        twice += len(done) == 2 and done[0] == done[1]
    for ops, share in ((0, 0.25), (1, 0.5), (2, 0.25)):
        assert per_picture[ops] == pytest.approx(n * share, abs=4 * np.sqrt(n * share))
    assert twice == pytest.approx(n / 4 / 15, abs=4 * np.sqrt(n / 60))


def test_levels_are_normal_about_the_magnitude_and_end_at_ten(monkeypatch):
    n = 8000
    _, levels, signs = zip(*drawn(monkeypatch, RECIPE, n), strict=True)
    levels = np.array(levels)
    assert levels.max() == 10
    assert np.median(levels) == pytest.approx(9, abs=4 * 1.25 * 0.5 / np.sqrt(n))
    # Shares of the normal distribution below 1 standard deviation, and above 2.
    below, above = 0.15866 * len(levels), 0.02275 * len(levels)
    assert (levels < 8.5).sum() == pytest.approx(below, abs=4 * np.sqrt(below))
    assert (levels == 10).sum() == pytest.approx(above, abs=4 * np.sqrt(above))
    assert sum(signs) == pytest.approx(0, abs=4 * np.sqrt(len(signs)))


def test_without_deviation_the_level_is_the_magnitude(monkeypatch):
    done = drawn(monkeypatch, "rand-m7-n3", 200)
    assert {level for _, level, _ in done} == {7}
    assert {name for name, _, _ in done} == set(PLAIN_OPS)
    assert len(done) == pytest.approx(300, abs=4 * np.sqrt(150))


def test_augmentation_is_a_function_of_the_generator_and_leaves_its_input_alone():
    augment, before = parse_randaugment(RECIPE, FILL), IMAGE.copy()
    first = [augment(IMAGE, np.random.default_rng(seed)) for seed in range(20)]
    again = [augment(IMAGE, np.random.default_rng(seed)) for seed in range(20)]
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(IMAGE, before)
    changed = sum((out != IMAGE).any() for out in first)
    assert 8 <= changed <= 20
    assert {(out.shape, out.dtype) for out in first} == {(IMAGE.shape, np.dtype(np.uint8))}


def test_notation_is_read_in_any_order_with_timms_defaults():
    augment = parse_randaugment(RECIPE, FILL)
    assert (augment.magnitude, augment.deviation, augment.count) == (9, 0.5, 2)
    assert augment.ops == tuple(INCREASING_OPS)
    assert parse_randaugment("rand-inc1-mstd0.5-n2-m9", FILL) == augment
    default = parse_randaugment("rand", FILL)
    assert (default.magnitude, default.deviation, default.count) == (10, 0, 2)
    assert default.ops == tuple(PLAIN_OPS)


@pytest.mark.parametrize(
    "spec",
    [
        "m9",
        "original-m9",
        "rand-m11",
        "rand-m-1",
        "rand-m9-inc2",
        "rand-m9-n0",
        "rand-m9-n1.5",
        "rand-m9-mstd",
        "rand-m9-mstd101",
        "rand-m9-m8",
        "rand-m9-p0.5",
        "rand-m9-tweights",
        "rand-m9-",
        "rand_m9",
        "",
    ],
)
def test_other_notation_is_refused_by_field_with_the_remedy(spec):
    with pytest.raises(ValueError, match=r"augment\.randaugment=.*rand-m9-mstd0\.5-inc1"):
        parse_randaugment(spec, FILL)


@pytest.mark.parametrize("fill", [(), (1, 2), (1, 2, 3, 4), (256,), (-1, 0, 0)])
def test_fill_that_no_picture_can_have_is_refused(fill):
    with pytest.raises(ValueError, match=r"augment\.randaugment.*1 or 3 channels"):
        parse_randaugment(RECIPE, fill)
