"""Weights of one image size, patch size or channel count, made to fit another."""

import jax
import jax.numpy as jnp
import numpy as np


def resize_positions(
    table: np.ndarray, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> np.ndarray:
    """Interpolates a position table [1, 1 + L, D] to another grid, the class row kept: bicubic as
    PyTorch computes it (a = -0.75, no antialias), as in the official fine-tuning."""
    if old_grid == new_grid:
        return table
    width = table.shape[-1]
    patches = jnp.asarray(table[:, 1:].reshape(*old_grid, width))
    resized = jax.image.resize(patches, (*new_grid, width), "cubic-pytorch", antialias=False)
    flat = np.asarray(resized).reshape(1, -1, width)
    return np.concatenate([table[:, :1], flat], axis=1)


def resize_patches(kernel: np.ndarray, patch_size: int) -> np.ndarray:
    """Fits a patch embedding [D, C, q, q] to patches of p x p pixels: [D, C, p, p].

    An enlarged patch gets the embedding the patch itself had, as nearly as least squares can: the
    pseudo-inverse of the resize (FlexiViT, arXiv 2212.08013, section 3.4).
    """
    old = kernel.shape[-1]
    if old == patch_size:
        return kernel
    basis = jnp.eye(old * old, dtype=jnp.float32).reshape(-1, old, old)
    shape = (old * old, patch_size, patch_size)
    resized = jax.image.resize(basis, shape, "cubic-pytorch", antialias=True)
    resize = np.asarray(resized, np.float64).reshape(old * old, -1).T  # [p*p, q*q]
    flat = kernel.reshape(*kernel.shape[:2], -1).astype(np.float64)  # [D, C, q*q]
    fitted = flat @ np.linalg.pinv(resize)  # [D, C, p*p]
    return fitted.reshape(*kernel.shape[:2], patch_size, patch_size).astype(np.float32)


def change_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Fits a patch embedding [D, C, p, p] to other channels. One gets the sum (grey is seen as its
    colour copy was); more get the old ones in turn, scaled so that the embedding keeps its size."""
    old = kernel.shape[1]
    if channels == old:
        return kernel
    if channels == 1:
        return kernel.sum(axis=1, keepdims=True)
    return kernel[:, np.arange(channels) % old] * np.float32(old / channels)
