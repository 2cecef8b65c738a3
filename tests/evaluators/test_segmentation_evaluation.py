"""mIoU: counted by hand, put together from windows, every picture once on any mesh."""

import json
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import in_two_processes

from mae_jax import UserError
from mae_jax.data.record import DecodeError, LabelError, Record
from mae_jax.data.segmentation import IGNORED, SegmentEvalTransform, View
from mae_jax.distributed.mesh import make_mesh
from mae_jax.evaluators.segmentation import (
    SegmentationEvaluation,
    Windows,
    WindowTransform,
    classes_of,
    confusion,
    over_windows,
    scores,
    total_confusion,
)
from mae_jax.train.metrics import MetricsWriter, read_metrics

K = 4
SIZES = [(40, 60), (33, 33), (61, 40), (16, 100), (25, 31), (48, 48), (30, 90)]


class Scenes:
    """Seven small pictures of noise with label maps of noise."""

    name, split, num_classes, class_names = "scenes", "validation", K, None

    def __init__(self, change=lambda record: record):
        self.change = change

    def __len__(self):
        return len(SIZES)

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (*SIZES[index], 3), np.uint8)
        labels = rng.integers(0, K + 1, SIZES[index]).astype(np.uint8)
        labels[labels == K] = IGNORED
        name = f"scenes/validation#{index}"
        return self.change(Record(image, -1, name, id=index, segmentation=labels))


TRANSFORM = SegmentEvalTransform((32, 32), K, stride=(20, 20))
PARAMS = np.random.default_rng(1).normal(size=(K, 3)).astype(np.float32)


def apply(params, images, size):
    """Logits [b, 8, 8, K] of windows, zero where they show nothing."""
    b, h, w, c = images.shape
    there = jnp.arange(h)[:, None] < size[:, 0, None, None]
    there &= jnp.arange(w) < size[:, 1, None, None]
    x = (images / 128.0 - 1) * there[..., None]
    x = x.reshape(b, h // 4, 4, w // 4, 4, c).mean(axis=(2, 4))
    return jnp.einsum("bhwc,kc->bhwk", 8 * x, params)


def bilinear(planes, size):
    """[h, w, K] resized to `size`, pixel by pixel as PyTorch's align_corners=False defines it."""
    out = np.zeros((*size, planes.shape[2]))
    for i, j in np.ndindex(*size):
        y = max((i + 0.5) * planes.shape[0] / size[0] - 0.5, 0)
        x = max((j + 0.5) * planes.shape[1] / size[1] - 0.5, 0)
        top, left = int(y), int(x)
        below, right = min(top + 1, len(planes) - 1), min(left + 1, planes.shape[1] - 1)
        dy, dx = y - top, x - left
        out[i, j] = (1 - dy) * ((1 - dx) * planes[top, left] + dx * planes[top, right])
        out[i, j] += dy * ((1 - dx) * planes[below, left] + dx * planes[below, right])
    return out


def slowly(transform, record):
    """Scores [H, W, K] of a picture: one window after the other, all in memory at once."""
    height, width = record.image.shape[:2]
    views, total = transform.views(height, width), 0
    for view in views:
        whole = np.zeros((view.height, view.width, K))
        counts = np.zeros((view.height, view.width, 1))
        for top, left in transform.corners(view):
            window = transform.window(record, view, (top, left))
            logits = apply(PARAMS, window["image"][None], window["size"][None])[0]
            logits = bilinear(np.asarray(logits, np.float64), transform.size)
            for i, j in np.ndindex(*window["size"]):
                whole[top + i, left + j] += logits[i, j]
                counts[top + i, left + j] += 1
        assert counts.min() >= 1
        logits = bilinear(whole / counts, (height, width))
        if view.mirrored:
            logits = logits[:, ::-1]
        if len(views) == 1:
            return logits
        odds = np.exp(logits - logits.max(axis=2, keepdims=True))
        total = total + odds / odds.sum(axis=2, keepdims=True)
    return total / len(views)


def brute_force(labels, predictions, classes):
    matrix = np.zeros((classes, classes), int)
    for is_class, taken_for in zip(labels.ravel(), predictions.ravel(), strict=True):
        if is_class != IGNORED:
            matrix[is_class, taken_for] += 1
    return matrix


def test_a_matrix_by_hand():
    labels = np.array([[0, 0, 0, 1], [1, 255, 2, 2]], np.uint8)
    predictions = np.array([[0, 0, 1, 1], [0, 3, 2, 2]], np.uint8)
    matrix = confusion(labels, predictions, 4)
    np.testing.assert_array_equal(matrix, [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 2, 0], [0] * 4])
    found = scores(matrix)
    np.testing.assert_allclose(found["iou"], [2 / 4, 1 / 3, 1, np.nan])
    np.testing.assert_allclose(found["acc"], [2 / 3, 1 / 2, 1, np.nan])
    assert found["miou"] == pytest.approx((1 / 2 + 1 / 3 + 1) / 3)
    assert found["macc"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert found["aacc"] == pytest.approx(5 / 7)


def test_a_class_that_is_only_predicted_counts_as_wrong():
    found = scores(np.array([[3, 1], [0, 0]]))
    np.testing.assert_allclose(found["iou"], [0.75, 0])
    np.testing.assert_allclose(found["acc"], [0.75, np.nan])


def test_a_split_without_labels_is_told():
    with pytest.raises(UserError, match="no labelled pixel"):
        scores(np.zeros((3, 3), np.int64))


def test_confusion_equals_counting_one_by_one():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 254, 255], (30, 20)).astype(np.uint8)
    predictions = rng.choice([0, 1, 2, 254], (30, 20)).astype(np.uint8)
    found = confusion(labels, predictions, 255)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, brute_force(labels, predictions, 255))


def test_one_window_is_the_whole_picture():
    logits = np.random.default_rng(0).normal(size=(K, 8, 8)).astype(np.float32)
    found = classes_of([(View(32, 32), (0, 0))], [logits], (32, 32), (32, 32))
    whole = bilinear(np.moveaxis(logits, 0, -1), (32, 32))
    np.testing.assert_array_equal(found, whole.argmax(axis=2))
    twice = [(View(32, 32), (0, 0))] * 2
    np.testing.assert_array_equal(classes_of(twice, [logits] * 2, (32, 32), (32, 32)), found)


@pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((0.5, 1.25), True)])
def test_pictures_put_together_equal_those_made_slowly(scales, flip):
    transform = SegmentEvalTransform((32, 32), K, stride=(20, 20), scales=scales, flip=flip)
    for index in (0, 3, 4) if flip else range(len(SIZES)):
        record = Scenes()[index]
        views = transform.views(*SIZES[index])
        windows = [(view, corner) for view in views for corner in transform.corners(view)]
        parts = [transform.window(record, *window) for window in windows]
        logits = apply(
            PARAMS, np.stack([p["image"] for p in parts]), np.stack([p["size"] for p in parts])
        )
        found = classes_of(windows, np.moveaxis(np.asarray(logits), -1, 1), (32, 32), SIZES[index])
        expected = slowly(transform, record)
        best = expected.max(axis=2)
        assert found.shape == SIZES[index]
        chosen = np.take_along_axis(expected, found[..., None].astype(int), axis=2)[..., 0]
        np.testing.assert_allclose(chosen, best, atol=1e-5)  # equal but for ties
        assert (found == expected.argmax(axis=2)).mean() > 0.999


@pytest.fixture(scope="module")
def expected():
    """The confusion matrix of every scene, slowly."""
    scenes = Scenes()
    return [
        brute_force(
            scenes[i].segmentation, slowly(TRANSFORM, scenes[i]).argmax(axis=2).astype(int), K
        )
        for i in range(len(scenes))
    ]


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 1), (1, 5), (3, 5), (8, 16), (8, 64)])
def test_every_picture_counts_once_on_any_mesh(expected, devices, batch_size):
    run = over_windows(apply, make_mesh(devices=jax.devices()[:devices]), batch_size)
    windows = Windows(Scenes(), TRANSFORM)
    assert len(windows) > 2 * len(SIZES)
    matrix, count = total_confusion(run, PARAMS, windows, threads=2)
    assert count == len(SIZES)
    assert matrix.sum() == sum((Scenes()[i].segmentation != IGNORED).sum() for i in range(7))
    np.testing.assert_allclose(matrix, sum(expected), atol=3)  # ties


def test_every_picture_counts_once_in_two_processes(expected):
    path = "PYTHONPATH=" + os.pathsep.join(sys.path)
    result = in_two_processes(["env", path, sys.executable, __file__], devices=2)
    assert result.returncode == 0, result.stdout
    told = [json.loads(line.split(" ", 1)[1]) for line in result.stdout.splitlines() if "{" in line]
    assert len(told) == 2
    assert told[0] == told[1]
    assert told[0]["count"] == len(SIZES)
    np.testing.assert_allclose(told[0]["matrix"], sum(expected), atol=3)


def test_windows_that_fit_are_of_whole_pictures(expected):
    whole = Windows(Scenes(), TRANSFORM)
    for most in (1, int(whole.first[2]), int(whole.first[3]) - 1):
        some = Windows(Scenes(), TRANSFORM, most)
        count = len(some.sizes)
        assert count == (1 if most == 1 else 2)
        assert len(some) == whole.first[count]
        run = over_windows(apply, make_mesh(), 8)
        matrix, pictures = total_confusion(run, PARAMS, some, threads=1)
        assert pictures == count
        np.testing.assert_allclose(matrix, sum(expected[:count]), atol=3)


def changed(index, **changes):
    def change(record):
        return Record(**{**vars(record), **changes}) if record.id == index else record

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (changed(2, image=b"none"), "validation#2: cannot be decoded"),
        (changed(2, segmentation=np.zeros((9, 9), np.uint8)), "validation#2: .* 9 x 9 pixels"),
        (changed(2, segmentation=None), "validation#2: the record has no label map"),
    ],
)
def test_a_bad_record_stops_or_is_left_out(expected, change, text):
    windows = Windows(Scenes(change), TRANSFORM)
    run = over_windows(apply, make_mesh(), 8)
    with pytest.raises(DecodeError, match=f"{text}.*bad_records=skip") as error:
        total_confusion(run, PARAMS, windows, threads=1)
    assert "\n" not in str(error.value)
    matrix, count = total_confusion(run, PARAMS, windows, threads=1, bad_records="skip")
    assert count == 6
    np.testing.assert_allclose(matrix, sum(expected) - expected[2], atol=3)


def test_a_label_outside_the_classes_stops_whatever_is_skipped():
    labels = np.full(SIZES[2], 9, np.uint8)
    windows = Windows(Scenes(changed(2, segmentation=labels)), TRANSFORM)
    run = over_windows(apply, make_mesh(), 8)
    with pytest.raises(LabelError, match=r"validation#2: label 9 .*the 4 classes"):
        total_confusion(run, PARAMS, windows, threads=1, bad_records="skip")


@pytest.mark.parametrize("max_batches", [0, 1])
def test_the_evaluation_of_a_run_writes_its_numbers(tmp_path, expected, max_batches):
    task = types.SimpleNamespace(windows_logits=apply, mesh=make_mesh(), eval_batch_size=8)
    inputs = types.SimpleNamespace(
        eval=Scenes(), eval_transform=TRANSFORM, loading={"threads": 1, "bad_records": "stop"}
    )
    writer = MetricsWriter(tmp_path, 0)
    evaluation = SegmentationEvaluation(task, inputs, writer, None, max_batches)
    (program,) = evaluation.compile(jax.ShapeDtypeStruct(PARAMS.shape, PARAMS.dtype))
    assert program.memory_analysis() is not None
    evaluation(7, PARAMS)
    writer.close()
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    count = len(Windows(Scenes(), TRANSFORM, 8).sizes) if max_batches else len(SIZES)
    assert (line["step"], line["eval/examples"]) == (7, count)
    np.testing.assert_allclose(evaluation.matrix, sum(expected[:count]), atol=3)
    for name in ("miou", "macc", "aacc"):
        assert line[f"eval/{name}"] == scores(evaluation.matrix)[name]


def test_windows_are_cut_with_the_schema_they_tell():
    windows, transform = Windows(Scenes(), TRANSFORM), WindowTransform(TRANSFORM)
    for index in (0, len(windows) - 1):
        found = transform(windows[index])
        assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
            name: (spec.shape, spec.dtype) for name, spec in transform.schema.items()
        }


if __name__ == "__main__":  # one of two processes
    from mae_jax.distributed.startup import initialize

    initialize()
    windows = Windows(Scenes(), TRANSFORM)
    matrix, count = total_confusion(over_windows(apply, make_mesh(), 8), PARAMS, windows, threads=1)
    print(json.dumps({"matrix": matrix.tolist(), "count": count}))
