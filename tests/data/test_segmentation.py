"""Label maps, and crops of pictures with them."""

import io
import pathlib
import re
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from mae_jax import UserError
from mae_jax.data import pipeline
from mae_jax.data.photometric import photometric_distortion
from mae_jax.data.pipeline import eval_batches, example_rng, train_batches
from mae_jax.data.record import DecodeError, LabelError, Record
from mae_jax.data.segmentation import (
    IGNORED,
    SegmentEvalTransform,
    SegmentTrainTransform,
    View,
    decode_labels,
    picture_size,
    resized_to,
)
from mae_jax.data.segmentation_folder import open_segmentation_folder

CAMVID = pathlib.Path(__file__).parents[2].parent / "shared" / "dense" / "camvid"


def file_of(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture_of(labels):
    """A picture whose colour tells its label: rgb = 10 + 40 * label."""
    return np.repeat((10 + 40 * labels)[..., None], 3, axis=2).astype(np.uint8)


def blocks(height, width, side=40, classes=5, seed=0):
    """A label map [H, W] of squares of random classes."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, classes, (-(-height // side), -(-width // side)))
    return small.repeat(side, 0).repeat(side, 1)[:height, :width].astype(np.uint8)


def record_of(labels, name="here/a.png"):
    return Record(picture_of(labels), -1, name, id=0, segmentation=labels)


NUMBERS = np.array([[0, 1, 2], [3, 255, 1]], np.uint8)


def palette_file():
    image = Image.new("P", (3, 2))
    image.putdata(NUMBERS.ravel().tolist())
    image.putpalette([v for k in range(256) for v in (255 - k, 7, 7)])  # colours say otherwise
    return file_of(image)


def four_bits():
    """A gray PNG of 4 bits a pixel: Pillow writes none, so chunk by chunk."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 3, 2, 4, 0, 0, 0, 0)
    rows = b"\0\x01\x20" + b"\0\x3f\x10"  # 15 for none
    image = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + image


@pytest.mark.parametrize(
    ("segmentation", "ignore"),
    [
        (NUMBERS, 255),
        (NUMBERS[..., None].astype(np.int32), 255),
        (file_of(Image.fromarray(NUMBERS)), 255),
        (file_of(Image.fromarray(NUMBERS.astype(np.uint16))), 255),
        (palette_file(), 255),
        (four_bits(), 15),
    ],
    ids=["array", "int32", "gray", "16 bits", "palette", "4 bits"],
)
def test_numbers_are_read_and_colours_are_not(segmentation, ignore):
    labels = decode_labels(segmentation, "x", (2, 3), classes=4, ignore=ignore)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, NUMBERS)


def test_which_numbers_mean_no_class():
    other = decode_labels(NUMBERS, "x", (2, 3), classes=3, zero_is_other=True)
    np.testing.assert_array_equal(other, [[IGNORED, 0, 1], [2, IGNORED, 0]])
    one = decode_labels(NUMBERS[:1], "x", (1, 3), classes=3, ignore=1)
    np.testing.assert_array_equal(one, [[0, IGNORED, 2]])


@pytest.mark.parametrize(
    ("segmentation", "kind", "text"),
    [
        (None, DecodeError, "has no label map"),
        (NUMBERS.astype(np.float32), DecodeError, "expected integers"),
        (file_of(Image.new("RGB", (3, 2))), DecodeError, "is RGB, not .* save class numbers"),
        (file_of(Image.new("L", (3, 2)), "JPEG"), DecodeError, "is a JPEG.* as PNG"),
        (b"nothing", DecodeError, "cannot be decoded"),
        (NUMBERS[:, :2], DecodeError, "has 2 x 2 pixels, the picture 2 x 3; give"),
        (NUMBERS.T, DecodeError, "has 3 x 2 pixels"),
        (NUMBERS + np.uint8(1), LabelError, "label 4 .*0 to 3 are the 4 classes.*segment.ignore"),
        (NUMBERS.astype(np.int32) * 100, LabelError, "label 25500 .*zero_is_other.*classes.txt"),
        (NUMBERS.astype(np.int32) - 1, LabelError, "label"),
    ],
)
def test_what_is_no_label_map_is_told_in_a_line_with_file_and_remedy(segmentation, kind, text):
    with pytest.raises(kind, match=f"here/a.png: .*{text}") as error:
        decode_labels(segmentation, "here/a.png", (2, 3), classes=4)
    assert "\n" not in str(error.value)


def test_labels_outside_the_classes_stop_a_run_that_skips_bad_records():
    class Two:
        name, split, num_classes, class_names = "two", "train", None, None

        def __len__(self):
            return 2

        def __getitem__(self, index):
            labels = np.full((8, 8), 9 if index else 1, np.uint8)
            return Record(picture_of(labels % 5), -1, f"record {index}", index, segmentation=labels)

    transform = SegmentEvalTransform((8, 8), 5, stride=(8, 8))
    options = {"batch_size": 2, "positions": np.arange(2), "bad_records": "skip", "threads": 1}
    with (
        pytest.raises(LabelError, match="record 1"),
        eval_batches(Two(), transform, **options) as b,
    ):
        next(b)


@pytest.mark.parametrize("size", [(60, 60), (40, 72)])
def test_crops_keep_picture_and_labels_together(size):
    labels = blocks(150, 230)
    transform = SegmentTrainTransform(size, 5, photometric=False)
    wrong = total = 0
    for g in range(40):
        found = transform(record_of(labels), example_rng(0, g))
        image, crop, (h, w) = found["image"], found["segmentation"], found["size"]
        assert image.shape == (*size, 3)
        assert crop.shape == size
        assert (image[h:] == 0).all() and (image[:, w:] == 0).all()  # noqa: PT018
        assert (crop[h:] == IGNORED).all() and (crop[:, w:] == IGNORED).all()  # noqa: PT018
        told = np.round((image[:h, :w, 0].astype(float) - 10) / 40)
        crop, near = crop[:h, :w], np.ones((5, 5))
        inner = cv2.erode(crop, near) == cv2.dilate(crop, near)
        wrong += (told != crop)[inner].sum()
        total += inner.sum()
    assert total > 20_000
    assert wrong == 0


@pytest.mark.parametrize("axis", [0, 1])
def test_borders_lie_at_the_same_place_in_picture_and_labels(axis):
    """A kernel that is even crosses the middle of black and white where the nearest pixel does."""
    stripes = (np.arange(160) // 23 % 2).astype(np.uint8)
    labels = np.stack([stripes] * 160, axis=1 - axis)
    record = Record((labels * 255)[..., None].repeat(3, axis=2), -1, "x", segmentation=labels)
    transform = SegmentTrainTransform((64, 64), 2, photometric=False)
    same = []
    for g in range(40):
        found = transform(record, example_rng(0, g))
        real = found["segmentation"] != IGNORED
        same.append(((found["image"][..., 0] > 127) == found["segmentation"])[real].mean())
    assert np.mean(same) > 0.999


def test_a_flip_mirrors_both():
    labels = blocks(80, 80, side=17)
    options = {"size": (80, 80), "classes": 5, "photometric": False, "scale": (1, 1)}
    plain = SegmentTrainTransform(**options, flip=False)(record_of(labels), example_rng(0, 0))
    np.testing.assert_array_equal(plain["segmentation"], labels)
    np.testing.assert_array_equal(plain["image"], picture_of(labels))
    seen = set()
    for g in range(12):
        found = SegmentTrainTransform(**options)(record_of(labels), example_rng(0, g))
        mirrored = bool((found["segmentation"] == labels[:, ::-1]).all())
        step = -1 if mirrored else 1
        np.testing.assert_array_equal(found["segmentation"], labels[:, ::step])
        np.testing.assert_array_equal(found["image"], picture_of(labels)[:, ::step])
        seen.add(mirrored)
    assert seen == {True, False}


def test_scales_and_places_are_spread_as_the_recipe_says():
    """The short side is U(0.5, 2) crops; a ramp tells where a crop lies and how large it shows."""
    labels = blocks(100, 100, side=4)
    ramp = np.repeat(np.arange(100, dtype=np.uint8)[None, :, None], 100, axis=0).repeat(3, axis=2)
    record = Record(ramp * 2, -1, "x", segmentation=labels)
    transform = SegmentTrainTransform((50, 50), 5, photometric=False, flip=False)
    scales, lefts = [], []
    for g in range(200):
        found = transform(record, example_rng(1, g))
        row = found["image"][0, : found["size"][1], 0].astype(float) / 2
        scales.append((len(row) - 11) / (row[-6] - row[5]))  # crop pixels a pixel
        if scales[-1] > 0.6:
            lefts.append((row[25] - 25 / scales[-1]) / (100 - 50 / scales[-1]))
    assert 0.24 < min(scales) < 0.3
    assert 0.93 < max(scales) < 1.05
    assert abs(np.mean(scales) - 0.625) < 0.04
    assert abs(np.mean(lefts) - 0.5) < 0.08


def test_a_crop_of_nearly_one_class_is_drawn_again():
    labels = np.zeros((100, 400), np.uint8)
    labels[:, 320:] = blocks(100, 80, side=5)
    record, shares = record_of(labels), []
    for g in range(60):
        crop = SegmentTrainTransform((40, 40), 5, scale=(1, 1))(record, example_rng(0, g))
        counts = np.bincount(crop["segmentation"].ravel(), minlength=256)[:IGNORED]
        shares.append(counts.max() / counts.sum())
    # A sixth of the places would do.
    assert np.mean(np.array(shares) < 0.75) > 0.7
    one = SegmentTrainTransform((40, 40), 5)(record_of(labels[:, :300]), example_rng(0, 0))
    assert (one["segmentation"] == 0).any()  # it ends where there is nothing else


def test_resized_sizes_keep_the_ratio_up_to_the_longest_side():
    assert resized_to(600, 800, 512, 2048) == (512, 683)
    assert resized_to(800, 600, 512, 2048) == (683, 512)
    assert resized_to(100, 1000, 512, 2048) == (205, 2048)
    assert resized_to(1, 10_000, 512, 2048) == (1, 2048)


def slow_distortion(image, rng):
    """mmsegmentation's PhotoMetricDistortion in words: floating point, cut off and down."""

    def convert(x, alpha=1.0, beta=0.0):
        return (
            (x.astype(np.float32) * np.float32(alpha) + np.float32(beta)).clip(0, 255).astype("u1")
        )

    def hsv(x, f):
        planes = list(cv2.split(cv2.cvtColor(x, cv2.COLOR_RGB2HSV)))
        return cv2.cvtColor(cv2.merge(f(planes)), cv2.COLOR_HSV2RGB)

    if rng.integers(2):
        image = convert(image, beta=rng.uniform(-32, 32))
    mode = rng.integers(2)
    if mode == 0 and rng.integers(2):
        image = convert(image, alpha=rng.uniform(0.5, 1.5))
    if rng.integers(2):
        s = rng.uniform(0.5, 1.5)
        image = hsv(image, lambda p: [p[0], convert(p[1], alpha=s), p[2]])
    if rng.integers(2):
        turn = rng.integers(-18, 18)
        image = hsv(image, lambda p: [((p[0].astype(int) + turn) % 180).astype("u1"), p[1], p[2]])
    if mode == 1 and rng.integers(2):
        image = convert(image, alpha=rng.uniform(0.5, 1.5))
    return image


def test_photometric_distortion_equals_the_slow_way():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    kept, changed = image.copy(), 0
    for g in range(100):
        found = photometric_distortion(image, example_rng(3, g))
        np.testing.assert_array_equal(found, slow_distortion(image, example_rng(3, g)))
        changed += not np.array_equal(found, image)
    np.testing.assert_array_equal(image, kept)
    assert 85 < changed < 100  # all of four are left out once in 16


def test_photometric_distortion_needs_colours():
    with pytest.raises(UserError, match=r"1 channels .*; set segment\.photometric=False"):
        SegmentTrainTransform((8, 8), 5, channels=1)
    SegmentTrainTransform((8, 8), 5, channels=1, photometric=False)


def test_batches_are_the_same_for_any_workers_and_any_split_over_processes(tmp_path):
    for n in range(5):
        labels = blocks(40 + n, 50, side=9, seed=n)
        for folder, data in (("images", picture_of(labels)), ("masks", labels)):
            (tmp_path / folder / "train").mkdir(parents=True, exist_ok=True)
            Image.fromarray(data).save(tmp_path / folder / "train" / f"{n}.png")
    source = open_segmentation_folder(str(tmp_path), "train")
    transform = SegmentTrainTransform((24, 32), 5)

    def batches(positions, **options):
        given = {"seed": 5, "batch_size": 6, "positions": positions, "end_step": 2, "threads": 1}
        with train_batches(source, transform, **given, **options) as some:
            return [{k: v.copy() for k, v in batch.items()} for batch in some]

    whole = batches(np.arange(6))
    assert whole[0]["segmentation"].shape == (6, 24, 32)
    assert whole[0]["size"].dtype == np.int32
    for found in zip(whole, batches(np.arange(6), workers=2), strict=True):
        assert found[0].keys() == found[1].keys()
        for name in found[0]:
            np.testing.assert_array_equal(found[0][name], found[1][name])
    half = batches(np.array([1, 4]))
    np.testing.assert_array_equal(half[1]["segmentation"], whole[1]["segmentation"][[1, 4]])
    several = batches(np.arange(6), repeat=2)  # decoded once for two crops
    record, rngs = several[0]["id"][0], [example_rng(5, g) for g in (0, 1)]
    for row, rng in enumerate(rngs):
        expected = transform(source[int(record)], rng)
        np.testing.assert_array_equal(several[0]["segmentation"][row], expected["segmentation"])


def test_windows_cover_a_picture_and_the_last_stops_at_its_border():
    transform = SegmentEvalTransform((512, 512), 5, stride=(341, 341))
    assert transform.corners(View(512, 512)) == [(0, 0)]
    assert transform.corners(View(512, 683)) == [(0, 0), (0, 171)]
    assert transform.corners(View(512, 2048)) == [(0, x) for x in (0, 341, 682, 1023, 1364, 1536)]
    assert transform.corners(View(205, 600)) == [(0, 0), (0, 88)]
    both = SegmentEvalTransform((64, 32), 5, stride=(40, 32)).corners(View(128, 64))
    assert both == [(y, x) for y in (0, 40, 64) for x in (0, 32)]
    with pytest.raises(UserError, match=r"segment\.stride"):
        SegmentEvalTransform((32, 32), 5, stride=(33, 32))


def test_views_are_scales_and_mirrors():
    plain = SegmentEvalTransform((64, 64), 5, stride=(64, 64))
    assert plain.views(100, 200) == [View(64, 128)]
    many = SegmentEvalTransform((64, 64), 5, stride=(64, 64), scales=(0.5, 1.0), flip=True)
    sizes = [(32, 64), (64, 128)]
    assert many.views(100, 200) == [View(*size, f) for size in sizes for f in (False, True)]


def test_a_window_is_a_part_of_the_whole_resized_picture():
    labels = blocks(90, 140)
    image = np.random.default_rng(0).integers(0, 256, (90, 140, 3), np.uint8)
    record = Record(image, -1, "x", segmentation=labels)
    transform = SegmentEvalTransform((48, 48), 5, stride=(30, 30))
    (view,) = transform.views(90, 140)
    whole = np.asarray(Image.fromarray(image).resize((view.width, view.height), Image.BICUBIC))
    for top, left in transform.corners(view):
        found = transform.window(record, view, (top, left))
        part = whole[top : top + 48, left : left + 48].astype(int)
        assert abs(found["image"] - part).max() <= 1  # Pillow's coefficients are fixed point
        assert found["size"].tolist() == [48, 48]
    mirrored = transform.window(record, view._replace(mirrored=True), (0, 0))["image"]
    assert abs(mirrored - whole[:48, ::-1][:, :48].astype(int)).max() <= 1
    small = transform.window(record, View(20, 31), (0, 0))
    assert small["size"].tolist() == [20, 31]
    assert (small["image"][20:] == 0).all()


def test_the_size_of_a_picture_is_that_of_the_decoded_one():
    image = Image.new("RGB", (7, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    for data, upright in ((file_of(image), True), (file_of(image, "JPEG", exif=exif), False)):
        assert picture_size(Record(data, -1, "x", upright=upright)) == (4, 7)
    turned = Record(file_of(image, "JPEG", exif=exif), -1, "x", upright=True)
    assert picture_size(turned) == (7, 4)
    assert picture_size(Record(np.zeros((4, 7, 3), np.uint8), -1, "x")) == (4, 7)
    with pytest.raises(DecodeError, match=re.escape("here: cannot be decoded")):
        picture_size(Record(b"x", -1, "here"))


def test_classes_are_as_many_as_a_byte_tells():
    for classes in (0, 256):
        with pytest.raises(UserError, match="1 to 255"):
            SegmentEvalTransform((8, 8), classes, stride=(8, 8))


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"no pictures at {CAMVID}")
def test_street_scenes_in_their_folders():
    source = open_segmentation_folder(str(CAMVID), "validation")
    assert (len(source), source.num_classes) == (101, 11)
    transform = SegmentTrainTransform((64, 64), 11, zero_is_other=True)
    found = transform(source[0], pipeline.example_rng(0, 0))
    assert set(np.unique(found["segmentation"])) <= {*range(11), IGNORED}
    with pytest.raises(
        LabelError, match=r"label 11 .*0016E5_07959.png|0016E5_07959.png\): label 11"
    ):
        SegmentTrainTransform((64, 64), 11)(source[0], pipeline.example_rng(0, 0))
