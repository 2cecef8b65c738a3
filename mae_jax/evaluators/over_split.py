"""The one way to run a function over a split: every example once, on every device, resumable."""

import functools
import io
import itertools
import json
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from mae_jax import UserError
from mae_jax.data.pipeline import Transform, eval_batches
from mae_jax.data.record import Selection, Source
from mae_jax.distributed.mesh import (
    abstract_batch,
    batch_sharding,
    global_batch,
    local_positions,
    replicated,
)
from mae_jax.distributed.stopping import until_told
from mae_jax.storage.files import complete_or_absent
from mae_jax.storage.processes import in_every_process

Results = dict[str, np.ndarray]

BATCHES_PER_PART = 16
LOG_EVERY_SECONDS = 30.0


class OverSplit:
    """A compiled function of (params, batch, number of the batch), to be run over splits.

    A batch, a dict of arrays [batch_size, ...] padded by rows of "weight" 0, is split over the
    mesh: its size is rounded up to a multiple of the devices. Results, a dict of arrays, come whole
    to the host of every process, one batch late: meanwhile the next is decoded and sent.
    StoppedError, between two batches: the process was told to stop.
    `shardings`: of params; None: a copy on every device. Raises UserError: the batch size is not
    positive.
    """

    def __init__(
        self, function: Callable[..., dict], mesh: Mesh, batch_size: int, shardings: Any = None
    ):
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: needs at least 1")
        everywhere = replicated(mesh)
        self.mesh, self.batch_size = mesh, -(-batch_size // mesh.size) * mesh.size
        self.positions = local_positions(self.batch_size, mesh)  # of this process
        self._names: tuple[str, ...] = ()  # of the arrays it was compiled for; else it takes all
        self._function = jax.jit(
            function,
            in_shardings=(shardings or everywhere, batch_sharding(mesh), everywhere),
            out_shardings=everywhere,
        )

    def compile(self, params: Any, schema: Mapping[str, tuple]) -> jax.stages.Compiled:
        """The program, for abstract params and, of batches, the arrays of `schema`: from now on
        it takes no others. `schema`: (shape of one example, dtype) by name."""
        batch = abstract_batch(schema, self.batch_size, self.mesh)
        number = jax.ShapeDtypeStruct((), np.int32)
        self._function = self._function.lower(params, batch, number).compile()
        self._names = tuple(schema)
        return self._function

    def __call__(
        self, params: Any, batches: Iterable[Results], *, examples: int, label: str
    ) -> Iterator[Results]:
        """What the function gives for every batch of this process's rows (`positions`), in order.

        `examples`: in all batches, for the progress that is shown as `label`.
        """
        running, problem = None, None
        with _progress(examples, label) as progress:
            try:
                for number, batch in enumerate(until_told(batches)):
                    batch = {name: batch[name] for name in self._names or batch}
                    batch = global_batch(batch, self.positions, self.batch_size, self.mesh)
                    before, running = running, self._function(params, batch, np.int32(number))
                    if before is not None:
                        yield jax.device_get(before)
                        progress.update(self.batch_size)
            except UserError as error:  # of a record; what was computed before it counts
                problem = error
            if running is not None:
                yield jax.device_get(running)
                progress.update(min(self.batch_size, examples - progress.n))
        if problem is not None:
            raise problem

    def over(
        self, params: Any, source: Source, transform: Transform, *, label: str, **loading: Any
    ) -> Iterator[Results]:
        """What the function gives for every batch of a source; `loading`: of `eval_batches`."""
        batches = eval_batches(
            source, transform, batch_size=self.batch_size, positions=self.positions, **loading
        )
        with batches:
            yield from self(params, batches, examples=len(source), label=label)


def means(results: Iterable[Results]) -> tuple[dict[str, Any], int]:
    """Sums over batches divided by the sum of "weight", and that sum, the number of examples."""
    totals: dict[str, Any] = {}
    for result in results:
        for name, value in result.items():
            totals[name] = totals.get(name, 0.0) + np.float64(value)
    count = totals.pop("weight")
    if not count:
        raise UserError("no record of the split can be decoded: there is nothing to evaluate")
    return {name: total / count for name, total in totals.items()}, round(count)


def rows(results: Iterable[Results]) -> Results:
    """The rows [N, ...] of all batches whose "weight" is not 0, without that."""
    parts = list(results)
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    real = whole.pop("weight") > 0
    return {name: values[real] for name, values in whole.items()}


class Parts:
    """Rows of a split in files, one for a few batches, so that a stopped run goes on.

    Records, known by `names` [N], may come and go between two runs. All rows depend on `key`: where
    `folder`, seen by every process, holds parts of another, their differing fields are in
    `foreign`; `compute` removes them.
    """

    def __init__(self, folder: epath.Path, key: Mapping[str, Any], names: np.ndarray):
        self._folder, self._names = folder, names
        self._key = json.loads(json.dumps(key))  # as it is read back
        self._read()

    def _read(self, complete: bool = False) -> None:
        self._files: list[epath.Path] = []
        self._strangers: list[epath.Path] = []
        self.foreign: set[str] = set()
        names: list[list] = []
        for path in sorted(self._folder.glob("*.npz")):
            try:
                with path.open("rb") as file, np.load(file) as part:
                    key, found = json.loads(str(part["key"])), part["names"].tolist()
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                logging.warning("%s cannot be read (%s) and is computed again", path, error)
                self._strangers.append(path)
                continue
            if differing := {k for k in key | self._key if key.get(k) != self._key.get(k)}:
                self.foreign |= differing
                self._strangers.append(path)
            else:
                self._files.append(path)
                names.append(found)
        self._starts = np.cumsum([0, *map(len, names)])  # of each part in the rows of all
        row_of = {name: row for row, name in enumerate(itertools.chain(*names))}
        self._rows = np.array(
            [row_of.get(name, -1) for name in self._names.tolist()]
        )  # -1: nowhere
        if complete and (self._rows < 0).any():
            raise UserError(f"{self._folder}: its files are gone, or not seen by every process")

    def compute(
        self, run: OverSplit, params: Any, source: Source, transform: Transform, **options: Any
    ) -> None:
        """Computes what is missing; `run` gives rows, "weight" among them. See `OverSplit.over`."""
        absent = self._rows < 0
        if jax.process_count() > 1:  # in some process
            absent = multihost_utils.process_allgather(absent).any(axis=0)
        missing = np.flatnonzero(absent)
        if not len(missing):
            return
        writes = jax.process_index() == 0
        if writes:
            for path in self._strangers:
                path.unlink(missing_ok=True)
        first = 1 + max((int(path.stem) for path in self._folder.glob("*.npz")), default=-1)
        results = run.over(params, Selection(source, missing), transform, **options)
        size = BATCHES_PER_PART * run.batch_size
        for number, start in enumerate(range(0, len(missing), size), first):
            done: list[Results] = []
            try:
                for result in itertools.islice(results, BATCHES_PER_PART):
                    done.append(result)
            finally:  # a part is shorter where the run stops in it
                if writes and done:
                    names = self._names[missing[start : start + size]][: len(done) * run.batch_size]
                    part = {k: np.concatenate([r[k] for r in done])[: len(names)] for k in done[0]}
                    path = self._folder / f"{number:06d}.npz"
                    with complete_or_absent(path) as temporary, temporary.open("wb") as file:
                        np.savez(file, **part, names=names, key=np.asarray(json.dumps(self._key)))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("parts of a split")
        in_every_process(self._read, True)

    def read(self, name: str) -> Iterator[np.ndarray]:
        """The rows of all records in order, in blocks [n, ...]."""

        @functools.lru_cache(maxsize=2)  # records that came later alternate with their neighbours
        def load(part: int) -> np.ndarray:
            with self._files[part].open("rb") as file, np.load(file) as arrays:
                return arrays[name]

        part_of = np.searchsorted(self._starts, self._rows, side="right") - 1
        borders = np.flatnonzero(np.diff(part_of)) + 1
        for indices in np.split(np.arange(len(self._rows)), borders):
            part = int(part_of[indices[0]])
            yield load(part)[self._rows[indices] - self._starts[part]]

    def array(self, name: str) -> np.ndarray:
        """The rows of all records in order: [N, ...]."""
        whole, done = None, 0
        for block in self.read(name):
            if whole is None:
                whole = np.empty((len(self._rows), *block.shape[1:]), block.dtype)
            whole[done : done + len(block)] = block
            done += len(block)
        return whole


class _Log(io.TextIOBase):
    """Makes log lines of what is written."""

    def write(self, text: str) -> int:
        if line := text.strip():
            logging.info("%s", line)
        return len(text)


def _progress(examples: int, label: str) -> tqdm:
    """A bar on a terminal, a line now and then in a log; nothing of what is quickly done."""
    look: dict[str, Any] = {"dynamic_ncols": True, "leave": False, "delay": 1.0}
    if not sys.stderr.isatty():
        line = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, left {remaining}"
        look |= {"file": _Log(), "mininterval": LOG_EVERY_SECONDS, "bar_format": line}
    hidden = jax.process_index() != 0
    return tqdm(total=examples, desc=label, unit=" images", disable=hidden, **look)
