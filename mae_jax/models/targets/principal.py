"""The largest principal components of patches as targets (paper table 1d, "PCA")."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.models.patches import patchify
from mae_jax.models.targets.base import Target

COMPONENTS = 96  # paper section 4.1: "the largest PCA coefficients (96 here)"
FITTED_PATCHES = 2**17  # all of fewer, where an epoch has no more


class PCA(Target):
    """Coefficients of a patch, less the mean patch, on the largest components of training patches.

    The paper does not say what it takes the components of. Here: the patches that `Pixel` predicts
    (not normalised by their own statistics) of training crops before the flip, their mean taken
    out; the coefficients are not scaled, so each weighs in the loss by its variance. A patch of
    fewer than 96 numbers takes all of its components.
    """

    fitted = True
    note = (
        f"The model predicts {COMPONENTS} principal components of each patch: what hidden patches "
        "show has no finer detail than these."
    )

    @property
    def outputs(self) -> int:
        """96, or all that a small patch has."""
        return min(COMPONENTS, self.patch_size**2 * self.channels)

    def init_state(self) -> dict[str, jax.Array]:
        """A mean [p*p*C] and a basis [p*p*C, outputs] to be fitted."""
        numbers = self.patch_size**2 * self.channels
        return {"mean": jnp.zeros(numbers), "basis": jnp.zeros((numbers, self.outputs))}

    def fit(self, batches: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
        """Mean and basis of patches, their covariance summed in float64 batch by batch; the largest
        component first, each with its largest number positive."""
        count, total, products = 0, 0.0, 0.0
        for images in batches:
            x = np.float64(patchify(images, self.patch_size))  # [B, L, p*p*C]
            x = x.reshape(-1, x.shape[-1])
            count, total, products = count + len(x), total + x.sum(axis=0), products + x.T @ x
            if count >= FITTED_PATCHES:
                break
        mean = total / count
        basis = np.linalg.eigh(products / count - np.outer(mean, mean))[1][:, ::-1]
        basis = basis[:, : self.outputs]
        largest = np.take_along_axis(basis, np.abs(basis).argmax(axis=0)[None], axis=0)  # [1, 96]
        return {"mean": np.float32(mean), "basis": np.float32(basis * np.sign(largest))}

    def values(self, images: jax.Array, state: Any) -> jax.Array:
        """The coefficients [B, L, outputs]."""
        patches = patchify(images, self.patch_size) - state["mean"]
        return jnp.matmul(patches, state["basis"], precision="highest")

    def to_pixels(
        self, predictions: jax.Array, images: jax.Array, mask: jax.Array, state: Any
    ) -> jax.Array:
        """The mean patch, and the components as much as predicted."""
        return jnp.matmul(predictions, state["basis"].T, precision="highest") + state["mean"]
