"""Pixels as what models compute on, normalised and in patches (paper section 3), and back."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


@jax.named_scope("images")
def normalize_shown(
    images: jax.Array, size: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
    """As `normalize`, and 0 beyond `size` [B, 2], the height and width of what images show before
    they were padded right and below."""
    rows = jnp.arange(images.shape[1])[None, :, None, None] < size[:, 0, None, None, None]
    columns = jnp.arange(images.shape[2])[None, None, :, None] < size[:, 1, None, None, None]
    return jnp.where(rows & columns, normalize(images, mean, std), 0)


@jax.named_scope("images")
def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Images [B, H, W, C] uint8 -> float32, with C statistics of pixels in [0, 1] taken out."""
    return (images.astype(jnp.float32) / 255.0 - np.float32(mean)) / np.float32(std)


def denormalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """The inverse of `normalize`: [B, H, W, C] float -> uint8, rounded and clipped."""
    pixels = (images.astype(jnp.float32) * np.float32(std) + np.float32(mean)) * 255.0
    return pixels.round().clip(0, 255).astype(jnp.uint8)


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """Cuts images [B, H, W, C] into patches [B, L, p*p*C], in row-major order; inside a patch the
    order is (row, column, channel)."""
    b, h, w, c = images.shape
    p = patch_size
    x = images.reshape(b, h // p, p, w // p, p, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches: jax.Array, patch_size: int, image_size: tuple[int, int]) -> jax.Array:
    """The inverse of `patchify`: [B, L, p*p*C] -> [B, H, W, C]."""
    b, _, d = patches.shape
    p = patch_size
    h, w = image_size
    x = patches.reshape(b, h // p, w // p, p, p, d // (p * p))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, d // (p * p))
