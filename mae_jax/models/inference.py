"""Models applied to pixels: pure functions of uint8 images and of parameters that hold the position
table (`position_params`): fixed, trained, or of another image size."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mae_jax import UserError
from mae_jax.models.classifier import pool_tokens
from mae_jax.models.mae import MAE
from mae_jax.models.masking import Masking
from mae_jax.models.patches import denormalize, normalize, normalize_shown, unpatchify
from mae_jax.models.segmenter import pixel_classes, segmenter_variables
from mae_jax.models.spec import ModelSpec

Params = dict[str, Any]
Features = dict[str, jax.Array]


def classify_function(
    spec: ModelSpec, dtype: jnp.dtype = jnp.float32
) -> Callable[[Params, jax.Array], jax.Array]:
    """(parameters, images [B, H, W, C] uint8) -> logits [B, K] float32."""
    model = spec.classifier(dtype=dtype)

    def classify(params: Params, images: jax.Array) -> jax.Array:
        return model.apply({"params": params}, normalize(images, spec.mean, spec.std))

    return classify


def features_function(
    spec: ModelSpec, *, block: int = 0, dtype: jnp.dtype = jnp.float32
) -> Callable[[Params, jax.Array], Features]:
    """(parameters, images [B, H, W, C] uint8) -> features, float32, after `block` blocks (0: all).

    They are {"cls": [B, D], "mean": [B, D] over patches, "tokens": [B, 1 + L, D]}, and "logits"
    [B, K] where there is a head and all blocks run. Where the head has a norm of its own
    (`fc_norm`), "mean" has passed it. The final norm follows whichever block is the last (as timm's
    `forward_intermediates(norm=True)`); weights fine-tuned on the mean token, or for segmentation,
    have none.
    """
    if not 0 <= block <= spec.depth:
        raise UserError(f"block {block}: the encoder has blocks 1 to {spec.depth}")
    encoder = spec.encoder(depth=block, dtype=dtype, position_params=True)
    has_head = spec.classes and not spec.segments and block in (0, spec.depth)
    head = spec.classifier(dtype=dtype) if has_head else None

    def features(params: Params, images: jax.Array) -> Features:
        x = normalize(images, spec.mean, spec.std)
        if head is None:
            return _pooled(encoder.apply({"params": params["encoder"]}, x))
        logits, inside = head.apply(
            {"params": params},
            x,
            capture_intermediates=lambda module, _: module.name in ("encoder", "fc_norm"),
            mutable=["intermediates"],
        )
        seen = {name: calls["__call__"][0] for name, calls in inside["intermediates"].items()}
        values = {**_pooled(seen["encoder"]), "logits": logits}
        return values | ({"mean": seen["fc_norm"]} if "fc_norm" in seen else {})

    return features


def segment_function(
    spec: ModelSpec, dtype: jnp.dtype = jnp.float32
) -> Callable[[Params, jax.Array], dict[str, jax.Array]]:
    """(parameters with running `statistics`, images [B, H, W, C] uint8) -> {"logits": [B, 4h, 4w,
    K] float32 for h x w patches, "classes": [B, H, W] int32, the best one of each pixel}."""
    model = spec.segmenter(dtype=dtype)

    def segment(params: Params, images: jax.Array) -> dict[str, jax.Array]:
        variables = segmenter_variables(params)
        logits, _ = model.apply(variables, normalize(images, spec.mean, spec.std))
        return {"logits": logits, "classes": pixel_classes(logits, spec.image_size)}

    return segment


def window_function(
    spec: ModelSpec, dtype: jnp.dtype = jnp.float32
) -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
    """(parameters with running `statistics`, windows [B, H, W, C] uint8, sizes [B, 2] of what each
    shows, in its upper left) -> logits [B, 4h, 4w, K] float32 for h x w patches."""
    model = spec.segmenter(dtype=dtype)

    def logits(params: Params, images: jax.Array, size: jax.Array) -> jax.Array:
        x = normalize_shown(images, size, spec.mean, spec.std)
        return model.apply(segmenter_variables(params), x)[0]

    return logits


def _pooled(tokens: jax.Array) -> Features:
    """Tokens [B, 1 + L, D] and their two summaries, float32."""
    return {
        "cls": pool_tokens(tokens, "cls"),
        "mean": pool_tokens(tokens, "mean"),
        "tokens": tokens.astype(jnp.float32),
    }


def reconstruct(
    model: MAE,
    params: Any,
    images: jax.Array,
    masking: Masking,
    mean: Sequence[float],
    std: Sequence[float],
    counted: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Images [B, H, W, C] uint8 with their removed patches as the model predicts them.

    "pixels" [B, H, W, C] uint8 (visible patches are the image's; none where the target has no way
    back to pixels), "mask" [B, L] (1 = removed), "loss" [B] over the removed patches, or over those
    where `counted` [B, L] is 1.
    """
    x = normalize(images, mean, std)
    output = model.apply({"params": params}, x, masking, counted)
    result = {"mask": masking.mask, "loss": output.loss}
    predicted, state = output.predictions, params.get("target_state")
    patches = model.target.to_pixels(predicted, x, masking.mask, state)
    if patches is None:
        return result
    p, size = model.encoder.patch_size, images.shape[1:3]
    predicted = denormalize(unpatchify(patches, p, size), mean, std)  # [B, H, W, C]
    removed = jnp.broadcast_to(masking.mask[:, :, None], patches.shape)  # [B, L, p*p*C]
    pixels = jnp.where(unpatchify(removed, p, size) > 0, predicted, images)
    return {"pixels": pixels, **result}
