"""Masks of a user's own, from a file of numpy's."""

import io

import numpy as np

from mae_jax import UserError
from mae_jax.storage.files import PathLike, to_path


def read_masks(path: PathLike, grid: tuple[int, int], field: str = "mask.file") -> np.ndarray:
    """Masks [n, L] bool, True where a patch of `grid` is removed, for `masking.choose_masking`.

    The file holds [h, w] or [n, h, w], bool or 0 and 1. UserError, which names `field`: there is
    no such file, it holds something else, or some mask removes none, all, or not as many as others.
    """
    file, what = to_path(path), f"{field} = {str(path)!r}"
    remedy = f"give bool or 0 and 1 (hidden), [{grid[0]}, {grid[1]}] or [n, {grid[0]}, {grid[1]}]"
    try:
        array = np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{what}: not to be read as .npy ({error}); {remedy}") from error
    held = f"holds {getattr(array, 'dtype', 'several arrays')} {list(getattr(array, 'shape', ()))}"
    shape = getattr(array, "shape", ())[-2:]
    if shape != tuple(grid) or array.ndim not in (2, 3) or not array.size:
        raise UserError(f"{what} {held}: {remedy}")
    if array.dtype.kind not in "buif" or not np.isin(array, (0, 1)).all():
        raise UserError(f"{what} {held}, not only 0 and 1: {remedy}")
    masks = array.reshape(-1, grid[0] * grid[1]).astype(bool)
    counts = masks.sum(axis=1)
    if (other := np.flatnonzero(counts != counts[0])).size:
        numbers = f"mask 0 hides {counts[0]} patches, mask {other[0]} {counts[other[0]]}"
        raise UserError(f"{what} {held}: {numbers}; all have to hide equally many")
    if not 0 < counts[0] < masks.shape[1]:
        numbers = f"hides {counts[0]} of {masks.shape[1]} patches"
        raise UserError(f"{what} {held} and {numbers}: one at least must stay, and one go")
    return masks
