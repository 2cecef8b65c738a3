"""What tensors tell of their model, and what has to be said beside them."""

import math
import re

from mae_jax import UserError
from mae_jax.interop.names import Tensors, is_decoder, some
from mae_jax.models.spec import ModelSpec
from mae_jax.models.vit import VARIANTS

# Heads follow from the width in every published model.
_HEADS = {shape.width: shape.heads for shape in VARIANTS.values()}
_DECODER_HEADS = {512: 16}


def infer_spec(
    tensors: Tensors, where: str, fallback: ModelSpec | None = None, **stated: object
) -> ModelSpec:
    """Reads the description of a model off official tensors; `stated` fields must agree with them.

    `fallback` gives heads, image shape and statistics where nothing else tells them. The heads of a
    decoder of unusual width stay unknown (0): whoever builds it has to ask.
    """
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"):
        if name not in tensors:
            held = f"{len(tensors)} tensors ({some(sorted(tensors, key=is_decoder))})"
            raise UserError(f"{where}: no {name}, so this is not a ViT of MAE. It holds {held}")
    kernel = tensors["patch_embed.proj.weight"].shape
    if len(kernel) != 4 or kernel[2] != kernel[3]:
        raise UserError(f"{where}: patch_embed.proj.weight is {kernel}, not [D, C, p, p]")
    width, channels, patch_size, _ = kernel
    found: dict[str, object] = {"patch_size": patch_size, "channels": channels, "width": width}
    found["depth"] = _depth(tensors, "blocks")
    if "mask_token" in tensors:
        found["decoder_width"] = tensors["mask_token"].shape[-1]
        found["decoder_depth"] = _depth(tensors, "decoder_blocks")
    if "head.weight" in tensors:
        found["classes"] = tensors["head.weight"].shape[0]
        pools = ("mean",) if "fc_norm.weight" in tensors else ("cls", "normed_mean")
        found["pool"] = stated["pool"] if stated.get("pool") in pools else pools[0]
    if "head.fuse.weight" in tensors:
        if "segment_taps" not in stated:
            raise UserError(f"{where}: a segmentation model, and no word on which blocks it reads")
        found["segment_width"] = tensors["head.fuse.weight"].shape[0]
        found["classes"] = tensors["head.classifier.weight"].shape[0]
    for field, value in found.items():
        if stated.get(field, value) != value:
            both = f"{value} in the tensors and {stated[field]} as stated"
            raise UserError(f"{where}: {field} is {both}")
    fields = {**found, **stated}
    patches = tensors["pos_embed"].shape[1] - 1
    if "image_size" not in fields:
        fields["image_size"] = _image_size(patches, patch_size, where, fallback)
    if "heads" not in fields:
        default = fallback.heads if fallback and fallback.width == width else 0
        fields["heads"] = _HEADS.get(width, default)
        if not fields["heads"]:
            raise UserError(f"{where}: tensors of width {width} do not tell the heads; give heads")
    if decoder_width := found.get("decoder_width"):
        same = fallback and fallback.decoder_width == decoder_width
        heads = _DECODER_HEADS.get(decoder_width, fallback.decoder_heads if same else 0)
        fields["decoder_heads"] = fields.get("decoder_heads") or heads
    if channels != 3 and not {"mean", "std"} <= fields.keys():
        if fallback and fallback.channels == channels:
            fields |= {"mean": fallback.mean, "std": fallback.std}
        elif fallback:  # other channels are adapted; nothing is computed with these
            fields |= {"mean": (0.0,) * channels, "std": (1.0,) * channels}
        else:
            unknown = f"how {channels} input channel(s) are normalised is unknown"
            raise UserError(f"{where}: {unknown}; give mean and std, one value per channel")
    spec = ModelSpec(**fields)
    if patches != spec.grid[0] * spec.grid[1]:
        size = f"images of {spec.image_size} have {spec.grid}"
        raise UserError(f"{where}: pos_embed has {patches} patches, {size}")
    return spec


def _image_size(
    patches: int, patch_size: int, where: str, fallback: ModelSpec | None
) -> tuple[int, int]:
    side = math.isqrt(patches)
    if side**2 == patches:  # first, so that fitting it to a rectangle is reported
        return side * patch_size, side * patch_size
    if fallback and fallback.grid[0] * fallback.grid[1] == patches:
        return fallback.grid[0] * patch_size, fallback.grid[1] * patch_size
    raise UserError(f"{where}: {patches} patches are no square; give image_size as height,width")


def _depth(tensors: Tensors, stack: str) -> int:
    numbers = {int(m.group(1)) for n in tensors if (m := re.match(rf"{stack}\.(\d+)\.", n))}
    return max(numbers, default=-1) + 1
