"""Models for weights that have been read: what a description describes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.interop.checkpoint import Checkpoint
from mae_jax.interop.description import Description, WeightsError
from mae_jax.interop.weights import Params
from mae_jax.models.mae import MAE, Decoder
from mae_jax.models.vit import ViT

Features = dict[str, jax.Array]


def build_mae(d: Description, dtype: jnp.dtype = jnp.float32) -> MAE:
    """The encoder and decoder.

    Raises:
      WeightsError: there is no decoder, or nobody knows what it predicts.
    """
    if not d.decoder_depth:
        raise WeightsError("these weights have no decoder: take a full checkpoint")
    if not d.target:
        raise WeightsError(
            "the file does not say what its decoder predicts: give target=norm_pixel (official "
            "*_full.pth) or target=pixel (official mae_visualize_*.pth)"
        )
    decoder = Decoder(
        grid=d.grid,
        patch_values=d.patch_size**2 * d.channels,
        width=d.decoder_width,
        depth=d.decoder_depth,
        heads=d.decoder_heads,
        dtype=dtype,
    )
    return MAE(encoder=build_encoder(d, dtype=dtype), decoder=decoder, target=d.target)


def build_encoder(d: Description, *, depth: int = 0, dtype: jnp.dtype = jnp.float32) -> ViT:
    """The encoder, or its first `depth` blocks with the final norm after them."""
    return ViT(
        image_size=d.image_size,
        patch_size=d.patch_size,
        channels=d.channels,
        width=d.width,
        depth=depth or d.depth,
        heads=d.heads,
        dtype=dtype,
    )


def encoder_params(checkpoint: Checkpoint) -> Params:
    """The parameters `build_encoder` takes.

    Raises:
      WeightsError: features would not be those of the trained model.
    """
    if checkpoint.trained_positions or "norm.weight" not in checkpoint.tensors:
        raise WeightsError(
            f"{checkpoint.source}: its positions were trained or its final norm was dropped "
            "(fine-tuning does both), and the encoder here has fixed positions and a final norm. "
            "Use the pretrained weights it came from"
        )
    return checkpoint.params()["encoder"]


def features_function(
    d: Description, *, block: int = 0, dtype: jnp.dtype = jnp.float32
) -> Callable[[Params, jax.Array], Features]:
    """A pure function of (encoder parameters, images) for features.

    Args:
      block: the number of blocks to run, 1 to depth; 0 runs all. The final norm follows whichever
        block is the last (as timm's `forward_intermediates(norm=True)`).

    Returns:
      (params, images [B, H, W, C] uint8) -> {"cls": [B, D], "mean": [B, D] over patches,
      "tokens": [B, 1 + L, D]}, float32.

    Raises:
      WeightsError: there is no such block.
    """
    if not 0 <= block <= d.depth:
        raise WeightsError(f"block {block}: the encoder has blocks 1 to {d.depth}")
    encoder = build_encoder(d, depth=block, dtype=dtype)
    mean, std = np.asarray(d.mean, np.float32), np.asarray(d.std, np.float32)

    def features(params: Params, images: jax.Array) -> Features:
        x = (images.astype(jnp.float32) / 255.0 - mean) / std  # [B, H, W, C]
        tokens = encoder.apply({"params": params}, x).astype(jnp.float32)  # [B, 1 + L, D]
        return {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(axis=1), "tokens": tokens}

    return features
