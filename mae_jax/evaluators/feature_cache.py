"""Features of a frozen encoder, computed once and kept in the workdir."""

import json
import pathlib
import sys
import time
import zipfile
from collections.abc import Iterator
from typing import Any, Self

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from tqdm import tqdm

from mae_jax.data import pipeline
from mae_jax.data.sources import Source
from mae_jax.data.splits import Splits
from mae_jax.distributed.mesh import batch_sharding, global_batch, local_positions, replicated
from mae_jax.distributed.sharding import state_sharding
from mae_jax.storage.checkpoints import fingerprint
from mae_jax.storage.files import complete_or_absent

LOG_EVERY_SECONDS = 30.0


class CachedFeatures:
    """Batches of features in place of pixels, in the order the pixels would have had.

    The evaluation crop is taken of both splits. The cache is used again only for the same encoder,
    data and crop; anything else is computed anew.

    Args:
      task: gives `features(frozen, images)`.
      frozen: the encoder's parameters on the mesh.
      directory: receives `SPLIT.npz` files.
    """

    def __init__(self, task: Any, data: Splits, frozen: Any, directory: pathlib.Path):
        self._task = task
        self._data = data
        self._directory = directory
        self.train, self.eval, self.classes = data.train, data.eval, data.classes
        marks = np.asarray(jax.device_get(fingerprint(frozen)), np.uint64)
        self._weights = [int(marks.sum()), int((marks * np.arange(1, len(marks) + 1)).sum())]

        def compute(frozen: Any, batch: dict) -> dict:
            rest = {name: batch[name] for name in ("label", "weight")}
            return {"feature": task.features(frozen, batch["image"]), **rest}

        # Replicated results bring every process the rows of all.
        self._compute = jax.jit(
            compute,
            in_shardings=(state_sharding(frozen, task.mesh), batch_sharding(task.mesh)),
            out_shardings=replicated(task.mesh),
        )
        self._seed, self._batch_size = data.seed, task.batch_size
        self._train_arrays = self._load_or_compute("train", data.train, frozen)
        self._eval_arrays = self._load_or_compute("eval", data.eval, frozen)

    def _load_or_compute(self, name: str, source: Source, frozen: Any) -> dict[str, np.ndarray]:
        key = {
            "weights": self._weights,
            "data": [source.name, source.split, len(source)],
            "transform": repr(self._data.eval_transform),
            "pool": self._task.pool,
            "dtype": str(self._task.encoder.dtype),
        }
        path = self._directory / f"{name}.npz"
        arrays = _read(path, json.dumps(key))
        found = arrays is not None
        if jax.process_count() > 1:  # computing is a matter of all processes or none
            found = bool(multihost_utils.process_allgather(np.asarray(found)).all())
        if found:
            logging.info("features of %s %s: found in %s", source.name, source.split, path)
            return arrays
        arrays = self._compute_all(source, frozen)
        if jax.process_index() == 0:
            with complete_or_absent(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **arrays, key=np.asarray(json.dumps(key)))
        return arrays

    def _compute_all(self, source: Source, frozen: Any) -> dict[str, np.ndarray]:
        """Every record's "feature" [N, D], "label" [N] and "weight" [N] (0: not decodable)."""
        size = self._task.eval_batch_size
        positions = local_positions(size, self._task.mesh)
        parts: dict[str, list[np.ndarray]] = {"feature": [], "label": [], "weight": []}
        first = jax.process_index() == 0
        quiet = not (first and sys.stderr.isatty())
        bar = tqdm(total=len(source), unit="image", desc=f"features {source.split}", disable=quiet)
        started = told = time.time()
        with bar, self._data.in_order(source, positions, size) as batches:
            for number, batch in enumerate(batches):
                batch = global_batch(batch, positions, size, self._task.mesh)
                count = min(size, len(source) - number * size)
                for name, values in self._compute(frozen, batch).items():
                    parts[name].append(np.asarray(values)[:count])
                bar.update(count)
                if quiet and time.time() - told > LOG_EVERY_SECONDS:
                    told, done = time.time(), number * size + count
                    left = (told - started) / done * (len(source) - done)
                    logging.info(
                        "features of %s: %d of %d, %.0f images/s, left %s",
                        source.split,
                        done,
                        len(source),
                        done / (told - started),
                        tqdm.format_interval(left),
                    )
        return {name: np.concatenate(values) for name, values in parts.items()}

    def train_batches(self, positions: np.ndarray, start_step: int, end_step: int) -> "_Rows":
        """As `Splits.train_batches`, of "feature" [b, D] and "label" [b]."""
        usable = np.flatnonzero(self._train_arrays["weight"])

        def batches() -> Iterator[dict[str, np.ndarray]]:
            for step in range(start_step, end_step):
                examples = step * self._batch_size + positions
                rows = usable[
                    [pipeline.example_index(self._seed, int(g), len(usable)) for g in examples]
                ]
                yield {name: self._train_arrays[name][rows] for name in ("feature", "label")}

        return _Rows(batches(), len(self._train_arrays["weight"]) - len(usable))

    def eval_batches(self, positions: np.ndarray, batch_size: int) -> "_Rows":
        """As `Splits.eval_batches`, of "feature" [b, D], "label" [b] and "weight" [b]."""
        count = len(self._eval_arrays["weight"])

        def batches() -> Iterator[dict[str, np.ndarray]]:
            for start in range(0, count, batch_size):
                rows = start + positions
                inside = rows < count
                batch = {
                    name: values[np.where(inside, rows, 0)]
                    for name, values in self._eval_arrays.items()
                }
                yield {**batch, "weight": batch["weight"] * inside}

        return _Rows(batches(), 0)


def _read(path: pathlib.Path, key: str) -> dict[str, np.ndarray] | None:
    """The arrays of a cache made for `key`; None where there is none or it cannot be read."""
    try:
        with np.load(path) as file:
            if str(file["key"]) == key:
                return {name: file[name] for name in ("feature", "label", "weight")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        logging.warning("%s cannot be read (%s) and is computed again", path, error)
    return None


class _Rows:
    """An iterator with the few habits of `pipeline.Batches` that the trainer relies on."""

    def __init__(self, batches: Iterator[dict[str, np.ndarray]], skipped: int):
        self._batches = batches
        self.skipped = skipped

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._batches)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._batches.close()
