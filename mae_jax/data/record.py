"""What a source hands over: one record, and the errors and slices every source shares."""

import dataclasses
import hashlib
import os
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from mae_jax import UserError


class DecodeError(UserError):
    """A record that cannot be turned into a picture. The message names the record."""


class LabelError(UserError):
    """A label outside the classes of its data set. The message names the record."""


class ArraySpec(NamedTuple):
    """One entry of a batch's schema, {name: ArraySpec}: what each example brings to it."""

    shape: tuple[int, ...]  # of one example
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Record:
    """One example as it lies in the dataset, not yet decoded."""

    image: Any
    """Bytes of a picture file, a picture that Pillow has opened, or uint8 [H, W, C]."""
    label: int
    """Class index; -1 when unlabelled."""
    name: str
    """Names the record in messages: ``imagenet2012/train#17 (n01440764_10026.JPEG)``."""
    id: int = -1
    """Its index in the split it was read from: ``source[record.id]`` reads it again."""
    upright: bool = False
    """Whether EXIF orientation is honoured: in files of one's own, not in prepared data sets."""


class Source(Protocol):
    """Random access to the records of one split. Picklable; files are opened on first use.

    ``name``, ``split``: as given to `open_source`. ``num_classes`` and ``class_names`` are None
    where the dataset has no labels, or no names for them. Any number of threads may read at once.
    """

    name: str
    split: str
    num_classes: int | None
    class_names: list[str] | None

    def __len__(self) -> int:
        """Number of records."""

    def __getitem__(self, index: int) -> Record:
        """Record ``index``, 0 <= index < len(self). Raises DecodeError if it is damaged."""

    def identity(self) -> str:
        """Differs where any record may: the place, names, sizes and times of the files."""


class Selection:
    """Some records of a source, in the order given."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, indices
        self.name, self.split = source.name, source.split

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.indices[index])]


def files_identity(paths: Iterable[str]) -> str:
    """A digest of the places, sizes and times of files."""
    total = hashlib.sha256()
    for path in paths:
        status = os.stat(path)
        total.update(os.fsencode(path) + f" {status.st_size} {status.st_mtime_ns}\n".encode())
    return total.hexdigest()


def select(spec: str, lengths: Mapping[str, int], field: str = "data.train_split") -> np.ndarray:
    """Turns a split in TFDS notation into record indices, for sources that are not TFDS.

    Args:
      spec: ``train``, ``train[:10%]``, ``train[100:200]``, ``train[-64:]``, ``train+validation``.
      lengths: number of records of every split; the splits are thought of as laid end to end in
        this order, and the indices returned count through them.
      field: how error messages call ``spec``.

    Returns:
      int64 [n], n > 0.

    Raises:
      UserError: unknown split, bad slice, or nothing in it.
    """
    starts = dict(zip(lengths, np.cumsum([0, *lengths.values()]), strict=False))
    if spec in lengths:  # the usual case does not need TFDS, whose import takes half a second
        pieces = [(spec, 0, lengths[spec])]
    else:
        import tensorflow_datasets as tfds

        infos = {
            name: types.SimpleNamespace(num_examples=n, shard_lengths=[n])
            for name, n in lengths.items()
        }
        try:
            instructions = tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos)
        except Exception as e:  # TFDS raises several kinds, some of them re-raised with notes
            raise split_error(spec, lengths, e) from e
        pieces = [
            (i.splitname, i.from_ or 0, lengths[i.splitname] if i.to is None else i.to)
            for i in instructions
        ]
    indices = [starts[name] + np.arange(first, last) for name, first, last in pieces]
    indices = np.concatenate(indices).astype(np.int64)
    if not len(indices):
        raise split_error(spec, lengths, "it holds no record")
    return indices


def split_error(spec: str, lengths: Mapping[str, int | None], why: object) -> UserError:
    """The one message about a split that cannot be read; lists the splits that exist."""
    exist = [name if n is None else f"{name} ({n} records)" for name, n in lengths.items()]
    return UserError(
        f"data.train_split / data.eval_split: cannot read {spec!r}: {why}. Splits that exist: "
        f"{', '.join(exist) or 'none'}. Slices are written as in TFDS: train[:10%], train[100:200]"
    )
