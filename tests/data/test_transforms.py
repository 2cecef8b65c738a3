import io
import math

import numpy as np
import pytest
from conftest import jpeg
from PIL import Image

from mae_jax.data.record import DecodeError, Record
from mae_jax.data.sources import open_source
from mae_jax.data.transforms import (
    EvalTransform,
    TrainTransform,
    decode,
    random_resized_crop_box,
    resize,
    resize_exact,
)


def encoded(image, format_name, **options):
    file = io.BytesIO()
    image.save(file, format_name, **options)
    return file.getvalue()


def test_jpeg_decodes_as_pillow_does():
    data = jpeg(60, 80, subsampling=0)  # no chroma to upsample: both decode the same numbers
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode(data, 3, "x").astype(int) - expected).mean() < 0.5


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_colour_space_becomes_the_channels_asked_for(mode, channels):
    data = jpeg(20, 30, mode=mode, **({} if mode == "L" else {"subsampling": 0}))
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    expected = np.asarray(expected.convert("L") if channels == 1 else expected).astype(int)
    pixels = decode(data, channels, "x")
    assert pixels.shape == (20, 30, channels)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected.reshape(pixels.shape)).mean() < 2.5


def test_png_palettes_transparency_and_16_bits_are_read():
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8))
    np.testing.assert_array_equal(decode(encoded(rgb, "PNG"), 3, "x"), np.asarray(rgb))
    palette = rgb.quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(decode(encoded(palette, "PNG"), 3, "x"), expected)
    rgba = rgb.convert("RGBA")
    np.testing.assert_array_equal(decode(encoded(rgba, "PNG"), 3, "x"), np.asarray(rgb))
    deep = rng.integers(0, 65536, (9, 7)).astype(np.uint16)
    pixels = decode(encoded(Image.fromarray(deep), "PNG"), 1, "x")
    np.testing.assert_array_equal(pixels[:, :, 0], deep >> 8)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.95])
def test_a_truncated_jpeg_is_refused_by_name_and_never_padded(kept):
    data = jpeg(200, 200)
    cut = data[: int(kept * len(data)) if isinstance(kept, float) else kept]
    with pytest.raises(DecodeError, match="picture 7"):
        decode(cut, 3, "picture 7")


def test_arrays_of_many_channels_pass_and_others_are_refused():
    image = np.zeros((4, 5, 6), np.uint8)
    assert decode(image, 6, "x") is image
    with pytest.raises(DecodeError, match=r"has 6 channels, model\.channels=3"):
        decode(image, 3, "x")
    with pytest.raises(DecodeError, match=r"model\.channels=5"):
        decode(jpeg(8, 8), 5, "x")


def test_crops_follow_torchvisions_distribution():
    rng = np.random.default_rng(0)
    boxes = np.asarray(
        [random_resized_crop_box(rng, 300, 400, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(20000)]
    )
    top, left, h, w = boxes.T
    assert top.min() >= 0
    assert left.min() >= 0
    assert (top + h).max() <= 300
    assert (left + w).max() <= 400
    # An independent draw: torchvision's rule as rejection sampling, all at once.
    other = np.random.default_rng(1)
    area = 300 * 400 * other.uniform(0.2, 1.0, (20000, 10))
    aspect = np.exp(other.uniform(math.log(3 / 4), math.log(4 / 3), (20000, 10)))
    ws, hs = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
    fits = (ws <= 400) & (hs <= 300)
    first = fits.argmax(axis=1)
    rows = np.flatnonzero(fits.any(axis=1))
    expected = (hs * ws)[rows, first[rows]]
    for quantile in (0.1, 0.5, 0.9):
        np.testing.assert_allclose(
            np.quantile(h * w, quantile), np.quantile(expected, quantile), rtol=0.03
        )


@pytest.mark.parametrize(("height", "width", "box"), [(10, 100, (0, 43, 10, 13))])
def test_a_picture_too_long_for_any_crop_gives_its_centre(height, width, box):
    rng = np.random.default_rng(0)
    assert random_resized_crop_box(rng, height, width, (0.9, 1.0), (3 / 4, 4 / 3)) == box


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (50, 1), (3, 2)])
def test_tiny_pictures_work(height, width):
    record = Record(np.full((height, width, 3), 200, np.uint8), 0, "tiny")
    pixels = TrainTransform(size=(16, 24))(record, np.random.default_rng(0))
    assert pixels.shape == (16, 24, 3)
    assert (pixels == 200).all()
    assert (EvalTransform(size=(16, 24))(record) == 200).all()


def test_training_resize_stays_close_to_pillows_bicubic(shared_tfds):
    source = open_source("imagenet2012", shared_tfds, "train[:24]")
    rng = np.random.default_rng(0)
    differences = []
    for i in range(len(source)):
        image = decode(source[i].image, 3, "x")
        box = random_resized_crop_box(rng, *image.shape[:2], (0.2, 1.0), (3 / 4, 4 / 3))
        ours = resize(image, box, (224, 224)).astype(int)
        differences.append(np.abs(ours - resize_exact(image, box, (224, 224))).mean())
    assert np.mean(differences) < 1.5


def test_shrinking_is_antialiased():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    shrunk = resize(stripes, (0, 0, 256, 256), (32, 32)).astype(int)
    assert np.abs(shrunk[4:-4, 4:-4] - 127.5).max() < 16


@pytest.mark.parametrize(
    ("height", "width", "size", "short"),
    [(300, 400, 224, 256), (200, 150, 96, 109), (500, 400, 448, 448)],
)
def test_evaluation_is_pillows_resize_and_centre_crop(height, width, size, short):
    image = decode(jpeg(height, width), 3, "x")
    scale = short / min(height, width)
    new = (
        (int(short * width / height), short)
        if height < width
        else (
            short,
            int(short * height / width),
        )
    )
    assert scale > 0
    resized = Image.fromarray(image).resize(new, Image.Resampling.BICUBIC)
    left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
    expected = np.asarray(resized.crop((left, top, left + size, top + size))).astype(int)
    ours = EvalTransform(size=(size, size))(Record(image, 0, "x")).astype(int)
    # The crop is resized directly, not cut from a rounded picture: the same but for rounding.
    assert np.abs(ours - expected).mean() < 1.0


def test_centre_crop_training_draws_nothing():
    record = Record(jpeg(100, 150), 0, "x")
    transform = TrainTransform(size=(64, 64), crop="centre")
    a, b = (transform(record, np.random.default_rng(seed)) for seed in (0, 1))
    np.testing.assert_array_equal(a, b)
    exact = EvalTransform(size=(64, 64))(record)
    assert np.abs(a.astype(int) - exact).mean() < 2


@pytest.mark.parametrize(
    "arguments", [{"scale": (0.5, 0.2)}, {"scale": (0.0, 1.0)}, {"ratio": (2, 1)}, {"crop": "x"}]
)
def test_impossible_crops_are_refused_by_field(arguments):
    with pytest.raises(ValueError, match=rf"data\.{next(iter(arguments))}"):
        TrainTransform(size=(8, 8), **arguments)
