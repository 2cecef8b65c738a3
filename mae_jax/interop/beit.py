"""Segmentation models for transformers, as `BeitForSemanticSegmentation`.

The names are those on the hub, which transformers 4 and 5 read; they come from the state dicts of
transformers 5.23.0 and its table of conversions.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from mae_jax import UserError
from mae_jax.interop.card import write_card
from mae_jax.interop.image_processor import write_image_processor
from mae_jax.interop.names import HF_FILE, Tensors
from mae_jax.interop.tensor_files import save_safetensors
from mae_jax.interop.weights import Params, to_official
from mae_jax.models.segmenter import AUXILIARY_WEIGHT
from mae_jax.models.spec import ModelSpec
from mae_jax.models.upernet import AUXILIARY_WIDTH, POOL_SIZES
from mae_jax.models.vit import LAYER_NORM_EPS, MLP_RATIO
from mae_jax.storage.files import PathLike, to_path, write_json

_EMBEDDINGS = {
    "cls_token": "cls_token",
    "pos_embed": "position_embeddings",
    "patch_embed.proj.weight": "patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "patch_embeddings.projection.bias",
}
_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "attn.relative_position_bias_table": (
        "attention.attention.relative_position_bias.relative_position_bias_table"
    ),
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "gamma_1": "lambda_1",
    "gamma_2": "lambda_2",
}
_PYRAMID = {"up4a": "fpn1.0", "norm": "fpn1.1", "up4b": "fpn1.3", "up2": "fpn2.0"}
_CONVS = {  # of convolution and batch norm
    **{f"head.pool{s}": f"decode_head.psp_modules.{i}.1" for i, s in enumerate(POOL_SIZES)},
    "head.context": "decode_head.bottleneck",
    **{f"head.lateral{i}": f"decode_head.lateral_convs.{i}" for i in range(3)},
    **{f"head.smooth{i}": f"decode_head.fpn_convs.{i}" for i in range(3)},
    "head.fuse": "decode_head.fpn_bottleneck",
    "auxiliary.conv": "auxiliary_head.convs.0",
}
_CLASSIFIERS = {
    "head.classifier": "decode_head.classifier",
    "auxiliary.classifier": "auxiliary_head.classifier",
}


def export_beit(
    params: Params, directory: PathLike, spec: ModelSpec, facts: Mapping[str, Any]
) -> epath.Path:
    """Writes a folder for `BeitForSemanticSegmentation.from_pretrained`; `params` with the running
    `statistics`. See `beit_config` for the block it has more than the model."""
    config = beit_config(spec)
    directory = to_path(directory)
    path = directory / HF_FILE
    save_safetensors(path, beit_tensors(to_official(params, spec), spec), {"format": "pt"})
    write_json(directory / "config.json", config)
    own = {"do_center_crop": False, "do_reduce_labels": spec.segment_zero_is_other}
    write_image_processor(directory, spec, "BeitImageProcessor", **own)
    form = "for Hugging Face transformers 4 and 5 as BeitForSemanticSegmentation. It has a last "
    form += f"block more, number {spec.depth}, which is zero and changes nothing: without it "
    form += "transformers could not read the output of the block before"
    load = "from transformers import BeitForSemanticSegmentation\n\n"
    load += 'model = BeitForSemanticSegmentation.from_pretrained("PATH_OF_THIS_FOLDER")'
    write_card(directory, spec, facts, form, load)
    return path


def beit_config(spec: ModelSpec) -> dict[str, Any]:
    """`config.json`; UserError where BEiT's class cannot hold the model.

    The class reads for `out_indices` i the output of block i - 2, counted from 0 (its list begins
    with the embeddings, and it subtracts one), and refuses an i above the number of blocks: the
    last block cannot be read. So there is one block more, whose layer scales are zero.
    """
    height, width = spec.image_size
    taps, refused = spec.segment_taps, ""
    if height != width:
        refused = f"square images alone, not {height} x {width}"
    elif spec.segment_width != spec.width:
        refused = f"a head as wide as the encoder ({spec.width}), not {spec.segment_width}"
    elif list(taps) != sorted(set(taps)):
        refused = f"four different blocks in order, not {taps}"
    elif spec.segment_ignore != 255:
        refused = f"255 as the label that does not count, not {spec.segment_ignore}"
    if refused:
        raise UserError(f"transformers' BEiT takes {refused}. Export with --format=orbax")
    names = spec.class_names or [f"LABEL_{i}" for i in range(spec.classes)]
    return {
        "architectures": ["BeitForSemanticSegmentation"],
        "model_type": "beit",
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth + 1,
        "num_attention_heads": spec.heads,
        "intermediate_size": MLP_RATIO * spec.width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,  # to train with it, spread it over the blocks that count
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": height,
        "patch_size": spec.patch_size,
        "num_channels": spec.channels,
        "use_mask_token": False,
        "use_absolute_position_embeddings": True,
        "use_relative_position_bias": True,
        "use_shared_relative_position_bias": False,
        "layer_scale_init_value": 1.0,
        "use_mean_pooling": True,  # the final norm would be the pooler's
        "out_indices": [tap + 2 for tap in taps],
        "pool_scales": POOL_SIZES,
        "use_auxiliary_head": True,
        "auxiliary_loss_weight": AUXILIARY_WEIGHT,
        "auxiliary_channels": AUXILIARY_WIDTH,
        "auxiliary_num_convs": 1,
        "auxiliary_concat_input": False,
        "semantic_loss_ignore_index": spec.segment_ignore,
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "torch_dtype": "float32",
    }


def beit_tensors(official: Tensors, spec: ModelSpec) -> dict[str, np.ndarray]:
    """Official tensors of a segmenter -> those of `BeitForSemanticSegmentation`, the zero block
    among them. Keys have no bias there: it adds the same to all logits of a query, so nothing."""
    tensors: dict[str, np.ndarray] = {}
    for name, x in official.items():
        if match := re.match(r"blocks\.(\d+)\.(.+)", name):
            block = f"beit.encoder.layer.{match[1]}."
            part, _, leaf = match[2].rpartition(".")
            if part == "attn.qkv":
                for letter, rows in zip("qkv", np.split(x, 3), strict=True):
                    tensors[f"{block}{_BLOCK[f'attn.{letter}']}.{leaf}"] = rows
                tensors.pop(f"{block}{_BLOCK['attn.k']}.bias", None)
            elif match[2] in _BLOCK:
                tensors[block + _BLOCK[match[2]]] = x
            else:
                tensors[f"{block}{_BLOCK[part]}.{leaf}"] = x
        elif name in _EMBEDDINGS:
            tensors[f"beit.embeddings.{_EMBEDDINGS[name]}"] = x
        else:
            tensors.update([_of_head(name, x)])
    last = f"beit.encoder.layer.{spec.depth - 1}."
    for name in [name for name in tensors if name.startswith(last)]:
        zero = name.replace(last, f"beit.encoder.layer.{spec.depth}.", 1)
        tensors[zero] = np.zeros_like(tensors[name])
    for name in [name for name in tensors if name.endswith("running_mean")]:
        # Batches seen, which PyTorch counts for a momentum it does not use here.
        tensors[name.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    return tensors


def _of_head(name: str, x: np.ndarray) -> tuple[str, np.ndarray]:
    stem, _, leaf = name.rpartition(".")
    if stem in _CLASSIFIERS:  # a convolution of 1 x 1
        return f"{_CLASSIFIERS[stem]}.{leaf}", x[:, :, None, None] if leaf == "weight" else x
    if stem.startswith("pyramid."):
        return f"{_PYRAMID[stem.removeprefix('pyramid.')]}.{leaf}", x
    if stem.endswith(".norm"):
        return f"{_CONVS[stem.removesuffix('.norm')]}.bn.{leaf}", x
    return f"{_CONVS[stem]}.conv.{leaf}", x
