"""Sheets of segmentation: every colour means one class, and text says which."""

import types

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mae_jax.data.record import Record
from mae_jax.data.segmentation import IGNORED, SegmentEvalTransform, SegmentTrainTransform
from mae_jax.data.splits import Splits
from mae_jax.distributed.mesh import make_mesh
from mae_jax.pictures import segmentation

NAMES = ["sky", "road", "car"]


class Scenes:
    """Pictures whose grey level tells the class of every pixel; the left quarter has none."""

    name, split, num_classes, class_names = "scenes", "train", 3, NAMES

    def __len__(self):
        return 6

    def __getitem__(self, index):
        labels = np.full((32, 64), index % 3, np.uint8)
        labels[16:] = (index + 1) % 3
        image = np.repeat(80 * labels[..., None], 3, axis=2)
        labels[:, :16] = IGNORED
        name = f"scenes/train#{index} (a/{index}.png)"
        return Record(image, -1, name, index, segmentation=labels)


def splits():
    shape = {"size": (32, 64), "classes": 3}
    return Splits(
        train=Scenes(),
        eval=Scenes(),
        train_transform=SegmentTrainTransform(**shape),
        eval_transform=SegmentEvalTransform(**shape, stride=(32, 64)),
        seed=0,
        batch_size=8,
        classes=None,
        threads=1,
    )


def test_colours_differ_and_do_not_depend_on_the_number_of_classes():
    colours = segmentation.palette(150).astype(int)
    apart = np.abs(colours[:150, None] - colours[None, :150]).sum(axis=2) + 999 * np.eye(150)
    assert apart.min() > 35
    assert apart[:11, :11].min() > 120
    np.testing.assert_array_equal(segmentation.palette(7)[:7], colours[:7])
    assert (colours[150:] == colours[IGNORED]).all()


def test_a_sheet_shows_labels_predictions_and_how_many_pixels_are_right(monkeypatch):
    sheets = []
    monkeypatch.setattr(
        segmentation, "sheet_of", lambda *args, **kwargs: sheets.append((args, kwargs))
    )
    texts = []
    fitting = segmentation.fitting
    monkeypatch.setattr(
        segmentation, "fitting", lambda text, room: texts.append(text) or fitting(text, room)
    )
    arrays, names = splits().example_arrays(Scenes(), 2)
    found = np.where(arrays["segmentation"] == IGNORED, 2, arrays["segmentation"])
    found[0, :8] = 2  # a quarter of the first picture, of class 0
    segmentation.segmentation_grid(
        arrays["image"], arrays["segmentation"], found,
        names=names, classes=3, class_names=NAMES, title="some",
    )  # fmt: skip
    (pictures, lines), options = sheets[0]
    assert pictures.shape == (2, 4, 128, 256, 3)  # enlarged, so that the legend can be read
    assert options["columns"][:3] == ("image", "labels", "predicted")
    assert [row[0][0][0] for row in lines] == [
        "train#0 (0.png)   75.0% of the pixels right",
        "train#5 (5.png)   100.0% of the pixels right",
    ]
    assert texts == ["road", "sky", "car", "car", "sky"]  # of both, the most frequent first
    colours = segmentation.palette(3)
    expected = np.round(0.4 * 80 + 0.6 * colours[1])
    np.testing.assert_allclose(pictures[0, 1, -1, -1], expected, atol=1)
    np.testing.assert_allclose(pictures[0, 1, 0, 0], np.round(0.6 * colours[IGNORED]), atol=1)
    legend = {tuple(c) for c in pictures[0, 3].reshape(-1, 3).tolist()}
    assert {tuple(c) for c in colours[:3].tolist()} <= legend


def test_a_legend_that_is_too_long_says_how_many_it_leaves_out(monkeypatch):
    labels = np.arange(30, dtype=np.uint8).repeat(30).reshape(30, 30)
    texts = []
    fitting = segmentation.fitting
    monkeypatch.setattr(
        segmentation, "fitting", lambda text, room: texts.append(text) or fitting(text, room)
    )
    legend = segmentation._legend(
        labels, (90, 90), segmentation.palette(30), [*map(str, range(30))]
    )
    assert legend.shape == (90, 90, 3)
    assert texts == ["0", "1", "2", "3"]


def test_a_run_draws_what_its_model_predicts_and_what_it_trains_on(tmp_path):
    def logits(state, images, size):
        near = jnp.abs(images[:, ::4, ::4, :1] - 80.0 * jnp.arange(3))
        return state - near  # of which the least is that of the class

    task = types.SimpleNamespace(windows_logits=logits, mesh=make_mesh(), batch_size=8)
    drawing = segmentation.draw_segmentations(task, splits(), 2, tmp_path)
    drawing.compile(jax.ShapeDtypeStruct((), np.float32))
    drawing(3, np.float32(0))
    sheet = np.asarray(Image.open(tmp_path / "step_00000003.png"))
    assert sheet.shape[1] > 4 * 256
    segmentation.draw_crops(task, splits(), tmp_path / "crops.png", 4)
    assert np.asarray(Image.open(tmp_path / "crops.png")).ndim == 3
