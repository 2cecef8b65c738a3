"""What other projects call our tensors.

The official names (facebookresearch/mae `.pth`; timm uses the same) are the hub: every other
spelling is translated to them and from them. Sources of the spellings: the state dicts of timm
1.0.31 and of transformers 4.57.6 and 5.23.0.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

Tensors = Mapping[str, np.ndarray]

# Where the parts of our parameter tree live; the first prefix that fits counts.
_PREFIXES = (
    ("encoder/patch_embed/", "patch_embed.proj."),
    ("decoder/blocks/", "decoder_blocks."),
    ("decoder/mask_token", "mask_token"),
    ("encoder/mask_token", "encoder_mask_token"),  # ours alone
    ("decoder/", "decoder_"),
    ("fc_norm/", "fc_norm."),
    ("head/", "head."),  # of a segmenter too
    ("pyramid/", "pyramid."),
    ("auxiliary/", "auxiliary."),
    ("encoder/", ""),
)
# What BEiT's blocks have beside those of a plain ViT, as timm names it.
_BLOCK_PARTS = {
    "attn.relative_bias": "attn.relative_position_bias_table",
    "layer_scale1": "gamma_1",
    "layer_scale2": "gamma_2",
}
_STATISTICS = {"mean": "running_mean", "var": "running_var"}  # as PyTorch's batch norm
HF_FILE = "model.safetensors"

_DECODER = re.compile(r"(encoder_)?mask_token$|decoder_|target_state\.")

# Hugging Face: part of a block -> official part. Two spellings are in circulation: the one on the
# hub, written by transformers up to 4, and the one transformers 5 has in memory.
_HF_BLOCK_PARTS = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.attention.query": "q",
    "attention.attention.key": "k",
    "attention.attention.value": "v",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_HF_BLOCK_PARTS_V5 = {f"attention.{x}_proj": x for x in "qkv"} | {"attention.o_proj": "attn.proj"}
_HF_TOP = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "vit.layernorm": "norm",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
    "classifier": "head",
}
_HF_STACKS = {
    "vit.encoder.layer": "blocks",
    "vit.layers": "blocks",
    "decoder.decoder_layers": "decoder_blocks",
    # save_pretrained of transformers 5.23 spells the decoder this way by mistake.
    "decoder.decoder_encoder.layer": "decoder_blocks",
}
_HF_BLOCK = re.compile(rf"({'|'.join(map(re.escape, _HF_STACKS))})\.(\d+)\.(.+)\.(weight|bias)$")
_HF_WITHOUT_VIT = re.compile(r"(embeddings\.|encoder\.layer\.|layers\.\d|layernorm\.)")


def official_name(path: str) -> str:
    """The official name of one of our parameters: `encoder/norm/scale` -> `norm.weight`."""
    if path.startswith("target_state/"):  # the state of a target has no name elsewhere
        return path.replace("/", ".")
    if path.startswith("statistics/"):
        norm, _, moment = path.removeprefix("statistics/").rpartition("/")
        return f"{official_name(norm)}.{_STATISTICS[moment]}"
    for ours, theirs in _PREFIXES:
        if path.startswith(ours):
            name = theirs + path.removeprefix(ours)
            name = re.sub(r"\.(kernel|scale)$", ".weight", name.replace("/", "."))
            return _with_ending(name, _BLOCK_PARTS)
    raise ValueError(f"parameter {path} has no name outside this project")


def our_path(name: str) -> str:
    """The inverse of `official_name`."""
    if name.startswith("target_state."):
        return name.replace(".", "/")
    for ours_ending, ending in _STATISTICS.items():
        if name.endswith(f".{ending}"):
            return f"statistics/{our_path(name.removesuffix(f'.{ending}'))}/{ours_ending}"
    name = _with_ending(name, {theirs: ours for ours, theirs in _BLOCK_PARTS.items()})
    for ours, theirs in _PREFIXES:
        if name.startswith(theirs):
            path = (ours + name.removeprefix(theirs)).replace(".", "/")
            is_norm = "norm" in path.split("/")[-2]
            return re.sub(r"/weight$", "/scale" if is_norm else "/kernel", path)
    raise ValueError(f"tensor {name} is not one of this project's parameters")


def _with_ending(name: str, endings: Mapping[str, str]) -> str:
    """The name of something in a block, with its ending replaced where it is one of `endings`."""
    for old, new in endings.items():
        if name.startswith("blocks.") and name.endswith(f".{old}"):
            return name.removesuffix(old) + new
    return name


def is_head(name: str) -> bool:
    """Whether an official name belongs to what reads the encoder's tokens, not to a decoder."""
    return name.startswith(("head.", "fc_norm.", "pyramid.", "auxiliary."))


def is_decoder(name: str) -> bool:
    """Whether an official name belongs to the decoder or the target it is trained for, or is the
    encoder's mask token: what nobody needs who has whole images."""
    return _DECODER.match(name) is not None


def some(names: Sequence[str]) -> str:
    """The first of many names, for messages."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def is_hugging_face(names: Iterable[str]) -> bool:
    """Whether tensors are spelled as transformers spells ViTMAE and ViT."""
    return any("embeddings.patch_embeddings.projection." in name for name in names)


def from_hugging_face(tensors: Tensors) -> dict[str, np.ndarray]:
    """Hugging Face names, of bare models (no `vit.`) too -> official names; query, key and value
    become one tensor. Unknown names are kept, for the caller to refuse."""
    official: dict[str, np.ndarray] = {}
    split: dict[str, dict[str, np.ndarray]] = {}  # fused name -> q, k, v
    for original, tensor in tensors.items():
        name = f"vit.{original}" if _HF_WITHOUT_VIT.match(original) else original
        if match := _HF_BLOCK.match(name):
            stack, index, part, leaf = match.groups()
            part = (_HF_BLOCK_PARTS | _HF_BLOCK_PARTS_V5).get(part, part)
            block = f"{_HF_STACKS[stack]}.{index}"
            if part in ("q", "k", "v"):
                split.setdefault(f"{block}.attn.qkv.{leaf}", {})[part] = tensor
            else:
                official[f"{block}.{part}.{leaf}"] = tensor
            continue
        stem = name if name in _HF_TOP else name.rpartition(".")[0]
        known = stem in _HF_TOP
        official[_HF_TOP[stem] + name.removeprefix(stem) if known else original] = tensor
    for name, parts in split.items():
        if absent := sorted({"q", "k", "v"} - parts.keys()):
            raise ValueError(f"{name}: the file lacks the {', '.join(absent)} part of this tensor")
        official[name] = np.concatenate([parts["q"], parts["k"], parts["v"]])
    return official


def to_hugging_face(tensors: Tensors) -> dict[str, np.ndarray]:
    """Official names -> the names on the hub, which transformers 4 and 5 both read."""
    top = {theirs: hf for hf, theirs in _HF_TOP.items()}
    parts = {theirs: hf for hf, theirs in _HF_BLOCK_PARTS.items()}
    stacks = {"blocks": "vit.encoder.layer", "decoder_blocks": "decoder.decoder_layers"}
    renamed: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if match := re.match(r"((?:decoder_)?blocks)\.(\d+)\.(.+)\.(weight|bias)$", name):
            stack, index, part, leaf = match.groups()
            block = f"{stacks[stack]}.{index}"
            if part == "attn.qkv":
                for letter, rows in zip("qkv", np.split(tensor, 3), strict=True):
                    renamed[f"{block}.{parts[letter]}.{leaf}"] = rows
            else:
                renamed[f"{block}.{parts[part]}.{leaf}"] = tensor
        else:
            stem = name if name in top else name.rpartition(".")[0]
            renamed[top[stem] + name.removeprefix(stem)] = tensor
    return renamed
