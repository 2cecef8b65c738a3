"""Weights of any origin into the parameters of a model, with a report in words."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mae_jax import UserError
from mae_jax.interop.adapt import change_channels, resize_patches, resize_positions
from mae_jax.interop.checkpoint import Checkpoint, open_checkpoint
from mae_jax.interop.description import Description
from mae_jax.interop.names import is_decoder, official_name
from mae_jax.interop.weights import Params, from_official

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
    model: Description,
    *,
    parts: str = "all",
    **known: Any,
) -> tuple[Params, LoadReport]:
    """Replaces the values of an initialised tree by those of a checkpoint.

    Adapted where the model differs: the position table (trained tables are interpolated, fixed
    ones computed for the new grid), the number of channels and the patch size. Left at their
    initial values where the file has none: a decoder, `fc_norm`, `head` (also where it has other
    classes).

    Args:
      params: of the model about to run: `encoder` with or without `decoder`, `fc_norm`, `head`.
        A tree that holds `encoder/pos_embed` trains its positions.
      path: see `open_checkpoint`.
      model: describes that model. Where the checkpoint does not tell its heads, image shape or
        statistics, they are taken to be the model's.
      parts: "encoder" leaves the decoder at its initial values.
      known: see `open_checkpoint`.

    Returns:
      the new tree, of numpy arrays where values came from the file.

    Raises:
      UserError: the checkpoint is of another model, or would hurt in silence.
    """
    if parts not in PARTS:
        raise UserError(f"parts {parts!r}: choose one of {', '.join(PARTS)}")
    return fit(params, open_checkpoint(path, fallback=model, **known), model, parts=parts)


def fit(
    params: Params, checkpoint: Checkpoint, model: Description, *, parts: str = "all"
) -> tuple[Params, LoadReport]:
    """`load_into` for a checkpoint that is open already."""
    theirs, source = checkpoint.description, checkpoint.source
    report = LoadReport(source, notes=list(checkpoint.notes))
    flat = flatten_dict(params, sep="/")
    wanted = {official_name(path): path for path in flat}
    _require_same_encoder(theirs, model, source)
    _note_statistics(theirs, model, report)

    tensors = dict(checkpoint.tensors)
    tensors["patch_embed.proj.weight"] = _adapt_patches(tensors, theirs, model, report)
    if "pos_embed" in wanted:
        tensors["pos_embed"] = _adapt_positions(tensors, theirs, model, report)
    else:
        _require_fixed_positions(checkpoint, model, report)

    use_decoder = parts == "all" and "mask_token" in wanted and theirs.decoder_depth > 0
    if use_decoder:
        _require_same_decoder(checkpoint, model)
    use_head = theirs.pool == model.pool and theirs.classes == model.classes
    if "norm.weight" in wanted and "norm.weight" not in tensors:
        raise UserError(
            f"{source}: fine-tuned on the mean token, so it has no final norm, which this model "
            "needs; its features without one would be meaningless. Use the pretrained weights it "
            "came from, or a model with mean pooling"
        )

    def usable(name: str) -> bool:
        if is_decoder(name):
            return use_decoder
        return use_head or not name.startswith(("head.", "fc_norm."))

    chosen = {name: x for name, x in tensors.items() if name in wanted and usable(name)}
    tables = ("pos_embed", "decoder_pos_embed")
    report.matched = len(chosen)
    report.fresh = sorted(wanted.keys() - chosen.keys())
    report.left_out = sorted(tensors.keys() - chosen.keys() - set(tables))
    loaded = flatten_dict(from_official(chosen, keep_positions=True), sep="/")
    for path, x in loaded.items():
        if x.shape != flat[path].shape:
            raise UserError(f"{source}: {path} is {x.shape}, the model has {flat[path].shape}")
    return unflatten_dict({**flat, **loaded}, sep="/"), report


def _require_same_encoder(theirs: Description, model: Description, source: str) -> None:
    for field in ("width", "depth", "heads"):
        if getattr(theirs, field) != getattr(model, field):
            raise UserError(
                f"{source} holds an encoder of {theirs.depth} blocks, width {theirs.width}, "
                f"{theirs.heads} heads; the model has {model.depth} blocks, width {model.width}, "
                f"{model.heads} heads. Set model.variant (or model.{field}) to match"
            )


def _require_same_decoder(checkpoint: Checkpoint, model: Description) -> None:
    theirs, source = checkpoint.description, checkpoint.source
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
    if checkpoint.trained_decoder_positions:
        raise UserError(
            f"{source}: its decoder was trained with other positions than the fixed sine-cosine "
            f"ones used here. Load the encoder alone (init_parts = encoder)"
        )


def _require_fixed_positions(
    checkpoint: Checkpoint, model: Description, report: LoadReport
) -> None:
    if checkpoint.trained_positions:
        raise UserError(
            f"{checkpoint.source}: its position table was trained (or is not MAE's sine-cosine "
            "table), and this model has fixed positions; its features would be meaningless. Load "
            "it into a model that trains its positions"
        )
    if checkpoint.description.grid != model.grid:
        report.adapted.append(
            f"position table: computed for {_grid(model)} patches, the file has "
            f"{_grid(checkpoint.description)}"
        )


def _adapt_positions(
    tensors: dict[str, np.ndarray], theirs: Description, model: Description, report: LoadReport
) -> np.ndarray:
    if theirs.grid != model.grid:
        report.adapted.append(
            f"position table: interpolated (bicubic) from {_grid(theirs)} to {_grid(model)} patches"
        )
    return resize_positions(tensors["pos_embed"], theirs.grid, model.grid)


def _adapt_patches(
    tensors: dict[str, np.ndarray], theirs: Description, model: Description, report: LoadReport
) -> np.ndarray:
    kernel = tensors["patch_embed.proj.weight"]
    if theirs.channels != model.channels:
        kernel = change_channels(kernel, model.channels)
        report.adapted.append(
            f"patch embedding: {theirs.channels} to {model.channels} input channel(s)"
        )
    if theirs.patch_size != model.patch_size:
        kernel = resize_patches(kernel, model.patch_size)
        report.adapted.append(
            f"patch embedding: patch size {theirs.patch_size} to {model.patch_size} "
            "(pseudo-inverse resize)"
        )
    return kernel


def _note_statistics(theirs: Description, model: Description, report: LoadReport) -> None:
    same_length = theirs.channels == model.channels
    if same_length and not np.allclose([theirs.mean, theirs.std], [model.mean, model.std]):
        report.notes.append(
            f"the file's input statistics are mean {theirs.mean}, std {theirs.std}; this model "
            f"is fed with mean {model.mean}, std {model.std}"
        )


def _grid(d: Description) -> str:
    return f"{d.grid[0]} x {d.grid[1]}"


def _parts(names: list[str]) -> str:
    """Names in words: a decoder is one thing, not a hundred."""
    decoder = [name for name in names if is_decoder(name)]
    others = [name for name in names if not is_decoder(name)]
    return ", ".join(([f"the decoder ({len(decoder)} tensors)"] if decoder else []) + others)
