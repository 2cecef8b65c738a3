"""launch/sky.yaml: parsed, and its two scripts run as bash reads them."""

import os
import subprocess

import pytest

from tests.program import ROOT

yaml = pytest.importorskip("yaml", reason="tasks need PyYAML")


@pytest.fixture(scope="module")
def task():
    return yaml.safe_load((ROOT / "launch/sky.yaml").read_text())


def test_recovers_from_what_a_restart_mends(task):
    recovery = task["resources"]["job_recovery"]
    # SkyPilot recovers where any host ends with one of these. It kills (137) the hosts that outlive
    # the first, so 137 must not be among them.
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [42, 134, 135, 139]}
    assert task["resources"]["use_spot"] is True
    assert task["envs"]["WORKDIR"] is None  # must be given


def test_scripts_are_bash(task):
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n", "-c", task[part]], check=True)


@pytest.mark.parametrize("gpus", [True, False])
def test_hosts_find_each_other(task, tmp_path, gpus):
    """Runs the part `run` with a `python` that prints what it is given."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')
    tools = {"python": 'echo "$@"; env | grep ^JAX | sort'} | ({"nvidia-smi": ""} if gpus else {})
    for name, text in tools.items():
        (tmp_path / ".venv/bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", task["run"]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("JAX")}
        | {"WORKDIR": "gs://B/mae", "CONFIG": "pretrain.py:vit_l"}
        | {
            "OVERRIDES": "--config.steps=5 --config.seed=1",
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        }
        | {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"},
    )
    command, *variables = done.stdout.splitlines()
    assert command == (
        "-m mae_jax.main --config=configs/pretrain.py:vit_l --workdir=gs://B/mae "
        "--config.steps=5 --config.seed=1"
    )
    explicit = ["JAX_COORDINATOR_ADDRESS=10.0.0.1:8476", "JAX_NUM_PROCESSES=2", "JAX_PROCESS_ID=1"]
    assert variables == (explicit if gpus else ["JAX_NUM_PROCESSES=auto"])
