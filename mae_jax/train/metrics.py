"""Where numbers go: metrics.jsonl always, TensorBoard where TensorFlow is installed."""

import importlib.util
import json
import math
import os
import pathlib

import jax
from absl import logging


class MetricsWriter:
    """Appends scalars to `workdir/metrics.jsonl`, one JSON object a line with `step`.

    Only the first process writes. Opened for a run that continues at `start_step`, it drops later
    lines (of steps that will run again) and a half-written last line.
    """

    def __init__(self, workdir: str | pathlib.Path, start_step: int):
        self._file = None
        self._tensorboard = None
        if jax.process_index() != 0:
            return
        path = pathlib.Path(workdir) / "metrics.jsonl"
        if path.exists():
            _truncate(path, start_step)
        self._file = path.open("a", buffering=1)
        if importlib.util.find_spec("tensorflow") is not None:
            from clu import metric_writers

            self._tensorboard = metric_writers.AsyncWriter(
                metric_writers.SummaryWriter(str(pathlib.Path(workdir) / "tensorboard"))
            )
        else:
            logging.info("TensorFlow is not installed: metrics go to %s only", path)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes scalars under slash-path names such as `train/loss`."""
        if self._file is None:
            return
        # JSON has no NaN or infinity: null says "not a finite number" to every reader.
        values = {k: float(v) if math.isfinite(v) else None for k, v in scalars.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._tensorboard is not None:
            self._tensorboard.write_scalars(step, scalars)

    def close(self) -> None:
        """Flushes everything."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_metrics(path: str | pathlib.Path) -> list[dict]:
    """The complete lines of a metrics file."""
    lines = []
    for line in pathlib.Path(path).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break  # half-written: the process died here
    return lines


def _truncate(path: pathlib.Path, start_step: int) -> None:
    kept = [line for line in read_metrics(path) if line["step"] <= start_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(temporary, path)
