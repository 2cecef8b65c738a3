"""Pictures with label maps: folders of both, and TFDS sets that hold both."""

import pickle

import pytest
from PIL import Image
from tiny_dataset import TinyDataset

from mae_jax import UserError
from mae_jax.data.segmentation import SegmentEvalTransform, decode_labels
from mae_jax.data.segmentation_folder import open_segmentation_folder
from mae_jax.data.sources import open_source
from mae_jax.data.splits import Splits
from mae_jax.data.transforms import decode


def write(path, number, mode="RGB", size=(6, 4)):
    """A picture of one colour, or a label map of one number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = (number, 7, 9) if mode == "RGB" else number
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def ade20k(tmp_path):
    """ADE20K's layout: 3 pairs to train on and 2 to validate, each told by its red and number."""
    for place, numbers in (("training", (1, 2, 3)), ("validation", (4, 5))):
        for n in numbers:
            write(tmp_path / f"images/{place}/p{n}.png", n)
            write(tmp_path / f"annotations/{place}/p{n}.png", n, "L")
    return tmp_path


def pairs(source):
    """Red of every picture and number of its label map."""
    found = []
    for i in range(len(source)):
        record = source[i]
        labels = decode_labels(record.segmentation, record.name, (4, 6), classes=100)
        found.append((int(decode(record.image, 3, record.name)[0, 0, 0]), int(labels[0, 0])))
    return found


def told(error):
    """The text of an error, which is one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


def test_ade20k_layout_gives_each_picture_its_label_map(ade20k):
    source = open_segmentation_folder(str(ade20k), "train")
    assert pairs(source) == [(1, 1), (2, 2), (3, 3)]
    assert source.num_classes is None
    assert source.class_names is None
    assert pairs(open_segmentation_folder(str(ade20k), "validation[1:]")) == [(5, 5)]
    assert pairs(pickle.loads(pickle.dumps(source))) == pairs(source)
    name = source[1].name
    assert name.startswith("segmentation_folder/train#1 (")
    assert name.endswith("training/p2.png)")
    assert "images/training/p2.png, label map" in name


def test_label_maps_are_read_only_where_asked_for(ade20k):
    plain = open_source("segmentation_folder", str(ade20k), "train")
    assert plain.num_classes is None
    assert [plain[i].segmentation for i in range(3)] == [None] * 3
    both = open_source("segmentation_folder", str(ade20k), "train", segmentation=True)
    assert both[0].segmentation is not None


@pytest.mark.parametrize("name", ["demo", "folder"])
def test_sets_without_label_maps_are_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"no label maps.*segmentation_folder") as error:
        open_source(name, str(tmp_path), "train", segmentation=True)
    told(error)


def test_other_names_suffixes_and_folders_below(tmp_path):
    for n in range(1, 52):
        write(tmp_path / f"JPEGImages/street/p{n:02d}.jpg", n)
        write(tmp_path / f"SegmentationClass/street/p{n:02d}{'_mask' * (n % 2)}.png", n, "L")
    train = open_segmentation_folder(str(tmp_path), "train")
    held_out = open_segmentation_folder(str(tmp_path), "validation")
    assert [number for _, number in pairs(held_out)] == [1, 51]  # every 50th
    assert [number for _, number in pairs(train)] == list(range(2, 51))


def test_names_of_classes(ade20k):
    (ade20k / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n1\t0.15\t1\t1\twall\n2\t0.1\t1\t1\tbuilding, edifice\n"
    )
    source = open_segmentation_folder(str(ade20k), "train")
    assert source.class_names == ["wall", "building, edifice"]
    assert source.num_classes == 2
    (ade20k / "classes.txt").write_text("sky\nroad\ncar\n\n")  # one's own goes first
    source = open_segmentation_folder(str(ade20k), "train")
    assert source.class_names == ["sky", "road", "car"]
    assert source.num_classes == 3
    (ade20k / "classes.txt").write_text("sky\n\ncar\n")
    with pytest.raises(UserError, match=r"classes.txt has no name in entry 2"):
        open_segmentation_folder(str(ade20k), "train")
    (ade20k / "classes.txt").write_text("sky\nsky\n")
    with pytest.raises(UserError, match=r"classes.txt has the class 'sky' twice"):
        open_segmentation_folder(str(ade20k), "train")


def remove_mask(root):
    (root / "annotations/training/p2.png").unlink()
    return r"images/training/p2.png has no label map: add it below .*annotations/training"


def remove_image(root):
    (root / "images/training/p2.png").unlink()
    return r"annotations/training/p2.png has no picture: add it below .*images/training"


def remove_masks(root):
    (root / "annotations").rename(root / "other")
    return "no folder of maps; have one of annotations/, masks/"


def remove_validation(root):
    (root / "annotations/training").rename(root / "annotations/more")
    return "images has training/, and .*annotations no such folder"


def second_folder(root):
    (root / "masks").mkdir()
    return "both annotations/ and masks/"


def two_masks(root):
    write(root / "annotations/training/p2_mask.png", 2, "L")
    return "p2.png and .*p2_mask.png would belong to the same pair; rename or remove one"


@pytest.mark.parametrize(
    "spoil",
    [remove_mask, remove_image, remove_masks, remove_validation, second_folder, two_masks],
)
def test_what_does_not_fit_is_told_in_a_line_with_file_and_remedy(ade20k, spoil):
    expected = spoil(ade20k)
    with pytest.raises(UserError, match=expected) as error:
        open_segmentation_folder(str(ade20k), "train")
    told(error)


def test_a_split_that_is_not_there(ade20k):
    with pytest.raises(UserError, match=r"cannot read 'test'.*Splits that exist: train") as error:
        open_segmentation_folder(str(ade20k), "test")
    told(error)


def test_another_label_map_is_another_identity(ade20k):
    before = open_segmentation_folder(str(ade20k), "train").identity()
    assert open_segmentation_folder(str(ade20k), "train").identity() == before
    write(ade20k / "annotations/training/p2.png", 9, "L", (60, 40))
    assert open_segmentation_folder(str(ade20k), "train").identity() != before


def test_another_label_map_is_another_fact(ade20k):
    def facts():
        source = open_segmentation_folder(str(ade20k), "train")
        crops = SegmentEvalTransform((4, 6), 9, stride=(4, 6))
        return Splits(source, source, crops, crops, seed=0, batch_size=1, classes=None).facts()

    before = facts()
    assert facts() == before
    write(ade20k / "annotations/training/p1.png", 5, "L")
    assert {key for key, value in facts().items() if value != before[key]} == {
        "label map 0 of data.train_split",
        "label map 0 of data.eval_split",
    }


def test_tfds_sets_with_label_maps(tmp_path):
    made = TinyDataset(tmp_path, "array_record", {"train": [3]}, label_maps="segmentation_mask")
    source = open_source("tiny", made.root, "train", segmentation=True)
    assert source.num_classes is None
    assert source.class_names is None
    for index, (image, _) in enumerate(made.written["train"]):
        record = source[index]
        height, width = decode(image, 3, "").shape[:2]
        labels = decode_labels(record.segmentation, record.name, (height, width), classes=3)
        assert (labels == index % 3).all()
        assert record.image == image
    plain = open_source("tiny", made.root, "train")
    assert plain[0].segmentation is None
    assert plain.num_classes == 3


def test_a_tfds_set_that_names_the_classes_of_its_maps(tmp_path):
    made = TinyDataset(tmp_path, "array_record", {"train": [2]}, label_maps="LabeledImage")
    source = open_source("tiny", made.root, "train", segmentation=True)
    assert source.num_classes == 2
    assert source.class_names == ["sky", "road"]


def test_tfds_sets_without_label_maps_and_the_trap_are_refused(tmp_path):
    made = TinyDataset(tmp_path, "array_record", {"train": [1]})
    with pytest.raises(UserError, match="must have one label map in a record") as error:
        open_source("tiny", made.root, "train", segmentation=True)
    told(error)
    (tmp_path / "tiny").rename(tmp_path / "scene_parse150")
    info = tmp_path / "scene_parse150/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace('"tiny"', '"scene_parse150"'))
    with pytest.raises(UserError, match=r"another challenge.*segmentation_folder") as error:
        open_source("scene_parse150", made.root, "train", segmentation=True)
    told(error)
