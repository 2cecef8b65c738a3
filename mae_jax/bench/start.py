"""How long it takes from the command to the end of the first step.

python -m mae_jax.bench start --config=configs/quickstart.py
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from mae_jax import UserError
from mae_jax.bench.step import open_mesh
from mae_jax.config_checks import validate
from mae_jax.distributed.sharding import abstract_state
from mae_jax.tasks import create_task
from mae_jax.tasks.inputs import open_splits
from mae_jax.train.ledger import process_began, read_times
from mae_jax.train.step import lower_step

WAYS = ("cold", "warm")  # with nothing compiled; with what the start before compiled
RECIPE = "import json\nfrom ml_collections import ConfigDict\n"
RECIPE += "def get_config():\n    return ConfigDict(json.loads({!r}))\n"
ROWS = {  # of the ledger's phases
    "imports": "imports",
    "open": "data opened, task built",
    "start": "the rest",
    "restore": "weights drawn",
    "features": "features computed",
    "pictures": "pictures and inputs read, drawn",
    "compile": "programs traced, compiled or read",
    "data": "waiting for the first batch",
    "step": "first step",
    "CPU": "CPU time, user and system",
}
POLL_SECONDS = 0.02


def main(config: ConfigDict, rounds: int, as_json: bool) -> None:
    """Prints the seconds of `rounds` starts with nothing compiled and as many with what these left,
    in turns: the training command itself, in a new workdir, killed after its first step."""
    if rounds < 1:
        raise UserError(f"--rounds={rounds}: give at least 1")
    validate(config)
    starts = {way: [] for way in WAYS}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            config.compile.cache_dir = f"{folder}/compiled"
            for way in WAYS:
                starts[way].append(measure(config, pathlib.Path(folder) / way))
    if as_json:
        print(json.dumps(starts))
        return
    seconds = {way: _table(starts[way]) for way in WAYS}
    print(f"| s, median of {rounds} rounds (range) | {' | '.join(WAYS)} |\n|---|---|---|")
    for name in seconds[WAYS[0]]:
        if any(seconds[way][name].any() for way in WAYS):
            print(f"| {name} | {' | '.join(_cell(seconds[way][name]) for way in WAYS)} |")


def measure(config: ConfigDict, workdir: pathlib.Path) -> dict:
    """What the ledger of a start says of it when its first step ends: seconds by phase, of all
    ("total"), and of processors ("CPU")."""
    workdir.mkdir()
    recipe = workdir.with_suffix(".py")
    recipe.write_text(RECIPE.format(json.dumps(config.to_dict())))
    command = [sys.executable, "-m", "mae_jax.main", f"--config={recipe}", f"--workdir={workdir}"]
    began, log = time.time(), workdir.with_suffix(".log")
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            while not (times := read_times(workdir) or {}).get("to_first_step"):
                if process.poll() is not None:
                    lines = log.read_text().strip().splitlines()[-1:]
                    raise UserError(f"the run ended before its first step: {' '.join(lines)}")
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
    seconds = times["to_first_step"]
    if "imports" not in seconds:  # the system did not tell when the process began
        seconds["imports"] = times["began"] - began
    total, cpu = sum(seconds.values()), times["cpu_to_first_step"]
    return {"seconds": seconds | {"CPU": cpu}, "total": total}


def _table(starts: Sequence[dict]) -> dict[str, np.ndarray]:
    """Seconds of each start [rounds] by the name of a row."""
    rows = {}
    for phase, name in ROWS.items():
        rows[name] = np.array([start["seconds"].get(phase, 0.0) for start in starts])
        if phase == "step":
            rows["**command to the end of the first step**"] = np.array(
                [start["total"] for start in starts]
            )
    return rows


def _cell(values: np.ndarray) -> str:
    return f"{np.median(values):.2f} ({values.min():.2f} to {values.max():.2f})"


def trace(config: ConfigDict, as_json: bool) -> None:
    """Prints what a start takes before it compiles the step, for a model that is not run here."""
    began, now = process_began(), time.time()
    seconds = {"imports": 0.0 if began is None else now - began}

    def add(name: str) -> None:
        nonlocal now
        seconds[name], now = time.time() - now, time.time()

    mesh = open_mesh(config)
    splits = open_splits(config)
    add("data opened")
    names = splits.train.class_names
    task = create_task(config, len(splits.train), splits.head_classes, mesh, names)
    abstract = abstract_state(task.init, mesh)
    add("task built, state's shapes traced")
    lowered = lower_step(task, abstract)
    add("step traced and lowered")
    seconds["total"] = sum(seconds.values())
    size = len(lowered.as_text())
    if as_json:
        print(json.dumps({"seconds": seconds, "characters": size}))
        return
    model = config.model
    head = f"ViT-{model.variant.upper()}, {model.stacking}, remat {model.remat}"
    print(f"| {head}, {jax.devices()[0].device_kind} | s |\n|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} |")
    print(f"\n{size:,} characters of StableHLO")
