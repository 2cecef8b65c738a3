import dataclasses

import numpy as np
import pytest
from test_pipeline import Pictures

from mae_jax import UserError
from mae_jax.data.record import DecodeError
from mae_jax.data.splits import Splits, common_classes
from mae_jax.data.transforms import EvalTransform, TrainTransform


def splits(source, **options):
    return Splits(
        train=source,
        eval=source,
        train_transform=TrainTransform((8, 8)),
        eval_transform=EvalTransform((8, 8)),
        seed=0,
        batch_size=4,
        classes=None,
        **options,
    )


def test_examples_are_spread_over_a_split_and_come_with_their_names():
    source = Pictures(9, bad=(4,))
    images, labels, names = splits(source, bad_records="skip").examples(source, 3)
    assert labels.tolist() == [0, 8]
    assert names == ["pictures/train#0", "pictures/train#8"]
    for image, label in zip(images, labels, strict=True):
        np.testing.assert_array_equal(image, EvalTransform((8, 8)).image(source[int(label)]))
    assert len(splits(source, bad_records="skip").examples(source, 99)[0]) == 8
    with pytest.raises(DecodeError, match=r"pictures/train#4.*data\.bad_records=skip"):
        splits(source).examples(source, 3)
    bad = Pictures(1, bad=(0,))
    with pytest.raises(DecodeError, match="none of 1 records"):
        splits(bad, bad_records="skip").examples(bad, 3)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"num_classes": None}, r"probe\.name: pictures, split val, has no labels, and who knows"),
        ({"num_classes": 3}, r"probe\.eval_split: val has 3 classes, train has 2\. "),
        ({"class_names": ["cat", "emu"]}, "in one of them only: dog, emu"),
        ({"class_names": ["dog", "cat"]}, "train has 2, in another order"),
    ],
)
def test_splits_whose_labels_mean_different_things_are_refused(theirs, message):
    train = Pictures(2, num_classes=2, class_names=["cat", "dog"])
    if "num_classes" in theirs:
        train.class_names = None
    evaluation = dataclasses.replace(train, split="val", **theirs)
    assert common_classes(train, train, "probe", "who knows") == 2
    with pytest.raises(UserError, match=message):
        common_classes(train, evaluation, "probe", "who knows")
