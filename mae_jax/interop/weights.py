"""Our parameter tree as flat tensors in official (timm) names and layouts, and back."""

from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mae_jax.interop.names import Tensors, is_decoder, official_name, our_path
from mae_jax.models.spec import ModelSpec
from mae_jax.models.vit import sincos_position_table

Params = dict[str, Any]


def to_official(
    params: Params, spec: ModelSpec, *, include_decoder: bool = True
) -> dict[str, np.ndarray]:
    """Parameters of `MAE`, a classifier or a segmenter (with its `statistics`) -> official tensors;
    `include_decoder` False is for timm.

    Linear weights are [out, in], the patch convolution is [D, C, p, p], all float32. The position
    tables, which official files store, are those of the tree, or the fixed sine-cosine table.
    """
    tensors = {
        name: np.asarray(x, np.float32, order="C")
        for name, x in _renamed(params, spec).items()
        if include_decoder or not is_decoder(name)
    }
    widths = {"pos_embed": "cls_token", "decoder_pos_embed": "decoder_norm.weight"}
    for table, other in widths.items():
        if other in tensors and table not in tensors:
            tensors[table] = sincos_position_table(tensors[other].shape[-1], spec.grid)[None]
    return tensors


def official_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of every tensor of a model, position tables included."""
    renamed = jax.eval_shape(lambda params: _renamed(params, spec), spec.abstract_params())
    return {name: x.shape for name, x in renamed.items()}


def _renamed(params: Params, spec: ModelSpec) -> dict[str, Any]:
    """Leaves, numpy's or jax's, under official names and in official layouts."""
    tensors = {}
    for path, x in flatten_dict(params, sep="/").items():
        name = official_name(path)
        if name == "patch_embed.proj.weight":
            # [p*p*C, D], channel fastest -> [D, C, p, p]
            p = spec.patch_size
            x = x.reshape(p, p, spec.channels, -1).transpose(3, 2, 0, 1)
        elif path.endswith("/kernel") and not path.startswith("target_state/"):
            x = x.transpose(_to_torch(path, x.ndim))
        tensors[name] = x
    return tensors


def _to_torch(path: str, ndim: int) -> tuple[int, ...]:
    """The order of a kernel's axes in PyTorch: [out, in], of convolutions [out, in, h, w], and of
    transposed ones [in, out, h, w]; here these are [in, out] and [h, w, in, out]."""
    if ndim == 4:
        return (2, 3, 0, 1) if path.startswith("pyramid/") else (3, 2, 0, 1)
    return (1, 0)


def from_official(tensors: Tensors) -> Params:
    """Official tensors -> parameters with their position tables, the inverse of `to_official`."""
    flat = {}
    for name, tensor in tensors.items():
        path = our_path(name)
        x = np.asarray(tensor, np.float32)
        if name == "patch_embed.proj.weight":
            x = x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])  # [D, C, p, p] -> [p*p*C, D]
        elif path.endswith("/kernel") and not path.startswith("target_state/"):
            x = x.transpose(np.argsort(_to_torch(path, x.ndim)))
        flat[path] = np.ascontiguousarray(x)
    return unflatten_dict(flat, sep="/")
