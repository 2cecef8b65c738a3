"""How fast the input pipeline is, beside a plain Pillow + NumPy pipeline that does the same work.

The plain one reads the same records, decodes with Pillow, draws the same crops and resizes with
Pillow's antialiased bicubic, in as many threads; RandAugment is the same code in both. The two
take turns, round by round, because other work on the machine disturbs both; CPU-seconds are
disturbed least.
"""

import concurrent.futures
import dataclasses
import io
import os
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from mae_jax import UserError
from mae_jax.config import validate
from mae_jax.data.pipeline import example_index, example_rng, train_batches
from mae_jax.data.sources import Record, Source
from mae_jax.data.transforms import TrainTransform
from mae_jax.tasks.inputs import open_splits

ROUNDS = 7
STEPS = 4  # batches in a round
WORKER_ROUND = 5  # times as many for every worker process
LARGEST_BATCH = 128  # a round should take about a second
COMPARED = 128  # crops whose pixels are compared


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one round took."""

    images: int
    wall: float  # seconds
    cpu: float  # seconds of all threads and ended child processes


def main(config: ConfigDict) -> None:
    """Prints rates, their ratio, and how far the pixels of the two pipelines lie apart.

    Raises:
      UserError: a config that cannot run, or channels that Pillow does not have.
    """
    validate(config)
    data, model = config.data, config.model
    if model.channels not in (1, 3):
        raise UserError(f"model.channels = {model.channels}: the plain pipeline reads 1 or 3")
    splits = open_splits(config)
    source, transform = splits.train, splits.train_transform
    height, width = transform.size
    batch_size = min(config.batch_size, LARGEST_BATCH)
    threads = data.threads or os.cpu_count()

    def ours(start_step: int, steps: int, rows: int = batch_size) -> Cost:
        def run() -> None:
            batches = train_batches(
                source,
                transform,
                seed=config.seed,
                batch_size=batch_size,
                positions=np.arange(rows),
                start_step=start_step,
                end_step=start_step + steps,
                workers=data.workers,
                threads=threads,
                prefetch=data.prefetch,
                bad_records=data.bad_records,
            )
            with batches:
                for _ in batches:
                    pass

        return _measure(run, steps * rows)

    def plain(start_step: int, steps: int) -> Cost:
        def row(g: int) -> np.ndarray:
            record = source[example_index(config.seed, g, len(source))]
            return plain_transform(record, transform, example_rng(config.seed, g))

        def run() -> None:
            with concurrent.futures.ThreadPoolExecutor(threads) as pool:
                for step in range(start_step, start_step + steps):
                    np.stack(list(pool.map(row, range(step * batch_size, (step + 1) * batch_size))))

        return _measure(run, steps * batch_size)

    # Worker processes cost seconds to start and a run lasts days: their start is taken out, as
    # measured on a run that builds one row in each, and a round is longer, to drown its noise.
    start_up = ours(0, data.workers, rows=1) if data.workers else Cost(0, 0.0, 0.0)
    steps = STEPS * (1 + WORKER_ROUND * data.workers)
    ours(0, 1), plain(0, 1)  # opens the files
    rounds = []
    for i in range(ROUNDS):
        cost = ours(i * steps, steps)
        cost = Cost(cost.images, cost.wall - start_up.wall, cost.cpu - start_up.cpu)
        rounds.append((cost, plain(i * steps, steps)))

    print(f"{len(source)} records of {source.name} {source.split!r}, {height} x {width} px")
    print(
        f"batches of {batch_size}, {data.workers} workers, {threads} threads; "
        f"median of {ROUNDS} rounds of {steps * batch_size} images"
    )
    for name, costs in zip(("mae_jax", "plain"), zip(*rounds, strict=True), strict=True):
        wall = statistics.median(c.images / c.wall for c in costs)
        cpu = statistics.median(c.images / c.cpu for c in costs)
        print(
            f"{name:8s} {wall:8.1f} images/s {cpu:8.1f} images/CPU-s {1e3 / cpu:6.2f} CPU-ms each"
        )
    ratio = statistics.median(b.cpu / a.cpu for a, b in rounds)
    print(f"ratio    {ratio:8.2f} x plain, per CPU-second")
    difference = _difference(source, transform, config.seed)
    print(f"pixels   {difference:8.2f} grey levels apart, mean of {COMPARED} crops")


def plain_transform(
    record: Record, transform: TrainTransform, rng: np.random.Generator
) -> np.ndarray:
    """What `transform` does, with Pillow alone. Returns uint8 [H, W, C]."""
    if isinstance(record.image, bytes):
        image = Image.open(io.BytesIO(record.image))
    else:
        image = Image.fromarray(record.image.squeeze())
    image = image.convert("RGB" if transform.channels == 3 else "L")
    top, left, h, w = transform.box(rng, image.height, image.width)
    corners = (left, top, left + w, top + h)
    image = image.resize(transform.size[::-1], Image.Resampling.BICUBIC, box=corners)
    pixels = np.asarray(image).reshape(transform.shape)
    return pixels if transform.randaugment is None else transform.randaugment(pixels, rng)


def _difference(source: Source, transform: TrainTransform, seed: int) -> float:
    """Mean absolute difference of the same crops before RandAugment, in grey levels."""
    transform = dataclasses.replace(transform, randaugment=None)
    differences = []
    for g in range(COMPARED):
        record = source[example_index(seed, g, len(source))]
        a = transform(record, example_rng(seed, g)).astype(int)
        b = plain_transform(record, transform, example_rng(seed, g))
        differences.append(np.abs(a - b).mean())
    return float(np.mean(differences))


def _measure(run: Callable[[], None], images: int) -> Cost:
    wall, cpu = time.perf_counter(), _cpu_seconds()
    run()
    return Cost(images, time.perf_counter() - wall, _cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages)
