"""Weights of any origin into the parameters of a model, with a report in words."""

import dataclasses
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mae_jax import UserError
from mae_jax.interop.adapt import change_channels, resize_patches, resize_positions
from mae_jax.interop.checkpoint import open_checkpoint
from mae_jax.interop.class_names import require_same_classes
from mae_jax.interop.names import Tensors, is_decoder, is_head, official_name
from mae_jax.interop.weights import Params, from_official
from mae_jax.models.spec import ModelSpec
from mae_jax.storage.files import PathLike

PARTS = ("all", "encoder")


@dataclasses.dataclass
class LoadReport:
    """What became of a checkpoint; `str(report)` says it in words."""

    source: str
    notes: list[str]
    adapted: list[str]
    matched: int
    fresh: list[str]
    left_out: list[str]

    def __str__(self) -> str:
        lines = [f"loaded {self.matched} tensors from {self.source}"]
        lines += [f"  adapted: {line}" for line in self.adapted]
        if self.fresh:
            lines.append(f"  not in the file, freshly initialised: {_parts(self.fresh)}")
        if self.left_out:
            lines.append(f"  in the file, not used: {_parts(self.left_out)}")
        lines += [f"  note: {line}" for line in self.notes]
        return "\n".join(lines)


def load_into(
    params: Params, path: PathLike, model: ModelSpec, *, parts: str = "all", **overrides: Any
) -> tuple[Params, LoadReport]:
    """An initialised tree with its values replaced by a checkpoint's (these are numpy arrays).

    Adapted are position tables, channels and patch size. A decoder, `fc_norm` and `head` that the
    file lacks stay at their initial values, as does a head of other classes; so do the relative
    biases, layer scales and heads of a segmenter that starts from a plain encoder.

    Args:
      params: `encoder` with or without `decoder`, `fc_norm`, `head`, position tables among them; a
        segmenter's running `statistics` too, to get the file's.
      path, overrides: see `open_checkpoint`.
      model: describes `params`, and the checkpoint where that does not tell.
      parts: "encoder" leaves the decoder at its initial values.
    """
    if parts not in PARTS:
        raise UserError(f"parts {parts!r}: choose one of {', '.join(PARTS)}")
    checkpoint = open_checkpoint(path, fallback=model, **overrides)
    theirs, source = checkpoint.spec, checkpoint.source
    notes = list(checkpoint.notes)
    flat = flatten_dict(params, sep="/")
    wanted = {official_name(path): path for path in flat}
    if "pos_embed" not in wanted:
        raise ValueError("the tree must hold its position tables (position_params)")
    if _encoder_words(theirs) != _encoder_words(model):
        raise UserError(
            f"{source} holds an encoder of {_encoder_words(theirs)}; the model has "
            f"{_encoder_words(model)}. Set model.variant (or model.width, .depth, .heads) to match"
        )
    if theirs.segments:
        _require_same_biases(theirs, model, source)
    if "norm.weight" in wanted and "norm.weight" not in checkpoint.tensors:
        raise UserError(
            f"{source}: fine-tuned on the mean token, so it has no final norm, which this model "
            "needs. Use the pretrained weights it came from, or a model with mean pooling"
        )
    use_decoder = parts == "all" and any(map(is_decoder, wanted)) and theirs.has_decoder
    if use_decoder:
        _require_same_decoder(theirs, model, source)
        if model.target == "token":
            own = {name: flat[path] for name, path in wanted.items()}
            _require_same_tokenizer(checkpoint.tensors, own, source)
    heads = ("pool", "classes", "segment_taps", "segment_width")
    use_head = all(getattr(theirs, field) == getattr(model, field) for field in heads)
    if use_head and model.classes:
        try:
            note = require_same_classes(theirs.class_names, model.class_names, "the data")
        except UserError as error:
            use_head, note = False, f"the head is not used: {error}"
        notes += [note] if note else []

    def usable(name: str) -> bool:
        if is_decoder(name):
            return use_decoder
        return use_head or not is_head(name)

    chosen = {name: x for name, x in checkpoint.tensors.items() if name in wanted and usable(name)}
    adapted = _adapt(chosen, theirs, model)
    own, fed = (theirs.mean, theirs.std), (model.mean, model.std)
    if theirs.channels == model.channels and not np.allclose(own, fed):
        notes.append(f"the file's input statistics (mean, std) are {own}; this model gets {fed}")
    fresh = sorted(wanted.keys() - chosen.keys())
    left_out = sorted(checkpoint.tensors.keys() - chosen.keys())
    report = LoadReport(source, notes, adapted, len(chosen), fresh, left_out)
    loaded = flatten_dict(from_official(chosen), sep="/")
    for path, x in loaded.items():
        if x.shape != flat[path].shape:
            raise UserError(f"{source}: {path} is {x.shape}, the model has {flat[path].shape}")
    return unflatten_dict({**flat, **loaded}, sep="/"), report


def _encoder_words(spec: ModelSpec) -> str:
    return f"{spec.depth} blocks, width {spec.width}, {spec.heads} heads"


def _require_same_biases(theirs: ModelSpec, model: ModelSpec, source: str) -> None:
    """UserError where relative biases would be lost, or would be of another grid: there is no one
    way to interpolate them (BEiT's is a spline on a geometric grid, transformers' is bilinear)."""
    if not model.segments:
        raise UserError(
            f"{source}: its encoder has relative position biases and layer scales, which this "
            "model has not: it serves segmentation alone. Use the weights that it was trained from"
        )
    if theirs.grid != model.grid:
        sizes = f"{theirs.image_size} pixels, patches of {theirs.patch_size}"
        raise UserError(
            f"{source}: its relative position biases are for {theirs.grid} patches, not "
            f"{model.grid}. Set model.image_size (and patch_size) as there: {sizes}"
        )


def _require_same_decoder(theirs: ModelSpec, model: ModelSpec, source: str) -> None:
    remedy = "or load the encoder alone (init_parts = encoder)"
    fields = {"encoder_tokens": "mask.encoder_tokens"}
    fields |= {f"decoder_{x}": f"decoder.{x}" for x in ("kind", "width", "depth", "heads")}
    for field, name in (fields | {"patch_size": "patch_size", "channels": "channels"}).items():
        if (old := getattr(theirs, field)) != (new := getattr(model, field)):
            has = f"{name} = {old}, the model's {new}"
            raise UserError(f"{source}: its decoder has {has}. Set them equal, {remedy}")
    if theirs.target and model.target and theirs.target != model.target:
        targets = f"predicts {theirs.target}, the model's {model.target}"
        raise UserError(f"{source}: its decoder {targets}. Set target to match, {remedy}")
    if theirs.tokenizer != model.tokenizer:
        shapes = f"codes of a tokenizer {theirs.tokenizer}, not {model.tokenizer}"
        raise UserError(f"{source}: its decoder predicts {shapes}. Give that tokenizer, {remedy}")


def _require_same_tokenizer(chosen: Tensors, own: Tensors, source: str) -> None:
    """UserError where a decoder was trained on codes of other weights than the model's `own`."""
    for name, x in own.items():
        if name.startswith("target_state.") and not np.array_equal(chosen[name], x):
            raise UserError(
                f"{source}: its decoder predicts the codes of another tokenizer. Give that one, or "
                "load the encoder alone (init_parts = encoder)"
            )


def _adapt(tensors: dict[str, np.ndarray], theirs: ModelSpec, model: ModelSpec) -> list[str]:
    """Changes what depends on the input's shape, in place; tells what, in words."""
    kernel, changes = "patch_embed.proj.weight", []
    if (old := theirs.channels) != (new := model.channels):
        tensors[kernel] = change_channels(tensors[kernel], new)
        changes.append(f"patch embedding: {old} to {new} input channel(s)")
    if (old := theirs.patch_size) != (new := model.patch_size):
        tensors[kernel] = resize_patches(tensors[kernel], new)
        changes.append(f"patch embedding: patch size {old} to {new} (pseudo-inverse resize)")
    if (old := theirs.grid) != (new := model.grid):
        for table in {"pos_embed", "decoder_pos_embed"} & tensors.keys():
            tensors[table] = resize_positions(tensors[table], old, new)
        grids = f"{old[0]} x {old[1]} to {new[0]} x {new[1]}"
        changes.append(f"position tables: interpolated (bicubic) from {grids} patches")
    return changes


def _parts(names: list[str]) -> str:
    """Names in words: a decoder is one thing, not a hundred."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_group(name), []).append(name)
    words = [f"{group} ({len(found)} tensors)" for group, found in groups.items() if group]
    return ", ".join(words + groups.get("", []))


def _group(name: str) -> str:
    """What a tensor is part of that has many; "" for those that are named one by one."""
    if is_decoder(name):
        return "the decoder"
    if name.endswith("relative_position_bias_table"):
        return "relative position biases"
    if name.endswith((".gamma_1", ".gamma_2")):
        return "layer scales"
    few = ("head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias")
    return "the segmentation heads" if is_head(name) and name not in few else ""
