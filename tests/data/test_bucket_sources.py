"""Data in a bucket: the same records, in few requests."""

import os
import pickle

import numpy as np
import pytest
from test_order import Windows
from tiny_dataset import TinyDataset

from mae_jax import UserError
from mae_jax.bench.data import count_reads
from mae_jax.data.pipeline import eval_batches, train_batches
from mae_jax.data.record import DecodeError
from mae_jax.data.sources import open_source
from mae_jax.data.splits import Splits
from mae_jax.data.transforms import EvalTransform, TrainTransform
from mae_jax.storage.files import to_path

SPLITS = {"train": [40, 40, 16], "validation": [6]}


@pytest.fixture(scope="module")
def places(tmp_path_factory, bucket):
    """(folder on disk, the same in a bucket, counts of what is asked of the bucket)."""
    dataset = TinyDataset(tmp_path_factory.mktemp("data"), "array_record", SPLITS)
    remote = to_path(bucket[0]) / "tfds"
    for file in dataset.folder.iterdir():
        (remote / "tiny" / "1.0.0" / file.name).write_bytes(file.read_bytes())
    return dataset.root, str(remote), bucket[1]


def train(source, **options):
    options = {"seed": 3, "batch_size": 12, "positions": np.arange(12), "end_step": 8} | options
    with train_batches(source, TrainTransform((16, 16)), threads=3, **options) as batches:
        return list(batches)


def test_records_are_those_on_disk(places):
    disk, remote, _ = places
    here, there = (open_source("tiny", place, "train[5:90]") for place in (disk, remote))
    assert len(there) == len(here) == 85
    assert there.class_names == here.class_names == ["ant", "bee", "cat"]
    for index in (0, 34, 35, 84):
        assert there[index] == here[index]
    assert there.read(30, 40) == here.read(30, 40) == {i: here[i] for i in range(30, 40)}
    assert pickle.loads(pickle.dumps(there))[7] == here[7]
    assert there.identity() != here.identity()


def test_opening_reads_no_data(places):
    _, remote, counts = places
    before = counts.copy()
    open_source("tiny", remote, "train")
    asked = counts - before
    assert sum(v for k, v in asked.items() if k != "bytes") <= 40, asked
    assert asked["bytes"] < 8000  # of 96 records, 150 kB: the descriptions alone


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_windows_are_read_with_a_request_each(places, workers):
    disk, remote, counts = places
    order = {"windows": Windows(8, 48), "workers": workers}
    expected = train(open_source("tiny", disk, "train"), **order)
    source, before = open_source("tiny", remote, "train"), counts.copy()
    found = train(source, **order)
    media = (counts - before)["GET media"]
    for a, b in zip(expected, found, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    # 12 windows and the ends of 12 lanes, some in two shards; the indices of 3 shards.
    assert media <= 12 + 12 + 4 + 3 * max(1, workers)
    if not workers:  # what the bench says of this
        splits = Splits(source, source, None, None, 3, 12, None)
        requests, _, _ = count_reads(splits, Windows(8, 48))
        assert 0 <= media - 96 * requests - 3 <= 3  # threads may read an index twice


def test_a_shuffle_takes_a_request_for_every_record(places):
    disk, remote, counts = places
    expected = train(open_source("tiny", disk, "train"))
    source, before = open_source("tiny", remote, "train"), counts.copy()
    found = train(source)
    np.testing.assert_array_equal(
        [batch["image"] for batch in expected], [batch["image"] for batch in found]
    )
    assert (counts - before)["GET media"] == 96 + 3  # and the indices of 3 shards


@pytest.mark.parametrize("windows", [None, Windows(8, 48)])
def test_repeated_crops_take_one_read_as_the_bench_says(places, windows):
    disk, remote, counts = places
    options = {"windows": windows, "repeat": 2, "end_step": 16}
    expected = train(open_source("tiny", disk, "train"), **options)
    source, before = open_source("tiny", remote, "train"), counts.copy()
    found = train(source, **options)
    np.testing.assert_array_equal(
        [batch["image"] for batch in expected], [batch["image"] for batch in found]
    )
    media = (counts - before)["GET media"]
    splits = Splits(source, source, None, None, 3, 12, None, repeat=2)
    requests, records, _ = count_reads(splits, windows)
    assert 0 <= media - 192 * requests - 3 <= 3  # of the indices of 3 shards
    assert windows is not None or requests == records == 0.5


def test_evaluation_reads_many_at_once(places):
    _, remote, counts = places
    source, options = open_source("tiny", remote, "train"), {"batch_size": 48, "threads": 2}
    before = counts.copy()
    with eval_batches(
        source, EvalTransform((16, 16)), positions=np.arange(48), **options
    ) as batches:
        ids = np.concatenate([batch["id"] for batch in batches])
    assert ids.tolist() == list(range(96))
    assert (counts - before)["GET media"] == 2 * 2 + 3  # both in two shards; and their indices


def test_a_damaged_record_is_named_and_its_neighbours_are_read(places, bucket):
    disk, _, _ = places
    folder = to_path(bucket[0]) / "damaged/tiny/1.0.0"
    for name in os.listdir(f"{disk}/tiny/1.0.0"):
        content = bytearray(to_path(f"{disk}/tiny/1.0.0/{name}").read_bytes())
        if name.endswith("00000-of-00003"):
            content[len(content) // 4] ^= 255  # inside one of 40 records
        (folder / name).write_bytes(bytes(content))
    source, bad = open_source("tiny", str(folder.parent.parent), "train"), []
    for index in range(40):
        try:
            source[index]
        except DecodeError:
            bad.append(index)
    assert len(bad) == 1
    with pytest.raises(DecodeError, match=f"tiny/train#{bad[0]}: the record cannot be read"):
        source[bad[0]]
    assert not set(source.read(0, 40)) & set(bad)
    found = train(source, windows=Windows(8, 48), bad_records="skip")
    ids = np.concatenate([batch["id"] for batch in found])
    expected = [i if i not in bad else i + 1 for i in range(96)]
    assert sorted(ids.tolist()) == expected


def test_what_is_not_there_is_said(places, bucket):
    _, remote, _ = places
    with pytest.raises(UserError, match=r"folders in gs://runs/tfds: tiny"):
        open_source("imagenet2012", remote, "train")
    with pytest.raises(UserError, match=r"data\.dir: there is no folder gs://runs/none"):
        open_source("tiny", f"{bucket[0]}/none", "train")
    with pytest.raises(UserError, match="a folder of pictures must be on disk"):
        open_source("folder", remote, "train")
    (to_path(remote) / "tiny/1.0.0/tiny-validation.array_record-00000-of-00001").unlink()
    with pytest.raises(UserError, match=r"1 of 1 shards .* are missing"):
        open_source("tiny", remote, "validation")


def test_tfrecord_in_a_bucket_is_refused(tmp_path, bucket):
    dataset = TinyDataset(tmp_path, "tfrecord", {"train": [2]})
    for file in dataset.folder.iterdir():
        (to_path(bucket[0]) / "old/tiny/1.0.0" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"in a bucket array_record is read.*array_record"):
        open_source("tiny", f"{bucket[0]}/old", "train")
