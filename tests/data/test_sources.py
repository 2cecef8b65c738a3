import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tiny_dataset import TinyDataset, jpeg

from mae_jax import UserError
from mae_jax.data import demo
from mae_jax.data.folder import list_pictures
from mae_jax.data.record import DecodeError
from mae_jax.data.sources import open_source
from mae_jax.data.transforms import decode

SPLITS = {"train": [5, 7, 4], "validation": [6]}


def contents(source):
    return [(source[i].image, source[i].label) for i in range(len(source))]


@pytest.fixture
def folder(tmp_path):
    """root with train/{b,a}/ and val/{a,b}/, extensions in several cases."""
    for split, numbers in (("train", range(6)), ("val", range(6, 8))):
        for number in numbers:
            place = tmp_path / split / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            suffix = (".jpg", ".JPEG", ".Jpg")[number % 3]
            (place / f"{number}{suffix}").write_bytes(jpeg(16, 16, number))
    (tmp_path / "train" / "a" / "notes.txt").write_text("not a picture")
    return tmp_path


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", lambda w: w["train"]),
        ("validation", lambda w: w["validation"]),
        ("train[:50%]", lambda w: w["train"][:8]),
        ("train[3:10]", lambda w: w["train"][3:10]),
        ("train[-6:]", lambda w: w["train"][-6:]),
        ("train+validation[:2]", lambda w: w["train"] + w["validation"][:2]),
    ],
)
def test_tfds_split_holds_what_was_written(tmp_path, file_format, split, expected):
    dataset = TinyDataset(tmp_path, file_format, SPLITS)
    source = open_source("tiny", dataset.root, split)
    assert contents(source) == expected(dataset.written)
    assert (source.num_classes, source.class_names) == (3, ["ant", "bee", "cat"])


def test_tfds_record_name_has_split_index_and_file_name(tmp_path):
    dataset = TinyDataset(tmp_path, "tfrecord", SPLITS)
    assert open_source("tiny", dataset.root, "train")[6].name == "tiny/train#6 (train6.jpg)"


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_tfds_source_survives_pickling_after_use(tmp_path, file_format):
    dataset = TinyDataset(tmp_path, file_format, SPLITS)
    source = open_source("tiny", dataset.root, "train")
    before = contents(source)
    assert contents(pickle.loads(pickle.dumps(source))) == before


def test_tfds_newest_version_is_taken_unless_one_is_named(tmp_path):
    TinyDataset(tmp_path, "tfrecord", {"train": [1]}, version="9.0.0")
    TinyDataset(tmp_path, "tfrecord", {"train": [2]}, version="10.0.0")
    assert len(open_source("tiny", str(tmp_path), "train")) == 2
    assert len(open_source("tiny:9.0.0", str(tmp_path), "train")) == 1
    with pytest.raises(UserError, match=r"version 1\.0\.0 .*'9\.0\.0', '10\.0\.0'"):
        open_source("tiny:1.0.0", str(tmp_path), "train")


def test_tfds_config_is_found_and_must_be_chosen_among_several(tmp_path):
    for config in ("small", "large"):
        dataset = TinyDataset(tmp_path / "made" / config, "tfrecord", {"train": [2]})
        (tmp_path / "tiny").mkdir(exist_ok=True)
        (dataset.folder.parent).rename(tmp_path / "tiny" / config)
    assert len(open_source("tiny/small:1.0.0", str(tmp_path), "train")) == 2
    with pytest.raises(ValueError, match="tiny/large, tiny/small"):
        open_source("tiny", str(tmp_path), "train")


def test_tfds_picture_feature_of_any_name_and_no_labels(tmp_path):
    dataset = TinyDataset(tmp_path, "tfrecord", {"train": [2]}, image_key="scan", labelled=False)
    source = open_source("tiny", dataset.root, "train")
    assert [label for _, label in contents(source)] == [-1, -1]
    assert source[0].image == dataset.written["train"][0][0]
    assert source.num_classes is None


def test_tfds_errors_name_field_and_remedy(tmp_path):
    dataset = TinyDataset(tmp_path, "array_record", SPLITS)
    with pytest.raises(ValueError, match=r"data\.dir is not set"):
        open_source("tiny", None, "train")
    with pytest.raises(UserError, match=r"data\.dir: there is no folder"):
        open_source("tiny", str(tmp_path / "absent"), "train")
    with pytest.raises(
        UserError, match=r"folders in .*: tiny.*tfds build imagenet2012.*array_record"
    ):
        open_source("imagenet2012", dataset.root, "train")
    with pytest.raises(ValueError, match=r"train \(16 records\), validation \(6 records\)"):
        open_source("tiny", dataset.root, "test")
    with pytest.raises(ValueError, match=r"eval_split.*train\[5:5\]"):
        open_source("tiny", dataset.root, "train[5:5]")
    dataset.path("train", 1, 3, "array_record").unlink()
    with pytest.raises(UserError, match=r"1 of 3 shards .*array_record-00001-of-00003"):
        open_source("tiny", dataset.root, "train")


@pytest.mark.parametrize(
    ("name", "split", "count", "classes"),
    [("imagenet2012", "train", 400, 1000), ("cifar10", "test", 10000, 10),
     ("imagenette96", "validation", 3925, 10)],
)  # fmt: skip
def test_real_tfds_records_equal_what_tfds_reads(shared_tfds, name, split, count, classes):
    source = open_source(name, shared_tfds, split)
    assert (len(source), source.num_classes) == (count, classes)
    builder = tfds.builder(name, data_dir=shared_tfds)
    reference = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    for i in (0, 17, count - 1):
        record = source[i]
        assert record.image == reference[i]["image"]
        assert record.label == reference[i]["label"]


def test_folder_classes_are_sorted_and_val_means_validation(folder):
    source = open_source("folder", str(folder), "train")
    expected = [(jpeg(16, 16, n), n % 2) for n in (0, 2, 4, 1, 3, 5)]
    assert contents(source) == expected
    assert source.class_names == ["a", "b"]
    validation = open_source("folder", str(folder), "validation")
    assert contents(validation) == [(jpeg(16, 16, n), n % 2) for n in (6, 7)]
    assert contents(pickle.loads(pickle.dumps(source))) == expected


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train[:50%]", (0, 2, 4)),
        ("train[-2:]", (3, 5)),
        ("train[1:3]", (2, 4)),
        ("validation+train[:1]", (6, 7, 0)),
    ],
)
def test_folder_slices_as_tfds(folder, split, numbers):
    source = open_source("folder", str(folder), split)
    assert contents(source) == [(jpeg(16, 16, n), n % 2) for n in numbers]


def test_folder_without_splits_keeps_every_fiftieth_for_validation(tmp_path):
    for number in range(101):
        (tmp_path / f"{number:03d}.png").write_bytes(b"%d" % number)
    train = open_source("folder", str(tmp_path), "train")
    validation = open_source("folder", str(tmp_path), "validation")
    assert [image for image, _ in contents(validation)] == [b"0", b"50", b"100"]
    assert len(train) == 98
    assert {i for i, _ in contents(train)}.isdisjoint(i for i, _ in contents(validation))
    assert all(label == -1 for _, label in contents(train))
    assert train.num_classes is None


def test_folder_of_arrays_holds_any_channel_count(tmp_path):
    (tmp_path / "train").mkdir()
    pixels = np.arange(4 * 5 * 7, dtype=np.uint8).reshape(4, 5, 7)
    np.save(tmp_path / "train" / "x.npy", pixels)
    np.testing.assert_array_equal(open_source("folder", str(tmp_path), "train")[0].image, pixels)
    np.save(tmp_path / "train" / "x.npy", pixels.astype(np.float32))
    record = open_source("folder", str(tmp_path), "train")[0]
    with pytest.raises(DecodeError, match=r"x\.npy\).*float32"):
        decode(record.image, 7, record.name)
    (tmp_path / "train" / "x.npy").write_bytes(b"nothing")
    with pytest.raises(DecodeError, match=r"x\.npy\): cannot be read"):
        open_source("folder", str(tmp_path), "train")[0]


def test_folder_errors_name_field_and_remedy(folder, tmp_path):
    with pytest.raises(UserError, match=r"data\.dir: there is no folder"):
        open_source("folder", str(folder / "absent"), "train")
    with pytest.raises(ValueError, match=r"cannot read 'test'.*train, validation\."):
        open_source("folder", str(folder), "test")
    with pytest.raises(ValueError, match=r"train\[:999\]"):
        open_source("folder", str(folder), "train[:999]")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"no picture below .*empty"):
        open_source("folder", str(empty), "train")
    (folder / "train" / "loose.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="both loose"):
        open_source("folder", str(folder), "train")


def pictures(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(8, 8))


@pytest.mark.parametrize(
    ("names", "folders", "split", "message"),
    [
        (["train/a/1.jpg"], [], "validation", r"no such folder.*val/.*data\.eval_split.*: train\."),
        (
            ["train/a/b/1.jpg"],
            [],
            "train",
            r"train/a/b/1\.jpg lies too deep",
        ),
        (["train/a/1.jpg"], ["train/b"], "train", r"1 of 2 class folders.*b/.*fill or remove"),
        (["a/1.jpg"], ["b"], "train", r"1 of 2 class folders.*b/.*fill or remove"),
        (["val/1.jpg", "validation/1.jpg"], [], "validation", "both val/ and validation/"),
        (["train/a/1.heic"], [], "train", r"no picture below .*train"),
    ],
)
def test_folders_that_train_nonsense_are_refused_with_the_remedy(
    tmp_path, names, folders, split, message
):
    pictures(tmp_path, *names)
    for folder in folders:
        (tmp_path / folder).mkdir()
    with pytest.raises(UserError, match=message):
        open_source("folder", str(tmp_path), split)


def test_split_folders_are_found_in_any_case(tmp_path):
    pictures(tmp_path, "Train/a/1.jpg", "VAL/a/2.jpg")
    assert len(open_source("folder", str(tmp_path), "train")) == 1
    assert open_source("folder", str(tmp_path), "validation")[0].name.endswith("VAL/a/2.jpg)")


def test_a_class_without_validation_pictures_keeps_its_place(tmp_path, caplog):
    pictures(
        tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/a/1.jpg", "val/c/1.jpg"
    )
    (tmp_path / "val" / "b").mkdir()
    with caplog.at_level("WARNING"):
        source = open_source("folder", str(tmp_path), "validation")
    assert (source.class_names, source[1].label) == (["a", "b", "c"], 2)
    assert "b/" in caplog.text


def test_pictures_of_all_formats_are_listed_and_others_counted_aloud(tmp_path, caplog):
    read = ["a.JPG", "b.jpe", "c.jfif", "d.TIF", "e.tiff", "f.avif", "g.jp2", "h.npy"]
    pictures(tmp_path, *read, "x.heic", "y.HEIC", "notes.txt", ".hidden.png")
    with caplog.at_level("WARNING"):
        assert list_pictures(tmp_path, "--images") == read
    assert "left out 3 files that are not read: 2 .heic, 1 .txt" in caplog.text
    with pytest.raises(UserError, match="--images: there is no folder"):
        list_pictures(tmp_path / "absent", "--images")


def test_linked_class_folders_are_followed_but_never_in_circles(tmp_path):
    pictures(tmp_path / "elsewhere", "1.jpg", "2.jpg")
    pictures(tmp_path / "data", "train/a/3.jpg")
    train = tmp_path / "data" / "train"
    for name in ("b", "c"):
        (train / name).symlink_to(tmp_path / "elsewhere")
    expected = ["a/3.jpg", "b/1.jpg", "b/2.jpg", "c/1.jpg", "c/2.jpg"]
    assert list_pictures(train, "--images") == expected
    source = open_source("folder", str(tmp_path / "data"), "train")
    assert [source[i].label for i in range(5)] == [0, 1, 1, 2, 2]
    (train / "a" / "up").symlink_to(train)
    (tmp_path / "elsewhere" / "back").symlink_to(train / "a")
    found = list_pictures(train, "--images")
    assert len(set(found)) == len(found) < 20


def test_files_are_upright_and_every_record_tells_its_index(folder):
    source = open_source("folder", str(folder), "train[2:5]")
    assert [(source[i].id, source[i].upright) for i in range(3)] == [
        (0, True),
        (1, True),
        (2, True),
    ]
    assert not open_source("demo", None, "train[3:5]")[1].upright
    assert open_source("demo", None, "train[3:5]")[1].id == 1


def test_demo_is_deterministic_balanced_and_sliced():
    train = open_source("demo", None, "train")
    assert len(train) == 4096
    assert len(open_source("demo", None, "validation")) == 256
    np.testing.assert_array_equal(train[9].image, open_source("demo", None, "train")[9].image)
    part = open_source("demo", None, "train[100:110]")
    np.testing.assert_array_equal(part[3].image, train[103].image)
    labels = [train[i].label for i in range(800)]
    assert np.bincount(labels).tolist() == [100] * 8
    assert train.class_names[train[0].label] in train[0].name


def test_demo_validation_crops_show_nothing_that_training_sees():
    # Number the pixels of every photograph by column in place of showing them.
    for _, package, file, _ in demo.PHOTOGRAPHS:
        assert Image.open(demo._path(package, file)).width > 0
    train, validation = demo._parts("train"), demo._parts("validation")
    for i, (name, package, file, side) in enumerate(demo.PHOTOGRAPHS):
        image = Image.open(demo._path(package, file)).convert("RGB")
        image.thumbnail((demo.LONGEST_SIDE,) * 2, Image.BICUBIC)
        parts = [train[i], validation[i]] if side == "right" else [validation[i], train[i]]
        # Side by side the two parts are the photograph: they share no pixel.
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), np.asarray(image), name)


def test_demo_without_its_extra_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    demo._parts.cache_clear()
    with pytest.raises(UserError, match=r"scikit-image.*pip install 'mae_jax\[demo\]'"):
        open_source("demo", None, "train")


def test_the_identity_of_a_source_follows_its_files(tmp_path):
    def identity(folder="a", split="train"):
        return open_source("folder", str(tmp_path / folder), split).identity()

    for folder in "ab":
        for name in ("1.png", "2.png", "3.png"):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / folder / name)
    first = identity()
    assert identity() == first
    assert len({first, identity("b"), identity(split="train+validation")}) == 3
    Image.new("RGB", (9, 8)).save(tmp_path / "a" / "2.png")
    assert identity() != first
    demo = {split: open_source("demo", None, split).identity() for split in ("train", "train[:9]")}
    assert len(set(demo.values())) == 2
