"""Codes of a dVAE as targets (paper table 1d "dVAE token"; BEiT, arXiv 2106.08254)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mae_jax import UserError
from mae_jax.models.dvae import DVAE, STRIDE, DVAEShape, encoder_macs, map_pixels, unmap_pixels
from mae_jax.models.patches import patchify
from mae_jax.models.targets.base import Target


@dataclasses.dataclass(frozen=True)
class Token(Target):
    """The code that a tokenizer gives each patch, by cross entropy.

    The tokenizer sees the very image that the model sees, resized in the step to 8 pixels a patch
    (112 for 14 x 14) with Lanczos' kernel, antialiased. BEiT resizes the original crop in place of
    the model's view, on the host, to whole numbers.
    """

    shape: DVAEShape
    mean: tuple[float, ...]  # of pixels in [0, 1], taken out of the images
    std: tuple[float, ...]

    @classmethod
    def of(cls, spec: Any) -> "Token":
        """The target of a model with a tokenizer; UserError without."""
        if not spec.tokenizer:
            raise UserError("not known which tokenizer gives the codes that the decoder predicts")
        shape = DVAEShape(*spec.tokenizer)
        return cls(spec.patch_size, spec.channels, shape, spec.mean, spec.std)

    @property
    def note(self) -> str:
        """Where the pictures come from."""
        if self.shape.decoder:
            return "Hidden patches are what the tokenizer's decoder makes of the predicted codes."
        return (
            "The model predicts codes of a tokenizer without a decoder: no picture can be drawn "
            "from these, so hidden patches stay grey."
        )

    @property
    def outputs(self) -> int:
        """A logit for each code."""
        return self.shape.codes

    @property
    def dvae(self) -> DVAE:
        """The tokenizer."""
        return DVAE(self.shape, self.channels, parent=None)  # no part of the model that asks

    def init_state(self) -> dict[str, Any]:
        """The tokenizer's weights, to be loaded."""
        x = jax.ShapeDtypeStruct((1, STRIDE, STRIDE, self.channels), jnp.float32)
        weights = jax.eval_shape(self.dvae.init, jax.random.key(0), x)["params"]
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), weights)

    def macs(self, image_size: tuple[int, int]) -> int:
        """Multiply-adds of the tokenizer's encoder."""
        height, width = (side // self.patch_size * STRIDE for side in image_size)
        return encoder_macs(self.shape, self.channels, height, width)

    def logits(self, images: jax.Array, state: Any) -> jax.Array:
        """The tokenizer's logits [B, h, w, codes] of normalised images, h x w patches."""
        b, height, width, c = images.shape
        size = (b, height // self.patch_size * STRIDE, width // self.patch_size * STRIDE, c)
        pixels = images * np.float32(self.std) + np.float32(self.mean)
        pixels = jnp.clip(jax.image.resize(pixels, size, "lanczos3", antialias=True), 0, 1)
        return self.dvae.apply({"params": state}, map_pixels(pixels), method="encode")

    def values(self, images: jax.Array, state: Any) -> jax.Array:
        """Codes [B, L] int32."""
        codes = self.logits(images, state).argmax(axis=-1)
        return codes.reshape(images.shape[0], -1)

    def loss(self, predictions: jax.Array, values: jax.Array) -> jax.Array:
        """Cross entropy [B, L], in nats."""
        return optax.softmax_cross_entropy_with_integer_labels(predictions, values)

    def to_pixels(
        self, predictions: jax.Array, images: jax.Array, mask: jax.Array, state: Any
    ) -> jax.Array | None:
        """The decoder's picture of the most likely codes, and of the true ones where patches are
        visible; None if the tokenizer has no decoder."""
        if not self.shape.decoder:
            return None
        b, height, width, _ = images.shape
        codes = jnp.where(mask > 0, predictions.argmax(axis=-1), self.values(images, state))
        grid = (b, height // self.patch_size, width // self.patch_size)
        shares = jax.nn.one_hot(codes.reshape(grid), self.shape.codes)
        pixels = unmap_pixels(self.dvae.apply({"params": state}, shares, method="decode"))
        pixels = jax.image.resize(pixels, images.shape, "cubic")
        return patchify((pixels - np.float32(self.mean)) / np.float32(self.std), self.patch_size)
