"""Several processes do as one: real ones, where something fails in process 1 alone."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from program import ROOT, environment

from mae_jax import UserError
from mae_jax.storage.processes import sole_run

HOLDER = """
import pathlib, sys, time
from mae_jax.storage.processes import sole_run
with sole_run(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(300)
"""
DRIVER = pathlib.Path(__file__).with_name("disagreeing_processes.py")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What came of every phase, by process: {(process, phase): text}; and the folder."""
    folder = tmp_path_factory.mktemp("checkpoints")
    launcher = [sys.executable, str(ROOT / "launch" / "local.py"), "--processes=2", "--devices=2"]
    result = subprocess.run(
        [*launcher, "--", sys.executable, str(DRIVER), str(folder)],
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = re.findall(r"^\[(\d)\] OUTCOME (\w+): (.*)$", result.stdout, re.MULTILINE)
    assert result.returncode == 0, result.stdout
    return {(int(process), phase): text for process, phase, text in found}, folder


@pytest.mark.parametrize("phase", ["record", "tree", "tensors", "fingerprint"])
def test_what_one_process_cannot_read_all_pass_over(outcomes, phase):
    found, folder = outcomes
    assert [found[process, phase] for process in (0, 1)] == ["step 2", "step 2"]
    assert sorted(p.name for p in (folder / phase).iterdir()) == ["1", "2", "4", "damaged-3"]


@pytest.mark.parametrize("phase", ["nothing", "late"])
def test_a_checkpoint_that_one_process_sees_and_all_can_read_is_taken(outcomes, phase):
    found, _ = outcomes
    assert [found[process, phase] for process in (0, 1)] == ["step 3", "step 3"]


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ("elsewhere", r"--workdir: process 1 sees no checkpoint in .* \[1, 2, 3\].*shared by all"),
        ("list", r"cannot be read \(.*Permission denied\)"),
    ],
)
def test_without_a_common_list_all_processes_stop_and_nothing_is_moved(outcomes, phase, message):
    found, folder = outcomes
    for process in (0, 1):
        assert re.match(f"UserError .*{message}", found[process, phase])
    assert sorted(p.name for p in (folder / phase).iterdir()) == ["1", "2", "3"]


def test_a_second_run_in_a_workdir_is_refused_by_name_until_the_first_is_killed(tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env=environment() | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout.readline() == "held\n"
    named = rf"another run trains here \(process {first.pid} on {os.uname().nodename}\)"
    with pytest.raises(UserError, match=named), sole_run(tmp_path):
        pass
    first.send_signal(signal.SIGKILL)
    first.wait()
    with sole_run(tmp_path):
        pass
    with sole_run(tmp_path):  # what is released can be taken again
        time.sleep(0)


def test_where_there_are_no_locks_the_run_goes_on_with_a_note(tmp_path, monkeypatch, caplog):
    import fcntl

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with caplog.at_level("INFO", logger="absl"), sole_run(tmp_path):
        assert "no locks here" in caplog.text
