"""launch/slurm.sbatch with a fake srun and scontrol; shell scripts against shellcheck."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

from tests.program import ROOT

HERE = pathlib.Path(__file__).parent
SCRIPT = ROOT / "launch/slurm.sbatch"
COMMAND = ["python", "-m", "mae_jax.main", "--config=configs/pretrain.py:vit_l", "--workdir=W"]
# What Slurm tells a job of 2 nodes with 4 GPUs and 32 CPUs each.
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_CPUS_ON_NODE": "32",
}


@pytest.fixture
def submit(tmp_path):
    """A function of (status of srun, variables) -> the finished script and its calls."""
    calls = tmp_path / "calls.txt"
    calls.touch()
    for name, text in {
        "srun": 'exit "$STATUS"',
        "scontrol": '[ "$1" != show ] || echo "JobId=7 JobState=$STATE Reason=None"',
    }.items():
        line = f'echo "{name} $*" >>{calls}'
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def run(status, **variables):
        environment = os.environ | JOB | {"STATUS": str(status), "STATE": "RUNNING"} | variables
        environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", SCRIPT, *COMMAND], env=environment, capture_output=True, text=True
        )
        return done, calls.read_text().splitlines()

    return run


def test_one_process_a_gpu(submit):
    done, calls = submit(0)
    assert done.returncode == 0
    assert calls == [
        "srun --nodes=2 --ntasks=8 --ntasks-per-node=4 --cpus-per-task=8 --kill-on-bad-exit=0 "
        f"--wait=120 {' '.join(COMMAND)}"
    ]


def test_one_process_a_node(submit):
    _, calls = submit(0, PROCESSES="node")
    assert "--ntasks=2 --ntasks-per-node=1 --cpus-per-task=32" in calls[0]


@pytest.mark.parametrize("status", [42, 134, 135, 137, 139, 143])
def test_goes_back_into_the_queue(submit, status):
    done, calls = submit(status, SLURM_RESTART_COUNT="99")
    assert calls[-1] == "scontrol requeue 7"
    assert done.returncode == status


@pytest.mark.parametrize("status", [0, 1, 2])
def test_ends(submit, status):
    done, calls = submit(status)
    assert len(calls) == 1
    assert done.returncode == status


def test_goes_back_only_so_often(submit):
    done, calls = submit(134, SLURM_RESTART_COUNT="3", RESTARTS="3")
    assert not any("requeue" in call for call in calls)
    assert "134 after 3 restarts" in done.stderr


@pytest.mark.parametrize("state", ["CANCELLED", "PENDING"])
def test_leaves_to_slurm_what_slurm_ended(submit, state):
    # PENDING: Slurm preempted the job and has put it back itself.
    _, calls = submit(42, STATE=state)
    assert not any("requeue" in call for call in calls)


@pytest.mark.parametrize(
    ("variables", "message"),
    [({"PROCESSES": "gpus"}, "PROCESSES"), ({"RESTARTS": "x"}, "RESTARTS")],
)
def test_refuses_in_one_line(submit, variables, message):
    done, calls = submit(0, **variables)
    assert (done.returncode, calls) == (2, [])
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("golden", "processes"), [("slurm_gpu.txt", "gpu"), ("slurm_node.txt", "node")]
)
def test_dry_run_prints_what_would_be_done(golden, processes):
    done = subprocess.run(
        ["bash", SCRIPT, "--dry_run", *COMMAND],
        env=os.environ | JOB | {"PROCESSES": processes},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stdout == (HERE / "goldens" / golden).read_text()


def test_sbatch_reads_the_options():
    # sbatch stops reading at the first line that is neither a comment nor empty.
    head = re.split(r"^[^#\n]", SCRIPT.read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", head, re.MULTILINE))
    assert options["signal"] == "TERM@120"  # to the processes: B: would tell only this script
    assert options["open-mode"] == "append"
    assert "requeue" in options
    assert SCRIPT.read_text().count("\n#SBATCH") == len(options)


@pytest.mark.parametrize("script", ["slurm.sbatch", "host.sh"])
def test_shellcheck(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", ROOT / "launch" / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
