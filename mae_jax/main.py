"""Runs a config: `python -m mae_jax.main --config=configs/quickstart.py --workdir=DIR`.

The workdir holds config.json, metrics.jsonl, checkpoints/, pictures and, at the end, export/ and
for classifiers results.json. The same command with the same workdir continues a stopped run.
"""

if __name__ == "__main__":
    from mae_jax.cli import start

    raise SystemExit(start("train"))

import contextlib
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

import mae_jax
from mae_jax import TryAgainError, UserError, cli
from mae_jax import config as config_lib
from mae_jax.config_checks import validate
from mae_jax.data.pipeline import picture_positions
from mae_jax.data.splits import Splits
from mae_jax.distributed import fate, startup, stopping, watchdog
from mae_jax.distributed import mesh as mesh_lib
from mae_jax.distributed.sharding import abstract_state, bytes_per_device, shardings_of
from mae_jax.interop.class_names import require_same_classes
from mae_jax.interop.load import load_into
from mae_jax.models.spec import ModelSpec
from mae_jax.results import write_results
from mae_jax.storage.checkpoints import Checkpoints
from mae_jax.storage.claim import Claim
from mae_jax.storage.files import (
    complete_or_absent_folder,
    read_json,
    to_path,
    write_atomically,
    write_json,
)
from mae_jax.storage.processes import (
    Timer,
    in_every_process,
    in_process_0,
    require_same,
    sole_run,
    tell_all,
)
from mae_jax.tasks import create_task
from mae_jax.tasks.inputs import open_splits
from mae_jax.train.ledger import Ledger, process_began, summary
from mae_jax.train.loop import Action, Totals, totals_from_json, totals_to_json, train
from mae_jax.train.metrics import MetricsWriter, evaluation_at, read_metrics
from mae_jax.train.profiler import Profiled
from mae_jax.train.programs import keep_compiled
from mae_jax.train.progress import with_clock
from mae_jax.train.report import Reporter
from mae_jax.train.state import TrainState
from mae_jax.train.step import compile_step
from mae_jax.train.task import Task


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = cli.Parser("train", __doc__)
    parser.add_argument("--workdir", required=True, help="folder of this run; an old one goes on")
    ledger = Ledger("start", process_began())
    if not {"-h", "--help", "--version"} & set(sys.argv[1:] if argv is None else argv):
        startup.initialize()  # first of all: what is wrong in one process ends all
    arguments = cli.parse_recipe(parser, argv)
    run(arguments.config, arguments.workdir, ledger)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a training is made of; nothing of it has been written yet."""

    config: ConfigDict
    workdir: epath.Path
    mesh: Mesh
    data: Splits
    task: Task
    abstract: TrainState


def run(config: ConfigDict, workdir: str, ledger: Ledger | None = None) -> None:
    """Trains to the end, or until told to stop."""
    started, ledger, folder = time.time(), ledger or Ledger("start"), to_path(workdir)
    with watchdog.watching(lambda: ledger.phase, config.watchdog.minutes, folder):
        fields = config_lib.flatten(config.to_dict()).items()
        alike = {name: value for name, value in fields if name not in config_lib.OF_A_HOST}
        require_same({"mae_jax": mae_jax.__version__, "jax": jax.__version__, **alike})
        with ledger.during("open"):
            setup = in_every_process(prepare, config, folder)
        if jax.process_count() > 1:
            require_same(in_every_process(setup.data.facts) | setup.task.digests)
        announce(setup)
        with (
            sole_run(folder, lambda text: fate.leave(fate.MENDABLE, f"error: {text}")) as claim,
            closing(ledger),
            closing(Checkpoints(folder / "checkpoints", config.checkpoint.keep)) as checkpoints,
        ):
            carry_out(setup, checkpoints, started, ledger, claim)


def carry_out(
    setup: Setup, checkpoints: Checkpoints, started: float, ledger: Ledger, claim: Claim | None
) -> None:
    """Trains in a workdir that is ours; `claim` is what process 0 holds it by."""
    starts = Starts(setup.workdir, setup.config.checkpoint.starts)
    if claim is not None:  # the last of these comes first
        fate.before_leaving(lambda code: claim.release())
        fate.before_leaving(lambda code: ledger.write())
        fate.before_leaving(starts.end)
    try:
        with ledger.during("restore"):
            state, record = restore_or_begin(setup, checkpoints)
        in_process_0(starts.begin, int(state.step))
        started -= record.get("elapsed_seconds", 0.0)
        if int(state.step) < setup.task.total_steps:  # one that ended is not away
            ledger.resume(setup.workdir, int(state.step), setup.task.total_steps)
        state, steps, stopped = train_and_evaluate(
            setup, state, record, checkpoints, started, ledger, claim
        )
        with ledger.during("save"):
            checkpoints.wait()
            in_every_process(stopping.disarm)
            if not stopped:
                finish(setup, state)
        in_process_0(conclude, setup.workdir, ledger)
        if stopped:
            leave_saved(steps, setup.task.total_steps)
        starts.end(0)
    except BaseException as error:
        fate.fail(error)  # before anything here waits for other processes
        with contextlib.suppress(Exception):
            starts.end(getattr(error, "exit_code", fate.BUG))
        raise


def conclude(workdir: epath.Path, ledger: Ledger) -> None:
    """Keeps where the time went, and shows it; who alone writes it reads it."""
    ledger.write()
    logging.info("%s", summary(workdir))


class Starts:
    """Counts, in the workdir, starts that failed since the newest checkpoint."""

    def __init__(self, workdir: epath.Path, limit: int):
        self._path, self._limit, self._own = workdir / "starts.json", limit, None

    def begin(self, step: int) -> None:
        """Counts a start that goes on from `step`; UserError where there were too many."""
        before = read_json(self._path) if self._path.exists() else {}
        count = before.get("failed", 0) if before.get("step") == step else 0
        if 0 < self._limit <= count:
            raise UserError(
                f"{self._path}: {count} starts failed without getting from step {step} to another "
                "checkpoint; see in their output why, then delete this file, or give another "
                "checkpoint.starts"
            )
        self._own = {"step": step, "failed": count}
        write_json(self._path, {"step": step, "failed": count + 1})

    def end(self, code: int) -> None:
        """Forgives this start where it was stopped, or people will mend what ended it."""
        told = code == fate.RETRY and stopping.told()
        if self._own is not None and (told or code in (0, fate.MENDABLE, fate.BY_CTRL_C)):
            write_json(self._path, self._own)


def leave_saved(steps: int, total: int) -> None:
    """Ends a run that was told to stop, when all its processes have saved."""
    text = f"stopped after step {steps} of {total} and saved; the same command continues from there"
    if stopping.by_ctrl_c():
        fate.leave(fate.BY_CTRL_C, text)
    raise TryAgainError(text)


def prepare(config: ConfigDict, workdir: epath.Path) -> Setup:
    """Opens the data and builds the task; raises UserError for what cannot be trained here."""
    validate(config)
    keep_compiled(config.compile.cache_dir)
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.fsdp)
    mesh_lib.check_batch(config.batch_size, config.optim.accumulate, mesh)
    picture_positions(mesh_lib.local_positions(config.batch_size, mesh), config.data.repeat)
    data = open_splits(config)
    names = data.train.class_names
    task = create_task(config, len(data.train), data.head_classes, mesh, names, workdir)
    mesh_lib.check_batch(task.eval_batch_size, 1, mesh, "eval.batch_size")
    return Setup(config, workdir, mesh, data, task, abstract_state(task.init, mesh))


def restore_or_begin(setup: Setup, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any]]:
    """The state to go on from, and what was recorded with it: nothing of a new run."""
    config, task = setup.config, setup.task
    check = functools.partial(check_fits, config=config, data=setup.data, digests=task.digests)
    restored = checkpoints.restore_newest(setup.abstract, check, task.fixed_positions)
    if restored is not None:
        state, record = restored
        logging.info("continuing from the checkpoint of step %d", int(state.step))
    else:
        steps = [line["step"] for line in read_metrics(setup.workdir / "metrics.jsonl")]
        traces = [f"metrics.jsonl up to step {max(steps)}"] if steps else []
        traces += [name for name in ("export", "results.json") if (setup.workdir / name).exists()]
        checkpoints.begin(traces)
        init = jax.jit(task.init, out_shardings=shardings_of(setup.abstract))
        state = task.prepare(with_clock("drawing random weights", init), setup.data)
        if config.init_from not in ("", "random"):
            fresh, parts = mesh_lib.to_host(state.weights), config.init_parts
            load = functools.partial(load_into, fresh, config.init_from, task.spec, parts=parts)
            weights, report = in_every_process(load)
            logging.info("%s", report)
            state = state.with_weights(mesh_lib.place(weights, shardings_of(state.weights)))
        record = {}
    text = config.to_json(indent=2, sort_keys=True) + "\n"
    in_process_0(write_atomically, setup.workdir / "config.json", text)
    return state, record


def train_and_evaluate(
    setup: Setup,
    state: TrainState,
    before: dict[str, Any],
    checkpoints: Checkpoints,
    started: float,
    ledger: Ledger,
    claim: Claim | None,
) -> tuple[TrainState, int, bool]:
    """Trains from where `state` is, evaluating and saving; as `train.loop.train`.

    `before`: what was recorded with `state`, if it was saved.
    """
    config, data, task, mesh = setup.config, setup.data, setup.task, setup.mesh
    start_step, total_steps = int(state.step), setup.task.total_steps

    # What a stop kept from being done with the state, and its unfinished log interval.
    due = before.get("due", ())
    begun = totals_from_json(before["interval"]) if "interval" in before else None
    timer = Timer(config.checkpoint.minutes)

    def save(step: int, state: TrainState, **more: Any) -> None:
        if claim is not None:
            claim.require()  # this process may have been frozen, and its workdir taken over
        timer.restart()
        record = {
            "config": config.to_dict(),
            "model": task.spec.to_json(),
            "seed": config.seed,
            "data": {"examples": len(data.train), "position": step * config.batch_size},
            "digests": task.digests,
            "elapsed_seconds": time.time() - started,
            "version": mae_jax.__version__,
        }
        checkpoints.save(step, state, record | more)

    def save_and_stop(step: int, state: TrainState, due: list[str], totals: Totals) -> None:
        due = [phase for phase in due if phase != "save"]
        save(step, state, due=due, interval=totals_to_json(totals))

    with closing(MetricsWriter(setup.workdir, start_step)) as writer:
        with ledger.during("features"):
            inputs = task.inputs(data, state, setup.workdir)
        shardings = shardings_of(setup.abstract)
        evaluate = task.evaluation(inputs, writer, shardings, config.eval.batches)
        also = timer.is_over if config.checkpoint.minutes else None
        with ledger.during("pictures"):  # what they show is read
            of_task = task.actions(config, data, writer, setup.workdir)
        actions = [
            Action("evaluation", config.eval.every, evaluate, evaluate.compile),
            *of_task,
            # Last: then all of it is done.
            Action("save", config.checkpoint.every, save, also=also),
        ]
        if start_step == total_steps:
            missing = evaluation_at(setup.workdir, total_steps) is None
            if tell_all(str(missing))[0] == "True":  # whoever lost the metrics, all evaluate
                due = [*due, "evaluation"]
        for action in actions:
            if action.phase in due:
                with ledger.during(action.phase):
                    action.run(start_step, state)
        if start_step == total_steps:
            return state, total_steps, False
        if start_step == 0:
            with ledger.during("pictures"):
                task.draw_inputs(data, setup.workdir)
        positions = mesh_lib.local_positions(config.batch_size, mesh)
        with inputs.train_batches(positions, start_step, total_steps) as host_batches:
            batches = on_devices(host_batches, task, positions)
            with ledger.during("compile"):
                others = {
                    action.phase: functools.partial(action.compile, setup.abstract)
                    for action in actions
                    if action.compile is not None
                }
                step = compile_step(task, setup.abstract, others)
            # Until here Ctrl-C and SIGTERM end the run at once, from here on after a save. All
            # together: the first exchange between devices waits for nobody's compiler.
            in_every_process(stopping.arm)
            profile = {"start": config.profile.start, "steps": config.profile.steps}
            folder = setup.workdir / "profile"
            with Profiled(step, folder, start_step=start_step, ledger=ledger, **profile) as traced:
                return train(
                    traced,
                    state,
                    batches,
                    metric_names=task.metric_names,
                    place_totals=lambda totals: mesh_lib.replicate(totals, mesh),
                    start_step=start_step,
                    total_steps=total_steps,
                    log_every=config.log_every,
                    report=Reporter(task, mesh, writer, len(data.train), host_batches, ledger),
                    actions=actions,
                    stop_requested=stopping.poll,
                    on_stop=save_and_stop,
                    ledger=ledger,
                    begun=begun,
                )


def on_devices(host_batches: Iterable[dict], task: Task, positions: np.ndarray) -> Iterator[Any]:
    """Global batches of these rows, the next on its way while the current one is used."""
    arrays = ({name: batch[name] for name in task.batch_schema} for batch in host_batches)
    sent = (mesh_lib.global_batch(x, positions, task.batch_size, task.mesh) for x in arrays)
    return (current for current, _ in itertools.pairwise(itertools.chain(sent, [None])))


def finish(setup: Setup, state: TrainState) -> None:
    """Writes the model of the last step and, of a classifier, its results."""
    config, data, steps = setup.config, setup.data, setup.task.total_steps
    params = None if state.ema is not None else state.params  # averages stand for them
    state = mesh_lib.to_host(state.replace(opt_state=None, params=params))
    facts = {
        "data": f"{data.train.name}, split {data.train.split}, {len(data.train)} images",
        "steps": steps,
        "batch size": config.batch_size,
        "epochs": f"{steps * config.batch_size / len(data.train):.1f}",
        "compute type": config.compute_dtype,
        "started from": config.init_from or "random weights",
        "weights": "moving average" if state.ema is not None else "of the last step",
        "trained with": f"mae_jax {mae_jax.__version__}",
    }

    def write() -> None:
        with complete_or_absent_folder(setup.workdir / "export") as folder:
            setup.task.export(state, folder, facts)
        if config.task in config_lib.SUPERVISED:
            sizes = {"train_examples": len(data.train), "parameters": tree_size(state.weights)}
            results = write_results(setup.workdir, config, steps=steps, **sizes)
            logging.info("results.json:\n%s\n%s", results["markdown_header"], results["markdown"])

    in_process_0(write)
    logging.info("done: %d steps. Model, pictures and metrics are in %s", steps, setup.workdir)


def check_fits(
    record: dict[str, Any], config: ConfigDict, data: Splits, digests: dict[str, str]
) -> None:
    """Raises UserError where a checkpoint belongs to another run."""
    if differing := config_lib.differing_fields(record["config"], config):
        changes = [f"{name}: {old!r} there, {new!r} now" for name, (old, new) in differing.items()]
        raise UserError(
            f"the workdir holds checkpoints of another config ({'; '.join(changes)}); give these "
            "fields their old values to continue, or choose a new --workdir"
        )
    names = ModelSpec.from_json(record["model"]).class_names if "model" in record else ()
    if names and data.head_classes:
        require_same_classes(names, data.train.class_names, f"data.dir: {data.train.name}")
    examples = record["data"]["examples"]
    if examples != len(data.train):
        raise UserError(
            f"data.dir: the checkpoint was trained on {examples} examples, {data.train.name} "
            f"{data.train.split} now has {len(data.train)}: restore them, or choose a new --workdir"
        )
    for field, digest in record.get("digests", {}).items():
        if digest != digests[field]:
            raise UserError(
                f"{field} = {config_lib.flatten(config.to_dict())[field]!r}: its content is not "
                "what this run began with; restore it, or choose a new --workdir"
            )


def announce(setup: Setup) -> None:
    """Logs what is about to run: parameters, mesh, data, length."""
    mesh, data, task, batch = setup.mesh, setup.data, setup.task, setup.config.batch_size
    params, frozen = setup.abstract.params, setup.abstract.frozen
    parts = ", ".join(f"{name} {tree_size(part):,}" for name, part in params.items())
    logging.info("parameters: %s (%s); --verbose lists them", f"{tree_size(params):,}", parts)
    if logging.level_debug():
        from clu import parameter_overview  # its import takes as long as that of flax

        table = parameter_overview.get_parameter_overview(params, include_stats="sharding")
        logging.debug("parameters:\n%s", table)
    if frozen is not None:
        logging.info("and %s numbers that no gradient changes", f"{tree_size(frozen):,}")
    shape = f"data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} = {mesh.size}"
    devices = f"{mesh.devices.flat[0].device_kind} device(s) in {jax.process_count()} process(es)"
    gigabytes = bytes_per_device(setup.abstract) / 1e9
    logging.info("mesh: %s %s; %.2f GB of state on each", shape, devices, gigabytes)
    examples = f"{len(data.train)} training and {len(data.eval)} evaluation examples"
    local = len(mesh_lib.local_positions(batch, mesh))
    logging.info("data: %s, %s; batch %d, %d a process", data.train.name, examples, batch, local)
    length = f"{task.total_steps} steps ({task.total_steps * batch / len(data.train):.1f} epochs)"
    flops, dtype = task.train_flops_per_image / 1e9, setup.config.compute_dtype
    logging.info("run: %s, %.1f GFLOP an image and step, %s", length, flops, dtype)


def tree_size(tree: Any) -> int:
    """Numbers in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
