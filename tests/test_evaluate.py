"""Accuracy of classifiers: the numbers, the benchmarks, and what bad input is told."""

import dataclasses
import functools
import io
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from mae_jax import UserError, cli, evaluate
from mae_jax.data.record import DecodeError, Record
from mae_jax.data.sources import open_source
from mae_jax.data.transforms import EvalTransform
from mae_jax.distributed.mesh import make_mesh
from mae_jax.evaluate import Scorer, choose_benchmark
from mae_jax.evaluators.robustness import ALEXNET_ERRORS, BENCHMARKS, corrupted, corruption_errors
from mae_jax.interop.checkpoint import open_checkpoint
from mae_jax.interop.export import export_encoder
from mae_jax.models.inference import classify_function
from mae_jax.models.spec import ModelSpec

CLASSES = 8  # as the embedded data has
MODEL = ModelSpec((32, 32), 8, 3, 32, 1, 4, pool="mean", classes=CLASSES)

# AlexNet's top-1 error at severities 1 to 5 of ImageNet-C, from another source than the means in
# `mae_jax.evaluators.robustness`.
ALEXNET_BY_SEVERITY = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.94870, 0.98720, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.58430, 0.70048, 0.82108, 0.89750, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.91870, 0.94952),
    "frost": (0.61390, 0.79734, 0.88790, 0.89942, 0.93430),
    "fog": (0.67474, 0.76050, 0.84378, 0.87260, 0.94500),
    "brightness": (0.45140, 0.48502, 0.54048, 0.62166, 0.72440),
    "contrast": (0.64548, 0.76150, 0.88874, 0.97760, 0.99270),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.54620, 0.73728, 0.87092, 0.91262),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
}


def random_classifier(d, seed=0):
    """Parameters whose predictions vary from picture to picture."""
    images = np.zeros((1, *d.image_size, d.channels), np.float32)
    shapes = jax.eval_shape(d.classifier().init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        x = rng.standard_normal(leaf.shape, np.float32)
        if "encoder" in name and "kernel" in name:
            return x * np.float32((2 / sum(leaf.shape)) ** 0.5)
        return x if "pos_embed" in name or "head" in name else np.full_like(x, "scale" in name)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    export_encoder(random_classifier(MODEL), folder, MODEL, {})
    return str(folder)


class Pictures:
    """Random pictures under a TFDS name; record `broken` cannot be read."""

    def __init__(self, name, labels, num_classes=CLASSES, seed=0):
        self.name, self.split = name, "test"
        self.labels, self.num_classes, self.class_names = labels, num_classes, None
        rng = np.random.default_rng(seed)
        patches = rng.integers(0, 256, (len(labels), 3, 4, 3)).astype(np.uint8)
        self.images = patches.repeat(12, axis=1).repeat(10, axis=2)  # [N, 36, 40, 3]
        self.broken = None
        self.reads = 0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.reads += 1
        if index == self.broken:
            raise DecodeError(f"{self.name}#{index}: cannot be read")
        return Record(self.images[index], self.labels[index], f"{self.name}#{index}")


@functools.cache
def classify(d):
    return jax.jit(classify_function(d))


def expected_scores(weights, source, chosen=None, crop=None):
    """Top-1, top-5 and loss in numpy, over all classes or the chosen ones."""
    checkpoint = open_checkpoint(weights)
    d = checkpoint.spec
    transform = EvalTransform(d.image_size, d.channels, crop)
    records = [source[i] for i in range(len(source))]
    images = np.stack([transform.image(record) for record in records])
    logits = np.asarray(classify(d)(checkpoint.params(decoder=False), images), np.float64)
    labels = np.array([record.label for record in records])
    if chosen is not None:
        hidden = np.setdiff1d(np.arange(d.classes), chosen)
        logits[:, hidden] = -np.inf
    order = np.argsort(-logits, axis=1)
    largest = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits - largest).sum(axis=1)) + largest[:, 0]
    return {
        "top1": np.mean(order[:, 0] == labels),
        "top5": np.mean((order[:, :5] == labels[:, None]).any(axis=1)),
        "loss": np.mean(log_sum - logits[np.arange(len(labels)), labels]),
    }


def assert_scores(found, expected):
    assert found["top1"] == pytest.approx(expected["top1"], abs=1e-9)
    assert found["top5"] == pytest.approx(expected["top5"], abs=1e-9)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def run(*arguments):
    evaluate.main([str(a) for a in arguments])


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        cli.start("evaluate", [str(a) for a in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_scores_are_those_of_numpy_on_any_number_of_devices(devices, weights):
    source = Pictures("some", [i % CLASSES for i in range(29)])  # the last batch is not full
    mesh = make_mesh(devices=jax.devices()[:devices])
    scores = Scorer(open_checkpoint(weights), batch_size=8, mesh=mesh)(source)
    assert scores["examples"] == 29
    assert scores["classes"] == CLASSES
    assert_scores(scores, expected_scores(weights, source))
    assert 0 < scores["top1"] < scores["top5"] < 1  # or it would say nothing


def test_the_embedded_data_is_scored_and_told_as_a_row(weights, tmp_path, capsys):
    pytest.importorskip("skimage", reason="the embedded data needs scikit-image")
    output = tmp_path / "scores.json"
    run(f"--weights={weights}", "--data=demo", "--split=validation[:45]", f"--output={output}")
    result = json.loads(output.read_text())
    expected = expected_scores(weights, open_source("demo", None, "validation[:45]"))
    assert_scores(result, expected)
    assert_scores(result["sets"]["demo"], expected)
    assert result["examples"] == 45
    assert "mce" not in result
    row = f"demo, validation[:45] | 45 | {100 * expected['top1']:.2f} | "
    printed = capsys.readouterr().out
    assert row in printed
    assert "| top-1 % | top-5 % | loss | mCE % |" in printed
    assert row in result["markdown"]


def write_pictures(folder, names, count):
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (40, 48, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def test_a_folder_of_classes_is_scored_and_the_crop_can_be_chosen(tmp_path):
    d = dataclasses.replace(MODEL, pool="cls", classes=3)
    export_encoder(random_classifier(d), tmp_path / "weights", d, {})
    write_pictures(tmp_path / "pictures" / "val", ("ant", "bee", "cat"), 5)
    common = [f"--weights={tmp_path / 'weights'}", "--data=folder"]
    common += [f"--data_dir={tmp_path / 'pictures'}", "--batch_size=4"]
    run(*common, f"--output={tmp_path / 'a.json'}")
    result = json.loads((tmp_path / "a.json").read_text())
    source = open_source("folder", str(tmp_path / "pictures"), "validation")
    assert_scores(result, expected_scores(str(tmp_path / "weights"), source))
    assert result["examples"] == 15
    run(*common, "--crop=1.0", f"--output={tmp_path / 'b.json'}")
    assert json.loads((tmp_path / "b.json").read_text())["loss"] != result["loss"]


def test_what_cannot_be_evaluated_is_explained(weights, tmp_path, capsys):
    pytest.importorskip("skimage", reason="the embedded data needs scikit-image")
    good = {"weights": weights, "data": "demo"}

    def error(**change):
        given = {name: value for name, value in (good | change).items() if value is not None}
        return error_of(capsys, *(f"--{name}={value}" for name, value in given.items()))

    headless = dataclasses.replace(MODEL, pool="", classes=0)
    params = random_classifier(dataclasses.replace(MODEL, pool="cls"))
    export_encoder({"encoder": params["encoder"]}, tmp_path / "headless", headless, {})
    assert "no head" in error(weights=tmp_path / "headless")
    assert "no such file" in error(weights=tmp_path / "nowhere")

    five = dataclasses.replace(MODEL, classes=5)
    export_encoder(random_classifier(five), tmp_path / "five", five, {})
    assert "has 8 classes, the classifier has 5" in error(weights=tmp_path / "five")

    write_pictures(tmp_path, ("flat",), 2)
    assert "has no labels" in error(data="folder", data_dir=tmp_path / "flat", split="train")

    assert "one of --data and --robustness" in error(robustness="a")
    assert "no workdir of a run, whose own split" in error(data=None)
    assert "belongs to --robustness=c" in error(corruptions="fog")
    assert "belongs to --data" in error(data=None, robustness="a", split="test")
    told = error(data=None, robustness="c", corruptions="fog,mist", data_dir=tmp_path)
    assert "there is no mist; choose from gaussian_noise" in told
    assert "--corruptions" in error(data=None, robustness="r", corruptions="fog")

    assert "data.dir is not set" in error(data=None, robustness="a")
    told = error(data=None, robustness="sketch", data_dir=tmp_path)
    assert "tfds build imagenet_sketch" in told
    told = error(data=None, robustness="c", data_dir=tmp_path)
    assert "tfds build imagenet2012_corrupted/gaussian_noise_1" in told
    assert "Likewise 74 more: imagenet2012_corrupted/gaussian_noise_2" in told
    assert "validation (256 records)" in error(split="test")
    assert "crop_ratio=2.0" in error(crop=2)
    assert "batch_size=0" in error(batch_size=0)
    assert "is a folder" in error(output=tmp_path)


def test_labels_are_asked_for_before_any_picture_is_decoded(weights):
    scorer = Scorer(open_checkpoint(weights))
    with pytest.raises(UserError, match="other, split test, has no labels"):
        scorer.check(Pictures("other", [-1, -1]))


def test_only_classes_that_occur_can_be_predicted_in_a_and_r(weights, monkeypatch):
    occurring = [1, 4, 6]
    source = Pictures("imagenet_a", [occurring[i % 3] for i in range(30)])
    monkeypatch.setattr(evaluate, "open_source", lambda name, data_dir, split: source)
    result = evaluate.evaluate(weights, BENCHMARKS["a"], "/data", batch_size=8)
    expected = expected_scores(weights, source, chosen=occurring)
    assert_scores(result, expected)
    assert result["sets"]["imagenet_a"]["classes"] == 3
    assert expected["top1"] > expected_scores(weights, source)["top1"]
    whole = evaluate.evaluate(weights, BENCHMARKS["sketch"], "/data", batch_size=8)
    assert whole["sets"]["imagenet_sketch"]["classes"] == CLASSES
    assert_scores(whole, expected_scores(weights, source))


def test_the_benchmarks_are_those_tfds_has():
    assert BENCHMARKS.keys() == {"a", "r", "sketch", "c"}
    assert [BENCHMARKS[b].split for b in ("a", "r", "sketch", "c")] == ["test"] * 3 + ["validation"]
    assert [BENCHMARKS[b].subset for b in ("a", "r", "sketch", "c")] == [True, True, False, False]
    assert len(set(BENCHMARKS["c"].data)) == 75
    assert BENCHMARKS["c"].crop == 1.0  # its pictures are cropped to 224 already
    assert choose_benchmark("", "", "c", "fog,snow,fog").data == corrupted("fog") + corrupted(
        "snow"
    )


@pytest.fixture
def corrupted_sets(tmp_path, monkeypatch):
    """The folders of a prepared ImageNet-C, its records faked: {name: source}."""
    sources = {}
    for seed, name in enumerate(BENCHMARKS["c"].data):
        folder = tmp_path / "tfds" / name / "3.1.0"
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text("{}")
        sources[name] = Pictures(name, [i % CLASSES for i in range(5)], seed=seed)
    monkeypatch.setattr(evaluate, "open_source", lambda name, data_dir, split: sources[name])
    return sources


@pytest.fixture
def scored_with(weights, corrupted_sets, tmp_path, monkeypatch):
    """A function of {corruption: top-1 errors by severity} -> the result of `evaluate`."""

    def run(by_severity):
        errors = {
            name: error
            for corruption, values in by_severity.items()
            for name, error in zip(corrupted(corruption), values, strict=True)
        }

        def score(self, source, *, subset):
            top1 = 1 - errors[source.name]
            return {"top1": top1, "top5": 1.0, "loss": 1.0, "examples": 50_000, "classes": 1000}

        monkeypatch.setattr(Scorer, "__call__", score)
        return evaluate.evaluate(weights, BENCHMARKS["c"], str(tmp_path / "tfds"))

    return run


def test_alexnets_own_corruption_error_is_100(scored_with):
    result = scored_with(ALEXNET_BY_SEVERITY)
    assert result["mce"] == pytest.approx(100, abs=1e-6)
    for name, value in result["corruption_errors"].items():
        assert value == pytest.approx(100, abs=1e-3), name
    assert result["examples"] == 75 * 50_000
    assert "| imagenet2012_corrupted | 3,750,000 |" in result["markdown"]
    assert result["markdown"].endswith("| 100.0 |")


def test_the_mean_corruption_error_is_the_mean_of_ratios_worked_by_hand(scored_with):
    errors = {name: (0.5,) * 5 for name in ALEXNET_ERRORS}
    errors["gaussian_noise"] = (0.2, 0.3, 0.4, 0.5, 0.6)  # 40 / 0.886428 = 45.1249
    errors["brightness"] = (0.1, 0.1, 0.1, 0.2, 0.5)  # 20 / 0.564592 = 35.4238
    result = scored_with(errors)
    assert result["corruption_errors"]["gaussian_noise"] == pytest.approx(45.1249, abs=1e-4)
    assert result["corruption_errors"]["brightness"] == pytest.approx(35.4238, abs=1e-4)
    assert result["corruption_errors"]["fog"] == pytest.approx(61.0259, abs=1e-4)  # 50 / 0.819324
    assert result["mce"] == pytest.approx(60.3781, abs=1e-4)
    assert corruption_errors({"snow": [0.0, 0.0, 0.0]}) == {"snow": 0.0}


def test_an_interrupted_benchmark_goes_on_after_the_last_data_set_it_finished(
    weights, corrupted_sets, tmp_path, capsys
):
    output = tmp_path / "c.json"
    names = corrupted("fog") + corrupted("snow")
    command = [f"--weights={weights}", "--robustness=c", "--corruptions=fog,snow"]
    command += [f"--data_dir={tmp_path / 'tfds'}", "--batch_size=8", f"--output={output}"]
    corrupted_sets["imagenet2012_corrupted/fog_4"].broken = 2
    assert "fog_4#2: cannot be read" in error_of(capsys, *command)
    assert list(json.loads(output.read_text())["sets"]) == list(names[:3])

    corrupted_sets["imagenet2012_corrupted/fog_4"].broken = None
    before = {name: corrupted_sets[name].reads for name in names}
    run(*command)
    printed = capsys.readouterr()
    assert "holds 3 of 10 data set(s) already" in printed.err
    assert "corruption errors: snow " in printed.out
    assert all(corrupted_sets[name].reads == before[name] for name in names[:3])
    result = json.loads(output.read_text())
    assert list(result["sets"]) == list(names)
    assert "mce" not in result  # of two corruptions there is none
    assert set(result["corruption_errors"]) == {"fog", "snow"}
    for name in names[2:5]:
        assert_scores(
            result["sets"][name], expected_scores(weights, corrupted_sets[name], crop=1.0)
        )

    content = output.read_text()
    run(*command)  # all is done: shown again, nothing read
    assert output.read_text() == content
    told = error_of(capsys, *command, "--crop=0.9")
    assert "holds another evaluation (other crop)" in told
    assert output.read_text() == content


def test_a_file_that_is_something_else_is_not_written_over(weights, tmp_path, capsys):
    pytest.importorskip("skimage", reason="the embedded data needs scikit-image")
    for content in ('{"mine": 1}', "[]", "text"):
        (tmp_path / "notes.json").write_text(content)
        error_of(capsys, f"--weights={weights}", "--data=demo", f"--output={tmp_path}/notes.json")
        assert (tmp_path / "notes.json").read_text() == content


def test_a_broken_picture_and_a_label_out_of_range_are_named(weights, tmp_path):
    scorer = Scorer(open_checkpoint(weights), batch_size=8)
    with pytest.raises(ValueError, match=r"odd#3.*label 9 lies outside the 8 classes"):
        scorer(Pictures("odd", [0, 1, 2, 9]))
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(buffer, "PNG")
    folder = pathlib.Path(tmp_path, "pictures", "val")
    write_pictures(folder, [f"class{i}" for i in range(CLASSES)], 1)
    (folder / "class5" / "0.png").write_bytes(buffer.getvalue()[:60])
    with pytest.raises(DecodeError, match=r"class5/0\.png"):
        scorer(open_source("folder", str(tmp_path / "pictures"), "validation"))
