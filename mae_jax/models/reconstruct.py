"""From a masked autoencoder's predictions back to pictures."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mae_jax.models.mae import MAE
from mae_jax.models.masking import Masking
from mae_jax.models.patches import unpatchify


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
      "pixels" [B, H, W, C] uint8, "mask" [B, L] (1 = removed), "loss" [B] over the removed patches;
      no "pixels" where the target has no way back to them.
    """
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    x = (images.astype(jnp.float32) / 255.0 - mean) / std
    output = model.apply({"params": params}, x, masking)
    result = {"mask": masking.mask, "loss": output.loss}
    # [B, L, p*p*C]
    predicted = model.target.to_pixels(output.predictions, x, params.get("target_state"))
    if predicted is None:
        return result
    p, size = model.encoder.patch_size, images.shape[1:3]
    predicted = (unpatchify(predicted, p, size) * std + mean) * 255  # [B, H, W, C]
    removed = jnp.repeat(masking.mask[:, :, None], p * p * images.shape[3], axis=2)
    pixels = jnp.where(
        unpatchify(removed, p, size) > 0, predicted.round().clip(0, 255).astype(jnp.uint8), images
    )
    return {"pixels": pixels, **result}
