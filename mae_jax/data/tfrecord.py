"""Random access to TFRecord shards, TFDS's default format, without TensorFlow.

A file is a chain of records, each [uint64 length, uint32 masked crc32c of the length, the bytes,
uint32 masked crc32c of the bytes], little-endian. It is walked once; where records start is cached
beside the shard, or in ~/.cache/mae_jax, for the file's size and modification time.
"""

import concurrent.futures
import hashlib
import itertools
import os
import random
import struct
from collections.abc import Sequence

import google_crc32c
import numpy as np
from absl import logging

from mae_jax import UserError
from mae_jax.data.record import DecodeError
from mae_jax.storage.files import complete_or_absent

HEADER = struct.Struct("<QI")  # length and its checksum, before the data
FOOTER = struct.Struct("<I")  # checksum of the data, after them
SCAN_THREADS = 16  # walking a chain waits for the disk, not for the CPU


class TfrecordReader:
    """Reads record ``position`` of shard ``shard``. Picklable; opens shards on first use."""

    def __init__(self, paths: Sequence[str], shard_lengths: Sequence[int]):
        """Raises UserError: a shard is damaged, or not as long as `shard_lengths` says."""
        self._paths = list(paths)
        # Processes that start together begin at different shards, and find what others have made.
        order = np.roll(np.arange(len(self._paths)), random.randrange(len(self._paths)))
        with concurrent.futures.ThreadPoolExecutor(SCAN_THREADS) as pool:
            made = pool.map(lambda shard: offset_index(self._paths[shard]), order)
            offsets = dict(zip(order.tolist(), made, strict=True))
        self._offsets = [offsets[shard] for shard in range(len(self._paths))]  # per shard: [n + 1]
        for path, offsets, length in zip(self._paths, self._offsets, shard_lengths, strict=True):
            if len(offsets) - 1 != length:
                what = f"{len(offsets) - 1} records where dataset_info.json says {length}"
                raise UserError(f"{path} holds {what}; prepare it again")
        self._files: list = [None] * len(self._paths)

    def read(self, shard: int, first: int, last: int) -> list[bytes]:
        """Records first to last - 1, in one read. Raises DecodeError: one fails its checksum."""
        file = self._files[shard]
        if file is None:  # two threads may both open it: harmless, the loser's is closed by GC
            file = self._files[shard] = open(self._paths[shard], "rb", buffering=0)  # noqa: SIM115
        offsets = self._offsets[shard][first : last + 1].tolist()
        content = os.pread(file.fileno(), offsets[-1] - offsets[0], offsets[0])
        records = []
        for start, end in itertools.pairwise(offsets):
            data = content[start - offsets[0] + HEADER.size : end - offsets[0]]
            size = end - start - HEADER.size - FOOTER.size
            whole = len(data) == size + FOOTER.size
            if not whole or _checksum(data[:size]) != FOOTER.unpack(data[size:])[0]:
                raise DecodeError(f"damaged, or changed since the run began: {self._paths[shard]}")
            records.append(data[:size])
        return records

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": [None] * len(self._paths)}


def offset_index(path: str) -> np.ndarray:
    """Start of every record of a shard, and the end of the last: int64 [n + 1]; cached."""
    stat = os.stat(path)
    stamp = np.array([stat.st_size, stat.st_mtime_ns], np.int64)
    folder, file_name = os.path.split(os.path.abspath(path))
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    home = os.path.expanduser(f"~/.cache/mae_jax/tfrecord/{digest}")
    places = [f"{place}/{file_name}.npy" for place in (f"{folder}/.mae_jax_index", home)]
    for place in places:
        try:
            cached = np.load(place, allow_pickle=False)
        except (OSError, ValueError, EOFError):  # absent, or cut short: it is made again
            continue
        if cached.ndim == 1 and len(cached) > 2 and np.array_equal(cached[:2], stamp):
            return cached[2:]
    offsets = _walk(path, stat.st_size)
    for place in places:
        try:
            with complete_or_absent(place) as temporary, temporary.open("wb") as file:
                np.save(file, np.concatenate([stamp, offsets]))
            break
        except UserError:  # not a place to write to
            continue
    else:
        logging.warning("no place to cache the index of %s: it is rebuilt at every start", path)
    return offsets


def _walk(path: str, size: int) -> np.ndarray:
    offsets, remedy = [0], "Copy or prepare the shard again"
    with open(path, "rb", buffering=0) as file:
        while (start := offsets[-1]) < size:
            record, end = len(offsets) - 1, size + 1
            header = os.pread(file.fileno(), HEADER.size, start)
            if len(header) == HEADER.size:
                length, checksum = HEADER.unpack(header)
                if _checksum(header[:8]) != checksum:
                    what = f"the header of record {record} fails its checksum"
                    raise UserError(f"{path}: {what}; damaged, or no TFRecord file. {remedy}")
                end = start + HEADER.size + length + FOOTER.size
            if end > size:
                what = f"record {record} runs past its end at byte {size}"
                raise UserError(f"{path} is truncated: {what}. {remedy}")
            offsets.append(end)
    return np.asarray(offsets, np.int64)


def _checksum(data: bytes) -> int:
    """TFRecord's masked crc32c: rotated right by 15 and shifted by a constant."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
