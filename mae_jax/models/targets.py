"""Images as patches, and what the decoder is asked to predict (paper section 3, table 1d)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

NORM_PIXEL_EPS = 1e-6


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """Cuts images [B, H, W, C] into patches [B, L, p*p*C].

    Patches are in row-major order; inside a patch the order is (row, column, channel).
    """
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


def _patch_statistics(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of each patch over all its values: [B, L, 1] each.

    The variance is the unbiased one (n - 1), as in the reference.
    """
    mean = patches.mean(axis=-1, keepdims=True)
    var = patches.var(axis=-1, keepdims=True, ddof=1)
    return mean, jnp.sqrt(var + NORM_PIXEL_EPS)


def pixel(patches: jax.Array) -> jax.Array:
    """The pixels themselves, normalised by the data set's channel statistics."""
    return patches


def norm_pixel(patches: jax.Array) -> jax.Array:
    """Pixels normalised by the mean and standard deviation of their own patch."""
    mean, std = _patch_statistics(patches)
    return (patches - mean) / std


TARGETS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "pixel": pixel,
    "norm_pixel": norm_pixel,
}


def to_pixels(target: str, predictions: jax.Array, patches: jax.Array) -> jax.Array:
    """Puts predictions [B, L, p*p*C] back into pixels.

    A norm-pixel prediction says nothing about the level and contrast of a patch: those are taken
    from the true `patches` [B, L, p*p*C].
    """
    if target == "norm_pixel":
        mean, std = _patch_statistics(patches)
        return predictions * std + mean
    return predictions
