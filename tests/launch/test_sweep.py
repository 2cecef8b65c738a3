"""launch/sweep.py: what it starts, starts again, leaves out and never repeats."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from mae_jax import cli
from mae_jax.config import load_config
from mae_jax.config_checks import validate
from tests.program import ROOT, environment

FAKE = pathlib.Path(__file__).with_name("fake_sweep.py")
SCRIPT = ROOT / "launch/sweep.py"
# Three members, one of them the base, with two follow-ups each.
THREE = ["decoder_depth", "--only=1,2,4", "--base=tiny"]


def start(script, *arguments, **variables):
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        env=environment() | {"PYTHONPATH": str(ROOT)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def finish(process):
    process.out, process.err = process.communicate(timeout=600)
    return process


def fake(*arguments, **variables):
    return finish(start(FAKE, *arguments, **variables))


def calls(workdir, what):
    path = workdir / "members" / "calls.txt"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [name for word, name, _ in lines if word == what]


def wait_for(workdir, what, count):
    until = time.time() + 60
    while len(calls(workdir, what)) < count:
        assert time.time() < until
        time.sleep(0.05)


def test_print_lists_what_would_run_and_starts_nothing(tmp_path):
    done = finish(start(SCRIPT, *THREE, "--seeds=0,1", f"--workdir={tmp_path / 'new'}", "--print"))
    assert (done.returncode, done.err) == (0, "")
    assert not (tmp_path / "new").exists()
    lines = [shlex.split(line) for line in done.out.splitlines()]
    assert len(lines) == 3 * 2 * 3
    pretrained = set()
    for line in lines:  # each is complete, and follows what it starts from
        assert line[:3] == ["python", "-m", "mae_jax.main"]
        parser = cli.Parser("train", "")
        parser.add_argument("--workdir")
        arguments = cli.parse_recipe(parser, line[3:])
        validate(arguments.config)
        if arguments.config.task == "pretrain":
            pretrained.add(arguments.workdir)
        else:
            assert arguments.config.init_from in pretrained
    # Once some are done, they are not listed.
    assert (
        fake(*THREE[:1], "--only=1", "--base=tiny", f"--workdir={tmp_path / 'new'}").returncode == 0
    )
    left = finish(start(SCRIPT, *THREE, f"--workdir={tmp_path / 'new'}", "--print"))
    assert len(left.out.splitlines()) == 2 * 3


def test_runs_all_then_has_nothing_to_do(tmp_path):
    done = fake(*THREE, f"--workdir={tmp_path}")
    assert done.returncode == 0, done.out + done.err
    first = calls(tmp_path, "started")
    assert len(first) == len(set(first)) == 9
    assert [name.split("-")[0] for name in first[:3]] == ["pretrain", "finetune", "linear_probe"]
    assert fake(*THREE, f"--workdir={tmp_path}").returncode == 0
    assert calls(tmp_path, "started") == first


def test_equal_members_of_two_sweeps_run_once(tmp_path):
    fake("decoder_depth", "--only=1", "--base=tiny", f"--workdir={tmp_path}")
    fake("mask_ratio", "--only=75,90", "--base=tiny", f"--workdir={tmp_path}")
    assert len(calls(tmp_path, "started")) == 3 + 3  # depth 1 and ratio 75 are both the base
    sweeps = json.loads((tmp_path / "sweep.json").read_text())["sweeps"]
    runs = {
        (name, member["name"]): member["runs"]["0"]
        for name, sweep in sweeps.items()
        for member in sweep["members"]
    }
    assert runs["decoder_depth", "1"] == runs["mask_ratio", "75"] != runs["mask_ratio", "90"]
    assert set(runs["mask_ratio", "90"].values()) <= set(calls(tmp_path, "finished"))


def test_a_broken_member_leaves_out_only_what_needs_it(tmp_path):
    done = fake(*THREE, f"--workdir={tmp_path}", FAIL="pretrain-decoder.depth-2:2")
    assert done.returncode == 1
    assert len(calls(tmp_path, "finished")) == 6
    assert len(calls(tmp_path, "started")) == 7  # 2 is not tried again
    told = [line for line in done.out.splitlines() if line.startswith(("failed", "left out"))]
    assert len(told) == 3
    assert told[0].endswith("error: as it was told")
    # Mended, the same command makes what is left.
    assert fake(*THREE, f"--workdir={tmp_path}").returncode == 0
    assert len(calls(tmp_path, "finished")) == 9


def test_a_member_that_does_not_go_together_is_refused_and_the_rest_runs(tmp_path):
    options = ["--grid", "decoder.heads=2,3", "--base=tiny", f"--workdir={tmp_path}"]
    done = fake(*options)
    assert done.returncode == 1
    assert "refused   grid decoder.heads 3 seed 0: decoder.width = 16" in done.out
    assert len(calls(tmp_path, "finished")) == 3


def test_a_preempted_run_is_started_again(tmp_path):
    done = fake(*THREE, f"--workdir={tmp_path}", FAIL_ONCE="finetune:42")
    assert done.returncode == 0, done.out
    assert len(calls(tmp_path, "finished")) == 9
    assert len(calls(tmp_path, "started")) == 9 + 3


def test_ctrl_c_stops_cleanly_and_the_command_goes_on(tmp_path):
    process = start(FAKE, *THREE, f"--workdir={tmp_path}", SECONDS="1")
    wait_for(tmp_path, "started", 2)
    process.send_signal(signal.SIGINT)
    assert finish(process).returncode == 130
    assert len(calls(tmp_path, "stopped")) == 1
    assert fake(*THREE, f"--workdir={tmp_path}").returncode == 0
    assert sorted(calls(tmp_path, "finished")) == sorted(set(calls(tmp_path, "started")))
    assert len(calls(tmp_path, "finished")) == 9


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere runs outlive a killed sweep")
def test_killed_and_restarted_it_repeats_nothing(tmp_path):
    process = start(FAKE, *THREE, f"--workdir={tmp_path}", SECONDS="1")
    wait_for(tmp_path, "started", 2)
    process.kill()
    assert fake(*THREE, f"--workdir={tmp_path}").returncode == 0
    finished = calls(tmp_path, "finished")
    assert len(finished) == len(set(finished)) == 9
    assert len(calls(tmp_path, "started")) == 9 + len(calls(tmp_path, "stopped"))


def test_several_at_a_time_share_the_cores(tmp_path):
    done = fake(*THREE, f"--workdir={tmp_path}", "--parallel=2", SECONDS="0.5")
    assert done.returncode == 0
    lines = [line.split() for line in (tmp_path / "members/calls.txt").read_text().splitlines()]
    running, most = set(), 0
    for word, name, _ in lines:
        (running.add if word == "started" else running.remove)(name)
        most = max(most, len(running))
    assert most == 2
    cores = {part for *_, part in lines}
    here = sorted(os.sched_getaffinity(0))
    assert cores <= {",".join(map(str, here[i::2] or here)) for i in range(2)}


def test_slurm_makes_follow_ups_wait(tmp_path):
    for name, text in {
        "sbatch": f'echo "$@" >>{tmp_path}/calls.txt; wc -l <{tmp_path}/calls.txt',
        "squeue": f"cat {tmp_path}/queue.txt",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "queue.txt").touch()
    path = f"{tmp_path}:{os.environ['PATH']}"
    options = [*THREE, "--only=1", f"--workdir={tmp_path / 'w'}", "--slurm=--nodes=2"]
    done = finish(start(SCRIPT, *options, PATH=path))
    assert done.returncode == 0, done.err
    lines = (tmp_path / "calls.txt").read_text().splitlines()
    assert len(lines) == 3
    assert "dependency" not in lines[0]
    assert all("--dependency=afterok:1 --kill-on-invalid-dep=yes" in line for line in lines[1:])
    for line in lines:
        assert "--parsable --nodes=2" in line
        assert f"{ROOT}/launch/slurm.sbatch python -m mae_jax.main --config=" in line
    # What is in the queue is not submitted again; what it needs is waited for by its number.
    name = next(word for word in lines[0].split() if word.startswith("--job-name="))[11:]
    (tmp_path / "queue.txt").write_text(f"77 {name}\n")
    finish(start(SCRIPT, *options, PATH=path))
    lines = (tmp_path / "calls.txt").read_text().splitlines()[3:]
    assert len(lines) == 2
    assert all("afterok:77" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base=tiny"], "give sweep files, or --grid"),
        (["mask_ration", "--base=tiny"], "no sweep of that name (augmentation"),
        (["mask_ratio", "--base=tiny", "--only=85"], "the members are 10, 20"),
        (["mask_ratio", "--base=tiny", "--config.mask.rate=1"], "unknown config field mask.rate"),
        (["--grid", "mask.rate=1", "--base=tiny"], "--grid mask.rate=1: give FIELD=VALUE"),
        (["mask_ratio", "--base=quickstart", "--finetune.epochs=1"], "has no such run"),
    ],
)
def test_refuses_in_one_line(tmp_path, options, message):
    done = finish(start(SCRIPT, *options, f"--workdir={tmp_path}", "--print"))
    assert done.returncode == 2
    assert done.err.startswith("error: ")
    assert message in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.slow
def test_real_runs_killed_in_the_middle_end_as_undisturbed_ones(tmp_path):
    options = ["mask_ratio", "--only=75", "--base=tiny"]
    assert finish(start(SCRIPT, *options, f"--workdir={tmp_path / 'a'}")).returncode == 0
    process = start(SCRIPT, *options, f"--workdir={tmp_path / 'b'}")
    until = time.time() + 300
    while not list((tmp_path / "b").glob("members/pretrain-*/checkpoints/8")):
        assert time.time() < until
        time.sleep(0.1)
    process.kill()
    assert finish(start(SCRIPT, *options, f"--workdir={tmp_path / 'b'}")).returncode == 0
    results = {
        part: {
            path.parent.name: json.loads(path.read_text())["top1"]
            for path in (tmp_path / part).glob("members/*/results.json")
        }
        for part in "ab"
    }
    assert len(results["a"]) == 2
    assert results["a"] == results["b"]


def test_time_left_goes_by_the_work_that_is_left(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    from sweep import Run, time_left

    def run(name, state, **fields):
        config = load_config("pretrain:vit_l")
        config.update_from_flattened_dict(fields)
        return Run(epath.Path(tmp_path / name), [], config, None, state)

    short = run("short", "done", epochs=100.0)
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "time.json").write_text('{"seconds": {"steps": 90, "compile": 10}}')
    long, wide = run("long", "waiting", epochs=800.0), run("all", "waiting", epochs=100.0)
    wide.config.mask.encoder_tokens = True  # paper, table 1c: 3.3 times the FLOPs
    steps = run("steps", "waiting", steps=100)
    assert time_left([short, long], 1) == "left about 13:20"
    minutes, seconds = time_left([short, wide], 1).removeprefix("left about ").split(":")
    assert 60 * int(minutes) + int(seconds) == pytest.approx(330, abs=10)
    assert time_left([short, long, steps], 2) == "left about 06:40 and 1 runs not yet known"
