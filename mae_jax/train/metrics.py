"""Where numbers go: metrics.jsonl always, TensorBoard where TensorFlow is installed."""

import importlib.util
import json
import math

import jax
from absl import logging

from mae_jax.storage.files import (
    PathLike,
    append_line,
    read_json_lines,
    to_path,
    write_atomically,
    write_json,
)

CLASSES_FILE = "classes.json"  # of the last evaluation: {"step", "classes": {name: scores}}


class MetricsWriter:
    """Appends scalars to `workdir/metrics.jsonl`, one JSON object a line with `step`.

    Only the first process writes. Opened for a run that continues at `start_step`, it drops later
    lines (of steps that will run again) and a half-written last line.
    """

    def __init__(self, workdir: PathLike, start_step: int):
        self._path = self._tensorboard = None
        if jax.process_index() != 0:
            return
        self._path = to_path(workdir) / "metrics.jsonl"
        kept = [line for line in read_metrics(self._path) if line["step"] <= start_step]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        if importlib.util.find_spec("tensorflow") is None:
            logging.info("TensorFlow is not installed: metrics go to %s only", self._path)
            return
        import tensorflow as tf
        from clu import metric_writers

        for kind in ("GPU", "TPU"):  # JAX's, of which TensorFlow would take all memory
            tf.config.set_visible_devices([], kind)
        writer = metric_writers.SummaryWriter(str(self._path.with_name("tensorboard")))
        self._tensorboard = metric_writers.AsyncWriter(writer)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes scalars under slash-path names such as `train/loss`."""
        if self._path is None:
            return
        # JSON has no NaN or infinity: null says "not a finite number" to every reader.
        values = {k: float(v) if math.isfinite(v) else None for k, v in scalars.items()}
        append_line(self._path, json.dumps({"step": step, **values}))
        if self._tensorboard is not None:
            self._tensorboard.write_scalars(step, scalars)

    def write_classes(self, step: int, classes: dict[str, dict[str, float | None]]) -> None:
        """Keeps what each class scored after `step` steps, in place of what was kept before."""
        if self._path is not None:
            write_json(self._path.with_name(CLASSES_FILE), {"step": step, "classes": classes})

    def close(self) -> None:
        """Flushes what TensorBoard is to show."""
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_metrics(path: PathLike) -> list[dict]:
    """The complete lines of a metrics file; none where there is no file."""
    return [line for line in read_json_lines(path) if "step" in line]


def evaluation_at(workdir: PathLike, step: int) -> dict | None:
    """The newest line of an evaluation after `step` steps."""
    lines = read_metrics(to_path(workdir) / "metrics.jsonl")
    return next((x for x in reversed(lines) if x["step"] == step and "eval/examples" in x), None)
