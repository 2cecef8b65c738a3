import io
import pickle

import numpy as np
import pytest
from PIL import Image, ImageOps
from tiny_dataset import jpeg

from mae_jax.data import demo
from mae_jax.data.randaugment import parse_randaugment
from mae_jax.data.record import DecodeError, Record
from mae_jax.data.sources import open_source
from mae_jax.data.transforms import (
    EvalTransform,
    TrainTransform,
    centre_box,
    decode,
    fixed_crop_box,
    random_resized_crop_box,
    resize_exact,
    resize_fast,
    single_try_crop_box,
)

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def encoded(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


PNG = encoded(Image.effect_noise((50, 50), 60), "PNG")


def photograph(name):
    label = [p[0] for p in demo.PHOTOGRAPHS].index(name)
    return demo._parts("train")[label]


def grey_levels(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_decodes_as_pillow_does(mode, channels, progressive):
    data = jpeg(37, 51, seed=1, mode=mode, progressive=progressive)
    image = Image.open(io.BytesIO(data))
    expected = np.asarray(image.convert("RGB").convert("RGB" if channels == 3 else "L"))
    pixels = decode(data, channels, "x")
    assert (pixels.shape, pixels.dtype) == ((37, 51, channels), np.uint8)
    assert grey_levels(pixels.squeeze(), expected) < 1.0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_png_of_every_mode_decodes(mode, channels):
    image = Image.fromarray(photograph("coffee")[:40, :30]).convert(mode)
    expected = np.asarray(image.convert("RGB").convert("RGB" if channels == 3 else "L"))
    pixels = decode(encoded(image, "PNG"), channels, "x")
    assert pixels.shape == (40, 30, channels)
    np.testing.assert_array_equal(pixels.squeeze(), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_transparent_is_laid_on_white(mode, channels):
    opaque = Image.fromarray(photograph("coffee")[:40, :30]).convert(mode.rstrip("A"))
    if mode == "P":
        alphas = np.array([0, 128] + [255] * 254)
        data = encoded(opaque, "PNG", transparency=bytes(alphas.tolist()))
        alpha = alphas[np.asarray(opaque)]
    else:
        alpha = np.tile(np.linspace(0, 255, 30).astype(np.uint8), (40, 1))  # [H, W]
        image = opaque.copy()
        image.putalpha(Image.fromarray(alpha))
        data = encoded(image, "PNG")
    share = alpha[:, :, None] / 255
    expected = np.asarray(opaque.convert("RGB")) * share + 255 * (1 - share)  # [H, W, 3]
    if channels == 1:
        expected = expected @ np.array([[0.299], [0.587], [0.114]])
    assert np.abs(decode(data, channels, "x") - expected).max() <= 1.5


def test_sixteen_bit_png_keeps_its_upper_byte():
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    pixels = decode(encoded(Image.fromarray(values), "PNG"), 1, "x")
    np.testing.assert_array_equal(pixels[:, :, 0], values >> 8)


@pytest.mark.parametrize("file_format", ["BMP", "WEBP", "GIF", "TIFF", "AVIF", "JPEG2000"])
def test_other_picture_formats_decode(file_format):
    image = Image.fromarray(photograph("coffee")[:40, :30])
    data = encoded(image, file_format)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data, 3, "x"), expected)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured_only_where_it_is_wanted(file_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(photograph("coffee")[:40, :30]), file_format, exif=exif)
    opened = Image.open(io.BytesIO(data))
    if file_format != "TIFF":  # which Pillow turns by itself
        np.testing.assert_array_equal(decode(data, 3, "x"), np.asarray(opened.convert("RGB")))
    expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert expected.shape == ((40, 30, 3) if orientation < 5 else (30, 40, 3))
    upright = decode(data, 3, "x", upright=True)
    if file_format == "JPEG":
        assert grey_levels(upright, expected) < 0.5
    else:
        np.testing.assert_array_equal(upright, expected)
    for transform in (EvalTransform((30, 30)), TrainTransform((30, 30), crop="centre")):
        out = transform(Record(data, 0, "x", upright=True), np.random.default_rng(0))
        np.testing.assert_array_equal(
            out["image"], transform(Record(upright, 0, "x"), None)["image"]
        )


def test_damaged_exif_does_not_spoil_the_pixels():
    data = jpeg(20, 30, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    np.testing.assert_array_equal(decode(data, 3, "x", upright=True), decode(data, 3, "x"))


def test_floating_point_pixels_are_refused_in_words():
    data = encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    with pytest.raises(DecodeError, match="floating point"):
        decode(data, 3, "x")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpeg_is_an_error_naming_the_record(kept, progressive):
    data = encoded(Image.fromarray(photograph("cat")), "JPEG", progressive=progressive)
    with pytest.raises(DecodeError, match=r"imagenet2012/train#17 \(a\.JPEG\)"):
        decode(data[: int(len(data) * kept)], 3, "imagenet2012/train#17 (a.JPEG)")


def test_jpeg_whose_rest_is_zeros_is_an_error():
    data = encoded(Image.fromarray(photograph("cat")), "JPEG")
    with pytest.raises(DecodeError, match="damaged JPEG"):
        decode(data[: len(data) // 2] + bytes(len(data) // 2), 3, "x")


def test_stray_bytes_before_the_end_marker_lose_nothing():
    data = jpeg(30, 40)
    stray = data[:-2] + bytes(3) + data[-2:]
    assert grey_levels(decode(stray, 3, "x"), decode(data, 3, "x")) < 0.5


@pytest.mark.parametrize("data", [b"", b"not a picture", PNG[: len(PNG) // 2]])
def test_what_is_no_picture_is_an_error(data):
    with pytest.raises(DecodeError, match="cannot be decoded"):
        decode(data, 3, "x")


def test_arrays_change_channels_only_between_gray_and_rgb():
    rgb = photograph("cat")[:9, :8]
    assert decode(rgb, 3, "x") is rgb
    gray = decode(rgb, 1, "x")
    assert grey_levels(gray[:, :, 0], np.asarray(Image.fromarray(rgb).convert("L"))) < 0.6
    np.testing.assert_array_equal(decode(gray, 3, "x"), np.repeat(gray, 3, axis=2))
    seven = np.zeros((4, 5, 7), np.uint8)
    assert decode(seven, 7, "x") is seven
    with pytest.raises(DecodeError, match=r"has 7 channels, model\.channels=3"):
        decode(seven, 3, "x")
    with pytest.raises(DecodeError, match=r"model\.channels=7.*\.npy"):
        decode(jpeg(9, 9), 7, "x")
    with pytest.raises(DecodeError, match="float32"):
        decode(seven.astype(np.float32), 7, "x")


def test_random_crop_has_torchvisions_distribution():
    rng = np.random.default_rng(0)
    h, w = 1000, 1400
    boxes = np.array([random_resized_crop_box(rng, h, w, (0.1, 0.3), RATIO) for _ in range(4000)])
    top, left, ch, cw = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + ch <= h).all()
    assert (left + cw <= w).all()
    # So small a crop always fits, so nothing is drawn twice: area uniform, log ratio uniform.
    share = ch * cw / (h * w)
    assert np.quantile(share, [0, 0.25, 0.5, 1]) == pytest.approx([0.1, 0.15, 0.2, 0.3], abs=0.005)
    log_ratio = np.log(cw / ch) / np.log(4 / 3)
    assert np.quantile(log_ratio, [0, 0.25, 0.5, 1]) == pytest.approx([-1, -0.5, 0, 1], abs=0.04)
    # The place is uniform over what is left beside the crop.
    assert np.quantile(top / (h - ch), [0, 0.5, 1]) == pytest.approx([0, 0.5, 1], abs=0.03)
    assert np.quantile(left / (w - cw), [0, 0.5, 1]) == pytest.approx([0, 0.5, 1], abs=0.03)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    # torchvision: the whole picture, its longer side cut to the nearest allowed ratio, centred
    [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10)), (1, 500, (0, 249, 1, 1))],
)
def test_picture_of_extreme_shape_is_cropped_in_its_centre(height, width, expected):
    rng = np.random.default_rng(0)
    box = random_resized_crop_box(rng, height, width, (0.9, 1.0), RATIO)
    assert box == expected


@pytest.mark.parametrize("shape", [(300, 500), (100, 1000), (1000, 100), (31, 29)])
def test_single_try_crop_is_the_formula_with_its_sides_cut(shape):
    height, width = shape
    cut = 0
    for seed in range(200):
        box = single_try_crop_box(np.random.default_rng(seed), height, width, (0.08, 1.0), RATIO)
        # The same draws, used as the formula says: area, then logarithm of width over height.
        rng = np.random.default_rng(seed)
        area = rng.uniform(0.08, 1.0) * height * width
        aspect = (4 / 3) ** rng.uniform(-1, 1)
        w, h = (area * aspect) ** 0.5, (area / aspect) ** 0.5
        cut += w > width + 0.5 or h > height + 0.5
        w, h = min(round(w), width), min(round(h), height)
        top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        assert box == (top, left, h, w)
        assert all(type(v) is int for v in box)
    assert cut >= 20  # sides are cut often enough for this to count


def test_single_try_crop_of_a_long_picture_is_a_whole_side_as_often_as_a_draw_does_not_fit():
    n, height, width = 4000, 100, 400
    rng = np.random.default_rng(0)
    boxes = [single_try_crop_box(rng, height, width, (0.08, 1.0), RATIO) for _ in range(n)]
    whole = np.mean([h == height for _, _, h, _ in boxes])
    # Height, sqrt(40000 area / aspect), rounds to 100 or more: area >= 0.2475 aspect; the mean of
    # a log-uniform aspect in 3/4 to 4/3 is (4/3 - 3/4) / log(16/9).
    aspect = (4 / 3 - 3 / 4) / np.log(16 / 9)
    expected = (1 - 99.5**2 / 40000 * aspect) / 0.92
    assert whole == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / n))
    assert expected > 0.8
    # The other crop draws again; none of ten fits in 0.8^10 of all cases.
    others = [random_resized_crop_box(rng, height, width, (0.08, 1.0), RATIO) for _ in range(n)]
    assert np.mean([h == height for _, _, h, _ in others]) < 0.2


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 500), (500, 1), (3, 20000), (20000, 3)])
def test_single_try_crop_of_an_extreme_picture_stays_inside_and_is_not_empty(shape):
    height, width = shape
    for seed in range(200):
        rng = np.random.default_rng(seed)
        top, left, h, w = single_try_crop_box(rng, height, width, (1e-4, 1.0), RATIO)
        assert 0 <= top < top + h <= height
        assert 0 <= left < left + w <= width


def pillows_crop(image, box, size):
    """The box of an array resized by plain Pillow, uint8 [*size, 3]."""
    top, left, h, w = box
    corners = (left, top, left + w, top + h)
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.BICUBIC, box=corners))


def spectrum(image):
    """Power in ten bands from zero to Nyquist's frequency, along both axes together [10]."""
    gray = image.astype(float).mean(axis=2)
    window = np.outer(np.hanning(gray.shape[0]), np.hanning(gray.shape[1]))
    power = np.abs(np.fft.fft2((gray - gray.mean()) * window)) ** 2
    radius = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, gray.shape), indexing="ij"))
    return np.histogram(radius, np.linspace(0, 0.5, 11), weights=power)[0]


PHOTOGRAPHS = ("astronaut", "cat", "coffee", "rocket", "pagoda", "flower")


@pytest.mark.parametrize("shrink", [0.9, 0.97, 1.1, 1.5, 2.2])
def test_training_crops_have_pillows_pixels_and_spectrum(shrink):
    powers = {"pillow": 0, "exact": 0, "fast": 0}
    differences = {"exact": [], "fast": []}
    side = int(200 / shrink)
    for name in PHOTOGRAPHS:
        image = photograph(name)[:200, :200]
        transforms = {
            resize: TrainTransform((side, side), scale=(1, 1), ratio=(1, 1), resize=resize)
            for resize in differences
        }
        expected = pillows_crop(image, (0, 0, 200, 200), (side, side))
        powers["pillow"] += spectrum(expected)
        for resize, transform in transforms.items():
            out = transform(Record(image, 0, name), np.random.default_rng(0))["image"]
            powers[resize] += spectrum(out)
            differences[resize].append(grey_levels(out, expected))
    np.testing.assert_allclose(powers["exact"] / powers["pillow"], 1, atol=0.03)
    assert max(differences["exact"]) <= 0.15
    # The fast one is further off, or this test would not tell.
    assert np.abs(powers["fast"] / powers["pillow"] - 1).max() > 0.03
    assert 0.15 < np.mean(differences["fast"]) < 2.5


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("size", [(224, 224), (96, 128), (400, 400), (60, 420)])
def test_fast_resize_is_within_one_and_a_half_grey_levels_of_pillow(name, size):
    image = photograph(name)
    box = (10, 20, image.shape[0] - 40, image.shape[1] - 50)
    assert grey_levels(resize_fast(image, box, size), pillows_crop(image, box, size)) < 1.5


@pytest.mark.parametrize(("resize", "most"), [("exact", 0.15), ("fast", 1.2)])
def test_random_crops_of_imagenet_are_near_pillows(shared_tfds, resize, most):
    source = open_source("imagenet2012", shared_tfds, "train[:48]")
    transform = TrainTransform((224, 224), resize=resize)
    differences = []
    for i in range(len(source)):
        image = np.asarray(Image.open(io.BytesIO(source[i].image)).convert("RGB"))
        box = random_resized_crop_box(np.random.default_rng(i), *image.shape[:2], SCALE, RATIO)
        crop = transform(source[i], np.random.default_rng(i))["image"]
        differences.append(grey_levels(crop, pillows_crop(image, box, (224, 224))))
    assert np.mean(differences) < most


def test_fast_resize_is_antialiased():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255  # finer than the result can show: must come out gray
    out = resize_fast(stripes, (0, 0, 256, 256), (80, 80))[:, 2:-2]
    assert abs(out.mean() - 127.5) < 2
    assert out.std() < 6


@pytest.mark.parametrize("channels", [1, 3, 7])
def test_channels_are_resized_alike(channels):
    gray = photograph("cat").mean(axis=2, keepdims=True).astype(np.uint8)
    image = np.repeat(gray, channels, axis=2)
    for out in (
        resize_fast(image, (5, 5, 200, 150), (64, 48)),
        resize_exact(image, (5, 5, 200, 150), (64, 48)),
    ):
        assert out.shape == (64, 48, channels)
        assert (out == out[:, :, :1]).all()


@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (256, 256), (100, 90)])
@pytest.mark.parametrize("side", [96, 224, 384])
def test_eval_transform_is_pillows_resize_then_centre_crop(shape, side):
    image = Image.fromarray(photograph("pagoda")).resize(shape[::-1])
    short = int(side / (224 / 256)) if side <= 224 else side
    h, w = shape
    new = (short, int(short * w / h)) if h <= w else (int(short * h / w), short)  # torchvision
    top, left = round((new[0] - side) / 2), round((new[1] - side) / 2)
    expected = image.resize(new[::-1], Image.BICUBIC).crop((left, top, left + side, top + side))
    out = EvalTransform((side, side)).image(Record(np.asarray(image), 0, "x"))
    # Pillow rounds between its two passes, so its pixels depend a little on what is asked for.
    difference = np.abs(out.astype(int) - np.asarray(expected))
    assert difference.mean() < 0.2
    assert (difference > 1).mean() < 1e-3


@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (256, 256), (100, 90)])
@pytest.mark.parametrize(("size", "short"), [((224, 224), 256), ((96, 96), 109), ((384, 384), 438)])
def test_fixed_crop_is_pillows_resize_of_the_short_side_then_a_crop_anywhere(shape, size, short):
    image = Image.fromarray(photograph("pagoda")).resize(shape[::-1])
    record, (h, w) = Record(np.asarray(image), 0, "x"), shape
    new = (short, int(short * w / h)) if h <= w else (int(short * h / w), short)  # torchvision
    resized = np.asarray(image.resize(new[::-1], Image.BICUBIC))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        top, left = (int(rng.integers(0, a - b + 1)) for a, b in zip(new, size, strict=True))
        expected = resized[top : top + size[0], left : left + size[1]]
        out = TrainTransform(size, crop="fixed")(record, np.random.default_rng(seed))["image"]
        difference = np.abs(out.astype(int) - expected)
        assert difference.mean() < 0.25
        assert (difference > 1).mean() < 1e-3


def test_fixed_crops_lie_anywhere_and_have_one_size():
    rng = np.random.default_rng(0)
    boxes = np.array([fixed_crop_box(rng, 512, 1024, (224, 224)) for _ in range(3000)])
    np.testing.assert_allclose(boxes[:, 2:], 448)  # 224 of 256, enlarged twice
    tops, lefts = boxes[:, 0] / 2, boxes[:, 1] / 2
    assert set(np.unique(tops.round(6))) == set(range(256 - 224 + 1))
    assert np.quantile(lefts, [0, 0.5, 1]) == pytest.approx([0, 144, 288], abs=6)


@pytest.mark.parametrize("size", [(96, 192), (192, 96), (300, 100)])
@pytest.mark.parametrize("shape", [(300, 500), (500, 300)])
def test_centre_crop_of_a_rectangle_keeps_proportions_and_stays_inside(size, shape):
    top, left, h, w = centre_box(*shape, size, 0.875)
    assert top >= 0
    assert left >= 0
    assert top + h <= shape[0]
    assert left + w <= shape[1]
    assert h / w == pytest.approx(size[0] / size[1], rel=0.02)
    assert max(h / shape[0], w / shape[1]) == pytest.approx(0.875, rel=0.02)


@pytest.mark.parametrize("size", [(96, 96), (64, 100), (250, 250)])
def test_centre_crop_for_training_is_the_evaluation_crop(size):
    record = Record(photograph("cat"), 0, "x")
    expected = EvalTransform(size).image(record)
    exact = TrainTransform(size, crop="centre")(record, None)["image"]
    np.testing.assert_array_equal(exact, expected)


def test_fast_centre_crop_for_training_shows_what_evaluation_shows():
    record = Record(photograph("cat"), 0, "x")
    fast = TrainTransform((96, 96), crop="centre", resize="fast")(record, None)["image"]
    assert grey_levels(fast, EvalTransform((96, 96)).image(record)) < 3.0


@pytest.mark.parametrize(
    ("crop", "draw"),
    [("random_resized", random_resized_crop_box), ("single_try", single_try_crop_box)],
)
def test_training_crop_is_the_one_named(crop, draw):
    transform = TrainTransform((48, 64), scale=(0.1, 0.9), ratio=(0.5, 2.0), crop=crop)
    boxes = [transform.box(np.random.default_rng(seed), 100, 300) for seed in range(50)]
    expected = [
        draw(np.random.default_rng(seed), 100, 300, (0.1, 0.9), (0.5, 2.0)) for seed in range(50)
    ]
    assert boxes == expected


@pytest.mark.parametrize("crop", ["random_resized", "single_try", "fixed", "centre"])
def test_training_picture_is_the_box_resized_then_augmented_by_the_same_generator(crop):
    image = photograph("coffee")
    record = Record(image, 0, "x")
    augment = parse_randaugment("rand-m9-mstd0.5-inc1", (124, 116, 104))
    plain = TrainTransform((48, 64), scale=(0.1, 0.5), crop=crop)
    augmented = TrainTransform((48, 64), scale=(0.1, 0.5), crop=crop, randaugment=augment)
    changed = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        expected = resize_exact(image, plain.box(rng, *image.shape[:2]), (48, 64))
        unchanged = plain(record, np.random.default_rng(seed))["image"]
        np.testing.assert_array_equal(unchanged, expected)
        expected = augment(expected, rng)
        for _ in range(2):  # the first call leaves nothing behind that the second could see
            out = augmented(record, np.random.default_rng(seed))["image"]
            np.testing.assert_array_equal(out, expected)
        changed += (out != unchanged).any()
    assert 8 <= changed <= 20  # three of four are augmented


def test_pictures_in_a_row_are_augmented_differently():
    record, rng = Record(photograph("coffee"), 0, "x"), np.random.default_rng(0)
    augment = parse_randaugment("rand-m9-mstd0.5-inc1", (124, 116, 104))
    transform = TrainTransform((24, 24), crop="centre", randaugment=augment)
    assert len({transform(record, rng)["image"].tobytes() for _ in range(20)}) > 10


def test_gray_pictures_are_augmented_with_one_value_of_fill():
    augment = parse_randaugment("rand-m9-mstd0.5-inc1", (114,))
    transform = TrainTransform((24, 24), channels=1, randaugment=augment)
    record = Record(photograph("coffee"), 0, "x")
    for seed in range(10):
        assert transform(record, np.random.default_rng(seed))["image"].shape == (24, 24, 1)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 3), (1, 20000)])
@pytest.mark.parametrize("channels", [1, 3])
def test_tiny_pictures_work(shape, channels):
    data = encoded(Image.new("RGB", shape[::-1], (10, 200, 30)), "PNG")
    for crop in ("random_resized", "single_try", "fixed", "centre"):
        transform = TrainTransform((32, 48), channels, crop=crop)
        for seed in range(5):
            out = transform(Record(data, 0, "x"), np.random.default_rng(seed))["image"]
            assert out.shape == (32, 48, channels)
            assert (out == out[0, 0]).all()
    assert EvalTransform((32, 48), channels).image(Record(data, 0, "x")).shape == (32, 48, channels)


def test_transforms_survive_pickling():
    augment = parse_randaugment("rand-m9-mstd0.5-inc1", (124, 116, 104))
    augmented = TrainTransform((8, 9), crop="single_try", randaugment=augment)
    for transform in (TrainTransform((8, 9)), augmented, EvalTransform((8, 9))):
        assert pickle.loads(pickle.dumps(transform)) == transform
        assert transform.schema == {"image": ((8, 9, 3), np.uint8)}
