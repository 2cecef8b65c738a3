"""Our parameter tree as flat tensors in official (timm) names and layouts, and back."""

import re
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mae_jax.interop.names import Tensors, is_decoder, official_name, our_path
from mae_jax.models.vit import sincos_position_table

Params = dict[str, Any]


def to_official(
    params: Params,
    *,
    image_size: tuple[int, int],
    patch_size: int,
    channels: int,
    include_decoder: bool = True,
) -> dict[str, np.ndarray]:
    """Parameters -> official tensors.

    Args:
      params: the tree of `MAE`, or of a classifier (`encoder`, `fc_norm`, `head`).
      include_decoder: False leaves out the decoder with its mask token, as timm needs it.

    Returns:
      float32 tensors. Linear weights are [out, in], the patch convolution is [D, C, p, p]. The
      position tables, which official files store, are there: the trained one where the tree holds
      one, the fixed sine-cosine table otherwise.
    """
    grid = (image_size[0] // patch_size, image_size[1] // patch_size)
    tensors = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        name = official_name(path)
        if is_decoder(name) and not include_decoder:
            continue
        x = np.asarray(leaf, np.float32)
        if name == "patch_embed.proj.weight":
            # [p*p*C, D], channel fastest -> [D, C, p, p]
            x = x.reshape(patch_size, patch_size, channels, -1).transpose(3, 2, 0, 1)
        elif path.endswith("/kernel"):
            x = x.T  # [in, out] -> [out, in]
        tensors[name] = np.ascontiguousarray(x)
    width = tensors["cls_token"].shape[-1]
    tensors.setdefault("pos_embed", sincos_position_table(width, grid)[None])
    if "mask_token" in tensors:
        decoder_width = tensors["mask_token"].shape[-1]
        tensors["decoder_pos_embed"] = sincos_position_table(decoder_width, grid)[None]
    return {name: tensors[name] for name in sorted(tensors, key=_file_order)}


def from_official(tensors: Tensors, *, keep_positions: bool = False) -> Params:
    """Official tensors -> parameters, the inverse of `to_official`.

    Args:
      keep_positions: puts `pos_embed` into the tree, for models that train it. Otherwise the
        tables are dropped: the caller answers for their being the fixed ones.
    """
    flat = {}
    for name, tensor in tensors.items():
        if name == "decoder_pos_embed" or (name == "pos_embed" and not keep_positions):
            continue
        path = our_path(name)
        x = np.asarray(tensor, np.float32)
        if name == "patch_embed.proj.weight":
            x = x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])  # [D, C, p, p] -> [p*p*C, D]
        elif path.endswith("/kernel"):
            x = x.T
        flat[path] = np.ascontiguousarray(x)
    return unflatten_dict(flat, sep="/")


def _file_order(name: str) -> tuple:
    """Encoder before decoder before head, blocks by number."""
    part = 1 if is_decoder(name) else 2 if name.startswith(("fc_norm", "head")) else 0
    block = re.search(r"blocks\.(\d+)\.", name)
    place = 1 if block else 0 if "embed" in name or "token" in name else 2
    return part, place, int(block.group(1)) if block else 0, name
