"""Histograms of oriented gradients as targets (MaskFeat, arXiv 2112.09133)."""

from typing import Any

import jax
import jax.numpy as jnp

from mae_jax.models.targets.base import Target

CELL = 8  # pixels a side
BINS = 9  # of 20 degrees; opposite directions share one
EPS = 1e-12  # as torch.nn.functional.normalize


class HOG(Target):
    """For each channel and cell of 8 x 8 pixels the strength of gradients in nine directions, to
    unit length: 108 numbers for a patch of 16 x 16 pixels and three channels.

    As the code of MaskFeat computes it: of the normalised image, gradients by Sobel's kernels with
    the border reflected, each pixel in one bin, cells not weighted and not normalised by others'.
    """

    note = (
        "The model predicts histograms of oriented gradients: no picture can be drawn from these, "
        "so hidden patches stay grey."
    )

    @property
    def outputs(self) -> int:
        """Nine for each channel of each cell."""
        return (self.patch_size // CELL) ** 2 * self.channels * BINS

    def values(self, images: jax.Array, state: Any) -> jax.Array:
        """Histograms [B, L, outputs]; inside a patch by (row and column of the cell, channel, bin).

        The patch size has to be a multiple of 8.
        """
        x = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        left_right = x[:, :, :-2] - x[:, :, 2:]  # [B, H + 2, W, C]
        top_bottom = x[:, :-2] - x[:, 2:]  # [B, H, W + 2, C]
        gx = left_right[:, :-2] + 2 * left_right[:, 1:-1] + left_right[:, 2:]  # [B, H, W, C]
        gy = top_bottom[:, :, :-2] + 2 * top_bottom[:, :, 1:-1] + top_bottom[:, :, 2:]
        bins = jnp.floor(jnp.arctan2(gx, gy) / jnp.pi * BINS) % BINS
        votes = jnp.hypot(gx, gy)[..., None] * (bins[..., None] == jnp.arange(BINS))
        b, h, w, c = images.shape
        p, cells = self.patch_size, self.patch_size // CELL
        votes = votes.reshape(b, h // p, cells, CELL, w // p, cells, CELL, c, BINS)
        histograms = votes.sum(axis=(3, 6))  # [B, rows, cells, columns, cells, C, 9]
        length = jnp.linalg.norm(histograms, axis=-1, keepdims=True)
        histograms = histograms / jnp.maximum(length, EPS)
        return histograms.transpose(0, 1, 3, 2, 4, 5, 6).reshape(b, -1, self.outputs)
