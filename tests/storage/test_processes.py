"""Several processes do as one: real ones, where something fails in process 1 alone."""

import errno
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath
from program import ROOT, environment

from mae_jax import TryAgainError, UserError
from mae_jax.storage import claim, retry
from mae_jax.storage.files import write_atomically
from mae_jax.storage.processes import Timer, sole_run

HOLDER = """
import pathlib, sys, time
from mae_jax.storage.processes import Timer, sole_run
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


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ("field", "process 1 has batch_size = 17 where process 0 has 16: start all with the same"),
        ("absent", 'process 1 has version = null where process 0 has "1": start all with the'),
    ],
)
def test_who_was_started_differently_is_named_in_every_process(outcomes, phase, message):
    found, _ = outcomes
    for process in (0, 1):
        assert found[process, phase].startswith(f"UserError {message}")


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


@pytest.fixture
def two_hosts(tmp_path, monkeypatch):
    """The claims of two hosts on one workdir, and what each was told when it lost its own."""
    monkeypatch.setattr(claim, "SECONDS_STALE", 3.0)
    monkeypatch.setattr(claim, "SECONDS_RENEWED", 0.5)
    monkeypatch.setattr(claim, "SECONDS_SETTLED", 0.1)
    told, path = [], epath.Path(tmp_path) / "claim.json"
    claims = [claim.Claim(path, told.append), claim.Claim(path, told.append)]
    claims[0]._host = "elsewhere"
    yield *claims, told
    for each in claims:
        each.release()


def test_a_claim_holds_on_other_hosts_while_it_is_renewed(two_hosts):
    there, here, _ = two_hosts
    there.take(locked=False)
    with pytest.raises(UserError, match=r"another run trains here \(process \d+ on elsewhere\)"):
        here.take(locked=True)
    there.release()
    here.take(locked=False)  # what is released can be taken at once


def test_a_renewal_under_way_does_not_bring_back_what_is_released(two_hosts, monkeypatch):
    there, here, _ = two_hosts
    begun, written, write = threading.Event(), threading.Event(), claim.write_json

    def slow(*args):
        begun.set()
        written.wait(10)
        write(*args)

    there.take(locked=True)
    monkeypatch.setattr(claim, "write_json", slow)
    assert begun.wait(10)
    threading.Timer(0.2, written.set).start()
    there.release()
    time.sleep(1)
    assert not here._path.exists()


def test_a_claim_that_nobody_renews_is_taken_over_and_its_old_owner_told(two_hosts, monkeypatch):
    there, here, told = two_hosts
    with monkeypatch.context() as frozen:
        frozen.setattr(
            there, "_write", lambda: None if there._renewals else type(there)._write(there)
        )
        there.take(locked=False)
        start = time.monotonic()
        here.take(locked=True)
        assert 3 <= time.monotonic() - start < 10
    with pytest.raises(UserError, match="another run trains here"):
        there.require()
    time.sleep(1)
    assert len(told) >= 1
    assert "another run trains here" in told[0]
    here.require()


def test_a_claim_of_this_host_is_taken_at_once_where_its_process_is_gone(two_hosts):
    _, here, _ = two_hosts
    gone = subprocess.Popen(["true"])
    gone.wait()
    owner = {"run": "x", "host": os.uname().nodename, "pid": gone.pid}
    here._path.write_text(json.dumps(owner))
    start = time.monotonic()
    here.take(locked=False)
    assert time.monotonic() - start < 2


def test_storage_that_does_not_answer_is_asked_again_and_then_left_for_later(monkeypatch):
    monkeypatch.setattr(retry, "SECONDS_BETWEEN", (0.0, 0.0))
    calls = []

    def answering(after, error):
        def read():
            calls.append(error)
            if len(calls) <= after:
                raise error
            return "read"

        calls.clear()
        return retry.retried(read)

    assert answering(2, OSError(errno.ESTALE, "Stale file handle"))() == "read"
    told = ValueError("UNAVAILABLE: OS error: Input/output error")  # TensorStore's words
    for error in (OSError(errno.EIO, "x"), ConnectionResetError(), told):
        with pytest.raises(TryAgainError, match="the same command continues"):
            answering(3, error)()
        assert len(calls) == 3
    for error in (OSError(errno.ENOSPC, "full"), PermissionError(13, "x"), ValueError("damaged")):
        with pytest.raises(type(error)):
            answering(1, error)()
        assert len(calls) == 1


def test_a_file_on_storage_that_does_not_answer_is_no_fault_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "SECONDS_BETWEEN", ())

    def failing(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_bytes", failing)
    with pytest.raises(TryAgainError, match=r"metrics.*Input/output error"):
        write_atomically(tmp_path / "metrics", "1")


def test_a_timer_is_over_after_its_minutes_and_starts_again(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    timer = Timer(minutes=2)
    assert not timer.is_over()
    now[0] += 120
    assert timer.is_over()
    timer.restart()
    assert not timer.is_over()
