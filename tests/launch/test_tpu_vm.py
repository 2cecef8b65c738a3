"""The loop of launch/tpu_vm.py against a fake gcloud whose hosts are folders: what it sends there,
`launch/host.sh` included, really runs; only uv and pip are stubs."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.program import ROOT, assert_refused_in_one_line

HERE = pathlib.Path(__file__).parent
# Counts its starts on this host over all pods, then ends as planned: with an exit status, or `wait`
# until killed; `42/wait` is 42 on host 0. If its predecessor still holds the chips it ends with 3.
JOB = """
cd "$FAKE"; echo >>starts$HOST; starts=$(wc -l <starts$HOST)
echo "start $starts on $HOST with JAX_NUM_PROCESSES=$JAX_NUM_PROCESSES"
for second in 1 2 3 4 5; do  # what was killed takes a moment to go; a zombie holds nothing
    grep -q ') [^ZX]' /proc/$(cat chips$HOST 2>/dev/null)/stat 2>/dev/null || break
    [ $second != 5 ] || { echo held on $HOST; exit 3; }
    sleep 1
done
echo $$ >chips$HOST; touch host$HOST/ready
set -- $1; shift $((starts - 1))
test $HOST = 0 && end=${1%/*} || end=${1#*/}
[ "$end" != wait ] || exec sleep 100
exit "$end"
"""


pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="what is sent is the last commit, launch/host.sh included"
)


@pytest.fixture
def fake(tmp_path):
    """A function of (pods, ends of the job's starts, options) -> the launcher, ended, its calls."""
    tools = tmp_path / "bin"
    tools.mkdir()
    job = tmp_path / "job.sh"
    job.write_text(JOB)
    for name, text in {
        "gcloud": f'exec {sys.executable} -S -E {HERE}/fake_gcloud.py "$@"',
        "python3": 'echo "python3 $*" >>"$FAKE/installed.txt"',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)

    def launch(pods, ends, *options):
        (tmp_path / "plan.txt").write_text(" ".join(pods))
        done = subprocess.run(
            [
                *(sys.executable, ROOT / "launch/tpu_vm.py", "run", "--name=mae", "--zone=zone-a"),
                *("--topology=v5e-8", "--spot", "--poll=0", *options),
                *("--", "bash", job, " ".join(map(str, ends))),
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ
            | {"PATH": f"{tools}:{os.environ['PATH']}", "FAKE": str(tmp_path)}
            | {"PYTHONPATH": str(ROOT)},
            timeout=120,
        )
        calls = (tmp_path / "calls.txt").read_text().splitlines()
        return done, [call.split()[0] for call in calls if not call.startswith("describe")]

    yield launch
    for group in pathlib.Path("/dev/shm").glob("mae_jax" + str(tmp_path).replace("/", "_") + "*"):
        subprocess.run(["kill", "-KILL", "--", f"-{group.read_text().strip()}"], check=False)
        group.unlink()


def starts(folder):
    return [len((folder / f"starts{host}").read_text().splitlines()) for host in (0, 1)]


def test_taken_three_times_it_asks_again_and_the_job_finishes(fake, tmp_path):
    done, calls = fake(["taken"] * 3 + ["kept"], ["wait"] * 3 + [0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert calls.count("create") == calls.count("delete") == 4
    assert calls[-1] == "delete"
    assert starts(tmp_path) == [4, 4]
    assert "start 4 on 1 with JAX_NUM_PROCESSES=auto" in (tmp_path / "mae.log").read_text()
    assert not (tmp_path / "pod.txt").exists()
    # Each new pod is given the code and an environment of its own.
    assert (tmp_path / "installed.txt").read_text().count("--editable .[tpu,gcs]") == 8


def test_what_may_go_better_is_started_again_on_the_same_machines(fake, tmp_path):
    done, calls = fake(["kept"], [42, 134, 137, 143, 0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert calls.count("create") == 1
    assert calls.count("scp") == 1
    assert starts(tmp_path) == [5, 5]
    for restart, status in enumerate((42, 134, 137, 143), 1):
        assert f"exit status {status}: restart {restart}" in done.stdout


@pytest.mark.parametrize("status", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_what_is_final_ends_the_loop_with_its_status(fake, tmp_path, status):
    done, calls = fake(["kept"], [status])
    assert done.returncode == status
    assert calls[-1] == "delete"
    assert starts(tmp_path) == [1, 1]
    assert f"ended with exit status {status}" in done.stdout


def test_no_capacity_is_waited_for(fake, tmp_path):
    done, calls = fake(["refused", "failed", "refused", "kept"], [0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert calls.count("create") == 4
    assert starts(tmp_path) == [1, 1]


def test_a_refusal_that_waiting_does_not_mend_ends_it(fake):
    done, calls = fake(["denied"], [0])
    assert done.returncode == 2
    assert calls == ["create"]
    assert "PERMISSION_DENIED" in done.stdout


@pytest.mark.slow
def test_machines_that_stop_answering_are_given_back(fake, tmp_path):
    done, calls = fake(["unreachable", "kept"], ["wait", 0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert calls.count("create") == calls.count("delete") == 2
    assert starts(tmp_path) == [2, 2]


@pytest.mark.slow
def test_restarts_are_counted(fake, tmp_path):
    done, calls = fake(["kept"], [134] * 9, "--restarts=2")
    assert done.returncode == 1
    assert "134 after 2 restarts" in done.stdout
    assert starts(tmp_path) == [3, 3]
    assert calls[-1] == "delete"


@pytest.mark.slow
def test_keep_leaves_the_pod(fake, tmp_path):
    done, calls = fake(["kept"], [2], "--keep")
    assert done.returncode == 2
    assert "delete" not in calls
    assert (tmp_path / "pod.txt").exists()


def test_a_host_that_hangs_is_cleared_before_the_next_start(fake, tmp_path):
    done, _ = fake(["kept"], ["42/wait", 0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert starts(tmp_path) == [2, 2]
    assert "held on 1" not in (tmp_path / "mae.log").read_text()


def run(*options):
    return subprocess.run(
        [sys.executable, ROOT / "launch/tpu_vm.py", *options],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


COMMAND = [
    *("--", "python", "-m", "mae_jax.main", "--config=configs/pretrain.py:vit_l"),
    "--workdir=gs://BUCKET/mae",
]


@pytest.mark.parametrize(
    ("golden", "options"),
    [
        ("tpu_vm_spot.txt", ("--topology=v5e-256", "--spot")),
        ("tpu_vm_slices.txt", ("--topology=v4-128", "--slices=2", "--reserved", "--keep")),
    ],
)
def test_dry_run_prints_what_would_be_done(golden, options):
    done = run("run", "--name=mae", "--zone=us-west4-a", "--dry_run", *options, *COMMAND)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (HERE / "goldens" / golden).read_text()


def test_dry_runs_of_logs_and_delete():
    start = "gcloud compute tpus queued-resources"
    where = ("--name=mae", "--zone=z", "--ssh_flags=--tunnel-through-iap", "--dry_run")
    assert run("delete", *where).stdout == f"{start} delete mae --zone=z --force --quiet\n"
    assert run("logs", *where).stdout == (
        f"{start} ssh mae --zone=z --node=0 --worker=0 --tunnel-through-iap "
        "'--command=tail -n 100 -F mae_jax/log'\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("run", "--name=mae", "--zone=z", "--topology=v5e-7", "--", "x"), "v5e-7"),
        (("run", "--name=mae", "--zone=z", "--topology=tpu7x-128", "--", "x"), "tpu7x-128"),
        (("run", "--name=mae", "--zone=z", "--topology=v5e-8"), "after --"),
        (("run", "--name=9", "--zone=z", "--topology=v5e-8", "--", "x"), "--name"),
        (("run", "--name=m", "--zone=z", "--topology=v5e-8", "--poll=-1", "--", "x"), "--poll"),
        (("walk", "--name=mae", "--zone=z"), "walk"),
    ],
)
def test_refuses_in_one_line(options, message):
    assert_refused_in_one_line(run(*options), message)
