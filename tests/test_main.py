"""The program as people run it: processes, signals, exit codes and files."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import safetensors.numpy
from program import (
    ROOT,
    TFDS,
    command,
    environment,
    in_two_processes,
    kill_at_random_moments,
    losses,
    progress,
    run,
)

from mae_jax.train.ledger import read_times
from mae_jax.train.metrics import read_metrics

KILLS = int(os.environ.get("MAE_JAX_KILLS", "3"))  # of the SIGKILL test; 20 takes ten minutes

pytest.importorskip("skimage", reason="the embedded data needs scikit-image")


def exported(workdir):
    return safetensors.numpy.load_file(workdir / "export" / "encoder.safetensors")


def assert_same_run(workdir, reference):
    assert losses(workdir) == losses(reference)
    expected, found = exported(reference), exported(workdir)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensor, found[name], err_msg=name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """One finished run that nobody interrupted; its log tells what was compiled."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_LOG_COMPILES", "1")
        result = run(workdir, profile__start=5, profile__steps=2)
    assert result.returncode == 0, result.stderr
    (workdir / "log.txt").write_text(result.stderr)
    return workdir


def test_a_run_leaves_everything_its_users_rely_on(undisturbed):
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["steps"] == 12
    assert config["mask"]["ratio"] == 0.75
    lines = read_metrics(undisturbed / "metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 13))
    assert {"train/lr", "train/grad_norm", "train/images_per_second", "train/data_wait"} <= set(
        lines[0]
    )
    assert lines[-1].keys() >= {"step", "eval/loss"} or lines[-2].keys() >= {"eval/loss"}
    assert (undisturbed / "reconstructions" / "step_00000012.png").stat().st_size > 1000
    assert {"4", "8", "12"} <= {p.name for p in (undisturbed / "checkpoints").iterdir()}
    assert (undisturbed / "export" / "README.md").exists()
    [trace] = undisturbed.glob("profile/plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 1000
    tensors = exported(undisturbed)
    assert tensors["patch_embed.proj.weight"].shape == (32, 3, 8, 8)
    assert tensors["pos_embed"].shape == (1, 17, 32)
    assert not any(name.startswith("decoder") or name == "mask_token" for name in tensors)


def test_what_runs_at_intervals_is_compiled_before_the_first_step(undisturbed):
    before, after = (undisturbed / "log.txt").read_text().split(" step 1/12 ")
    for program in ("step", "eval_step", "reconstruct"):
        assert f"Compiling jit({program}) " in before
    compiled = set(re.findall(r"Compiling jit\((\w+)\)", after))
    assert compiled <= {"fingerprint", "_multi_slice"}  # of a checkpoint: seconds at most
    assert re.search(r"memory a device: step \S+, evaluation \S+, pictures \S+ GB; with", before)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_seed_another(undisturbed, tmp_path):
    assert run(tmp_path / "again").returncode == 0
    assert_same_run(tmp_path / "again", undisturbed)
    assert run(tmp_path / "other", seed=1).returncode == 0
    assert losses(tmp_path / "other") != losses(undisturbed)


@pytest.mark.slow
def test_killed_at_random_moments_and_restarted_the_run_ends_bit_identical(undisturbed, tmp_path):
    workdir = tmp_path / "killed"
    assert kill_at_random_moments(command(workdir, checkpoint__every=1), workdir, KILLS) > 0
    result = run(workdir, checkpoint__every=1)
    assert result.returncode == 0, result.stderr
    assert_same_run(workdir, undisturbed)


def test_sigterm_saves_and_exits_cleanly_and_the_run_continues(undisturbed, tmp_path):
    process = subprocess.Popen(
        command(tmp_path, checkpoint__every=1000),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    for line in process.stderr:
        if " step 1/12" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read()
    assert process.wait() == 42
    assert "saved; the same command continues" in rest.splitlines()[-1]
    assert 1 <= progress(tmp_path) < 12
    assert not (tmp_path / "export").exists()
    result = run(tmp_path, checkpoint__every=1000)
    assert "continuing from the checkpoint of step" in result.stderr
    expected, found = exported(undisturbed), exported(tmp_path)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensor, found[name], err_msg=name)


@pytest.mark.slow
def test_time_is_accounted_for_across_a_kill_and_the_steps_it_cost_are_counted(tmp_path):
    began = time.time()
    first = subprocess.Popen(
        command(tmp_path, steps=200),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    next(line for line in first.stderr if re.search(r" step (10|14|18|22)/", line))
    first.kill()
    first.communicate()
    killed, before = time.time(), read_times(tmp_path)
    assert 10 <= before["step"] < 200
    result = run(tmp_path, steps=200)
    ended, times = time.time(), read_times(tmp_path)
    resumed = int(re.search(r"continuing from the checkpoint of step (\d+)", result.stderr)[1])
    assert (times["starts"], times["step"]) == (2, 200)
    assert times["steps_repeated"] == before["step"] - resumed
    assert (times["seconds"].get("repeated", 0) > 0) == (before["step"] > resumed)
    assert times["began"] == before["began"]
    assert sum(times["seconds"].values()) == pytest.approx(times["until"] - times["began"], abs=0.1)
    assert times["until"] - times["began"] > 0.5 * (ended - began)  # the rest is Python's imports
    # A process's beginning is told in ticks of a hundredth of a second.
    assert times["seconds"]["away"] > killed - before["until"] - 0.02
    goodput = [
        line["goodput"] for line in read_metrics(tmp_path / "metrics.jsonl") if "goodput" in line
    ]
    assert len(goodput) == 200
    assert goodput[-1] == pytest.approx(times["goodput"], rel=0.5)
    assert "200 of 200 steps, 2 start(s)" in result.stderr


def damage_checkpoints(workdir):
    for step in (workdir / "checkpoints").iterdir():
        (step / "record" / "metadata").write_text("{")


@pytest.mark.slow
def test_a_run_that_lost_its_checkpoints_never_starts_over(undisturbed, tmp_path):
    """However often it is tried, whatever befell them, and nothing is erased."""
    metrics = (undisturbed / "metrics.jsonl").read_text()
    for fate in (damage_checkpoints, lambda workdir: shutil.rmtree(workdir / "checkpoints")):
        workdir = tmp_path / fate.__name__
        shutil.copytree(undisturbed, workdir)
        fate(workdir)
        for _ in range(2):
            refused = run(workdir)
            assert refused.returncode == 2
            assert "--workdir" in refused.stderr.splitlines()[-1]
            assert (workdir / "metrics.jsonl").read_text() == metrics
    assert "metrics.jsonl up to step 12, export" in refused.stderr
    # As version 0.1 left it.
    workdir = tmp_path / "damage_checkpoints"
    for step in (4, 8, 12):
        (workdir / "checkpoints" / f"{step}").rename(workdir / "checkpoints" / f"damaged-{step}")
    assert "damaged-12, damaged-4" in run(workdir).stderr
    assert (workdir / "metrics.jsonl").read_text() == metrics


def test_a_run_that_died_before_its_first_checkpoint_starts_over(undisturbed, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "no-checkpoint-yet").touch()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 7.0}\n')
    assert run(tmp_path).returncode == 0
    assert_same_run(tmp_path, undisturbed)
    assert not (tmp_path / "checkpoints" / "no-checkpoint-yet").exists()


def test_a_second_run_in_the_same_workdir_is_refused(tmp_path):
    first = subprocess.Popen(
        command(tmp_path, steps=100000),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    next(line for line in first.stderr if " step 1/" in line)
    second = run(tmp_path, steps=100000)
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert f"another run trains here (process {first.pid} on " in second.stderr
    assert "choose another --workdir" in second.stderr


def test_a_finished_run_started_again_trains_no_further(undisturbed):
    before = losses(undisturbed)
    result = run(undisturbed)
    assert result.returncode == 0
    assert losses(undisturbed) == before


@pytest.mark.slow
def test_a_run_may_start_from_the_weights_of_another(undisturbed, tmp_path):
    # A learning rate of nothing: what comes out is what went in.
    still = {"optim__base_lr": 1e-30, "optim__weight_decay": 0.0, "steps": 3}
    for source in (undisturbed, undisturbed / "export" / "encoder.safetensors"):
        workdir = tmp_path / source.name
        result = run(workdir, init_from=source, mesh__fsdp=2, devices=2, **still)
        assert result.returncode == 0, result.stderr
        assert re.search(rf"loaded \d+ tensors from .*{source}", result.stderr)
        for name, tensor in exported(undisturbed).items():
            np.testing.assert_allclose(exported(workdir)[name], tensor, atol=1e-7, err_msg=name)
    fresh_decoder = "not in the file, freshly initialised" in result.stderr
    assert fresh_decoder
    other_decoder = {"init_from": undisturbed, "decoder__depth": 2, **still}
    refused = run(tmp_path / "deep", **other_decoder)
    assert refused.returncode == 2
    assert "init_parts = encoder" in refused.stderr
    assert run(tmp_path / "deep", init_parts="encoder", **other_decoder).returncode == 0
    refused = run(tmp_path / "wide", init_from=undisturbed, model__width=64)
    assert refused.returncode == 2
    assert "width 32" in refused.stderr


def test_another_device_count_and_accumulation_continue_the_run(undisturbed, tmp_path):
    half = run(tmp_path, steps=12, checkpoint__every=4, eval__every=0)
    assert half.returncode == 0
    for name in ("12", "8"):
        subprocess.run(["rm", "-r", tmp_path / "checkpoints" / name], check=True)
    result = run(tmp_path, devices=8, mesh__fsdp=4, optim__accumulate=2)
    assert result.returncode == 0, result.stderr
    assert "continuing from the checkpoint of step 4" in result.stderr
    expected, found = losses(undisturbed), losses(tmp_path)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def test_two_processes_of_four_devices_compute_what_one_device_does(undisturbed, tmp_path):
    result = in_two_processes(command(tmp_path, mesh__fsdp=2), devices=4)
    assert result.returncode == 0, result.stdout
    expected, found = losses(undisturbed), losses(tmp_path)
    assert expected.keys() == found.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
    for name, tensor in exported(undisturbed).items():
        np.testing.assert_allclose(exported(tmp_path)[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_repeated_crops_are_those_of_one_run_on_two_processes_and_after_a_kill(tmp_path):
    whole, killed, two = (tmp_path / name for name in ("whole", "killed", "two"))
    fields = {"data__repeat": 4, "data__crop": "fixed", "augment__color_jitter": 0.4}
    result = run(whole, **fields)
    assert result.returncode == 0, result.stderr
    assert kill_at_random_moments(command(killed, checkpoint__every=1, **fields), killed, 1) > 0
    result = run(killed, checkpoint__every=1, **fields)
    assert result.returncode == 0, result.stderr
    assert_same_run(killed, whole)
    result = in_two_processes(command(two, **fields), devices=4)
    assert result.returncode == 0, result.stdout
    expected, found = losses(whole), losses(two)
    assert expected.keys() == found.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
    result = in_two_processes(command(tmp_path / "odd", data__repeat=16), devices=4)
    assert result.returncode == 2
    assert "data.repeat = 16: a process holds 8 rows" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--config.batch_size=$((16 << JAX_PROCESS_ID))", "process 1 has batch_size = 32"),
        (
            "--config.data.name=folder --config.data.dir={folder}/$JAX_PROCESS_ID",
            "process 1 has record 1 of data.train_split",
        ),
        (
            "--config.data.name=folder --config.data.dir={folder}/$((JAX_PROCESS_ID * 2))",
            "process 1 has records in data.train_split = 2 where process 0 has 3",
        ),
        (
            "--config.mask.kind=file --config.mask.file=/dev/stdin < {folder}/$JAX_PROCESS_ID.npy",
            "process 1 has mask.file = ",
        ),
    ],
)
def test_processes_started_differently_end_at_once_and_name_the_difference(
    tmp_path, option, message
):
    from PIL import Image

    names = ("abcd", "abxd", "abc")
    for number, letters in enumerate(names):
        (tmp_path / f"{number}").mkdir()
        for letter in letters:
            Image.new("RGB", (32, 32)).save(tmp_path / f"{number}" / f"{letter}.png")
    for number in (0, 1):
        np.save(tmp_path / f"{number}.npy", np.arange(16).reshape(4, 4) % 2 == number)
    line = shlex.join(command(tmp_path / "run")) + f" {option.format(folder=tmp_path)}"
    started = time.time()
    result = in_two_processes(["bash", "-c", line], devices=1)
    assert result.returncode == 2, result.stdout
    for process in (0, 1):
        assert re.search(rf"^\[{process}\] error: .*{message}", result.stdout, re.MULTILINE)
    assert "Traceback" not in result.stdout
    assert not (tmp_path / "run").exists()
    assert time.time() - started < 120


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask__ratoi": 0.5}, "unknown config field mask.ratoi; did you mean mask.ratio"),
        ({"model__image_size": 60}, "height 60 is not divisible by model.patch_size = 8"),
        ({"data__name": "folder", "data__dir": "/nowhere"}, "data.dir: there is no folder"),
        ({"data__name": "imagenet2012"}, "data.dir is not set"),
        ({"mesh__data": 3}, "mesh.data = 3"),
    ],
)
def test_bad_input_ends_at_once_with_its_message(tmp_path, fields, message):
    result = run(tmp_path / "new", **fields)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "new").exists()


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(tmp_path):
    result = run(tmp_path, devices=3, batch_size=16)
    assert result.returncode == 2
    assert "batch_size = 16 does not divide over 3 device(s)" in result.stderr


def test_a_workdir_of_another_config_is_refused_with_the_differing_field(undisturbed):
    before = (undisturbed / "config.json").read_text()
    result = run(undisturbed, model__width=64)
    assert result.returncode == 2
    assert "model.width: 32 there, 64 now" in result.stderr
    assert (undisturbed / "config.json").read_text() == before


def test_a_run_with_masks_of_a_file_does_not_go_on_with_others_in_that_file(tmp_path):
    masks = np.zeros((1, 4, 4), bool)
    masks[:, :2] = True
    file, fields = tmp_path / "masks.npy", {"mask__kind": "file", "steps": 2}
    np.save(file, masks)
    assert run(tmp_path / "run", mask__file=file, **fields).returncode == 0
    np.save(file, ~masks)
    result = run(tmp_path / "run", mask__file=file, **fields)
    assert result.returncode == 2
    assert re.search(r"error: mask\.file = .*: its content is not what this run", result.stderr)


@pytest.mark.skipif(not (TFDS / "imagenet2012").exists(), reason="no ../shared/tfds")
def test_real_imagenet_records_train(tmp_path):
    fields = {"data__name": "imagenet2012", "data__dir": TFDS, "steps": 4}
    result = run(tmp_path, **fields)
    assert result.returncode == 0, result.stderr
    assert "400 training and 100 evaluation examples" in result.stderr


def test_a_truncated_picture_stops_the_run_with_its_name_or_is_skipped_and_counted(tmp_path):
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        image = Image.fromarray(rng.integers(0, 255, (48, 48, 3), np.uint8))
        image.save(folder / f"{i:02d}.jpg")
    broken = folder / "17.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    fields = {"data__name": "folder", "data__dir": folder, "steps": 6, "data__flip": True}
    stopped = run(tmp_path / "stop", **fields)
    assert stopped.returncode == 2
    assert "17.jpg" in stopped.stderr.splitlines()[-1]
    skipped = run(tmp_path / "skip", data__bad_records="skip", **fields)
    assert skipped.returncode == 0, skipped.stderr
    assert "17.jpg" in skipped.stderr
    lines = read_metrics(tmp_path / "skip" / "metrics.jsonl")
    counts = [line["train/skipped_records"] for line in lines if "train/loss" in line]
    assert counts[-1] > 0
    assert counts == sorted(counts)
