"""Segmentation as people run it, and on any devices."""

import json
import os
import subprocess

import jax
import numpy as np
import pytest
import safetensors.numpy
from label_maps import NAMES, write
from PIL import Image
from program import (
    ROOT,
    assert_refused_in_one_line,
    environment,
    in_two_processes,
    kill_at_random_moments,
    losses,
)
from program import command as program_command
from task_runs import assert_close, run_steps

from mae_jax import evaluate
from mae_jax.config import load_config

KILLS = int(os.environ.get("MAE_JAX_KILLS", "2"))
TINY = {
    "task": "segment",
    "init_from": "random",
    "batch_size": 8,
    "data.name": "segmentation_folder",
    "segment.width": 16,
    "optim.warmup_steps": 2,
    "optim.schedule": "linear",
    "optim.layer_decay": 0.75,
    "model.drop_path": 0.1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("label_maps"))


def command(workdir, data, **fields):
    return program_command(workdir, "configs/segment.py", **(TINY | {"data.dir": data} | fields))


def run(workdir, data, **fields):
    return subprocess.run(
        command(workdir, data, **fields),
        env=environment(),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    result = run(workdir, data, **{"pictures.every": 12})
    assert result.returncode == 0, result.stderr
    return workdir


def weights(workdir):
    return safetensors.numpy.load_file(workdir / "export" / "segmenter.safetensors")


def test_a_run_leaves_everything_its_users_rely_on(undisturbed):
    results = json.loads((undisturbed / "results.json").read_text())
    assert 0 <= results["miou"] <= results["macc"] <= 1
    assert 0 <= results["aacc"] <= 1
    assert list(results["classes"]) == NAMES
    assert results["miou"] == pytest.approx(
        np.mean([scores["iou"] for scores in results["classes"].values()])
    )
    assert results["examples"] == 5
    for picture in ("augmentations.png", "predictions/step_00000012.png"):
        assert Image.open(undisturbed / picture).size[0] > 100
    assert {"pos_embed", "blocks.0.attn.qkv.weight"} <= weights(undisturbed).keys()


def test_evaluate_scores_it_again_with_the_same_numbers(undisturbed, tmp_path, capsys):
    evaluate.main([f"--weights={undisturbed}", f"--output={tmp_path / 'again.json'}"])
    again = json.loads((tmp_path / "again.json").read_text())
    results = json.loads((undisturbed / "results.json").read_text())
    for name in ("miou", "macc", "aacc", "classes", "examples"):
        assert again[name] == results[name]
    assert "| green |" in capsys.readouterr().out


LAYOUTS = [(8, 8, 1), (8, 1, 8)]


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "axis", "fsdp"), LAYOUTS)
def test_steps_and_statistics_do_not_depend_on_the_devices(data, devices, axis, fsdp):
    config = load_config("segment:quick")
    sizes = {"model.width": 32, "model.heads": 2, "model.depth": 2, "model.image_size": (32,)}
    config.update_from_flattened_dict({**TINY, **sizes, "data.dir": str(data), "steps": 20})
    expected, state = run_steps(config)
    losses, other = run_steps(config, devices, axis, fsdp)
    assert losses[0] != losses[-1]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert_close(jax.device_get(state.weights), jax.device_get(other.weights))


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_bit_identical(undisturbed, data, tmp_path):
    one = command(tmp_path / "run", data, **{"pictures.every": 12})
    assert kill_at_random_moments(one, tmp_path / "run", KILLS)
    done = subprocess.run(one, env=environment(), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(undisturbed)
    for name, tensor in weights(undisturbed).items():
        np.testing.assert_array_equal(weights(tmp_path / "run")[name], tensor, err_msg=name)
    files = [path / "results.json" for path in (tmp_path / "run", undisturbed)]
    assert len({json.loads(file.read_text())["miou"] for file in files}) == 1


@pytest.mark.slow
def test_two_processes_compute_what_one_does(undisturbed, data, tmp_path):
    result = in_two_processes(command(tmp_path, data, **{"pictures.every": 12}), devices=4)
    assert result.returncode == 0, result.stdout
    expected, found = losses(undisturbed), losses(tmp_path)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
    ours, theirs = (json.loads((p / "results.json").read_text()) for p in (tmp_path, undisturbed))
    assert ours["examples"] == theirs["examples"] == 5
    assert ours["aacc"] == pytest.approx(theirs["aacc"], abs=0.01)


@pytest.mark.slow
def test_it_learns_every_class(data, tmp_path):
    """With a head of 64 channels; one of 16 confuses two of the colours for as many steps more."""
    fields = {"steps": 120, "optim.base_lr": 0.1, "optim.layer_decay": 1.0, "model.drop_path": 0.0}
    result = run(tmp_path, data, **fields, **{"checkpoint.every": 120, "segment.width": 64})
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "results.json").read_text())["miou"] > 0.7


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "annotations/training/3.png").unlink(), "3.png has no label map"),
        (lambda d: save(d, np.ones((9, 9), np.uint8)), "3.png"),
        (lambda d: save(d, np.full((40, 48), 77, np.uint8)), "label 77"),
        (lambda d: save(d, np.ones((40, 48, 3), np.uint8)), "RGB"),
        (lambda d: (d / "classes.txt").unlink(), "classes.txt"),
    ],
    ids=["missing", "other size", "no class", "colours", "classes"],
)
def test_bad_label_maps_are_refused_in_one_line(tmp_path, spoil, message):
    spoil(write(tmp_path / "data", training=6))
    done = run(tmp_path / "run", tmp_path / "data", **{"batch_size": 6, "log_every": 50})
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr


def save(folder, labels):
    Image.fromarray(labels).save(folder / "annotations/training/3.png")


def test_fields_that_do_not_go_together_are_refused(data, tmp_path):
    for fields, message in (
        ({"segment.taps": "0,1"}, "segment.taps"),
        ({"segment.taps": "-1,0,1,1"}, "segment.taps"),
        ({"segment.stride": 64}, "segment.stride"),
        ({"data.scale": "0.1,1"}, "data.scale"),
        ({"head.classes": 7}, "head.classes = 7"),
    ):
        done = run(tmp_path, data, **fields)
        assert_refused_in_one_line(done, message)


def test_an_export_scores_the_same_on_the_data_by_name(undisturbed, data, tmp_path):
    weights, output = undisturbed / "export" / "segmenter.safetensors", tmp_path / "scores.json"
    options = ["--data=segmentation_folder", f"--data_dir={data}", f"--output={output}"]
    evaluate.main([f"--weights={weights}", *options])
    again = json.loads(output.read_text())
    results = json.loads((undisturbed / "results.json").read_text())
    assert again["classes"] == results["classes"]
    assert again["miou"] == results["miou"]
