"""Compiles a recipe's step for a TPU pod that is not there: does it fit, how fast might it go.

    python -m mae_jax.plan --config=configs/pretrain.py:vit_l \\
        --topology=v5e:4x4 --config.batch_size=512

Runs on any CPU with the TPU compiler installed (`pip install "mae_jax[plan]"`). Memory and
collectives are what the pod's executable has; cycles are the compiler's estimate, good for
comparing layouts, not for predicting hours. Data is not read; its size only sets the schedule.
"""

if __name__ == "__main__":
    from mae_jax.cli import start

    raise SystemExit(start("plan"))

import collections
import importlib.util
import os
import re
import time
from collections.abc import Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from mae_jax import UserError, cli
from mae_jax import config as config_lib
from mae_jax.distributed import mesh as mesh_lib
from mae_jax.distributed.sharding import abstract_state, bytes_per_device
from mae_jax.tasks import create_task
from mae_jax.train.progress import with_clock
from mae_jax.train.step import lower_step

IMAGENET_TRAIN_IMAGES = 1_281_167
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the plan."""
    parser = cli.Parser("plan", __doc__)
    parser.add_argument("--topology", default="v5e:4x4", help="generation:grid, as v5p:4x4x4")
    arguments = cli.parse_recipe(parser, argv)
    for name, value in plan(arguments.config, arguments.topology).items():
        print(f"{name:>28}: {value}")


def plan(config: ConfigDict, topology: str) -> dict[str, object]:
    """Compiles the training step for `topology`: what it needs, as {what: figure}."""
    config_lib.validate(config)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError('the TPU compiler is not installed: pip install "mae_jax[plan]"')
    try:
        devices = list(topologies.get_topology_desc(topology, "tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology}: {str(error).splitlines()[0]}") from error
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    mesh_lib.check_batch(config.batch_size, config.optim.accumulate, mesh)
    task = create_task(config, IMAGENET_TRAIN_IMAGES, config.head.classes or 1000, mesh)
    abstract = abstract_state(task.init, mesh)
    start = time.time()
    try:
        compiled = with_clock("compiling", lower_step(task, abstract).compile)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"the step does not fit: {reason}; see the table in README.md") from error
    seconds = time.time() - start
    memory = compiled.memory_analysis()
    cycles, collectives = read_program(compiled.as_text())
    images = config.batch_size // mesh.size
    return {
        "devices": f"{mesh.size} {devices[0].device_kind}",
        "mesh": f"data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}",
        "images a device": images,
        "state a device": f"{bytes_per_device(abstract) / 1e9:.2f} GB",
        "working memory a device": f"{memory.temp_size_in_bytes / 1e9:.2f} GB",
        "peak memory a device": f"{memory.peak_memory_in_bytes / 1e9:.2f} GB",
        "estimated cycles a step": f"{cycles / 1e6:.1f} M",
        "model FLOP a cycle": f"{images * task.train_flops_per_image / cycles:.0f}",
        "collectives": ", ".join(f"{n} {name}" for name, n in collectives.items()) or "none",
        "compile time": f"{seconds:.0f} s",
    }


def read_program(text: str) -> tuple[int, dict[str, int]]:
    """Estimated cycles and executed collectives of a compiled TPU program's text; a `while` body
    counts as often as it runs: the constant its condition compares with."""
    _, *parts = re.split(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", text, flags=re.MULTILINE)
    marks, names, bodies = parts[::3], parts[1::3], parts[2::3]
    computations = dict(zip(names, bodies, strict=True))

    def walk(computation: str) -> tuple[int, collections.Counter]:
        cycles, collectives = 0, collections.Counter()
        for line in computations[computation].splitlines():
            estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
            cycles += int(estimate[1]) if estimate else 0
            operation = re.search(r"= .*? ([a-z\-]+)\(", line)
            kind = operation[1].removesuffix("-start") if operation else ""
            if kind in COLLECTIVES:
                collectives[kind] += 1
            if loop := re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                limits = re.findall(r"s32\[\][^=]* constant\((\d+)\)", computations[loop[1]])
                count = max(map(int, limits), default=1)
                inner_cycles, inner = walk(loop[2])
                cycles += count * inner_cycles
                collectives.update({k: count * v for k, v in inner.items()})
        return cycles, collectives

    cycles, collectives = walk(names[marks.index("ENTRY ")])
    return cycles, dict(collectives)
