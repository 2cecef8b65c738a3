"""What a source hands over: one record, and the errors and slices every source shares."""

import dataclasses
import hashlib
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from mae_jax import UserError
from mae_jax.storage.files import versions


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

    image: Any  # bytes of a picture file, a picture that Pillow has opened, or uint8 [H, W, C]
    label: int  # class index; -1 when unlabelled
    name: str  # in messages: ``imagenet2012/train#17 (n01440764_10026.JPEG)``
    id: int = -1  # index in the split it was read from: ``source[record.id]`` reads it again
    upright: bool = False  # honour EXIF orientation: in one's own files, not prepared data sets
    segmentation: Any = None  # label map: bytes of a picture file, or integers [H, W]


class Source(Protocol):
    """Random access to the records of one split. Picklable; files are opened on first use.

    Where that is cheaper, ``read(start, stop)`` gives many records at once, {index: Record}, and
    leaves out those that are damaged.
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

    def read(self, start: int, stop: int) -> dict[int, Record]:
        """As `Source.read`, where the records lie side by side in the source."""
        own = self.indices[start:stop]
        if not hasattr(self.source, "read") or (np.diff(own) != 1).any():
            return {}
        found = self.source.read(int(own[0]), int(own[-1]) + 1)
        return {start + index - int(own[0]): record for index, record in found.items()}


def files_identity(paths: Sequence[str]) -> str:
    """A digest of the places, sizes and times of files."""
    total = hashlib.sha256()
    for path, version in zip(paths, versions(paths), strict=True):
        total.update(os.fsencode(path) + f" {version}\n".encode())
    return total.hexdigest()


def select(spec: str, lengths: Mapping[str, int]) -> np.ndarray:
    """Turns a split in TFDS notation into record indices, int64 [n > 0], for other sources.

    The splits, whose numbers of records are `lengths`, are thought of as laid end to end. Raises
    UserError: unknown split, bad slice, or nothing in it.
    """
    starts = dict(zip(lengths, np.cumsum([0, *lengths.values()]), strict=False))
    if spec in lengths:  # the usual case does not need TFDS, whose import takes half a second
        pieces = [(spec, 0, lengths[spec])]
    else:
        import tensorflow_datasets as tfds

        info = {}
        for name, n in lengths.items():
            info[name] = types.SimpleNamespace(num_examples=n, shard_lengths=[n])
        try:
            parts = tfds.core.ReadInstruction.from_spec(spec).to_absolute(info)
        except Exception as e:  # TFDS raises several kinds, some of them re-raised with notes
            raise split_error(spec, lengths, e) from e
        ends = [lengths[part.splitname] if part.to is None else part.to for part in parts]
        pieces = [(p.splitname, p.from_ or 0, end) for p, end in zip(parts, ends, strict=True)]
    indices = np.concatenate([starts[name] + np.arange(*piece) for name, *piece in pieces])
    if not len(indices):
        raise split_error(spec, lengths, "it holds no record")
    return indices.astype(np.int64)


def split_error(spec: str, lengths: Mapping[str, int | None], why: object) -> UserError:
    """The one message about a split that cannot be read; lists the splits that exist."""
    exist = [name if n is None else f"{name} ({n} records)" for name, n in lengths.items()]
    return UserError(
        f"data.train_split / data.eval_split: cannot read {spec!r}: {why}. Splits that exist: "
        f"{', '.join(exist) or 'none'}. Slices are written as in TFDS: train[:10%], train[100:200]"
    )
