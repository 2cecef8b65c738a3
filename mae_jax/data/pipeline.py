"""Batches of decoded crops, in an order that depends on nothing but the seed.

Training examples are counted through the whole run: ``g = step * batch_size + position``. Which
record example g is, and how it is cropped, are pure functions of (seed, g): the same for any number
of processes, threads or restarts. Epochs follow each other without a seam: every N consecutive
examples from a multiple of N on are all N records once; a batch may be larger than the dataset.

With ``repeat`` = k, example g is a crop of picture g // k: the k crops of a picture, each with
random numbers of its own, are neighbours in the batch, so that one process reads and decodes it
once for all. Pictures come in the order that examples have without: every N k consecutive examples
from a multiple of N k on are all N records k times.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, Protocol

import numpy as np
from absl import logging

from mae_jax import UserError
from mae_jax.data.order import WindowReader, Windows, example_index
from mae_jax.data.record import ArraySpec, DecodeError, LabelError, Record, Source

CROP_STREAM = 0x63726F70  # "crop": sets the crops' random numbers apart from any other use of seed
ROWS_PER_TASK = 8  # rows a thread takes at once; a task costs about 30 us, a row 3 ms
ROWS_PER_WORKER_TASK = 32  # rows a thread of a worker process; a task costs about 200 us
READ_IN_ORDER = 64  # records read at once where they are used in their order
ALIGNMENT = 64  # bytes, of arrays in shared memory
SECONDS_AFTER_SIGTERM = 600  # that a worker goes on, unless its parent ends before


class Transform(Protocol):
    """Turns a record into arrays. Picklable.

    ``schema`` names what it makes and says of what shape and type: an image, a second view of it, a
    label map, a mask. Each becomes an array of the batch. "label", "id" and "weight" are taken.
    """

    schema: Mapping[str, ArraySpec]

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Mapping[str, np.ndarray]:
        """Returns an array for each entry of the schema; raises DecodeError naming the record."""

    def decoded(self, record: Record) -> Record:
        """A record of which this makes the same, sooner: asked where there are several crops."""


def example_rng(seed: int, g: int) -> np.random.Generator:
    """Random numbers of training example ``g``: a counter-based generator keyed by (seed, g)."""
    return np.random.Generator(np.random.Philox(key=[(seed << 32 | CROP_STREAM) % 2**64, g]))


def picture_positions(positions: np.ndarray, repeat: int) -> np.ndarray:
    """Which pictures of a batch its rows `positions` [b] are all crops of, in their order [b / k].

    Raises UserError where some of a picture's crops are missing: two processes would decode it.
    """
    pictures = positions[::repeat] // repeat
    if not np.array_equal((pictures[:, None] * repeat + np.arange(repeat)).ravel(), positions):
        what = f"a process holds {len(positions)} rows of the batch, with part of a picture's crops"
        raise UserError(f"data.repeat = {repeat}: {what}; give a divisor of a process's rows")
    return pictures


def train_batches(
    source: Source,
    transform: Transform,
    *,
    seed: int | None,
    batch_size: int,
    positions: np.ndarray,
    start_step: int = 0,
    end_step: int | None = None,
    workers: int = 0,
    threads: int = 0,
    prefetch: int = 2,
    bad_records: str = "stop",
    classes: int | None = None,
    windows: Windows | None = None,
    repeat: int = 1,
) -> "Batches":
    """Batches of steps ``start_step`` to ``end_step``: this process's rows of the global batch.

    Each: arrays [b, ...] of ``transform.schema``, "label" and "id" (record index) int32 [b].

    Args:
      seed: not negative; sets order and crops. None: see `eval_batches`.
      positions: [b], places in the global batch of `batch_size` of the rows wanted, in this order.
      end_step: one past the last step; None goes on for ever.
      workers: processes that fill the rows of batches; 0: threads of this process do.
      threads: threads decoding in each process; 0 for one per CPU (shared among the workers).
      prefetch: batches made ahead.
      bad_records: ``stop`` raises DecodeError; ``skip`` takes the next record that can be decoded,
        counts the row in ``Batches.skipped`` and logs the record's name once.
      classes: labels are to lie in [0, classes), or LabelError stops the run; None takes any.
      windows: the order, and many records at a read, in place of a shuffle of all records.
      repeat: crops of a picture, neighbours in the batch. Each process has all crops of a picture,
        in their order; else UserError.
    """
    if hasattr(source, "read") and (seed is None or windows is not None):
        if seed is None:  # in order: a worker's rows of a batch lie side by side
            size = max(1, min(READ_IN_ORDER, len(positions) // max(1, workers)))
            in_use = (prefetch + 1) * (len(positions) // size + 2)
        else:
            places = picture_positions(positions, repeat)
            size, in_use = windows.size, windows.in_use(places, batch_size // repeat)
        source = WindowReader(source, size, -(-in_use // max(1, workers)))
    builder = _Builder(
        source, transform, batch_size, positions, bad_records, classes, seed, windows, repeat
    )
    steps = range(start_step, sys.maxsize if end_step is None else end_step)
    return Batches(builder, steps, workers, threads, prefetch)


def eval_batches(
    source: Source, transform: Transform, *, batch_size: int, positions: np.ndarray, **loading: Any
) -> "Batches":
    """Every record once, in order, in ceil(N / batch_size) batches in every process.

    Rows past the end of the dataset are zeros with weight 0, label 0 and id -1. So are rows that
    cannot be decoded, with ``bad_records="skip"``: no other record takes their place. Called as
    ``transform(record, None)``. The rest as in `train_batches`, with "weight" float32 [b] besides.
    """
    places = {"batch_size": batch_size, "positions": positions}
    end = -(-len(source) // batch_size)
    return train_batches(source, transform, seed=None, end_step=end, **places, **loading)


@dataclasses.dataclass(frozen=True)
class _Builder:
    """Fills rows of batches. Picklable; fields as the arguments of `train_batches`."""

    source: Source
    transform: Transform
    batch_size: int
    positions: np.ndarray
    bad_records: str
    classes: int | None
    seed: int | None  # None: evaluation, records in order
    windows: Windows | None
    repeat: int

    def __post_init__(self) -> None:
        places, most = self.positions, self.batch_size
        if places.ndim != 1 or not np.issubdtype(places.dtype, np.integer):
            raise ValueError(f"positions must be integers [b], got {places.dtype}")
        if not len(places) or places.min() < 0 or places.max() >= most:
            raise ValueError(f"positions must lie in [0, batch_size={most}): {places}")
        picture_positions(places, self.repeat)
        if not len(self.source):
            raise UserError(f"{self.source.name}, split {self.source.split}, holds no record")

    @property
    def schema(self) -> Mapping[str, ArraySpec]:
        number = ArraySpec((), np.int32)
        weight = {"weight": ArraySpec((), np.float32)} if self.seed is None else {}
        return {**self.transform.schema, "label": number, "id": number, **weight}

    def fill(self, batch: Mapping[str, np.ndarray], step: int, rows: Sequence[int]) -> list[str]:
        """Writes rows of the batch of a step, each with the others of its picture, whose first it
        is; returns messages of those that cannot be decoded."""
        errors: list[str] = []
        for first in rows:
            g = step * self.batch_size + int(self.positions[first])
            for row, example in enumerate(self._examples(g, errors), first):
                for name, value in example.items():
                    batch[name][row] = value
        return errors

    def _examples(self, g: int, errors: list[str]) -> Sequence[Mapping[str, Any]]:
        """The arrays of example ``g`` and the others of its picture; those left out are zeros."""
        n = len(self.source)
        if self.seed is None:
            indices = range(n)[g : g + 1]  # empty: padding
        else:
            picture = g // self.repeat
            if self.windows is None:
                first = example_index(self.seed, picture, n)
            else:
                pictures = self.batch_size // self.repeat
                first = self.windows.index(self.seed, picture, n, pictures)
            indices = ((first + i) % n for i in range(n))
        for i, index in enumerate(indices):
            try:
                return self._read(index, g)
            except DecodeError as e:
                if self.bad_records != "skip":
                    remedy = "Mend or remove it, or train without such records"
                    raise DecodeError(f"{e}. {remedy}: data.bad_records=skip") from e
                if not i:  # what counts is the row, not how many bad records lie side by side
                    errors += [str(e)] * self.repeat
        if self.seed is None:
            return [{"id": -1}]
        raise DecodeError(f"none of the {n} records of {self.source.name} can be decoded")

    def _read(self, index: int, g: int) -> Sequence[Mapping[str, Any]]:
        """The arrays of a record, cropped by the numbers of the examples that it stands for."""
        record = self.source[index]
        facts = {"label": record.label, "id": record.id}
        if self.seed is None:
            examples = [{**self.transform(record, None), **facts, "weight": 1}]
        else:
            record = self.transform.decoded(record) if self.repeat > 1 else record
            rngs = (example_rng(self.seed, g + i) for i in range(self.repeat))
            examples = [{**self.transform(record, rng), **facts} for rng in rngs]
        if self.classes is not None and not 0 <= record.label < self.classes:
            what = f"outside the {self.classes} classes of {self.source.name}"
            raise LabelError(f"{record.name}: label {record.label} lies {what}; mend the data set")
        return examples


class Batches(contextlib.AbstractContextManager, Iterator[dict[str, np.ndarray]]):
    """Iterator over batches. Close it (or use it in a `with` statement) to end its processes.

    ``skipped``: rows handed out so far, in this process, whose record could not be decoded.
    The rows of a batch are filled by many threads, or by worker processes in memory that they share
    with this one: a batch exists once, and a worker holds no more than the row it works on.
    """

    def __init__(self, builder: _Builder, steps: range, workers: int, threads: int, prefetch: int):
        self._builder, self._steps, self._prefetch = builder, iter(steps), prefetch
        self._shared = workers > 0
        # CPUs this process may use, which may be fewer than the machine has.
        affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
        threads = threads or max(1, (len(affinity) or os.cpu_count() or 1) // max(1, workers))
        rows, repeat = len(builder.positions), builder.repeat
        if self._shared:
            task = max(1, min(ROWS_PER_WORKER_TASK * threads, rows // workers))
            # Whoever keeps windows must get the rows of the same lanes each time.
            sticky = isinstance(builder.source, WindowReader)
            pools, each = (workers, 1) if sticky else (1, workers)
            self._executors = [
                concurrent.futures.ProcessPoolExecutor(
                    each,
                    multiprocessing.get_context("spawn"),  # a fork would take JAX's threads along
                    initializer=_start_worker,
                    initargs=(builder, threads),
                )
                for _ in range(pools)
            ]
        else:
            task = max(1, min(ROWS_PER_TASK, rows // (2 * threads)))
            threads_of_this = concurrent.futures.ThreadPoolExecutor(threads, "mae-jax-decode")
            self._executors = [threads_of_this]
        task = -(-task // repeat) * repeat
        self._tasks = [range(i, min(i + task, rows), repeat) for i in range(0, rows, task)]
        # Of batches under way: arrays, messages about their rows to come, file of shared memory.
        self._pending: collections.deque[tuple[dict, list, IO | None]] = collections.deque()
        self._reported: set[str] = set()
        self.skipped = 0
        self._start_ahead()

    def _start_ahead(self) -> None:
        """Hands the rows of the next batches to threads or workers."""
        for step in itertools.islice(self._steps, self._prefetch + 1 - len(self._pending)):
            file = None
            if self._shared:
                file, path = _shared_file()
                batch = _shared_arrays(self._builder, file)
                fill = functools.partial(_fill_in_worker, path)
            else:
                rows, schema = len(self._builder.positions), self._builder.schema
                batch = {k: np.zeros((rows, *s.shape), s.dtype) for k, s in schema.items()}
                fill = functools.partial(self._builder.fill, batch)
            shares = len(self._executors) / len(self._builder.positions)
            futures = [
                self._executors[int(task.start * shares)].submit(fill, step, task)
                for task in self._tasks
            ]
            self._pending.append((batch, futures, file))

    def __next__(self) -> dict[str, np.ndarray]:
        """Returns the next batch. Raises DecodeError or LabelError if a record stops the run."""
        self._start_ahead()
        if not self._pending:
            raise StopIteration
        batch, futures, file = self._pending.popleft()
        errors = [message for future in futures for message in future.result()]
        if file is not None:
            file.close()  # the memory stays for as long as the arrays
        self.skipped += len(errors)
        for error in sorted({*errors} - self._reported):
            logging.warning("skipped: %s", error)
        self._reported.update(errors)
        return batch

    def close(self) -> None:
        """Ends threads and worker processes; safe to call twice."""
        # When a worker dies the executor sends the others SIGTERM, at which they go on.
        for executor in self._executors:
            if self._shared and executor._broken:
                for worker in (executor._processes or {}).values():
                    worker.kill()
            executor.shutdown(wait=True, cancel_futures=True)
        while self._pending:
            if (file := self._pending.pop()[2]) is not None:
                file.close()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _shared_file() -> tuple[IO[bytes], str]:
    """A file in memory that workers open by its path; gone when everybody has closed it."""
    if hasattr(os, "memfd_create"):  # not in /dev/shm, of which a container has 64 MB
        file = os.fdopen(os.memfd_create("mae_jax-batch"), "r+b")
        return file, f"/proc/{os.getpid()}/fd/{file.fileno()}"
    file = tempfile.NamedTemporaryFile()  # noqa: SIM115 (no Linux: on disk)
    return file, file.name


def _shared_arrays(builder: _Builder, file: IO[bytes]) -> dict[str, np.ndarray]:
    """The arrays of a batch, one behind the other in a file; whoever opens it sees the same."""
    arrays, offset = {}, 0
    for name, spec in builder.schema.items():
        shape = (len(builder.positions), *spec.shape)
        arrays[name] = np.asarray(np.memmap(file, spec.dtype, "r+", offset, shape))  # it may grow
        offset += -(-arrays[name].nbytes // ALIGNMENT) * ALIGNMENT
    return arrays


_in_worker: tuple[_Builder, concurrent.futures.Executor]  # set in worker processes only


def _start_worker(builder: _Builder, threads: int) -> None:
    global _in_worker
    _in_worker = builder, concurrent.futures.ThreadPoolExecutor(threads)
    # A job's end is told to all of its processes. The parent, which may have a step to finish and a
    # checkpoint to write, decides; a worker ends with it, however it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_AFTER_SIGTERM))

    def exit_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _fill_in_worker(path: str, step: int, rows: Sequence[int]) -> list[str]:
    builder, threads = _in_worker
    batch = _open_batch(path, step)
    messages = threads.map(lambda row: builder.fill(batch, step, [row]), rows)
    return [message for of_row in messages for message in of_row]


@functools.lru_cache(maxsize=1)  # the path of a batch serves again for later ones: by step, too
def _open_batch(path: str, step: int) -> dict[str, np.ndarray]:
    with open(path, "r+b") as file:
        return _shared_arrays(_in_worker[0], file)
