"""Weights of any origin into the parameters of a model, with a report in words."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mae_jax import UserError
from mae_jax.interop.adapt import change_channels, resize_patches, resize_positions
from mae_jax.interop.checkpoint import open_checkpoint
from mae_jax.interop.class_names import require_same_classes
from mae_jax.interop.names import is_decoder, official_name
from mae_jax.interop.weights import Params, from_official
from mae_jax.models.spec import ModelSpec

PARTS = ("all", "encoder")


@dataclasses.dataclass
class LoadReport:
    """What became of a checkpoint; `str(report)` says it in words."""

    source: str
    matched: int = 0
    adapted: list[str] = dataclasses.field(default_factory=list)
    fresh: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

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
    params: Params,
    path: str | pathlib.Path,
    model: ModelSpec,
    *,
    parts: str = "all",
    **overrides: Any,
) -> tuple[Params, LoadReport]:
    """Replaces the values of an initialised tree by those of a checkpoint.

    Adapted where the model differs: the position tables (interpolated, as the official fine-tuning
    does), the number of channels and the patch size. Left at their initial values where the file
    has none: a decoder, `fc_norm`, `head` (also where it has other classes).

    Args:
      params: of the model about to run: `encoder` with or without `decoder`, `fc_norm`, `head`, its
        position tables among them.
      path: see `open_checkpoint`.
      model: describes that model. Where the checkpoint does not tell its heads, image shape or
        statistics, they are taken to be the model's.
      parts: "encoder" leaves the decoder at its initial values.
      overrides: see `open_checkpoint`.

    Returns:
      the new tree, of numpy arrays where values came from the file.

    Raises:
      UserError: the checkpoint is of another model, or would hurt in silence.
    """
    if parts not in PARTS:
        raise UserError(f"parts {parts!r}: choose one of {', '.join(PARTS)}")
    checkpoint = open_checkpoint(path, fallback=model, **overrides)
    theirs, source = checkpoint.spec, checkpoint.source
    report = LoadReport(source, notes=list(checkpoint.notes))
    flat = flatten_dict(params, sep="/")
    wanted = {official_name(path): path for path in flat}
    if "pos_embed" not in wanted:
        raise ValueError("the tree must hold its position tables (position_params)")
    _require_same_encoder(theirs, model, source)
    if "norm.weight" in wanted and "norm.weight" not in checkpoint.tensors:
        raise UserError(
            f"{source}: fine-tuned on the mean token, so it has no final norm, which this model "
            "needs; its features without one would be meaningless. Use the pretrained weights it "
            "came from, or a model with mean pooling"
        )
    use_decoder = parts == "all" and "mask_token" in wanted and theirs.decoder_depth > 0
    if use_decoder:
        _require_same_decoder(theirs, model, source)
    use_head = theirs.pool == model.pool and theirs.classes == model.classes
    if use_head and model.classes:
        try:
            note = require_same_classes(theirs.class_names, model.class_names, "the data")
        except UserError as error:
            use_head, note = False, f"the head is not used: {error}"
        report.notes += [note] if note else []

    def usable(name: str) -> bool:
        if is_decoder(name):
            return use_decoder
        return use_head or not name.startswith(("head.", "fc_norm."))

    chosen = {name: x for name, x in checkpoint.tensors.items() if name in wanted and usable(name)}
    _adapt(chosen, theirs, model, report)
    report.matched = len(chosen)
    report.fresh = sorted(wanted.keys() - chosen.keys())
    report.left_out = sorted(checkpoint.tensors.keys() - chosen.keys())
    loaded = flatten_dict(from_official(chosen), sep="/")
    for path, x in loaded.items():
        if x.shape != flat[path].shape:
            raise UserError(f"{source}: {path} is {x.shape}, the model has {flat[path].shape}")
    return unflatten_dict({**flat, **loaded}, sep="/"), report


def _require_same_encoder(theirs: ModelSpec, model: ModelSpec, source: str) -> None:
    for field in ("width", "depth", "heads"):
        if getattr(theirs, field) != getattr(model, field):
            raise UserError(
                f"{source} holds an encoder of {theirs.depth} blocks, width {theirs.width}, "
                f"{theirs.heads} heads; the model has {model.depth} blocks, width {model.width}, "
                f"{model.heads} heads. Set model.variant (or model.{field}) to match"
            )


def _require_same_decoder(theirs: ModelSpec, model: ModelSpec, source: str) -> None:
    remedy = "or load the encoder alone (init_parts = encoder)"
    for field in ("decoder_width", "decoder_depth", "decoder_heads", "patch_size", "channels"):
        if getattr(theirs, field) != getattr(model, field):
            shown = field.replace("decoder_", "decoder.")
            raise UserError(
                f"{source}: its decoder has {shown} = {getattr(theirs, field)}, the model's "
                f"{getattr(model, field)}. Set them equal, {remedy}"
            )
    if theirs.target and model.target and theirs.target != model.target:
        raise UserError(
            f"{source}: its decoder predicts {theirs.target}, the model is to predict "
            f"{model.target}. Set target to match, {remedy}"
        )


def _adapt(
    tensors: dict[str, np.ndarray], theirs: ModelSpec, model: ModelSpec, report: LoadReport
) -> None:
    """Changes what depends on the input's shape, in place."""
    kernel = "patch_embed.proj.weight"
    if theirs.channels != model.channels:
        tensors[kernel] = change_channels(tensors[kernel], model.channels)
        report.adapted.append(
            f"patch embedding: {theirs.channels} to {model.channels} input channel(s)"
        )
    elif not np.allclose([theirs.mean, theirs.std], [model.mean, model.std]):
        report.notes.append(
            f"the file's input statistics are mean {theirs.mean}, std {theirs.std}; this model "
            f"is fed with mean {model.mean}, std {model.std}"
        )
    if theirs.patch_size != model.patch_size:
        tensors[kernel] = resize_patches(tensors[kernel], model.patch_size)
        report.adapted.append(
            f"patch embedding: patch size {theirs.patch_size} to {model.patch_size} "
            "(pseudo-inverse resize)"
        )
    if theirs.grid != model.grid:
        for table in {"pos_embed", "decoder_pos_embed"} & tensors.keys():
            tensors[table] = resize_positions(tensors[table], theirs.grid, model.grid)
        report.adapted.append(
            f"position tables: interpolated (bicubic) from {theirs.grid[0]} x {theirs.grid[1]} to "
            f"{model.grid[0]} x {model.grid[1]} patches"
        )


def _parts(names: list[str]) -> str:
    """Names in words: a decoder is one thing, not a hundred."""
    decoder = [name for name in names if is_decoder(name)]
    others = [name for name in names if not is_decoder(name)]
    return ", ".join(([f"the decoder ({len(decoder)} tensors)"] if decoder else []) + others)
