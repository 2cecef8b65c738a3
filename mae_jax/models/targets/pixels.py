"""Pixels as targets (paper section 3, "Reconstruction target")."""

from typing import Any

import jax
import jax.numpy as jnp

from mae_jax.models.patches import patchify
from mae_jax.models.targets.base import Target

NORM_PIXEL_EPS = 1e-6


class Pixel(Target):
    """The pixels themselves, normalised by the data set's channel statistics."""

    def values(self, images: jax.Array, state: Any) -> jax.Array:
        """The patches [B, L, p*p*C]."""
        return patchify(images, self.patch_size)

    def to_pixels(
        self, predictions: jax.Array, images: jax.Array, mask: jax.Array, state: Any
    ) -> jax.Array:
        """The predictions as they are."""
        return predictions


class NormPixel(Target):
    """Pixels normalised by the mean and standard deviation of their own patch."""

    note = (
        "The model predicts each patch normalised: the hidden patches shown take brightness and "
        "contrast from the original."
    )

    def values(self, images: jax.Array, state: Any) -> jax.Array:
        """The normalised patches [B, L, p*p*C]."""
        patches = patchify(images, self.patch_size)
        mean, std = _statistics(patches)
        return (patches - mean) / std

    def to_pixels(
        self, predictions: jax.Array, images: jax.Array, mask: jax.Array, state: Any
    ) -> jax.Array:
        """Predictions with level and contrast, of which they say nothing, from the true patches."""
        mean, std = _statistics(patchify(images, self.patch_size))
        return predictions * std + mean


def _statistics(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation (unbiased, n - 1, as the reference) of each patch: [B, L, 1]."""
    mean = patches.mean(axis=-1, keepdims=True)
    var = patches.var(axis=-1, keepdims=True, ddof=1)
    return mean, jnp.sqrt(var + NORM_PIXEL_EPS)
