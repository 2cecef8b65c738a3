"""Compiles a recipe's step for a TPU pod that is not there: does it fit, how long, at what cost.

    python -m mae_jax.plan --config=configs/pretrain.py:vit_l --topology=v5e-256
    python -m mae_jax.plan --config=... --topology=v5e-256 --slices=2 --json
    python -m mae_jax.plan --config=... --topology=v5e-256 --search
    python -m mae_jax.plan --config=... --compare=v5e-256,v6e-64,v4-128 --price

Runs on any CPU with the TPU compiler installed (`pip install "mae_jax[plan]"`), in minutes. Memory
and what devices exchange are those of the pod's executable; times are estimates, docs/plan.md says
how good. Data is not read; its size only sets the schedule. Ends with status 0 where the step fits,
3 where it does not.
"""

if __name__ == "__main__":
    from mae_jax.cli import start

    raise SystemExit(start("plan"))

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported

import jax
from absl import logging
from ml_collections import ConfigDict

from mae_jax import UserError, cli
from mae_jax import config as config_lib
from mae_jax.config_checks import validate
from mae_jax.distributed import mesh as mesh_lib
from mae_jax.distributed.sharding import abstract_state, bytes_per_device
from mae_jax.planning import bundles, cost, program
from mae_jax.planning.chips import PRICES_OF, Chip, Pod, parse_pod
from mae_jax.planning.figures import Layout, Plan, out_of_memory
from mae_jax.planning.search import cheapest, modelled, order, resized, search, spent
from mae_jax.planning.table import amount, compared, describe, needs
from mae_jax.tasks import create_task
from mae_jax.train.progress import with_clock
from mae_jax.train.step import lower_step

IMAGENET_TRAIN_IMAGES = 1_281_167
DOES_NOT_FIT = 3
# CPU-ms to decode a picture and, by `data.resize`, to make a 224 px crop of it, as `bench data`
# measured on photographs of ImageNet, two threads on the two threads of one core of a server, as
# hosts' virtual CPUs are; decoding's share by `data.repeat`.
DECODE_MS, CROP_MS = 2.0, {"exact": 1.6, "fast": 0.2}
COLOR_JITTER_MS = 3.0


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plan; returns the exit status."""
    parser = cli.Parser("plan", __doc__)
    pods = "product or generation:grid, as v5e-256, v4-128 or v5p:4x4x4"
    parser.add_argument("--topology", metavar="POD", help=pods + " (default: v5e:4x4)")
    parser.add_argument("--slices", type=_at_least_one, default=1, help="pods of that kind, joined")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    what = "dollars a chip-hour, or default prices (not today's: " + PRICES_OF + ")"
    parser.add_argument("--price", type=_price, nargs="?", const="on_demand", help=what)
    what = "try layouts and sizes of the topology's chip; minutes each, at most eight"
    parser.add_argument("--search", action="store_true", help=what)
    what = "pods side by side; 2xv5e-256 for two slices"
    parser.add_argument("--compare", metavar="POD,POD,...", help=what)
    what = "sets the batch by the pod's size, in place of the recipe's"
    parser.add_argument("--images_per_chip", type=_at_least_one, help=what)
    what = "of the training split; its length sets the schedule (default: ImageNet's)"
    parser.add_argument("--examples", type=_at_least_one, default=IMAGENET_TRAIN_IMAGES, help=what)
    what = "CPU-ms to decode an image (default: measured for 224 px by `bench data`)"
    parser.add_argument("--decode_ms", type=_positive, help=what)
    argv = sys.argv[1:] if argv is None else argv
    arguments = cli.parse_recipe(parser, argv)
    if arguments.search and arguments.compare:
        raise UserError("--search and --compare: give one of them")
    if arguments.compare and (arguments.topology or arguments.slices > 1):
        raise UserError("--compare names its pods, as 2xv5e-256: leave out --topology and --slices")
    planner = Planner(arguments)
    if arguments.compare:
        pods = [parse_pod(name) for name in arguments.compare.split(",")]
        plans = sorted(planner.compare(pods), key=order)
    else:
        pod = parse_pod(arguments.topology or "v5e:4x4", arguments.slices)
        planner.price(pod.chip)  # refuses before minutes are spent
        base = planner.layout(pod)
        plans = search(base, pod, planner.compile) if arguments.search else []
        plans = plans or [planner.compile(base, pod)]
    several = bool(arguments.compare or arguments.search)
    best = (arguments.compare and cheapest(plans)) or plans[0]
    reason = _reason(best, plans, bool(arguments.search)) if several else ""
    if arguments.json:
        what = {"plans": [plan.as_json() for plan in plans], "reason": reason} if several else {}
        print(json.dumps(best.as_json() | what))
    else:
        print(planner.title())
        if several:
            print(f"\n{compared(plans)}\n\n{reason}\n")
        print(describe(best))
    return 0 if best.fits else DOES_NOT_FIT


def decode_ms(config: ConfigDict) -> float:
    """CPU-ms that hosts spend on a training example, as measured for 224 px."""
    crop = CROP_MS[config.data.resize] + COLOR_JITTER_MS * (config.augment.color_jitter > 0)
    return DECODE_MS / config.data.repeat + crop


class Planner:
    """Plans one recipe for any pod."""

    def __init__(self, arguments: argparse.Namespace):
        self.config, self._arguments = arguments.config, arguments
        validate(self.config, starts=False)
        if importlib.util.find_spec("libtpu") is None:
            raise UserError('the TPU compiler is not installed: pip install "mae_jax[plan]"')
        if jax.config.jax_compilation_cache_dir:  # written without a TPU, but never read
            jax.config.update("jax_enable_compilation_cache", False)

    def title(self) -> str:
        """What is planned."""
        model, size = self.config.model, "x".join(map(str, config_lib.image_size(self.config)))
        return (
            f"{self.config.task} of ViT-{model.variant.upper()}/{model.patch_size} at {size} px: "
            "nothing was run, times are estimates"
        )

    def price(self, chip: Chip) -> tuple[float | None, str]:
        """Dollars a chip-hour, and where they come from."""
        kind = self._arguments.price
        if not isinstance(kind, str):
            return kind, "as given" if kind else ""
        price = getattr(chip, kind)
        if not price and not self._arguments.compare:
            raise UserError(f"--price: none is known for {chip.name}; give dollars a chip-hour")
        return price or None, f"{kind}, {PRICES_OF}"

    def layout(self, pod: Pod) -> Layout:
        """How the recipe's own fields spread its step over `pod`."""
        config, given = self.config, self._arguments.images_per_chip
        batch = given * pod.chips if given else config.batch_size
        mesh = self._mesh(pod, config.mesh.data, config.mesh.fsdp)
        mesh_lib.check_batch(batch, config.optim.accumulate, mesh)
        return Layout(batch, config.optim.accumulate, config.model.remat, *mesh.shape.values())

    def _mesh(self, pod: Pod, data: int, fsdp: int) -> jax.sharding.Mesh:
        return mesh_lib.make_mesh(data, fsdp, list(pod.topology().devices))

    def _config(self, layout: Layout) -> ConfigDict:
        config = ConfigDict(self.config.to_dict())
        config.batch_size, config.optim.accumulate = layout.batch_size, layout.accumulate
        config.model.remat = layout.remat
        config.mesh.data, config.mesh.fsdp = layout.data, layout.fsdp
        return config

    def compile(self, layout: Layout, pod: Pod) -> Plan:
        """What the step takes there."""
        config = self._config(layout)
        mesh = self._mesh(pod, layout.data, layout.fsdp)
        classes = config_lib.classes_without_data(config)
        task = create_task(config, self._arguments.examples, classes, mesh)
        abstract = abstract_state(task.init, mesh)
        price, source = self.price(pod.chip)
        plan = Plan(
            pod=pod,
            layout=layout,
            steps=task.total_steps,
            flops=layout.batch_size * task.train_flops_per_image,
            state_bytes=bytes_per_device(abstract),
            decode_ms=self._arguments.decode_ms or decode_ms(config),
            price=price,
            price_source=source,
        )
        logging.info("compiling for %s: %s; this takes minutes ...", pod.name, layout)
        started = time.time()
        try:
            lowered = lower_step(task, abstract)
            compiled, read = with_clock("compiling", lambda: program.compile_and_read(lowered))
        except jax.errors.JaxRuntimeError as error:
            plan = out_of_memory(plan, str(error))
            if plan is None:
                raise
            logging.info("it does not fit: %s", needs(plan))
            return plan
        seconds = time.time() - started
        logging.info("compiled in %.0f s", seconds)
        devices, read = list(mesh.devices.flat), bundles.counted(read, pod)
        return dataclasses.replace(
            plan,
            program=read,
            parts=cost.estimate(read, pod.chip),
            exchanged=tuple(cost.communication(read, pod, devices)),
            waiting_seconds=cost.waiting(read, pod, devices),
            peak_bytes=compiled.memory_analysis().peak_memory_in_bytes,
            compile_seconds=seconds,
        )

    def compare(self, pods: Sequence[Pod]) -> list[Plan]:
        """A plan for each; what is compiled for one slice serves others with as many images."""
        plans: list[Plan] = []
        layouts = [self.layout(pod) for pod in pods]  # refuses before minutes are spent
        for pod, layout in zip(pods, layouts, strict=True):
            alike = (p for p in plans if p.fits and p.pod.chip == pod.chip and not p.modelled_from)
            alike = (p for p in alike if p.pod.slices == pod.slices == 1)
            alike = (p for p in alike if resized(p.layout, p.pod, pod).fsdp == layout.fsdp)
            source = next((p for p in alike if p.layout.images == layout.images), None)
            if source:
                steps = config_lib.total_steps(self._config(layout), self._arguments.examples)
                made = dataclasses.replace(modelled(source, pod, layout), steps=steps)
            plans.append(made if source else self.compile(layout, pod))
        return plans


def _reason(best: Plan, plans: Sequence[Plan], one_pod: bool) -> str:
    """Why `best` is recommended: of one pod the shortest run, of several the cheapest."""
    if not best.fits:
        return "none of these fits"
    chosen = f"recommended: {best.pod.name}, {best.layout}"
    if one_pod:
        least = min((plan for plan in plans if plan.fits), key=lambda plan: plan.chip_hours)
        return (
            f"{chosen}: the shortest run there, {amount(best.hours)} h; the fewest chip-hours, "
            f"{amount(least.chip_hours)}, has {least.pod.name} with {least.layout}"
        )
    if best.price is None:
        hours = amount(best.hours_with_data)
        return f"{chosen}: the shortest run, {hours} h; --price weighs what they cost"
    return f"{chosen}: the least dollars, {amount(spent(best))}, of those that fit and have a price"


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer from 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def _price(text: str) -> str | float:
    return text if text in ("spot", "on_demand") else _positive(text)
