"""Names of classes: into every export, out of every file, and compared wherever labels count."""

import dataclasses
import json
import runpy
import types

import numpy as np
import pytest
from PIL import Image
from small_models import SMALL, assert_same_tree, classifier_params

from mae_jax import UserError, evaluate, export, main
from mae_jax.config import default_config
from mae_jax.data.folder import PictureFiles
from mae_jax.interop.checkpoint import open_checkpoint
from mae_jax.interop.class_names import require_same_classes
from mae_jax.interop.export import export_encoder, export_hugging_face
from mae_jax.interop.load import load_into
from mae_jax.interop.tensor_files import read_tensors, save_safetensors
from mae_jax.storage.checkpoints import Checkpoints
from mae_jax.train.state import TrainState

NAMES = ("cat", "dog")
SPEC = dataclasses.replace(
    SMALL.without_decoder(),
    target="",
    mask_ratio=0.0,
    pool="cls",
    classes=2,
    class_names=NAMES,
)


def test_a_class_more_is_other_classes():
    with pytest.raises(
        UserError, match=r"here has other classes.* 2 in the weights, 3 in the data"
    ):
        require_same_classes(NAMES, (*NAMES, "emu"), "here")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    export_encoder(classifier_params(SPEC), folder / "timm", SPEC, {})
    for format in ("official", "hf", "orbax", "stablehlo"):
        arguments = [f"--from={folder / 'timm'}", f"--format={format}"]
        export.main([*arguments, f"--output={folder / format}"])
    return folder


@pytest.mark.parametrize("format", ["timm", "official", "hf", "orbax"])
def test_every_export_carries_them(format, exported):
    assert open_checkpoint(exported / format).spec == SPEC
    assert "- classes: cat, dog\n" in (exported / format / "README.md").read_text()


def test_a_served_function_brings_them(exported):
    assert runpy.run_path(str(exported / "stablehlo" / "serve.py"))["class_names"]() == [*NAMES]


@pytest.mark.parametrize("format", ["timm", "hf"])
def test_they_are_read_where_others_write_them(format, exported, tmp_path):
    """From config.json alone: the file of tensors tells nothing."""
    (file,) = (exported / format).glob("*.safetensors")
    tensors, _ = read_tensors(file)
    save_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    config = json.loads((exported / format / "config.json").read_text())
    field, numbered = {
        "timm": ("label_names", {"0": "cat", "1": "dog"}),
        "hf": ("id2label", {"0": "LABEL_0", "1": "LABEL_1"}),
    }[format]
    for content, expected in (
        (config[field], NAMES),
        (numbered, NAMES if format == "timm" else ()),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {field: content}))
        assert open_checkpoint(tmp_path, heads=4).spec.class_names == expected


def test_a_workdir_tells_its_classes(tmp_path):
    config = default_config()
    config.task, config.head.pool = "finetune", "cls"
    state = TrainState(np.int32(3), classifier_params(SPEC), {"mu": np.zeros(1, np.float32)}, None)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    record = {"config": config.to_dict(), "elapsed_seconds": 1.0, "version": "0"}
    checkpoints.save(3, state, record | {"model": SPEC.to_json()})
    checkpoints.close()
    assert open_checkpoint(tmp_path).spec == SPEC


SYNSETS = [f"n0144076{i}" for i in range(3)]


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (["cat", "dog"], ["cat", "emu"], "1 of 2 classes differ; number 1 is 'emu' in the data"),
        (["cat", "dog"], ["emu", "owl"], "2 of 2 classes differ"),
        (["cat", "dog"], ["dog", "cat"], "the same classes in another order"),
        (SYNSETS, SYNSETS[::-1], "another order"),
        (["1", "0"], ["cat", "dog"], "differ"),  # numbers that do not count the classes
    ],
)
def test_other_classes_are_refused_by_name(model, data, message):
    with pytest.raises(UserError, match=message):
        require_same_classes(model, data, "the data")


@pytest.mark.parametrize(
    ("model", "data", "note"),
    [
        (["cat", "dog"], ["cat", "dog"], ""),
        (["Apple_pie", "hot-dog"], ["apple pie", "hot dog"], ""),
        ([], ["cat", "dog"], "weights carry no class names"),
        (["LABEL_0", "LABEL_1"], ["cat", "dog"], "weights carry no class names"),
        (["cat", "dog"], None, "has no class names"),
        (["cat", "dog"], ["0", "1"], "has no class names"),
        (["tench", "goldfish", "shark"], SYNSETS, "not compared"),
    ],
)
def test_what_cannot_be_compared_is_noted(model, data, note):
    found = require_same_classes(model, data, "the data")
    assert note in found
    assert bool(found) == bool(note)


def score(weights, folder, *options):
    arguments = [f"--weights={weights}", "--data=folder", f"--data_dir={folder}"]
    evaluate.main([*arguments, "--batch_size=8", *options])


def test_evaluate_refuses_other_classes_of_equal_count(exported, tmp_path, capsys):
    for name, classes in {"right": NAMES, "wrong": ("cat", "emu")}.items():
        for label in classes:
            (tmp_path / name / "val" / label).mkdir(parents=True)
            for i in range(2):
                file = tmp_path / name / "val" / label / f"{i}.png"
                Image.fromarray(np.full((32, 32, 3), 40 * i, np.uint8)).save(file)
    score(exported / "timm", tmp_path / "right")
    assert "note" not in capsys.readouterr().err
    with pytest.raises(UserError, match="number 1 is 'emu' in the data and 'dog' in the weights"):
        score(exported / "timm", tmp_path / "wrong")
    score(exported / "timm", tmp_path / "wrong", "--class_names=none")
    captured = capsys.readouterr()
    assert "note: the weights carry no class names" in captured.err
    assert "| 4 |" in captured.out
    (tmp_path / "names.txt").write_text("cat\nemu\n")
    score(exported / "timm", tmp_path / "wrong", f"--class_names={tmp_path / 'names.txt'}")


def test_a_head_of_other_classes_is_not_taken_into_training(exported):
    other = dataclasses.replace(SPEC, class_names=("cat", "emu"))
    fresh = classifier_params(SPEC, seed=5)
    loaded, report = load_into(fresh, exported / "timm", other)
    assert_same_tree(loaded["head"], fresh["head"])
    assert "the head is not used: the data has other classes" in str(report)
    loaded, report = load_into(fresh, exported / "timm", SPEC)
    assert_same_tree(loaded, classifier_params(SPEC))
    assert not report.notes


def test_a_run_is_not_continued_on_other_classes():
    """`data.dir` may change between a checkpoint and the run that continues from it."""
    config = default_config()
    record = {"config": config.to_dict(), "model": SPEC.to_json(), "data": {"examples": 4}}
    for names in (NAMES, ("cat", "emu")):
        source = PictureFiles("", ["a"] * 4, class_names=[*names])
        data = types.SimpleNamespace(train=source, head_classes=2)
        if names == NAMES:
            main.check_fits(record, config, data, {})
        else:
            with pytest.raises(UserError, match=r"data\.dir: folder has other classes"):
                main.check_fits(record, config, data, {})


def test_names_must_be_as_many_as_classes():
    with pytest.raises(UserError, match="3 class names for 2 classes"):
        dataclasses.replace(SPEC, class_names=("a", "b", "c"))


def test_hugging_face_labels_are_named(exported):
    config = json.loads((exported / "hf" / "config.json").read_text())
    assert config["label2id"] == {"cat": 0, "dog": 1}
    export_hugging_face(
        classifier_params(SPEC),
        exported / "nameless",
        dataclasses.replace(SPEC, class_names=()),
        {},
    )
    config = json.loads((exported / "nameless" / "config.json").read_text())
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
