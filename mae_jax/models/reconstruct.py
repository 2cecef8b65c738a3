"""From a masked autoencoder's predictions back to pictures."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mae_jax.models.mae import MAE
from mae_jax.models.masking import Masking
from mae_jax.models.targets import patchify, to_pixels, unpatchify


def reconstruct(
    model: MAE,
    params: Any,
    images: jax.Array,
    masking: Masking,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, jax.Array]:
    """Images [B, H, W, C] uint8 with their removed patches as the model predicts them.

    Visible patches are those of the image: the loss never asks for a prediction there.

    Args:
      mean, std: channel statistics the model's input is normalised with, of pixels in [0, 1].

    Returns:
      "pixels" [B, H, W, C] uint8, "mask" [B, L] (1 = removed), "loss" [B] over the removed patches.
    """
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    x = (images.astype(jnp.float32) / 255.0 - mean) / std
    output = model.apply({"params": params}, x, masking)
    p, size = model.encoder.patch_size, images.shape[1:3]
    predicted = to_pixels(model.target, output.predictions, patchify(x, p))  # [B, L, p*p*C]
    predicted = (unpatchify(predicted, p, size) * std + mean) * 255  # [B, H, W, C]
    removed = jnp.repeat(masking.mask[:, :, None], predicted[0].size // masking.mask.shape[1], 2)
    pixels = jnp.where(
        unpatchify(removed, p, size) > 0, predicted.round().clip(0, 255).astype(jnp.uint8), images
    )
    return {"pixels": pixels, "mask": masking.mask, "loss": output.loss}
