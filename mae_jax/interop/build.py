"""Models for weights that have been read: what a description describes.

Functions on pixels take the position table from the file, so one model serves fixed positions
(pretraining) and trained ones (fine-tuning).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax import UserError
from mae_jax.interop.checkpoint import Checkpoint
from mae_jax.interop.description import Description
from mae_jax.interop.names import is_decoder
from mae_jax.interop.weights import Params, from_official
from mae_jax.models.classifier import Classifier, pool_tokens
from mae_jax.models.mae import MAE, Decoder
from mae_jax.models.vit import ViT

Features = dict[str, jax.Array]


def build_mae(d: Description, dtype: jnp.dtype = jnp.float32) -> MAE:
    """The encoder and decoder.

    Raises:
      UserError: there is no decoder, or nobody knows what it predicts.
    """
    if not d.decoder_depth:
        raise UserError("these weights have no decoder: take a full checkpoint")
    if not d.target:
        raise UserError(
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


def build_encoder(
    d: Description,
    *,
    depth: int = 0,
    dtype: jnp.dtype = jnp.float32,
    train_positions: bool = False,
) -> ViT:
    """The encoder, or its first `depth` blocks.

    The final norm follows the last of them, except where a head reads the mean token: such models
    have none.

    Args:
      train_positions: the parameters hold the position table.
    """
    return ViT(
        image_size=d.image_size,
        patch_size=d.patch_size,
        channels=d.channels,
        width=d.width,
        depth=depth or d.depth,
        heads=d.heads,
        dtype=dtype,
        train_positions=train_positions,
        final_norm=d.pool != "mean",
    )


def build_classifier(d: Description, dtype: jnp.dtype = jnp.float32) -> Classifier:
    """The encoder with its head.

    Raises:
      UserError: there is no head.
    """
    if not d.classes:
        raise UserError(
            "these weights have no head: they tell no classes. Take those of a fine-tuned model, "
            "or fine-tune or probe these (tasks finetune, linear_probe)"
        )
    encoder = build_encoder(d, dtype=dtype, train_positions=True)
    return Classifier(encoder=encoder, classes=d.classes, pool=d.pool)


def model_params(checkpoint: Checkpoint) -> Params:
    """What the functions below take: `encoder`, its positions included, `fc_norm` and `head`."""
    tensors = {name: x for name, x in checkpoint.tensors.items() if not is_decoder(name)}
    return from_official(tensors, keep_positions=True)


def classify_function(
    d: Description, dtype: jnp.dtype = jnp.float32
) -> Callable[[Params, jax.Array], jax.Array]:
    """A pure function (`model_params`, images [B, H, W, C] uint8) -> logits [B, K] float32.

    Raises:
      UserError: there is no head.
    """
    model = build_classifier(d, dtype)

    def classify(params: Params, images: jax.Array) -> jax.Array:
        return model.apply({"params": params}, _normalize(images, d))

    return classify


def features_function(
    d: Description, *, block: int = 0, dtype: jnp.dtype = jnp.float32
) -> Callable[[Params, jax.Array], Features]:
    """A pure function of (`model_params`, images) for features.

    Args:
      block: the number of blocks to run, 1 to depth; 0 runs all. The final norm follows whichever
        block is the last (as timm's `forward_intermediates(norm=True)`); weights fine-tuned on the
        mean token have no final norm, so nothing follows.

    Returns:
      (params, images [B, H, W, C] uint8) -> {"cls": [B, D], "mean": [B, D] over patches,
      "tokens": [B, 1 + L, D]}, float32, and "logits" [B, K] where there is a head and all blocks
      run. "mean" is then what a head on the mean token reads: it has passed `fc_norm`.

    Raises:
      UserError: there is no such block.
    """
    if not 0 <= block <= d.depth:
        raise UserError(f"block {block}: the encoder has blocks 1 to {d.depth}")
    if d.classes and block in (0, d.depth):
        return _classifier_features(d, dtype)
    encoder = build_encoder(d, depth=block, dtype=dtype, train_positions=True)

    def features(params: Params, images: jax.Array) -> Features:
        return _pooled(encoder.apply({"params": params["encoder"]}, _normalize(images, d)))

    return features


def _classifier_features(
    d: Description, dtype: jnp.dtype
) -> Callable[[Params, jax.Array], Features]:
    model = build_classifier(d, dtype)

    def features(params: Params, images: jax.Array) -> Features:
        logits, inside = model.apply(
            {"params": params},
            _normalize(images, d),
            capture_intermediates=lambda module, _: module.name in ("encoder", "fc_norm"),
            mutable=["intermediates"],
        )
        seen = {name: calls["__call__"][0] for name, calls in inside["intermediates"].items()}
        values = _pooled(seen["encoder"])
        if d.pool == "mean":
            values["mean"] = seen["fc_norm"]
        return {**values, "logits": logits}

    return features


def _pooled(tokens: jax.Array) -> Features:
    """Tokens [B, 1 + L, D] and their two summaries, float32."""
    return {
        "cls": pool_tokens(tokens, "cls"),
        "mean": pool_tokens(tokens, "mean"),
        "tokens": tokens.astype(jnp.float32),
    }


def _normalize(images: jax.Array, d: Description) -> jax.Array:
    """uint8 [B, H, W, C] as float32 with the model's input statistics taken out."""
    mean, std = np.asarray(d.mean, np.float32), np.asarray(d.std, np.float32)
    return (images.astype(jnp.float32) / 255.0 - mean) / std
