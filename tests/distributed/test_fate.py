"""Processes of one run end together, by codes that supervisors understand, and lose nothing.

Each test runs the program in several processes with a fault in one of them, see faulty.py.
`MAE_JAX_KILLS=20` makes the last one what is run before a release.
"""

import json
import os
import random
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import safetensors.numpy
from program import ROOT, command, environment, losses

from mae_jax import UserError
from mae_jax.distributed import fate, startup
from mae_jax.main import Starts
from mae_jax.storage.checkpoints import steps_in

KILLS = int(os.environ.get("MAE_JAX_KILLS", "2"))
DRIVER = ROOT / "tests" / "distributed" / "faulty.py"

pytest.importorskip("skimage", reason="the embedded data needs scikit-image")


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Runs the program with a fault; what it compiles is small and need not be fast."""
    cache = tmp_path_factory.mktemp("compiled")

    def launching(workdir, fault, *options, processes=2, **fields):
        launcher = [sys.executable, ROOT / "launch" / "local.py", "--devices=1", *options]
        return subprocess.run(
            [
                *(*launcher, f"--processes={processes}", "--", sys.executable, DRIVER),
                *(*fault.split(), "--", *command(workdir, **{"model__depth": 1, **fields})[3:]),
            ],
            env=environment()
            | {
                "PYTHONPATH": str(ROOT),
                "JAX_COMPILATION_CACHE_DIR": str(cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            },
            stdout=subprocess.PIPE,
            text=True,
            timeout=900,
        )

    return launching


def ends(output):
    """Of the processes: exit statuses, and seconds from the first end to the last."""
    found = re.findall(r"^launch: \[\d+\] ended with (\d+)(?:, (\d+) s)?", output, re.MULTILINE)
    return sorted(int(code) for code, _ in found), max(int(s or 0) for _, s in found)


def assert_same_run(workdir, reference):
    assert losses(workdir) == losses(reference)
    load = safetensors.numpy.load_file
    found, expected = (load(w / "export/encoder.safetensors") for w in (workdir, reference))
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensor, found[name], err_msg=name)


def test_a_recipe_missing_on_one_host_ends_all_with_its_message(launch, tmp_path):
    done = launch(tmp_path / "run", "config 1 start 1")
    codes, seconds = ends(done.stdout)
    assert (done.returncode, codes) == (2, [2, 2])
    assert seconds < 15
    for line in ("[1] error: --config=", "[0] error: process 1: --config="):
        assert f"{line}/no/such/recipe.py: no such file" in done.stdout
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("mendable 1 data 3", 2, r"^\[0\] error: process 1: data.dir: picture 7 cannot be read"),
        ("mendable 0 data 3", 2, r"^\[1\] error: process 0: data.dir: picture 7 cannot be read"),
        ("bug 1 data 3", 1, r"^\[1\] ZeroDivisionError: a fault of the program"),
        ("mendable 1 close 1", 2, r"^\[0\] error: process 1: data.dir: picture 7 cannot be read"),
    ],
)
def test_an_error_in_one_process_ends_all_within_seconds(launch, tmp_path, fault, code, message):
    done = launch(tmp_path / "run", fault)
    codes, seconds = ends(done.stdout)
    assert (done.returncode, codes) == (code, [code, code])
    assert seconds < 15
    assert re.search(message, done.stdout, re.MULTILINE), done.stdout
    assert ("Traceback" in done.stdout) == (code == 1)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("action", "moment"),
    [("kill", phase) for phase in ("data 6", "save 1", "save 2", "close 1")]
    + [("freeze", "data 6")],
)
def test_a_lost_peer_is_named_in_one_plain_line(launch, tmp_path, action, moment, victim):
    """Killed, or stopped as a machine that hangs is: the launcher kills that at the end."""
    fields = {"steps": 40, "checkpoint__every": 2 if "save" in moment else 4}
    grace = 5 if action == "freeze" else 50  # which the first that ends gives the others
    done = launch(tmp_path / "run", f"{action} {victim} {moment}", f"--grace={grace}", **fields)
    codes, seconds = ends(done.stdout)
    assert codes == [134, 137]
    assert seconds < 60
    other = 1 - victim
    assert re.search(rf"^\[{other}\] error: lost process {victim} ", done.stdout, re.MULTILINE)
    assert "Check failure stack trace" not in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.slow
def test_stopped_at_any_moment_all_save_the_same_and_what_was_given_up_is_done_later(
    launch, tmp_path
):
    """Compiling, evaluating, probing, saving: 42 everywhere, one checkpoint, the same metrics."""
    fields = {"steps": 40, "eval__every": 9, "probe__every": 8, "probe__train_examples": 64}
    fields |= {"probe__eval_examples": 32, "checkpoint__every": 3, "eval__batches": 4}
    fields["log_every"] = 5  # a stop may cut an interval in two
    assert launch(tmp_path / "calm", "none 9 none 1", **fields).returncode == 0
    workdir = tmp_path / "run"
    moments = ["compile 1", "evaluation 1", "probe 1", "save 1"]
    for number, moment in enumerate(moments):
        done = launch(workdir, f"term {number % 2} {moment}", **fields)
        assert (done.returncode, ends(done.stdout)[0]) == (42, [42, 42]), done.stdout
        assert steps_in(workdir / "checkpoints") or moment == "compile 1"
        for mark in tmp_path.glob(f"{workdir.name}-[!e]*"):
            mark.unlink()
    assert launch(workdir, "none 9 none 1", **fields).returncode == 0
    assert_same_run(workdir, tmp_path / "calm")
    for name in ("eval/loss", "probe/top1"):
        assert metric(workdir, name) == metric(tmp_path / "calm", name)


def metric(workdir, name):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]


@pytest.mark.slow
def test_a_hang_leaves_stacks_and_ends_all(launch, tmp_path):
    done = launch(tmp_path / "run", "hang 1 data 4", steps=40, watchdog__minutes=0.5)
    assert (done.returncode, ends(done.stdout)[0]) == (134, [134, 134])
    assert "no progress for 0.5 minutes in phase" in done.stdout
    assert "faulty.py" in (tmp_path / "run" / "stacks-1.txt").read_text()  # where it slept
    assert (tmp_path / "run" / "stacks-0.txt").exists()


@pytest.mark.slow
def test_killed_at_random_and_restarted_by_the_launcher_the_run_ends_bit_identical(
    launch, tmp_path
):
    """One of four processes, the first included, again and again."""
    steps = 4 * KILLS + 8
    fields = {"steps": steps, "checkpoint__every": 1, "checkpoint__starts": 0, "processes": 4}
    assert launch(tmp_path / "calm", "none 9 none 1", **fields).returncode == 0
    rng, workdir = random.Random(0), tmp_path / "run"
    for number in range(KILLS):
        victim = 0 if number == 0 else rng.randrange(4)
        done = launch(workdir, f"kill {victim} data {rng.randint(2, 4)}", **fields)
        codes, seconds = ends(done.stdout)
        assert codes == [134, 134, 134, 137], done.stdout
        assert seconds < 60
        for mark in tmp_path.glob(f"{workdir.name}-[!e]*"):
            mark.unlink()
    again = launch(workdir, "kill 2 data 2", "--restarts=2", **fields)
    assert again.returncode == 0, again.stdout
    assert "launch: restart 1 of at most 2, after status 1" in again.stdout
    assert_same_run(workdir, tmp_path / "calm")


def examples(workdir):
    """Which record every row of every step was: {(step, position): record}."""
    found = {}
    for line in workdir.with_name(f"{workdir.name}-examples.jsonl").read_text().splitlines():
        batch = json.loads(line)
        for position, record in zip(batch["positions"], batch["ids"], strict=True):
            place = batch["step"], position
            assert found.setdefault(place, record) == record, place  # drawn again: the same
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("order", "counts"), [("shuffled", (2, 1, 2)), ("windowed", (4, 2, 1, 4))])
def test_on_other_numbers_of_processes_the_examples_are_those_of_one(
    launch, tmp_path, order, counts
):
    fields = {"steps": 40, "checkpoint__every": 9, "data__order": order}
    assert launch(tmp_path / "calm", "none 9 none 1", processes=1, **fields).returncode == 0
    workdir = tmp_path / "run"
    *before, last = counts
    for processes in before:
        done = launch(workdir, "term 0 data 3", processes=processes, **fields)
        assert done.returncode == 42, done.stdout
        for mark in tmp_path.glob(f"{workdir.name}-[!e]*"):
            mark.unlink()
    assert launch(workdir, "none 9 none 1", processes=last, **fields).returncode == 0
    assert examples(workdir) == examples(tmp_path / "calm")
    assert len(examples(workdir)) == 40 * 16
    seen, expected = losses(workdir), losses(tmp_path / "calm")
    assert seen.keys() == expected.keys()
    # Sums in another order.
    np.testing.assert_allclose([*seen.values()], [*expected.values()], rtol=1e-5)


def test_a_finished_process_leaves_no_thread_in_jaxs_client():
    """Python ends by unwinding such a thread through C++, which kills the process: status 139."""
    inside = threading.Event()

    class Slow:
        def key_value_set(self, *_, **__):
            inside.set()
            time.sleep(0.5)
            inside.clear()

        def key_value_dir_get(self, _):
            return []

        def key_value_try_get(self, _):
            raise RuntimeError("NOT_FOUND")

        def wait_at_barrier(self, *_):
            pass

    before = threading.active_count()
    peers = fate.Peers(Slow(), process=1, count=2, coordinator="localhost:1")
    assert inside.wait(10)
    peers.end()
    assert not inside.is_set()
    assert threading.active_count() == before


def test_starts_without_progress_are_counted_and_then_refused(tmp_path):
    for _ in range(3):
        Starts(tmp_path, limit=3).begin(step=5)  # and killed
    with pytest.raises(UserError, match=r"3 starts failed without getting from step 5"):
        Starts(tmp_path, limit=3).begin(step=5)
    Starts(tmp_path, limit=0).begin(step=5)
    progress = Starts(tmp_path, limit=3)
    progress.begin(step=6)
    for code in (0, 2, 130):
        progress.end(code)
        assert json.loads((tmp_path / "starts.json").read_text()) == {"step": 6, "failed": 0}
        progress.begin(step=6)
    progress.end(1)
    assert json.loads((tmp_path / "starts.json").read_text())["failed"] == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"JAX_NUM_PROCESSES": "1"}, None),
        (
            {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3", "SLURM_NTASKS": "4"},
            {"num_processes": 4, "process_id": 3, "cluster_detection_method": "deactivate"},
        ),
        ({"JAX_NUM_PROCESSES": "auto"}, {"local_device_ids": None}),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, {"local_device_ids": None}),
        ({"SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "2"}, {"local_device_ids": None}),
        (
            {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"},
            {"local_device_ids": [0, 1, 2, 3]},
        ),
    ],
)
def test_how_processes_join_follows_the_environment(variables, expected, monkeypatch):
    """One process a node sees all of its GPUs; ours to say, nothing is detected."""
    joined = []
    for name in [*os.environ]:
        if name.startswith(("JAX_NUM_PROC", "JAX_PROCESS", "SLURM_", "TPU_", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(startup, "_join", lambda **arguments: joined.append(arguments))
    monkeypatch.setattr(startup.stopping, "listen", lambda: None)
    startup.initialize()
    assert joined == ([] if expected is None else [expected])


@pytest.mark.parametrize("variables", [{}, {"JAX_PROCESS_ID": "first"}])
def test_a_process_that_is_not_told_its_number_says_so(variables, monkeypatch):
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="JAX_PROCESS_ID="):
        startup.initialize()
