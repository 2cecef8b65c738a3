"""Runs a config: `python -m mae_jax.main --config=configs/quickstart.py --workdir=DIR`.

The workdir holds config.json, metrics.jsonl, checkpoints/, reconstructions/ and, at the end,
export/. The same command with the same workdir continues where the run stopped.
"""

import logging as python_logging
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from clu import parameter_overview
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict, config_flags

import mae_jax
from mae_jax import config as config_lib
from mae_jax.data import pipeline
from mae_jax.distributed import mesh as mesh_lib
from mae_jax.distributed import startup
from mae_jax.distributed.sharding import abstract_state, bytes_per_device, shardings_of
from mae_jax.interop.files import write_atomically
from mae_jax.interop.load import load_into
from mae_jax.tasks.pretrain import Pretrain, PretrainData, Reconstructions
from mae_jax.train.checkpoints import CheckpointError, Checkpoints
from mae_jax.train.loop import Action, NonFiniteLossError, train
from mae_jax.train.metrics import MetricsWriter
from mae_jax.train.report import Evaluation, Reporter
from mae_jax.train.state import TrainState
from mae_jax.train.step import compile_step

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, e.g. configs/quickstart.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run; an old one is continued")


def main(argv: list[str]) -> None:
    """Entry point; bad input ends with its message and exit status 2, not with a traceback."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    set_up_logging()
    try:
        startup.initialize()
        run(_CONFIG.value, _WORKDIR.value)
    except (ValueError, OSError, ImportError, CheckpointError, NonFiniteLossError) as error:
        logging.debug("traceback", exc_info=True)
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)


def set_up_logging() -> None:
    """Our own lines with the time, other libraries' only from warnings up."""
    logging.set_verbosity(max(logging.get_verbosity(), logging.INFO))
    handler = logging.get_absl_handler()
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    package = str(pathlib.Path(mae_jax.__file__).parent)
    handler.addFilter(
        lambda record: (
            record.levelno >= python_logging.WARNING
            or (record.pathname.startswith(package) and jax.process_index() == 0)
        )
    )


def run(config: ConfigDict, workdir: str) -> None:
    """Trains to the end, or until told to stop."""
    started = time.time()
    config_lib.validate(config)
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.fsdp)
    mesh_lib.check_batch(config.batch_size, config.optim.accumulate, mesh)
    data = PretrainData(config)
    task = Pretrain(config, len(data.train), mesh)

    abstract = abstract_state(task.init, mesh)
    announce(config, mesh, data, task, abstract)

    path = pathlib.Path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(path / "checkpoints", config.checkpoint.keep)
    restored = checkpoints.restore_newest(abstract, lambda record: check_fits(record, config, data))
    if restored is None:
        state, elapsed_before = jax.jit(task.init, out_shardings=shardings_of(abstract))(), 0.0
        if config.init_from:
            state = start_from(config.init_from, config.init_parts, task, state, mesh)
    else:
        state, record = restored
        elapsed_before = record["elapsed_seconds"]
        logging.info("continuing from the checkpoint of step %d", int(state.step))
    start_step = int(state.step)
    if jax.process_index() == 0:
        write_atomically(path / "config.json", config_lib.to_json(config) + "\n")

    def save(step: int, state: TrainState) -> None:
        record = {
            "config": config.to_dict(),
            "seed": config.seed,
            "data": {"examples": len(data.train), "position": step * config.batch_size},
            "elapsed_seconds": elapsed_before + time.time() - started,
            "version": mae_jax.__version__,
        }
        checkpoints.save(step, state, record)

    writer = MetricsWriter(path, start_step)
    positions = mesh_lib.local_positions(config.batch_size, mesh)
    evaluate = Evaluation(
        task,
        data,
        mesh,
        writer,
        shardings_of(abstract),
        max_batches=config.eval.batches,
        bad_records=config.data.bad_records,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
    )
    pictures = Reconstructions(
        task, data.eval_images(config.pictures.count), mesh, path / "reconstructions"
    )
    stop_signal = startup.StopSignal()
    stopped_at = start_step
    try:
        if start_step < task.total_steps:
            with pipeline.train_batches(
                data.train,
                data.train_transform,
                seed=config.seed,
                batch_size=config.batch_size,
                positions=positions,
                start_step=start_step,
                end_step=task.total_steps,
                bad_records=config.data.bad_records,
                workers=config.data.workers,
                threads=config.data.threads,
                prefetch=config.data.prefetch,
            ) as host_batches:
                state, stopped_at = train(
                    compile_step(task, abstract),
                    state,
                    device_batches(
                        host_batches, task.batch_fields, positions, config.batch_size, mesh
                    ),
                    metric_names=task.metric_names,
                    place_totals=lambda totals: mesh_lib.replicate(totals, mesh),
                    start_step=start_step,
                    total_steps=task.total_steps,
                    log_every=config.log_every,
                    report=Reporter(task, mesh, writer, len(data.train), host_batches),
                    actions=[
                        Action(config.eval.every, evaluate),
                        Action(config.pictures.every, pictures),
                        Action(config.checkpoint.every, save),  # last: then all of it is done
                    ],
                    stop_requested=stop_signal,
                    on_stop=save,
                )
    finally:
        writer.close()
        checkpoints.close()  # whatever ended the run, a save under way is completed
    if stopped_at < task.total_steps:
        logging.info(
            "stopped after step %d of %d and saved; the same command continues from there",
            stopped_at,
            task.total_steps,
        )
        return
    params = mesh_lib.to_host(state.best_params, mesh)
    if jax.process_index() == 0:
        facts = {
            "data": f"{data.train.name}, split {data.train.split}, {len(data.train)} images",
            "steps": task.total_steps,
            "batch size": config.batch_size,
            "epochs": f"{task.total_steps * config.batch_size / len(data.train):.1f}",
            "compute type": config.compute_dtype,
            "started from": config.init_from or "random weights",
            "weights": "moving average" if state.ema is not None else "of the last step",
            "trained with": f"mae_jax {mae_jax.__version__}",
        }
        task.export(params, path / "export", facts)
    logging.info("done: %d steps. Encoder, pictures and metrics are in %s", stopped_at, path)


def start_from(
    source: str, parts: str, task: Pretrain, state: TrainState, mesh: Mesh
) -> TrainState:
    """The state at step 0 with the weights of another model, as far as they fit.

    Raises:
      ValueError: weights that cannot be read, or would do silent harm.
    """
    fresh = mesh_lib.to_host(state.params, mesh)
    params, report = load_into(fresh, source, task.description, parts=parts)
    logging.info("%s", report)
    params = mesh_lib.place(params, shardings_of(state.params))
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, ema=ema)


def check_fits(record: dict[str, Any], config: ConfigDict, data: PretrainData) -> None:
    """Raises ConfigError where a checkpoint belongs to another run."""
    differing = config_lib.differing_fields(record["config"], config)
    if differing:
        lines = [f"  {name}: {old!r} there, {new!r} now" for name, (old, new) in differing.items()]
        raise config_lib.ConfigError(
            "the workdir holds checkpoints of another config:\n"
            + "\n".join(lines)
            + "\nGive these fields their old values to continue, or choose a new --workdir."
        )
    examples = record["data"]["examples"]
    if examples != len(data.train):
        raise config_lib.ConfigError(
            f"data.dir: the checkpoint was trained on {examples} examples, {data.train.name} "
            f"{data.train.split} now has {len(data.train)}; the order would not be the same. "
            "Restore the data, or choose a new --workdir."
        )


def announce(
    config: ConfigDict,
    mesh: Mesh,
    data: PretrainData,
    task: Pretrain,
    abstract: Any,
) -> None:
    """Logs what is about to run: parameters, mesh, data, length."""
    logging.info(
        "parameters:\n%s",
        parameter_overview.get_parameter_overview(
            one_row_per_stack(abstract.params), include_stats="sharding"
        ),
    )
    device = mesh.devices.flat[0]
    logging.info(
        "mesh: data %d x fsdp %d = %d %s device(s) in %d process(es); %.2f GB of state on each",
        mesh.shape["data"],
        mesh.shape["fsdp"],
        mesh.size,
        device.device_kind,
        jax.process_count(),
        bytes_per_device(abstract) / 1e9,
    )
    logging.info(
        "data: %s, %d training and %d evaluation examples; batch %d, %d a process",
        data.train.name,
        len(data.train),
        len(data.eval),
        config.batch_size,
        len(mesh_lib.local_positions(config.batch_size, mesh)),
    )
    logging.info(
        "run: %d steps (%.1f epochs), %.1f GFLOP an image and step, %s",
        task.total_steps,
        task.total_steps * config.batch_size / len(data.train),
        task.train_flops_per_image / 1e9,
        config.compute_dtype,
    )


def one_row_per_stack(params: Any) -> Any:
    """Abstract parameters for a table: the equal blocks of a stack shown as one, [depth, ...]."""

    def stack(leaf: jax.ShapeDtypeStruct, depth: int) -> jax.ShapeDtypeStruct:
        spec = P(None, *leaf.sharding.spec)
        return jax.ShapeDtypeStruct(
            (depth, *leaf.shape), leaf.dtype, sharding=NamedSharding(leaf.sharding.mesh, spec)
        )

    table = {}
    for name, part in params.items():
        table[name] = dict(part)
        if "blocks" in part:
            depth = len(part["blocks"])
            block = jax.tree.map(lambda leaf, depth=depth: stack(leaf, depth), part["blocks"]["0"])
            table[name]["blocks"] = {f"0-{depth - 1}": block}
    return table


def device_batches(
    batches: Iterator[dict],
    fields: tuple[str, ...],
    positions: np.ndarray,
    batch_size: int,
    mesh: Mesh,
) -> Iterator[dict]:
    """Global device batches of `fields`, the next on its way while the current one is used."""
    ahead = None
    for batch in batches:
        arrays = {name: batch[name] for name in fields}
        current, ahead = ahead, mesh_lib.global_batch(arrays, positions, batch_size, mesh)
        if current is not None:
            yield current
    yield ahead


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with unknown config fields told by their whole name."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        known = config_lib.flatten(config_lib.default_config().to_dict())
        overrides = [a.split("=")[0].removeprefix("--config.") for a in argv if "--config." in a]
        unknown = ", ".join(name for name in overrides if name not in known)
        hint = str(error).partition("Did you mean")
        logging.debug("traceback", exc_info=True)
        print(
            f"\nerror: unknown config field {unknown or error}. "
            + "".join(hint[1:]).rstrip("\"'")
            + "\nEvery field is in mae_jax/config.py.",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
