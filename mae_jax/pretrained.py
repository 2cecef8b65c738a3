"""Pretrained models applied to pictures: what `mae_jax.load` gives."""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from mae_jax import UserError
from mae_jax.data.folder import PictureFiles
from mae_jax.data.mask_file import read_masks
from mae_jax.data.record import Record
from mae_jax.data.transforms import EvalTransform
from mae_jax.interop.checkpoint import open_checkpoint
from mae_jax.models.inference import classify_function, features_function, reconstruct
from mae_jax.models.masking import FILE, Masking, choose_masking, mask_problems
from mae_jax.models.spec import ModelSpec

BATCH_SIZE = 64  # pictures computed at once

Picture = str | os.PathLike | np.ndarray | Image.Image
Pictures = np.ndarray | Sequence[Picture]
Arrays = dict[str, np.ndarray]


def draw_masks(
    spec: ModelSpec,
    count: int,
    ratio: float | None = None,
    seed: int = 0,
    kind: str | None = None,
    file: str | os.PathLike | None = None,
) -> Masking:
    """So many masks for images of `spec`: as its model was trained, unless said otherwise."""
    keys = jax.random.split(jax.random.key(seed), count)
    kind = kind or (FILE if file is not None else spec.mask_kind)
    if kind == FILE and file is None:
        raise UserError("masks were those of a file: give mask_file, or a mask_kind, as random")
    if file is not None:
        if kind != FILE or ratio is not None:
            raise UserError("mask_file says what is hidden: leave out mask_kind and mask_ratio")
        return choose_masking(keys, read_masks(file, spec.grid, "mask_file"))
    ratio = spec.mask_ratio or 0.75 if ratio is None else ratio
    spec = dataclasses.replace(spec, mask_kind=kind, mask_ratio=ratio)
    for problem in mask_problems(kind, spec.grid, ratio, spec.unit_patches):
        raise UserError(problem.replace("mask.", "mask_").replace(" = ", "="))  # as arguments
    return jax.jit(spec.masking)(keys)


def pixels(spec: ModelSpec, images: Pictures) -> np.ndarray:
    """What a model of `spec` is fed of images as `Model` takes them: uint8 [B, H, W, C]."""
    size = (*spec.image_size, spec.channels)
    if hasattr(images, "ndim"):
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4:
            shape = f"{images.dtype} {list(images.shape)}"
            raise UserError(f"images: {shape}; give uint8 [B, H, W, C] or a list of pictures")
        if images.shape[1:] == size:
            return images
    elif isinstance(images, (str, os.PathLike, Image.Image)):
        raise UserError("images: give a list of pictures, [picture] for one")
    if not len(images):
        raise UserError("images: give at least one picture")

    transform = EvalTransform(size=spec.image_size, channels=spec.channels)

    def prepare(numbered: tuple[int, Picture]) -> np.ndarray:
        number, picture = numbered
        if isinstance(picture, (str, os.PathLike)):
            path = pathlib.Path(picture).expanduser().absolute()
            return transform.image(PictureFiles(path.parent, [path.name])[0])
        return transform.image(Record(picture, -1, f"images[{number}]", upright=True))

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.stack(list(pool.map(prepare, enumerate(images))))


class Model:
    """A model with its weights: `spec` describes it, `source` what was read, `notes` what to know.

    Methods take `images`: uint8 [B, H, W, C] of the model's own size, used as they are; or pictures
    of any size (paths, PIL images, uint8 arrays [H, W, C]), of which the evaluation crop is taken
    as by `mae-jax features`, upright as their EXIF orientation asks.
    """

    def __init__(self, path: str | os.PathLike, **overrides: Any):
        checkpoint = open_checkpoint(path, **overrides)
        self.spec, self.source, self.notes = checkpoint.spec, checkpoint.source, checkpoint.notes
        self._params = jax.device_put(checkpoint.params())

    def __repr__(self) -> str:
        spec = self.spec
        parts = [f"ViT of {spec.depth} blocks, width {spec.width}, patches of {spec.patch_size}"]
        parts += ["decoder"] if spec.has_decoder else []
        parts += [f"head of {spec.classes} classes"] if spec.classes else []
        height, width = spec.image_size
        return f"<{', '.join(parts)}; {height} x {width} px; {self.source}>"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in their order; empty where nobody knows them."""
        return self.spec.class_names

    def encode(self, images: Pictures) -> Arrays:
        """Features of whole pictures, float32, as `mae-jax features` writes them: "cls" [B, D],
        "mean" [B, D] over patches, and "tokens" [B, 1 + L, D]."""
        return self._run(self._features, self.pixels(images))

    def reconstruct(
        self,
        images: Pictures,
        mask_ratio: float | None = None,
        seed: int = 0,
        mask_kind: str | None = None,
        mask_file: str | os.PathLike | None = None,
    ) -> Arrays:
        """Pictures with patches removed and predicted, as `mae-jax visualize` draws them. They are
        removed as in pretraining (the share 0.75 where nobody knows), unless said otherwise; what
        was masked by a file's masks needs that `mask_file` (see `data.mask_file`), or a kind.

        "pixels" [B, H, W, C] uint8, only removed patches changed (none where the decoder's target
        has no way back to them); "mask" [B, L], 1 = removed; "loss" [B] float32 over removed ones.
        """
        pixels = self.pixels(images)
        masking = draw_masks(self.spec, len(pixels), mask_ratio, seed, mask_kind, mask_file)
        return self._run(self._reconstruct, pixels, *masking)

    def classify(self, images: Pictures) -> np.ndarray:
        """Probabilities [B, K] float32 of the classes, those that `mae-jax evaluate` scores."""
        return self._run(self._classify, self.pixels(images))["probabilities"]

    def pixels(self, images: Pictures) -> np.ndarray:
        """What the model is fed: uint8 [B, H, W, C] of its size."""
        return pixels(self.spec, images)

    @functools.cached_property
    def _features(self) -> Callable:
        features = features_function(self.spec)

        def encode(*args: jax.Array) -> dict[str, jax.Array]:
            values = features(*args)
            return {name: values[name] for name in ("cls", "mean", "tokens")}

        return jax.jit(encode)

    @functools.cached_property
    def _classify(self) -> Callable:
        classify = classify_function(self.spec)
        return jax.jit(lambda *args: {"probabilities": jax.nn.softmax(classify(*args))})

    @functools.cached_property
    def _reconstruct(self) -> Callable:
        spec, model = self.spec, self.spec.mae(position_params=True)

        def function(params: Any, images: jax.Array, *masking: jax.Array) -> dict[str, jax.Array]:
            return reconstruct(model, params, images, Masking(*masking), spec.mean, spec.std)

        return jax.jit(function)

    def _run(self, function: Callable, *rows: Any) -> Arrays:
        """`function(params, *rows)` in batches of one size, so that it is compiled once."""
        count = len(rows[0])
        size = min(BATCH_SIZE, count)
        results = []
        for start in range(0, count, size):
            places = np.arange(start, start + size) % count  # the last batch is filled up
            batch = [x[places] for x in rows]
            results.append(jax.device_get(function(self._params, *batch)))
        return {k: np.concatenate([r[k] for r in results])[:count] for k in results[0]}
