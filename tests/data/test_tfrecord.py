import os
import pathlib

import numpy as np
import pytest
from tiny_dataset import TinyDataset, write_tfrecord

from mae_jax.data import tfrecord
from mae_jax.data.record import DecodeError
from mae_jax.data.sources import open_source
from mae_jax.data.tfrecord import TfrecordReader, offset_index

RECORDS = [b"first", b"", b"x" * 5000, b"last"]


@pytest.fixture
def shard(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "data" / "a.tfrecord"
    path.parent.mkdir()
    write_tfrecord(path, RECORDS)
    return path


def test_records_come_back_in_any_order(shard):
    reader = TfrecordReader([str(shard), str(shard)], [4, 4])
    assert [reader.read(s, i, i + 1)[0] for s in (1, 0) for i in (3, 1, 2, 0)] == [
        RECORDS[i] for i in (3, 1, 2, 0)
    ] * 2


def test_tfrecord_and_array_record_of_one_dataset_are_equal(tmp_path):
    sources = []
    for file_format in ("tfrecord", "array_record"):
        TinyDataset(tmp_path / file_format, file_format, {"train": [3, 4]})
        sources.append(open_source("tiny", str(tmp_path / file_format), "train"))
    a, b = sources
    assert [a[i] for i in range(7)] == [b[i] for i in range(7)]


def test_index_is_built_once_and_again_when_the_shard_changes(shard, monkeypatch):
    walks = []
    walk = tfrecord._walk
    monkeypatch.setattr(tfrecord, "_walk", lambda *a: walks.append(a) or walk(*a))
    first = offset_index(str(shard))
    np.testing.assert_array_equal(offset_index(str(shard)), first)
    assert len(walks) == 1
    assert list((shard.parent / ".mae_jax_index").iterdir())
    write_tfrecord(shard, RECORDS[:2])
    assert len(offset_index(str(shard))) == 3
    assert len(walks) == 2


def test_index_goes_home_when_the_dataset_cannot_be_written(shard):
    (shard.parent / ".mae_jax_index").write_text("in the way")
    offset_index(str(shard))
    home = pathlib.Path(os.environ["HOME"]) / ".cache" / "mae_jax" / "tfrecord"
    assert [p.name for p in home.rglob("*.npy")] == ["a.tfrecord.npy"]


def test_half_written_index_is_made_again(shard):
    expected = offset_index(str(shard))
    cache = shard.parent / ".mae_jax_index" / "a.tfrecord.npy"
    cache.write_bytes(cache.read_bytes()[:-8])
    np.testing.assert_array_equal(offset_index(str(shard)), expected)


@pytest.mark.parametrize("cut", [1, 10, 30, 5010])
def test_truncated_shard_is_named(shard, cut):
    shard.write_bytes(shard.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"a\.tfrecord is truncated"):
        offset_index(str(shard))


def test_damaged_length_is_named_with_its_record(shard):
    data = bytearray(shard.read_bytes())
    data[12 + 5 + 4] ^= 1  # lowest byte of the second record's length
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tfrecord: the header of record 1 fails"):
        offset_index(str(shard))


def test_damaged_data_fail_their_checksum(shard):
    data = bytearray(shard.read_bytes())
    data[data.index(b"x" * 100) + 50] ^= 1
    shard.write_bytes(data)
    reader = TfrecordReader([str(shard)], [4])
    assert [reader.read(0, i, i + 1)[0] for i in (0, 1, 3)] == [RECORDS[i] for i in (0, 1, 3)]
    with pytest.raises(DecodeError, match=r"damaged.*a\.tfrecord"):
        reader.read(0, 2, 3)


def test_shard_with_another_number_of_records_is_named(shard):
    with pytest.raises(ValueError, match=r"a\.tfrecord holds 4 records .* says 5"):
        TfrecordReader([str(shard)], [5])


def test_damaged_record_is_a_decode_error_with_its_name(tmp_path):
    dataset = TinyDataset(tmp_path, "tfrecord", {"train": [3]})
    path = dataset.path("train", 0, 1, "tfrecord")
    data = bytearray(path.read_bytes())
    data[12:20] = b"\xff" * 8
    path.write_bytes(data)
    source = open_source("tiny", str(tmp_path), "train")
    with pytest.raises(DecodeError, match="tiny/train#0"):
        source[0]
    assert source[1].label == 1
