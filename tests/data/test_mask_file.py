"""Masks of a user's own."""

import numpy as np
import pytest

from mae_jax import UserError
from mae_jax.data.mask_file import read_masks


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
@pytest.mark.parametrize("count", [None, 1, 3])
def test_masks_are_read_in_any_type_one_or_many(dtype, count, tmp_path):
    mask = np.arange(8).reshape(2, 4) % 2
    array = mask if count is None else np.stack([mask] * count)
    np.save(tmp_path / "m.npy", array.astype(dtype))
    masks = read_masks(tmp_path / "m.npy", (2, 4))
    assert masks.dtype == bool
    np.testing.assert_array_equal(masks, [mask.ravel()] * (count or 1))


def masks_with(*hidden):
    masks = np.zeros((len(hidden), 2, 4), np.uint8)
    for mask, count in zip(masks, hidden, strict=True):
        mask.flat[:count] = 1
    return masks


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (masks_with(3, 3, 5), r"holds uint8 \[3, 2, 4\]: mask 0 hides 3 patches, mask 2 5; all"),
        (masks_with(8), "hides 8 of 8 patches: one at least must stay"),
        (masks_with(0), "hides 0 of 8 patches"),
        (np.zeros((4, 2), bool), r"holds bool \[4, 2\]: give bool or 0 and 1 .*\[2, 4\] or \[n, 2"),
        (np.zeros((1, 1, 2, 4), bool), r"holds bool \[1, 1, 2, 4\]"),
        (np.zeros((0, 2, 4), bool), r"holds bool \[0, 2, 4\]"),
        (255 * masks_with(3), r"holds uint8 \[1, 2, 4\], not only 0 and 1"),
        (np.full((2, 4), np.nan), "holds float64 .*, not only 0 and 1"),
        (np.full((2, 4), "1"), "holds <U1 .*, not only 0 and 1"),
        (np.full((2, 4), None), r"not to be read as \.npy"),  # which would take a pickle
    ],
)
def test_masks_that_cannot_be_used_are_refused_by_file_type_and_shape(array, message, tmp_path):
    np.save(tmp_path / "m.npy", array)
    with pytest.raises(UserError, match=rf"^mask\.file = '.*/m\.npy'.*{message}"):
        read_masks(tmp_path / "m.npy", (2, 4))


@pytest.mark.parametrize("content", [None, b"", b"no array"])
def test_a_file_that_is_no_array_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "m.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"mask\.file = .*not to be read as \.npy"):
        read_masks(tmp_path / "m.npy", (2, 4))


def test_several_arrays_in_one_file_are_refused(tmp_path):
    with (tmp_path / "m.npy").open("wb") as file:
        np.savez(file, a=masks_with(3))
    with pytest.raises(UserError, match="holds several arrays"):
        read_masks(tmp_path / "m.npy", (2, 4))
