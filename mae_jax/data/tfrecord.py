"""Random access to TFRecord shards, TFDS's default format, without TensorFlow.

A TFRecord file is a chain of records, each [uint64 length, uint32 masked crc32c of the length,
the bytes, uint32 masked crc32c of the bytes], little-endian. Nothing in it says where record i
starts, so the chain is walked once, from header to header, and the offsets are cached.
"""

import concurrent.futures
import hashlib
import os
import pathlib
import struct
import tempfile
from collections.abc import Sequence

import numpy as np
from absl import logging

from mae_jax import UserError

HEADER = 12  # bytes before the data: length and its checksum
FOOTER = 4  # bytes after the data: its checksum
INDEX_FOLDER = ".mae_jax_index"  # beside the shards
SCAN_THREADS = 16  # walking a chain waits for the disk, not for the CPU


class TfrecordReader:
    """Reads record ``position`` of shard ``shard``. Picklable; opens shards on first use."""

    def __init__(self, paths: Sequence[str], shard_lengths: Sequence[int]):
        """Loads the offset index of every shard, building those that are missing or stale.

        Args:
          paths: the shards.
          shard_lengths: records each must hold, from dataset_info.json.

        Raises:
          ValueError: a shard is truncated, damaged or holds another number of records.
        """
        self._paths = list(paths)
        with concurrent.futures.ThreadPoolExecutor(SCAN_THREADS) as pool:
            self._offsets = list(pool.map(offset_index, self._paths))  # per shard: [n + 1]
        for path, offsets, length in zip(self._paths, self._offsets, shard_lengths, strict=True):
            if len(offsets) - 1 != length:
                raise UserError(
                    f"{path} holds {len(offsets) - 1} records where dataset_info.json says "
                    f"{length}: the shard is damaged or from another build; prepare it again"
                )
        self._files: list = [None] * len(self._paths)

    def read(self, shard: int, position: int) -> bytes:
        """The bytes of one record. The checksum of the data is not verified (no fast crc32c)."""
        file = self._files[shard]
        if file is None:  # two threads may both open it: harmless, the loser's is closed by GC
            file = self._files[shard] = open(self._paths[shard], "rb", buffering=0)  # noqa: SIM115
        start, end = self._offsets[shard][position : position + 2]
        size = int(end - start) - HEADER - FOOTER
        data = os.pread(file.fileno(), size, int(start) + HEADER)
        if len(data) != size:
            raise OSError(f"{self._paths[shard]} has shrunk since its index was built")
        return data

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": [None] * len(self._paths)}


def offset_index(path: str) -> np.ndarray:
    """Start of every record of a shard, and the end of the last: int64 [n + 1].

    Comes from the cache beside the shard (or, where that is not writable, ~/.cache/mae_jax) if the
    file's size and modification time are those the cache was made for.
    """
    stat = os.stat(path)
    stamp = np.array([stat.st_size, stat.st_mtime_ns], np.int64)
    places = _cache_places(path)
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
            _write_atomically(place, np.concatenate([stamp, offsets]))
            break
        except OSError:
            continue
    else:
        logging.warning("no place to cache the index of %s: it is rebuilt at every start", path)
    return offsets


def _walk(path: str, size: int) -> np.ndarray:
    offsets, headers = [0], []
    with open(path, "rb", buffering=0) as file:
        while offsets[-1] < size:
            header = os.pread(file.fileno(), HEADER, offsets[-1])
            if len(header) < HEADER:
                raise _truncated(path, size, len(headers))
            headers.append(header)
            offsets.append(offsets[-1] + HEADER + struct.unpack_from("<Q", header)[0] + FOOTER)
            if offsets[-1] > size:
                # A damaged length points anywhere, so say which of the two it is.
                _check_headers(path, headers)
                raise _truncated(path, size, len(headers) - 1)
    _check_headers(path, headers)
    return np.asarray(offsets, np.int64)


def _truncated(path: str, size: int, record: int) -> UserError:
    return UserError(
        f"{path} is truncated: record {record} runs past its end at byte {size}. "
        "Copy or prepare the shard again."
    )


def _check_headers(path: str, headers: list[bytes]) -> None:
    """Compares every length with its checksum, all records at once."""
    if not headers:
        return
    raw = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, HEADER)  # [n, 12]
    crc = np.full(len(raw), 0xFFFFFFFF, np.uint32)
    table = _crc32c_table()
    for byte in range(8):
        crc = table[(crc ^ raw[:, byte]) & 0xFF] ^ (crc >> np.uint32(8))
    crc ^= np.uint32(0xFFFFFFFF)
    # TFRecord's "masked" checksum: rotated right by 15 and shifted by a constant.
    masked = ((crc >> np.uint32(15)) | (crc << np.uint32(17))) + np.uint32(0xA282EAD8)
    stored = raw[:, 8:].copy().view("<u4")[:, 0]
    if (bad := np.flatnonzero(masked != stored)).size:
        raise UserError(
            f"{path}: the header of record {bad[0]} fails its checksum; the file is damaged or "
            "not a TFRecord file. Copy or prepare the shard again."
        )


def _crc32c_table() -> np.ndarray:
    """Table of the Castagnoli polynomial, bits reversed: uint32 [256]."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table


def _cache_places(path: str) -> list[str]:
    folder, file = os.path.split(os.path.abspath(path))
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    home = pathlib.Path.home() / ".cache" / "mae_jax" / "tfrecord" / digest
    return [os.path.join(folder, INDEX_FOLDER, file + ".npy"), str(home / (file + ".npy"))]


def _write_atomically(path: str, array: np.ndarray) -> None:
    """Other processes may be writing the same index: each writes its own file, then renames it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), delete=False) as file:
        try:
            np.save(file, array)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
