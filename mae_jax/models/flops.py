"""Analytic matrix-multiply work, the basis of MFU (compilers count the body of a scan once)."""

import dataclasses

from mae_jax.models.mae import MAE, LinearHead
from mae_jax.models.masking import num_kept
from mae_jax.models.segmenter import Segmenter
from mae_jax.models.spec import ModelSpec
from mae_jax.models.upernet import AUXILIARY_WIDTH, POOL_SIZES
from mae_jax.models.vit import MLP_RATIO, ViT


def stack_macs(tokens: int, width: int, depth: int) -> int:
    """Multiply-adds of one image through a stack of transformer blocks."""
    weights = (4 + 2 * MLP_RATIO) * width * width  # qkv, proj, fc1, fc2
    attention = 2 * tokens * width  # scores and weighted sum, per token
    return depth * tokens * (weights + attention)


def mae_forward_macs(model: MAE, kept: int) -> int:
    """Multiply-adds of one image, of which `kept` patches are visible, through encoder and decoder;
    mask tokens in the encoder are work as patches are. As the paper's model does them: it embeds
    removed patches, too, about 1 % of its work, which the step here leaves out."""
    encoder, decoder = model.encoder, model.decoder
    patches = encoder.grid[0] * encoder.grid[1]
    kept = patches if model.encoder_tokens else kept
    if isinstance(decoder, LinearHead):
        return encoder_forward_macs(encoder) + patches * encoder.width * decoder.outputs
    return (
        encoder_forward_macs(encoder, kept)
        + (1 + kept) * encoder.width * decoder.width
        + stack_macs(1 + patches, decoder.width, decoder.depth)
        + (1 + patches) * decoder.width * decoder.outputs
    )


def encoder_forward_macs(encoder: ViT, kept: int | None = None) -> int:
    """Multiply-adds of one image through the encoder; `kept` patches of it pass the blocks."""
    patches = encoder.grid[0] * encoder.grid[1]
    embedding = patches * encoder.patch_size**2 * encoder.channels * encoder.width
    tokens = 1 + (patches if kept is None else kept)
    return embedding + stack_macs(tokens, encoder.width, encoder.depth)


def spec_forward_macs(spec: ModelSpec) -> int:
    """Multiply-adds of one image through the model of a description, its target's left out."""
    if not spec.has_decoder:
        return encoder_forward_macs(spec.encoder())
    kept = num_kept(spec.grid[0] * spec.grid[1], spec.mask_ratio)
    return mae_forward_macs(dataclasses.replace(spec, target="pixel").mae(), kept)


def segmenter_forward_macs(model: Segmenter) -> int:
    """Multiply-adds of one image through the encoder, the pyramid and both heads of UperNet."""
    d, c, classes = model.encoder.width, model.width, model.classes
    tokens = model.encoder.grid[0] * model.encoder.grid[1]
    levels = [16 * tokens, 4 * tokens, tokens, tokens // 4]  # pixels of the pyramid's maps
    pyramid = tokens * 4 * d * d + levels[1] * 4 * d * d + tokens * 4 * d * d  # transposed
    pooling = sum(side * side for side in POOL_SIZES) * d * c
    pooling += levels[3] * 9 * (d + len(POOL_SIZES) * c) * c
    head = sum(levels[:3]) * (d * c + 9 * c * c) + levels[0] * (9 * 4 * c * c + c * classes)
    auxiliary = tokens * (9 * d * AUXILIARY_WIDTH + AUXILIARY_WIDTH * classes)
    return encoder_forward_macs(model.encoder) + pyramid + pooling + head + auxiliary


def train_flops(forward_macs: int, tuned_macs: int | None = None) -> int:
    """FLOPs of a training step per image: two per multiply-add, backward twice the forward of the
    part `tuned_macs` that gradients run back through (None: all)."""
    tuned_macs = forward_macs if tuned_macs is None else tuned_macs
    return 2 * forward_macs + 2 * 2 * tuned_macs
