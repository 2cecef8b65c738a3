"""Fine-tuning and probing as people run them: processes, files, messages."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from program import (
    PLAIN,
    ROOT,
    command,
    environment,
    in_two_processes,
    kill_at_random_moments,
    losses,
    run,
)

from mae_jax.train.metrics import read_metrics

pytest.importorskip("skimage", reason="the embedded data needs scikit-image")

KILLS = int(os.environ.get("MAE_JAX_KILLS", "2"))
FINETUNE = {"config": "configs/finetune.py", **PLAIN}
PROBE = {
    "config": "configs/linear_probe.py",
    "optim.trust": 0.1,
    "data.crop": "centre",
    "data.flip": False,
    "head.norm_group": 8,
}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pretrained")
    result = run(workdir, steps=3, optim__warmup_steps=1)
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.fixture(scope="module")
def finetuned(pretrained, tmp_path_factory):
    """One finished run of the whole recipe."""
    workdir = tmp_path_factory.mktemp("finetuned")
    fields = {"augment__mix_group": 4, "optim__ema": 0.5, "pictures__every": 12}
    result = run(workdir, config="configs/finetune.py", init_from=pretrained, **fields)
    assert result.returncode == 0, result.stderr
    (workdir / "stderr").write_text(result.stderr)
    return workdir


def weights(workdir):
    return safetensors.numpy.load_file(workdir / "export" / "classifier.safetensors")


def test_fine_tuning_leaves_everything_its_users_rely_on(finetuned):
    results = json.loads((finetuned / "results.json").read_text())
    assert (results["task"], results["steps"], results["seed"]) == ("finetune", 12, 0)
    assert 0 <= results["top1"] <= results["top5"] <= 1
    assert results["loss"] > 0
    assert results["images_per_second"] > 0
    assert results["markdown"].startswith("| finetune | ViT-Ti/8, 32 px")
    last = [line for line in read_metrics(finetuned / "metrics.jsonl") if "eval/top1" in line][-1]
    assert (last["step"], last["eval/top1"]) == (12, results["top1"])
    for picture in ("augmentations.png", "predictions/step_00000012.png"):
        assert Image.open(finetuned / picture).size[0] > 100
    tensors = weights(finetuned)
    assert tensors["head.weight"].shape == (results["config"]["head"]["classes"] or 8, 32)
    assert {"fc_norm.weight", "fc_norm.bias", "pos_embed"} <= tensors.keys()


def test_fine_tuning_tells_what_was_loaded_and_what_is_fresh(finetuned, pretrained):
    told = (finetuned / "stderr").read_text()
    assert f"tensors from workdir {pretrained}" in told
    fresh = told[told.index("freshly initialised") :].splitlines()[0]
    assert "head.weight" in fresh
    assert "fc_norm.weight" in fresh


def test_the_exported_classifier_scores_what_the_run_scored(finetuned):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "mae_jax.evaluate", "--data=demo"),
            f"--weights={finetuned / 'export' / 'classifier.safetensors'}",
            f"--output={finetuned / 'evaluation.json'}",
        ],
        env=environment(3),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    scores = json.loads((finetuned / "evaluation.json").read_text())["sets"]["demo"]
    results = json.loads((finetuned / "results.json").read_text())
    assert scores["examples"] == results["examples"]
    assert scores["top1"] == pytest.approx(results["top1"], abs=1e-9)
    assert scores["loss"] == pytest.approx(results["loss"], rel=1e-4)


def test_a_finished_run_that_lost_its_metrics_is_evaluated_again(finetuned, pretrained, tmp_path):
    shutil.copytree(finetuned, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "results.json").unlink()
    fields = {"augment__mix_group": 4, "optim__ema": 0.5, "pictures__every": 12}
    result = run(tmp_path / "run", config="configs/finetune.py", init_from=pretrained, **fields)
    assert result.returncode == 0, result.stderr
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    before = json.loads((finetuned / "results.json").read_text())
    for name in ("top1", "top5", "loss", "examples"):
        assert again[name] == pytest.approx(before[name], rel=1e-6)
    assert again["images_per_second"] is None


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [FINETUNE, PROBE], ids=["finetune", "linear_probe"])
def test_killed_and_restarted_the_run_ends_bit_identical(recipe, pretrained, tmp_path):
    fields = {**recipe, "init_from": pretrained, "checkpoint.every": 1}
    reference, workdir = tmp_path / "reference", tmp_path / "killed"
    assert run(reference, **fields).returncode == 0
    assert kill_at_random_moments(command(workdir, **fields), workdir, KILLS) > 0
    result = run(workdir, **fields)
    assert result.returncode == 0, result.stderr
    assert losses(workdir) == losses(reference)
    expected, found = weights(reference), weights(workdir)
    assert "head.weight" in expected
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensor, found[name], err_msg=name)
    top1 = [json.loads((w / "results.json").read_text())["top1"] for w in (reference, workdir)]
    assert top1[0] == top1[1]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [FINETUNE, PROBE], ids=["finetune", "linear_probe"])
def test_two_processes_compute_what_one_does(recipe, pretrained, tmp_path):
    fields = {**recipe, "init_from": pretrained, "steps": 4}
    assert run(tmp_path / "one", **fields).returncode == 0
    result = in_two_processes(command(tmp_path / "two", **fields, mesh__fsdp=2), devices=2)
    assert result.returncode == 0, result.stdout
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
    scores = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert scores[0]["examples"] == scores[1]["examples"]
    assert scores[0]["top1"] == scores[1]["top1"]


def folder(path, *files):
    rng = np.random.default_rng(0)
    for file in files:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(path / file)
    return path


def test_an_unlabelled_set_is_refused(tmp_path):
    photos = folder(tmp_path / "photos", *(f"{i}.jpg" for i in range(20)))
    fields = {"data__name": "folder", "data__dir": photos, "init_from": "random"}
    refused = run(tmp_path / "new", **FINETUNE, **fields)
    assert refused.returncode == 2
    assert "has no labels, and task finetune learns from labels" in refused.stderr
    assert not (tmp_path / "new").exists()


def test_splits_with_other_classes_are_refused(tmp_path):
    photos = folder(
        tmp_path / "photos",
        *(f"train/{name}/{i}.jpg" for name in ("cat", "dog") for i in range(8)),
        *(f"validation/{name}/{i}.jpg" for name in ("cat", "cow", "dog") for i in range(8)),
    )
    fields = {"data__name": "folder", "data__dir": photos, "init_from": "random"}
    refused = run(tmp_path / "new", **FINETUNE, **fields)
    assert refused.returncode == 2
    assert "validation has 3 classes, train has 2; in one of them only: cow" in refused.stderr


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "init_from"),
        ({"init_from": "/nowhere"}, "/nowhere"),
        ({"init_from": "random", "head__classes": 1000}, "head.classes = 1000, but demo has"),
        ({"init_from": "random", "trainable_blocks": 0.7}, "trainable_blocks = 0.7"),
        ({"init_from": "random", "trainable_blocks": 3.0}, "trainable_blocks = 3"),
        ({"init_from": "random", "decoder__depth": 2}, "decoder.depth"),
    ],
)
def test_bad_input_ends_at_once_with_its_message(tmp_path, fields, message):
    result = run(tmp_path / "new", **(FINETUNE | fields), batch_size=12)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_weights_of_another_shape_are_refused_tensor_by_tensor(pretrained, tmp_path):
    refused = run(tmp_path / "new", **FINETUNE, init_from=pretrained, model__width=64)
    assert refused.returncode == 2
    assert "width 32" in refused.stderr


@pytest.mark.parametrize("workdir", ["pretrained", "finetuned"])
def test_evaluate_scores_a_run_again_on_its_own_split(workdir, request, tmp_path):
    folder = request.getfixturevalue(workdir)
    output = tmp_path / "again.json"
    subprocess.run(
        [sys.executable, "-m", "mae_jax.evaluate", f"--weights={folder}", f"--output={output}"],
        env=environment(),
        check=True,
        capture_output=True,
        cwd=ROOT,
    )
    again = json.loads(output.read_text())
    told = [line for line in read_metrics(folder / "metrics.jsonl") if "eval/loss" in line][-1]
    assert again.pop("step") == told.pop("step")
    assert again == {name.removeprefix("eval/"): value for name, value in told.items()}
