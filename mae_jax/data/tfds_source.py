"""TFDS datasets as prepared on disk, read without TensorFlow."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from mae_jax import UserError
from mae_jax.data.record import DecodeError, Record, files_identity, split_error
from mae_jax.data.tfrecord import TfrecordReader
from mae_jax.storage.files import in_bucket, to_path, versions

READ_AT_ONCE = 1 << 24  # bytes of a shard, of all that is wanted of it at a time
FOOTER = 1 << 18  # bytes read of a shard's end, for its index; by default 1 MiB in a bucket
# What label maps are called, where they are plain Image features of one channel.
MAPS = (
    "segmentation_mask",
    "segmentation_label",
    "segmentation",
    "annotation",
    "label_map",
    "mask",
)


class TfdsSource:
    """Records of a prepared TFDS split (`array_record` or `tfrecord`), pictures still encoded.

    With `segmentation` records have their label maps, and the classes are those of the maps.
    Raises UserError: the dataset, shard, split, picture or map is not there, or a shard is damaged.
    """

    def __init__(self, name: str, data_dir: str, split: str, segmentation: bool = False):
        self.name, self.split = name, split
        folder = find_dataset(name, data_dir)
        info = tfds.builder_from_directory(folder).info
        self._map_key = _map_key(folder, info) if segmentation else None
        self._image_key = _image_key(folder, info, self._map_key)
        self._label_key = _the_key(info, tfds.features.ClassLabel, 1, "label")
        self.num_classes, self.class_names = None, None
        classes_key = self._map_key or self._label_key
        classes = None if classes_key is None else info.features[classes_key]
        if getattr(classes, "num_classes", None) is not None:  # a plain Image does not tell
            names = list(classes.names)
            self.num_classes = len(names)
            # Without a names file TFDS makes names up: "0", "1", ...
            self.class_names = None if names == list(map(str, range(len(names)))) else names
        lengths = {name: s.num_examples for name, s in info.splits.items()}
        try:
            pieces = [p for p in info.splits[split].file_instructions if p.take]
        except Exception as e:  # ValueError, KeyError, or either re-raised with notes
            raise split_error(split, lengths, e) from e
        if not pieces:
            raise split_error(split, lengths, "it holds no record")
        remedy = _how_to_prepare(name, data_dir)
        self._paths = paths = [os.fspath(p.filename) for p in pieces]
        there = versions(paths)
        if absent := [p for p, version in zip(paths, there, strict=True) if version is None]:
            what = f"{len(absent)} of {len(paths)} shards of {name} {split!r} are missing"
            raise UserError(f"data.dir: {what}, the first is {absent[0]}. {remedy}")
        self._ends = np.cumsum([p.take for p in pieces])  # [number of pieces]
        self._skips = [p.skip for p in pieces]
        _allow_open_files(len(paths))
        file_format = info.file_format.value
        if file_format == "array_record":
            options = {"footer_prefetch_bytes": str(FOOTER)} if in_bucket(folder) else None
            self._reader = ArrayRecordDataSource(pieces, options)
            self._wide = _WideReaders(paths)
        elif in_bucket(folder):
            what = f"{folder} is in the format {file_format!r}; in a bucket array_record is read"
            raise UserError(f"data.dir: {what}. {remedy}")
        elif file_format == "tfrecord":
            self._reader = TfrecordReader(paths, [p.examples_in_shard for p in pieces])
        else:
            what = f"{folder} is in the format {file_format!r}"
            raise UserError(f"data.dir: {what}; array_record and tfrecord can be read. {remedy}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def identity(self) -> str:
        """Of the shards, and what is taken of them."""
        return f"{files_identity(self._paths)} {self._skips} {self._ends.tolist()}"

    def __getitem__(self, index: int) -> Record:
        name = f"{self.name}/{self.split}#{index}"
        if not 0 <= index < len(self):
            raise IndexError(name)
        try:
            if isinstance(self._reader, TfrecordReader):
                ((piece, first, last),) = self.places(index, index + 1)
                (data,) = self._reader.read(piece, first, last)
            else:
                data = self._reader[index]
        except Exception as e:  # both readers raise plain RuntimeError or their own kinds
            raise DecodeError(f"{name}: the record cannot be read: {e}") from e
        return self._record(index, data)

    def read(self, start: int, stop: int) -> dict[int, Record]:
        """Many records in one read of each shard they lie in; without those that are damaged."""
        wide = self._reader if isinstance(self._reader, TfrecordReader) else self._wide
        found: dict[int, Record] = {}
        for piece, first, last in self.places(start, stop):
            begin = start
            start += last - first
            try:
                contents = wide.read(piece, first, last)
            except Exception as e:  # one by one they tell which it is
                logging.debug("%s records %d to %d: %s", self._paths[piece], first, last, e)
                continue
            for index, data in enumerate(contents, begin):
                with contextlib.suppress(DecodeError):
                    found[index] = self._record(index, data)
        return found

    def places(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where records lie: piece, first position in its shard, and one past the last."""
        piece = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self._ends[piece])
            skip = self._skips[piece] - (int(self._ends[piece - 1]) if piece else 0)
            yield piece, start + skip, min(stop, end) + skip
            start, piece = end, piece + 1

    def _record(self, index: int, data: bytes) -> Record:
        name = f"{self.name}/{self.split}#{index}"
        try:
            features = tf_example_pb2.Example.FromString(data).features.feature
        except Exception as e:
            raise DecodeError(f"{name}: the record cannot be read: {e}") from e
        for file in features["file_name"].bytes_list.value:  # a record makes absent features empty
            name += f" ({file.decode(errors='replace')})"
        if not features[self._image_key].bytes_list.value:
            raise DecodeError(f"{name}: the record has no feature {self._image_key!r}")
        labels = features[self._label_key].int64_list.value if self._label_key else ()
        image = features[self._image_key].bytes_list.value[0]
        label_map = None
        if self._map_key is not None:
            if not features[self._map_key].bytes_list.value:
                raise DecodeError(f"{name}: the record has no feature {self._map_key!r}")
            label_map = features[self._map_key].bytes_list.value[0]
        label = labels[0] if labels else -1
        return Record(image, label, name, id=index, segmentation=label_map)


class _WideReaders:
    """Reads many neighbours of array_record shards at once. Picklable."""

    def __init__(self, paths: Sequence[str]):
        self._paths = paths
        self._readers: list[ArrayRecordReader | None] = [None] * len(paths)

    def read(self, shard: int, first: int, last: int) -> list[bytes]:
        """Records first to last - 1 of a shard."""
        reader = self._readers[shard]
        if reader is None:  # two threads may both make it: harmless
            options = f"readahead_buffer_size:{READ_AT_ONCE}"
            if in_bucket(self._paths[shard]):
                options += f",footer_prefetch_bytes:{FOOTER}"
            reader = ArrayRecordReader(self._paths[shard], options=options)
            self._readers[shard] = reader
        return reader.read(first, last)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_readers": [None] * len(self._paths)}


def find_dataset(name: str, data_dir: str) -> str:
    """Folder ``<data_dir>/<name>/[<config>/]<version>``; by default the newest, the only config.

    Raises UserError: nothing there, or ``name`` is malformed or leaves several configs.
    """
    parsed = re.fullmatch(r"([\w-]+)(?:/([\w.+-]+))?(?::(\d+\.\d+\.\d+))?", name)
    if not parsed:
        tfds_forms = "`name`, `name:1.2.3`, `name/config[:1.2.3]`"
        forms = f"`demo`, `folder`, `segmentation_folder`, or a TFDS dataset: {tfds_forms}"
        raise UserError(f"data.name={name!r} is none of {forms}")
    dataset, config, version = parsed.groups()
    root = to_path(data_dir)
    if not root.is_dir():
        raise UserError(f"data.dir: there is no folder {root}")
    folder = root / dataset / (config or "")
    versions = _versions(folder)
    if not versions and not config:
        places = sorted(folder.iterdir()) if folder.is_dir() else []
        configs = [place for place in places if place.is_dir() and _versions(place)]
        if len(configs) > 1:
            choice = ", ".join(f"{dataset}/{place.name}" for place in configs)
            raise UserError(f"data.name: {dataset} has several configs; choose one of {choice}")
        if configs:
            folder, versions = configs[0], _versions(configs[0])
    if versions and version in (None, *versions):
        return str(folder / (version or versions[-1]))
    if versions:
        what = f"version {version} of {dataset} is not in {folder}, which has {versions}"
    else:
        prepared = sorted(d.name for d in root.iterdir() if d.is_dir())
        what = f"no prepared dataset at {folder}; folders in {root}: {', '.join(prepared) or '-'}"
    raise UserError(f"data.name / data.dir: {what}. {_how_to_prepare(name, data_dir)}")


def _versions(folder: epath.Path) -> list[str]:
    """Versions prepared below ``folder``, oldest first."""
    found = [info.parent.name for info in folder.glob("*/dataset_info.json")]
    found = [v for v in found if re.fullmatch(r"\d+\.\d+\.\d+", v)]
    return sorted(found, key=lambda v: tuple(map(int, v.split("."))))


def _how_to_prepare(name: str, data_dir: str) -> str:
    command = f"`tfds build {name} --data_dir={data_dir} --file_format=array_record`"
    other = "or `tfds.load`, which writes tfrecord"
    return f"Prepare it, where TensorFlow is installed, with {command} ({other})."


def _the_key(
    info: tfds.core.DatasetInfo, kind: type, place: int, name: str, without: str | None = None
) -> str | None:
    """The feature of a kind: at a place of the supervised keys, of a name, or the only one but
    that called `without`."""
    features = info.features if isinstance(info.features, dict | tfds.features.FeaturesDict) else {}
    keys = [key for key in features if isinstance(features[key], kind) and key != without]
    supervised = (info.supervised_keys or ())[place : place + 1]
    chosen = [key for key in (*supervised, name) if key in keys] or keys * (len(keys) == 1)
    return chosen[0] if chosen else None


def _map_key(folder: str, info: tfds.core.DatasetInfo) -> str:
    """The feature that holds the label maps."""
    if info.name == "scene_parse150":
        what = "holds the maps of another challenge: R is one of 100 things, G the number of each"
        remedy = "Unpack ADEChallengeData2016 and set data.name=segmentation_folder"
        raise UserError(f"data.name: scene_parse150 of TFDS {what}. {remedy}")
    images = {k: f for k, f in info.features.items() if isinstance(f, tfds.features.Image)}
    kind = tfds.features.LabeledImage
    keys = [k for k, f in images.items() if isinstance(f, kind) or (k in MAPS and f.shape[-1] == 1)]
    if len(keys) != 1:
        what = f"a LabeledImage or an Image of one channel called {', '.join(MAPS)}"
        has = f"it has {' '.join(str(info.features).split())}"
        raise UserError(f"data.name: {folder} must have one label map in a record, {what}; {has}")
    return keys[0]


def _image_key(folder: str, info: tfds.core.DatasetInfo, label_maps: str | None) -> str:
    key, features = _the_key(info, tfds.features.Image, 0, "image", label_maps), info.features
    if key is None:
        what = f"`image` or the only Image feature; it has {' '.join(str(features).split())}"
        raise UserError(f"data.name: {folder} must have one picture in a record, {what}")
    if np.dtype(features[key].np_dtype) not in (np.uint8, np.uint16):
        what = f"feature {key!r} of {folder} is {features[key].np_dtype}"
        raise UserError(f"data.name: {what}; pictures of 8 or 16 bits can be read")
    return key


def _allow_open_files(count: int) -> None:
    """Lets the process hold every shard open: ImageNet has 1,024, the usual limit is 1,024."""
    import resource  # not on Windows, where array_record does not exist either

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 512  # what the rest of the process may hold
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            what = f"the dataset has {count} shards and this process may open {hard} files"
            raise UserError(f"{what}; raise the limit: ulimit -n {needed}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
