"""Sheets: every picture where it belongs, and text that says what it is."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.inference import reconstruct
from mae_jax.models.masking import masking_from_scores
from mae_jax.models.targets.pixels import NormPixel, Pixel
from mae_jax.pictures import grids

GREY = 128
MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.25, 0.3)


def tiles(sheet, rows, columns, top, size, below):
    """The pictures of a sheet, [R, K, size, size, 3]."""
    step = size + grids.GAP
    starts = [top + r * (size + below + grids.GAP) for r in range(rows)]
    return np.stack(
        [
            [
                sheet[y : y + size, grids.GAP + k * step : grids.GAP + k * step + size]
                for k in range(columns)
            ]
            for y in starts
        ]
    )


def images_of(count, side=128, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def written(monkeypatch):
    """The texts that are drawn from now on."""
    texts = []
    fitting = grids.fitting
    monkeypatch.setattr(
        grids, "fitting", lambda text, room: texts.append(text) or fitting(text, room)
    )
    return texts


def test_a_reconstruction_shows_predictions_only_where_patches_were_hidden(monkeypatch):
    texts = written(monkeypatch)
    images, pixels = images_of(2), images_of(2, seed=1)
    mask = np.array([[1, 0, 0, 1], [0, 1, 1, 1]], np.float32)  # patches of 64 pixels
    hidden = np.zeros((2, 128, 128, 1), bool)
    for b, rows in enumerate(mask.reshape(2, 2, 2)):
        for (y, x), value in np.ndenumerate(rows):
            hidden[b, 64 * y : 64 * y + 64, 64 * x : 64 * x + 64] = value
    pixels = np.where(hidden, pixels, images)
    sheet = grids.reconstruction_grid(
        images,
        mask,
        np.array([0.25, 0.5]),
        pixels,
        names=["folder/train#3 (/far/away/cat.jpg)", "dog.png"],
        title="step 1,200",
        note=NormPixel.note,
    )
    below = grids.LINE
    top = sheet.shape[0] - 2 * (128 + below + grids.GAP)
    shown = tiles(sheet, 2, 4, top, 128, below)
    np.testing.assert_array_equal(shown[:, 0], images)
    np.testing.assert_array_equal(shown[:, 1], np.where(hidden, GREY, images))
    np.testing.assert_array_equal(shown[:, 2], np.where(hidden, pixels, GREY))
    np.testing.assert_array_equal(shown[:, 3], pixels)
    assert texts[0] == "step 1,200   mean loss 0.3750"
    assert "brightness and contrast from the original" in " ".join(texts)
    assert {"original", "62% masked"} < set(texts)
    assert "train#3 (cat.jpg)   loss 0.2500" in texts
    assert "dog.png   loss 0.5000" in texts


def test_pixels_as_targets_need_no_note(monkeypatch):
    texts = written(monkeypatch)
    grids.reconstruction_grid(
        images_of(1),
        np.ones((1, 4), np.float32),
        np.ones(1),
        images_of(1),
        names=["a"],
        title="",
        note=Pixel.note,
    )
    assert not any("contrast" in text for text in texts)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_small_pictures_are_enlarged_and_shown_in_colour(channels):
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, channels)).astype(np.uint8)
    sheet = grids.image_grid(images, "some", columns=2)
    shown = tiles(sheet, 2, 2, sheet.shape[0] - 2 * (112 + grids.GAP), 112, 0)
    first = {1: [0, 0, 0], 2: [0, 1, 0]}.get(channels, [0, 1, 2])
    expected = images[..., first].repeat(7, axis=1).repeat(7, axis=2)
    np.testing.assert_array_equal(shown.reshape(4, 112, 112, 3)[:3], expected)
    assert (shown[1, 1] == 255).all()


def test_rows_of_small_pictures_stand_side_by_side():
    pictures = np.random.default_rng(0).integers(0, 256, (5, 4, 16, 16, 3)).astype(np.uint8)
    lines = [[[(f"row {r}", "black")]] for r in range(5)]
    sheet = grids.sheet_of(pictures, lines, title="", columns=tuple("abcd"))
    block = 4 * (112 + grids.GAP) - grids.GAP
    assert sheet.shape[1] == 2 * block + 5 * grids.GAP  # GAP, block, 3 GAP, block, GAP
    step = 112 + grids.LINE + grids.GAP
    for index in range(5):
        left, top = grids.GAP + index // 3 * (block + 3 * grids.GAP), sheet.shape[0] - 3 * step
        y = top + index % 3 * step
        for column in range(4):
            x = left + column * (112 + grids.GAP)
            shown = sheet[y : y + 112 : 7, x : x + 112 : 7]
            np.testing.assert_array_equal(shown, pictures[index, column])


def test_predictions_are_told_by_class_names_and_counted(monkeypatch):
    texts = written(monkeypatch)
    probabilities = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8]])
    sheet = grids.prediction_grid(
        images_of(3, side=224),
        np.array([0, 1, 1]),
        probabilities,
        names=["a", "b", "c"],
        class_names=["cat", "dog"],
        title="step 7",
    )
    assert texts[0] == "step 7   2 of 3 right"
    assert texts[1:] == [
        *("a", "is cat", "taken for cat (90%)"),
        *("b", "is dog", "taken for cat (70%)"),
        *("c", "is dog", "taken for dog (80%)"),
    ]
    assert sheet.shape[1] == 3 * (224 + grids.GAP) + grids.GAP


def test_text_longer_than_its_room_loses_its_middle():
    for room in (40, 200, 2000):
        short = grids.fitting("a_very_long_name_of_a_picture.jpeg", room)
        assert grids.FONT.getlength(short) <= room
        assert short[0] == "a"
        assert short[-1] == "g"
    assert short == "a_very_long_name_of_a_picture.jpeg"
    lines = grids._wrapped("one two three four five six seven", 60)
    assert " ".join(lines) == "one two three four five six seven"
    assert all(grids.FONT.getlength(line) <= 60 for line in lines)


@pytest.mark.parametrize("target", [Pixel, NormPixel])
def test_perfect_predictions_reconstruct_the_image(target):
    """The targets are worked out in numpy; visible patches stay whatever is predicted there."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 12, 8, 3)).astype(np.uint8)
    x = (images / 255 - np.array(MEAN)) / np.array(STD)
    patches = x.reshape(2, 3, 4, 2, 4, 3).swapaxes(2, 3).reshape(2, 6, 48)  # of 4 pixels
    if target is NormPixel:
        mean, var = patches.mean(-1, keepdims=True), patches.var(-1, ddof=1, keepdims=True)
        patches = (patches - mean) / np.sqrt(var + 1e-6)
    masking = masking_from_scores(jnp.asarray(rng.random((2, 6))), 2)
    visible = np.asarray(masking.mask)[:, :, None] == 0
    output = types.SimpleNamespace(
        predictions=jnp.asarray(np.where(visible, 1e3, patches), jnp.float32), loss=jnp.ones(2)
    )
    model = types.SimpleNamespace(
        target=target(4, 3), encoder=types.SimpleNamespace(patch_size=4), apply=lambda *_: output
    )
    result = jax.device_get(reconstruct(model, {}, jnp.asarray(images), masking, MEAN, STD))
    np.testing.assert_array_equal(result["pixels"], images)
    assert result["pixels"].dtype == np.uint8
