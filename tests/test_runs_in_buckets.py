"""A run whose workdir is in a bucket: the same numbers as on disk, killed or not."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import program
import pytest

from mae_jax.results import read_results
from mae_jax.storage.checkpoints import by_name, read_newest, steps_in
from mae_jax.storage.files import read_json, to_path
from mae_jax.train.metrics import read_metrics

SCRATCH = {"config": "configs/scratch.py", "eval__every": 6, "log_every": 2}


def python(*arguments):
    result = subprocess.run(
        [sys.executable, "-m", *arguments],
        env=program.environment(),
        capture_output=True,
        text=True,
        cwd=program.ROOT,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def without_times(workdir):
    kept = ("step", "train/loss", "eval/")
    lines = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k.startswith(kept)} for line in lines]


def header_and_tensors(file):
    """Of safetensors, whose writer puts the entries of its JSON header in any order."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_ends_as_one_on_disk(tmp_path, bucket):
    disk, remote = to_path(tmp_path / "run"), to_path(bucket[0]) / "killed"
    result = program.run(disk, **SCRATCH)
    assert result.returncode == 0, result.stderr
    process = subprocess.Popen(program.command(remote, **SCRATCH), env=program.environment())
    while not steps_in(remote / "checkpoints"):
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert not (remote / "results.json").exists()
    result = program.run(remote, **SCRATCH)
    assert result.returncode == 0, result.stderr
    assert "continuing from the checkpoint" in result.stderr

    assert without_times(remote) == without_times(disk)
    assert steps_in(remote / "checkpoints") == steps_in(disk / "checkpoints") == [4, 8, 12]
    (whole, _, _), (other, _, _) = (
        read_newest(place / "checkpoints", ["params", "opt_state"]) for place in (disk, remote)
    )
    for (name, mine), yours in zip(by_name(whole).items(), by_name(other).values(), strict=True):
        np.testing.assert_array_equal(mine, yours, err_msg=name)
    assert (remote / "export/config.json").read_bytes() == (
        disk / "export/config.json"
    ).read_bytes()
    name = "export/classifier.safetensors"
    assert header_and_tensors(remote / name) == header_and_tensors(disk / name)
    assert read_results(remote)["top1"] == read_results(disk)["top1"]
    assert (remote / "config.json").read_bytes() == (disk / "config.json").read_bytes()

    # What others do with it: a table, weights out of it and into a bucket, a run that starts there.
    assert read_results(remote)["markdown"] in python("mae_jax.results", str(remote))
    for place, target in ((disk, tmp_path / "out"), (remote, f"{bucket[0]}/out")):
        options = (f"--from={place}", "--format=orbax", f"--output={target}")
        assert f"wrote {target}/params" in python("mae_jax.export", *options)
    assert read_json(f"{bucket[0]}/out/description.json") == read_json(
        tmp_path / "out/description.json"
    )
    tuned = to_path(bucket[0]) / "tuned"
    started = {"config": "configs/finetune.py", "init_from": f"{bucket[0]}/out", "steps": 1}
    result = program.run(tuned, **started)
    assert result.returncode == 0, result.stderr
    assert "tensors from Orbax export gs://" in result.stderr


@pytest.mark.slow
def test_two_processes_share_a_bucket(bucket):
    workdir = to_path(bucket[0]) / "shared"
    launcher = [sys.executable, str(program.ROOT / "launch" / "local.py"), "--processes=2"]
    for steps in (4, 8):
        fields = {"steps": steps, "log_every": 2, "checkpoint__every": 2, "optim__warmup_steps": 1}
        command = program.command(workdir, **fields | {"epochs": 0.01})
        result = subprocess.run(
            [*launcher, "--devices=1", "--", *command],
            env=os.environ | {"PYTHONPATH": str(program.ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if steps == 4:
            assert result.returncode == 0, result.stdout
            assert steps_in(workdir / "checkpoints") == [2, 4]
            assert [x["step"] for x in read_metrics(workdir / "metrics.jsonl")] == [2, 4, 4]
            assert (workdir / "export" / "encoder.safetensors").exists()
    assert result.returncode == 2  # other steps: told by the checkpoint, to both
    assert "the workdir holds checkpoints of another config (steps: 4 there, 8 now)" in (
        result.stdout
    )
