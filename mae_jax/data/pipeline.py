"""Batches of decoded crops, in an order that depends on nothing but the seed.

Training examples are counted through the whole run: ``g = step * batch_size + position``. Which
record example g is, and how it is cropped, are pure functions of (seed, g), so the stream is the
same for any number of processes, threads or restarts, and starting at step s costs the same as
starting at 0. Epochs follow each other without a seam: every N consecutive examples from a multiple
of N on are all N records once, nothing is dropped, and a batch may be larger than the dataset.
"""

import concurrent.futures
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any, Protocol, Self

import grain
import numpy as np
from absl import flags, logging
from grain.experimental import index_shuffle

from mae_jax import UserError
from mae_jax.data.record import DecodeError, LabelError, Record, Source

CROP_STREAM = 0x63726F70  # "crop": sets the crops' random numbers apart from any other use of seed
ROWS_PER_TASK = 8  # rows a thread takes at once; a task costs about 30 us, a row 2 ms


class Transform(Protocol):
    """Turns a record into pixels. Picklable; ``shape`` is (H, W, C) of every result."""

    shape: tuple[int, int, int]

    def __call__(self, record: Record, rng: np.random.Generator | None) -> np.ndarray:
        """Returns uint8 [H, W, C]; raises DecodeError naming the record."""


def example_index(seed: int, g: int, n: int) -> int:
    """Record that training example ``g`` is, in a dataset of ``n`` records: shuffled by epoch."""
    epoch, place = divmod(g, n)
    return index_shuffle(place, max_index=n - 1, seed=_shuffle_seed(seed, epoch), rounds=4)


@functools.lru_cache(maxsize=16)  # one epoch's seed serves all its examples
def _shuffle_seed(seed: int, epoch: int) -> int:
    # NumPy promises SeedSequence never changes; index_shuffle wants 32 bits.
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def example_rng(seed: int, g: int) -> np.random.Generator:
    """Random numbers of training example ``g``: a counter-based generator keyed by (seed, g)."""
    return np.random.Generator(np.random.Philox(key=[(seed << 32 | CROP_STREAM) % 2**64, g]))


class Batches(Iterator[dict[str, np.ndarray]]):
    """Iterator over batches that can be closed, and that counts what could not be decoded.

    ``skipped``: rows of the batches handed out so far whose record could not be decoded
    (``bad_records="skip"``), in this process. Close it (or use it in a `with` statement) to end
    its threads and worker processes.
    """

    def __init__(self, iterator: "grain.DatasetIterator", builder: "_BatchBuilder"):
        self._iterator, self._builder = iterator, builder
        self._reported: set[str] = set()
        self.skipped = 0

    def __next__(self) -> dict[str, np.ndarray]:
        """Returns the next batch. Raises DecodeError or LabelError if a record stops the run."""
        batch, errors = next(self._iterator)
        if batch is None:
            raise errors
        self.skipped += len(errors)
        for error in errors:
            if error not in self._reported:
                self._reported.add(error)
                logging.warning("skipped: %s", error)
        return batch

    def close(self) -> None:
        """Ends threads and worker processes; safe to call twice."""
        self._iterator.close()
        self._builder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def train_batches(
    source: Source,
    transform: Transform,
    *,
    seed: int,
    batch_size: int,
    positions: np.ndarray,
    start_step: int = 0,
    end_step: int | None = None,
    shuffle: bool = True,
    workers: int = 0,
    threads: int = 0,
    prefetch: int = 2,
    bad_records: str = "stop",
    classes: int | None = None,
) -> Batches:
    """Batches of steps ``start_step`` to ``end_step``: this process's rows of the global batch.

    Args:
      source: the records.
      transform: called as ``transform(record, rng)``.
      seed: not negative; sets order and crops.
      batch_size: of the global batch.
      positions: [b], places in the global batch of the rows wanted here, in the order wanted.
      start_step: first step; resuming is starting there.
      end_step: one past the last step; None goes on for ever.
      shuffle: False takes the records in order.
      workers: processes that build batches; 0 builds them in threads of this process.
      threads: threads decoding in each process; 0 for one per CPU (shared among the workers).
      prefetch: batches made ahead, in all (at least one per worker).
      bad_records: ``stop`` raises DecodeError; ``skip`` takes the next record that can be decoded,
        counts the row in ``Batches.skipped`` and logs the record's name once.
      classes: labels are to lie in [0, classes), or LabelError stops the run; None takes any.

    Returns:
      Iterator of ``{"image": uint8 [b, H, W, C], "label": int32 [b]}``.

    Raises:
      ValueError: an argument that cannot be right.
    """
    if seed < 0 or not 0 <= start_step <= (start_step if end_step is None else end_step):
        raise ValueError(f"need seed {seed} >= 0 and 0 <= start_step {start_step} <= {end_step=}")
    builder = _TrainBuilder(source, transform, batch_size, positions, bad_records, classes)
    builder.seed, builder.shuffle = seed, shuffle
    # Grain measures its datasets, so "for ever" is a number: more steps than anyone will take.
    stop = sys.maxsize if end_step is None else end_step
    return _run(builder, start_step, stop, workers, threads, prefetch)


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    positions: np.ndarray,
    workers: int = 0,
    threads: int = 0,
    prefetch: int = 2,
    bad_records: str = "stop",
    classes: int | None = None,
) -> Batches:
    """Every record once, in order, in ceil(N / batch_size) batches in every process.

    Rows past the end of the dataset are zeros with label 0 and weight 0. So are rows that cannot be
    decoded, with ``bad_records="skip"``: no other record takes their place. Called as
    ``transform(record, None)``. Other arguments as in `train_batches`.

    Returns:
      Iterator of ``{"image": uint8 [b, H, W, C], "label": int32 [b], "weight": float32 [b]}``.

    Raises:
      ValueError: an argument that cannot be right.
    """
    builder = _EvalBuilder(source, transform, batch_size, positions, bad_records, classes)
    return _run(builder, 0, -(-len(source) // batch_size), workers, threads, prefetch)


class _BatchBuilder:
    """Builds the batch of one step, its rows shared among threads. Picklable."""

    def __init__(
        self,
        source: Source,
        transform: Transform,
        batch_size: int,
        positions: np.ndarray,
        bad_records: str,
        classes: int | None,
    ):
        positions = np.asarray(positions)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: needs at least 1")
        if positions.ndim != 1 or not np.issubdtype(positions.dtype, np.integer):
            raise ValueError(f"positions must be integers [b], got {positions.dtype}")
        if not len(positions) or positions.min() < 0 or positions.max() >= batch_size:
            raise ValueError(f"positions must lie in [0, batch_size={batch_size}): {positions}")
        if bad_records not in ("stop", "skip"):
            raise ValueError(f"data.bad_records={bad_records!r}: choose `stop` or `skip`")
        if not len(source):
            raise UserError(f"{source.name}, split {source.split}, holds no record")
        self.source, self.transform = source, transform
        self.batch_size, self.positions = batch_size, positions
        self.skip = bad_records == "skip"
        self.classes = classes
        self.threads = 1
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def __call__(self, step: int) -> tuple[dict[str, np.ndarray] | None, Any]:
        """The batch, and the messages of the rows that could not be decoded.

        No batch, and the error, when a row stops the run: an error that is raised here would reach
        the user with Grain's remarks on how it travelled.
        """
        # Grain would make an element of every image and copy it into the batch; here a whole batch
        # is Grain's element and each row is written where it belongs.
        b = len(self.positions)
        batch = {
            "image": np.zeros((b, *self.transform.schema["image"].shape), np.uint8),  # [b, H, W, C]
            "label": np.zeros(b, np.int32),
            "weight": np.zeros(b, np.float32),
        }
        size = max(1, min(ROWS_PER_TASK, b // (2 * self.threads)))
        chunks = [range(i, min(i + size, b)) for i in range(0, b, size)]
        fill = functools.partial(self._fill, batch, int(step))
        results = map(fill, chunks) if self._pool is None else self._pool.map(fill, chunks)
        try:
            errors = [message for messages in results for message in messages]
        except (DecodeError, LabelError) as e:
            return None, e
        return self.finish(batch), errors

    def _fill(self, batch: dict[str, np.ndarray], step: int, rows: range) -> list[str]:
        errors = []
        for row in rows:
            g = step * self.batch_size + int(self.positions[row])
            label, weight = self.example(g, batch["image"][row], errors)
            batch["label"][row], batch["weight"][row] = label, weight
        return errors

    def label(self, record: Record) -> int:
        """The record's label; raises LabelError where it is none of the classes."""
        if self.classes is not None and not 0 <= record.label < self.classes:
            raise LabelError(
                f"{record.name}: label {record.label} lies outside the {self.classes} classes of "
                f"{self.source.name} (0 to {self.classes - 1}); mend the data set"
            )
        return record.label

    def open(self) -> None:
        """Starts the threads; called in the process that builds."""
        if self.threads > 1:
            self._pool = concurrent.futures.ThreadPoolExecutor(self.threads, "mae-jax-decode")

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pool": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.open()


class _TrainBuilder(_BatchBuilder):
    seed: int
    shuffle: bool

    def example(self, g: int, out: np.ndarray, errors: list[str]) -> tuple[int, float]:
        """Writes example ``g`` into ``out`` [H, W, C]; returns its label and weight."""
        n = len(self.source)
        first = example_index(self.seed, g, n) if self.shuffle else g % n
        for i in range(n):
            try:
                record = self.source[(first + i) % n]
                # A substitute is cropped by the numbers of the row it stands in for.
                out[:] = self.transform(record, example_rng(self.seed, g))["image"]
            except DecodeError as e:
                if not self.skip:
                    raise
                if not i:  # what counts is the row, not how many bad records lie side by side
                    errors.append(str(e))
                continue
            return self.label(record), 1.0
        raise DecodeError(f"none of the {n} records of {self.source.name} can be decoded")

    def finish(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        del batch["weight"]
        return batch


class _EvalBuilder(_BatchBuilder):
    def example(self, g: int, out: np.ndarray, errors: list[str]) -> tuple[int, float]:
        """Writes record ``g`` into ``out`` [H, W, C]; returns its label and weight."""
        if g >= len(self.source):
            return 0, 0.0
        try:
            record = self.source[g]
            out[:] = self.transform(record, None)["image"]
        except DecodeError as e:
            if not self.skip:
                raise
            errors.append(str(e))
            return 0, 0.0
        return self.label(record), 1.0

    def finish(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return batch


def _run(
    builder: _BatchBuilder, start: int, stop: int, workers: int, threads: int, prefetch: int
) -> Batches:
    if workers < 0 or threads < 0 or prefetch < 1:
        raise ValueError(
            f"data.workers={workers}, data.threads={threads}, data.prefetch={prefetch}: the first "
            "two must not be negative, the last must be at least 1"
        )
    builder.threads = threads or max(1, _cpus() // max(1, workers))
    dataset = grain.MapDataset.range(start, stop)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags; a script may have none
            flags.FLAGS.mark_as_parsed()
        # The builder travels to the workers, where unpickling starts its threads.
        dataset = dataset.map(builder)
        ahead = max(1, prefetch // workers)
        dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
        )
    else:
        builder.open()
        # Two batches under way keep every decoding thread busy while one of them ends.
        options = grain.ReadOptions(num_threads=min(2, prefetch), prefetch_buffer_size=prefetch)
        dataset = dataset.map(builder).to_iter_dataset(options)
    return Batches(iter(dataset), builder)


def _cpus() -> int:
    """CPUs this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
