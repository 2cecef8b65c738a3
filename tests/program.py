"""The program as a process, for tests that run it as people do."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

from mae_jax.train.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[1]
TFDS = ROOT.parent / "shared" / "tfds"

TINY = {
    "batch_size": 16,
    "steps": 12,
    "log_every": 1,
    "model.width": 32,
    "model.depth": 2,
    "model.heads": 2,
    "model.image_size": 32,
    "decoder.width": 16,
    "decoder.depth": 1,
    "decoder.heads": 2,
    "optim.warmup_steps": 2,
    "checkpoint.every": 4,
    "eval.batches": 1,
    "eval.every": 0,
    "pictures.every": 0,
    "pictures.count": 2,
    "data.threads": 1,
}

# The same for configs/finetune.py, scratch.py and linear_probe.py, quick to compile.
TINY_CLASSIFIER = {
    **{name: value for name, value in TINY.items() if not name.startswith("decoder.")},
    "compute_dtype": "float32",
    "epochs": 0.0,
    "model.variant": "ti",
    "model.patch_size": 8,
    "data.name": "demo",
    "eval.batches": 0,
    "eval.batch_size": 64,
}
TINY_TOKENIZER = {
    **{name: x for name, x in TINY.items() if name.split(".")[0] not in ("model", "decoder")},
    "model.image_size": 16,
    "dvae.codes": 32,
    "dvae.width": 8,
}
TINY_OF = {"configs/quickstart.py": TINY, "configs/tokenizer.py": TINY_TOKENIZER}
PLAIN = {
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
    "augment.erasing": 0.0,
    "augment.randaugment": "",
    "model.drop_path": 0.0,
}


def command(workdir, config="configs/quickstart.py", **fields):
    tiny = TINY_OF.get(config, TINY_CLASSIFIER)
    values = tiny | {name.replace("__", "."): value for name, value in fields.items()}
    return [
        *(sys.executable, "-m", "mae_jax.main", f"--config={ROOT / config}"),
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]


def environment(devices=1):
    return os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}


def hear_ctrl_c():
    """Undoes what a shell does to commands in the background, whose children inherit deaf ears."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run(workdir, devices=1, config="configs/quickstart.py", **fields):
    return subprocess.run(
        command(workdir, config, **fields),
        env=environment(devices),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )


def in_two_processes(command, devices):
    """Run by launch/local.py, with so many devices each; the output of both is in stdout."""
    launcher = [sys.executable, str(ROOT / "launch" / "local.py"), "--processes=2"]
    return subprocess.run(
        [*launcher, f"--devices={devices}", "--", *command],
        env=environment(),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )


def assert_refused_in_one_line(done, message):
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def losses(workdir):
    lines = read_metrics(workdir / "metrics.jsonl")
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def progress(workdir):
    """Newest step on disk, complete or being written."""
    checkpoints = workdir / "checkpoints"
    names = [p.name.split(".")[0] for p in checkpoints.iterdir()] if checkpoints.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=-1)


def kill_at_random_moments(command, workdir, kills, seed=0):
    """Starts `command` so many times and kills it soon after a new step; returns the kills."""
    rng = random.Random(seed)
    killed = 0
    for _ in range(kills):
        process = subprocess.Popen(
            command,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
        )
        # Let it train or save for a random while after it made its first new step.
        before = progress(workdir)
        deadline = time.time() + 120
        while progress(workdir) <= before and process.poll() is None and time.time() < deadline:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.0))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    return killed
