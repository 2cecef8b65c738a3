"""Features of a frozen encoder, computed once and kept in the workdir."""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any, Self

import jax
import numpy as np
from etils import epath

import mae_jax
from mae_jax.data.order import example_index
from mae_jax.data.sources import Source
from mae_jax.data.splits import Splits
from mae_jax.distributed.sharding import state_sharding
from mae_jax.evaluators.over_split import OverSplit, Parts, Results
from mae_jax.storage.checkpoints import fingerprint
from mae_jax.train.task import Probing


class CachedFeatures:
    """Batches of features in place of pixels, in the order the pixels would have had.

    Of `frozen`, the encoder's parameters on the mesh, for the evaluation crop of both splits. The
    cache, a folder of parts for each in `directory`, serves again only while nothing that features
    depend on has changed.
    """

    def __init__(self, task: Probing, data: Splits, frozen: Any, directory: epath.Path):
        self.train, self.eval, self.classes = data.train, data.eval, data.classes
        self._seed, self._batch_size = data.seed, task.batch_size

        def features(frozen: Any, batch: dict, _: jax.Array) -> dict:
            rest = {name: batch[name] for name in ("label", "weight")}
            return {"feature": task.features(frozen, batch["image"]), **rest}

        shardings = state_sharding(frozen, task.mesh)
        run = OverSplit(features, task.mesh, task.eval_batch_size, shardings)
        key = {
            "weights": _digest(np.asarray(jax.device_get(fingerprint(frozen))).tobytes()),
            "model": repr(task.encoder),  # with the types it computes in
            "input": repr((data.eval_transform, task.mean, task.std)),
            "pool": task.pool,
            "version": mae_jax.__version__,
        }

        def load(name: str, source: Source) -> Results:
            """feature [N, D], label [N] and weight [N], 0: not decodable."""
            records = [source.name, source.split, _digest(source.identity().encode())]
            parts = Parts(directory / name, {**key, "records": records}, np.arange(len(source)))
            label = f"features of {source.name} {source.split}"
            parts.compute(run, frozen, source, data.eval_transform, label=label, **data.loading)
            return {name: parts.array(name) for name in ("feature", "label", "weight")}

        self._train_arrays, self._eval_arrays = load("train", data.train), load("eval", data.eval)

    def train_batches(self, positions: np.ndarray, start_step: int, end_step: int) -> "_Rows":
        """As `Splits.train_batches`, of "feature" [b, D] and "label" [b]."""
        arrays = self._train_arrays
        usable = np.flatnonzero(arrays["weight"])

        def batches() -> Iterator[Results]:
            for step in range(start_step, end_step):
                examples = step * self._batch_size + positions
                chosen = [example_index(self._seed, int(g), len(usable)) for g in examples]
                yield {name: arrays[name][usable[chosen]] for name in ("feature", "label")}

        return _Rows(batches(), len(arrays["weight"]) - len(usable))

    def eval_batches(self, positions: np.ndarray, batch_size: int) -> "_Rows":
        """As `Splits.eval_batches`, of "feature" [b, D], "label" [b] and "weight" [b]."""
        count = len(self._eval_arrays["weight"])

        def batches() -> Iterator[Results]:
            for rows in (start + positions for start in range(0, count, batch_size)):
                places = np.minimum(rows, count - 1)
                batch = {name: values[places] for name, values in self._eval_arrays.items()}
                yield {**batch, "weight": batch["weight"] * (rows < count)}

        return _Rows(batches())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclasses.dataclass
class _Rows(Iterator[Results]):
    """Batches with the few habits of `pipeline.Batches` that the trainer relies on."""

    batches: Iterator[Results]
    skipped: int = 0

    def __next__(self) -> Results:
        return next(self.batches)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.batches.close()
