"""How fast the input pipeline is, and how true, beside the same work done with Pillow alone.

Both ways to resize (`data.resize`) and the plain one fill the same batches, with the same crops, in
the same threads or workers; RandAugment and colour jitter are the same code. So do Pillow's quicker
resize of what is decoded here, "gap", and decoding alone. They take turns, round by round, because
other work on the machine disturbs all; CPU-seconds are disturbed least.

Of prepared data sets it also tells how often an epoch reads storage in either `data.order`, counted
without reading: in a bucket every read is a request, which takes its time and costs money.
"""

import dataclasses
import io
import multiprocessing
import os
import pathlib
import sys
import time

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from mae_jax import UserError
from mae_jax.config_checks import validate
from mae_jax.data.order import WindowReader, Windows, example_index
from mae_jax.data.pipeline import example_rng
from mae_jax.data.record import Record
from mae_jax.data.splits import Splits
from mae_jax.data.tfds_source import TfdsSource
from mae_jax.data.transforms import RESIZES, TrainTransform
from mae_jax.tasks.inputs import open_splits

ROUNDS = 5
STEPS = 4  # batches in a round
LARGEST_BATCH = 128  # a round should take about a second
SAMPLED = 32  # records whose size is looked at
PROCESSES = (1, 16)
COMPARED = 128  # crops whose pixels are compared
REDUCING_GAP = 2.0  # of Pillow's resize: what shrinks 4 times and more is first averaged
HALF_NYQUIST = (0.2, 0.3)  # cycles a pixel: the band about half the highest frequency


@dataclasses.dataclass(frozen=True)
class Plain(TrainTransform):
    """A `TrainTransform` made of Pillow alone."""

    def decoded(self, record: Record) -> Record:
        """The record with a picture of Pillow's."""
        image = record.image
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        elif isinstance(image, np.ndarray):
            image = Image.fromarray(image.squeeze())
        if record.upright:
            image = ImageOps.exif_transpose(image)
        image = image.convert("RGB" if self.channels == 3 else "L")
        return dataclasses.replace(record, image=image, upright=False)

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns "image"."""
        return _resized(self, self.decoded(record).image, rng)


@dataclasses.dataclass(frozen=True)
class Reducing(TrainTransform):
    """A `TrainTransform` that shrinks in two steps, the first one by averaging."""

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns "image"."""
        image = Image.fromarray(self.decoded(record).image.squeeze())
        return _resized(self, image, rng, REDUCING_GAP)


def _resized(
    transform: TrainTransform,
    image: Image.Image,
    rng: np.random.Generator,
    gap: float | None = None,
) -> dict[str, np.ndarray]:
    """What Pillow alone makes of a decoded picture."""
    top, left, h, w = transform.box(rng, image.height, image.width)
    corners, bicubic = (left, top, left + w, top + h), Image.Resampling.BICUBIC
    image = image.resize(transform.size[::-1], bicubic, box=corners, reducing_gap=gap)
    pixels = np.asarray(image).reshape(*transform.size, transform.channels)
    return {"image": transform.augmented(pixels, rng)}


@dataclasses.dataclass(frozen=True)
class Decoding(TrainTransform):
    """What every way has to do, and no more."""

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns "image", which shows nothing."""
        self.decoded(record)
        return {"image": np.zeros((*self.size, self.channels), np.uint8)}


def main(config: ConfigDict) -> None:
    """Prints for each way its rate, its price, and how far its pixels lie from the plain one's."""
    validate(config)
    if config.model.channels not in (1, 3):
        raise UserError(f"model.channels={config.model.channels}: the plain way reads 1 or 3")
    splits = open_splits(config)
    if hasattr(splits.train, "places"):
        print_reads(splits, Windows(config.data.window, config.data.pool))
    largest = max(1, LARGEST_BATCH // splits.repeat) * splits.repeat
    splits = dataclasses.replace(splits, batch_size=min(config.batch_size, largest))
    transform = splits.train_transform
    ways = {name: dataclasses.replace(transform, resize=name) for name in RESIZES}
    ways |= {"gap": Reducing(**vars(transform)), "decode": Decoding(**vars(transform))}
    ways["plain"] = Plain(**vars(transform))
    of_each = [dataclasses.replace(splits, train_transform=way) for way in ways.values()]
    images = STEPS * splits.batch_size
    costs = np.empty((ROUNDS, len(ways), 2))
    for i in range(ROUNDS):  # forwards and backwards: what follows the plain way is a tenth slower
        for j in range(len(ways))[:: -1 if i % 2 else 1]:
            costs[i, j] = _cost(of_each[j], i * STEPS) / images
    source, (height, width) = splits.train, transform.size
    print(
        f"{len(source)} records of {source.name} {source.split!r}, {height} x {width} px; batches "
        f"of {splits.batch_size}, {splits.repeat} of each picture, {splits.workers} workers, "
        f"{splits.threads or os.cpu_count()} threads; median of {ROUNDS} rounds of {images} images"
    )
    rates, cpu = np.median(1 / costs[..., 0], 0), np.median(1e3 * costs[..., 1], 0)
    ratios = np.median(costs[:, -1:, 1] / costs[..., 1], 0)
    pixels = {name: _crops(splits, way) for name, way in ways.items() if name != "decode"}
    power = {name: sum(map(_power, crops)) for name, crops in pixels.items()}
    print("        images/s  CPU-ms each  x plain  grey levels off  power at half Nyquist")
    for i, name in enumerate(ways):
        row = f"{name:6s} {rates[i]:9.1f} {cpu[i]:12.2f} {ratios[i]:8.2f}"
        if name in pixels:
            pairs = zip(pixels[name], pixels["plain"], strict=True)
            off = np.mean([np.abs(a - b).mean() for a, b in pairs])
            row += f" {off:16.2f} {power[name] / power['plain']:22.3f}"
        print(row)


def print_reads(splits: Splits, windows: Windows) -> None:
    """Prints for both orders what one process reads in an epoch."""
    source = splits.train
    sample = np.linspace(0, len(source) - 1, SAMPLED).astype(int)
    size = np.mean([len(source[int(i)].image) for i in sample])  # bytes
    pictures = splits.batch_size // splits.repeat  # in a batch
    print(f"reading {source.name} {source.split!r}, batch {splits.batch_size}, by each process")
    print("                     requests/image  kB/image  MB kept")
    ways = ((None, 1), *((windows, n) for n in PROCESSES if pictures % n == 0))
    for way, processes in ways:
        name = f"windowed, {processes:2} proc." if way else "shuffled"
        requests, records, kept = count_reads(splits, way, processes)
        row = f"{requests:14.4f} {records * size / 1e3:9.1f} {kept * size / 1e6:8.1f}"
        print(f"{name:20} {row}")


def count_reads(
    splits: Splits, windows: Windows | None, processes: int = 1
) -> tuple[float, float, int]:
    """Of the first of so many processes, while each record is used once: requests and records read
    for each example, and the most records that it keeps at a time."""
    n, batch_size = len(splits.train), splits.batch_size // splits.repeat  # of pictures
    positions = np.arange(batch_size // processes)
    source = tally = _Tally(splits.train)
    if windows is not None:
        source = WindowReader(tally, windows.size, windows.in_use(positions, batch_size))
    examples = kept = 0
    for g in range(n):
        if g % batch_size >= len(positions):
            continue
        if windows is None:
            source[example_index(splits.seed, g, n)]
        else:
            source[windows.index(splits.seed, g, n, batch_size)]
            if examples % 100 == 0:
                kept = max(kept, source.kept)
        examples += splits.repeat
    return tally.requests / examples, tally.records / examples, kept


class _Tally:
    """A source that counts what would be read of another, and reads nothing."""

    def __init__(self, source: TfdsSource):
        self.name, self.split, self._source = source.name, source.split, source
        self.requests = self.records = 0

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> bool:
        self.requests += 1
        self.records += 1
        return True

    def read(self, start: int, stop: int) -> dict[int, bool]:
        """True for every record."""
        self.requests += len(list(self._source.places(start, stop)))
        self.records += stop - start
        return dict.fromkeys(range(start, stop), True)


def _cost(splits: Splits, start_step: int) -> np.ndarray:
    """Seconds [2], wall and of all threads and workers, that a round's batches take, in mid-run."""
    positions = np.arange(splits.batch_size)
    with splits.train_batches(positions, start_step, sys.maxsize) as batches:
        next(batches)
        start = _seconds()
        for _ in range(STEPS):
            next(batches)
        return _seconds() - start


def _seconds() -> np.ndarray:
    """Time on the wall, and CPU time of this process and its workers: [2]."""
    cpu = time.process_time()
    for worker in multiprocessing.active_children():
        fields = pathlib.Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        cpu += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user, system
    return np.array([time.perf_counter(), cpu])


def _crops(splits: Splits, transform: TrainTransform) -> list[np.ndarray]:
    """The first crops of the run, not augmented, each [H, W, C] float."""
    transform = dataclasses.replace(transform, randaugment=None, color_jitter=None)
    source, seed = splits.train, splits.seed
    records = (source[example_index(seed, g, len(source))] for g in range(COMPARED))
    made = (transform(record, example_rng(seed, g)) for g, record in enumerate(records))
    return [example["image"].astype(float) for example in made]


def _power(image: np.ndarray) -> float:
    """Power about half the highest frequency, in all directions, of the mean of the channels."""
    gray = image.mean(axis=2)
    window = np.outer(np.hanning(gray.shape[0]), np.hanning(gray.shape[1]))
    power = np.abs(np.fft.fft2((gray - gray.mean()) * window)) ** 2  # [H, W]
    y, x = (np.fft.fftfreq(side) for side in gray.shape)
    radius = np.hypot(y[:, None], x)
    return float(power[(radius >= HALF_NYQUIST[0]) & (radius < HALF_NYQUIST[1])].sum())
