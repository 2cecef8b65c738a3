"""Pictures a run leaves in its workdir."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mae_jax.augment.pixels import denormalize
from mae_jax.distributed.mesh import global_batch, local_positions, replicate, replicated
from mae_jax.pictures import grids
from mae_jax.storage.files import write_png
from mae_jax.train.state import TrainState


class Reconstructions:
    """Draws what a masked autoencoder makes of a few fixed images.

    Args:
      task: `Pretrain`.
      images: [B, H, W, C] uint8.
      directory: receives `step_NNNNNNNN.png`.
    """

    def __init__(self, task: Any, images: np.ndarray, directory: pathlib.Path):
        self._task = task
        self._images = images
        self._directory = directory
        self._reconstruct = jax.jit(task.reconstruct, out_shardings=replicated(task.mesh))

    def __call__(self, step: int, state: TrainState) -> None:
        """Writes the picture of `step`."""
        predictions, mask = self._reconstruct(state, replicate(self._images, self._task.mesh))
        if jax.process_index() != 0:
            return
        sheet = grids.reconstruction_grid(
            self._images,
            np.asarray(predictions),
            np.asarray(mask),
            patch_size=self._task.encoder.patch_size,
            target=self._task.model.target,
            mean=self._task.mean,
            std=self._task.std,
        )
        write_png(self._directory / f"step_{step:08d}.png", sheet)


class Predictions:
    """Draws a few fixed images with what a classifier takes them for.

    Args:
      task: `Finetune`.
      images: [B, H, W, C] uint8, with labels [B].
      class_names: of the data set; None shows numbers.
      directory: receives `step_NNNNNNNN.png`.
    """

    def __init__(
        self,
        task: Any,
        images: np.ndarray,
        labels: np.ndarray,
        class_names: Sequence[str] | None,
        directory: pathlib.Path,
    ):
        self._mesh = task.mesh
        self._images = images
        self._labels = labels
        self._names = class_names
        self._directory = directory
        self._probabilities = jax.jit(task.probabilities, out_shardings=replicated(task.mesh))

    def __call__(self, step: int, state: TrainState) -> None:
        """Writes the picture of `step`."""
        probabilities = self._probabilities(state, replicate(self._images, self._mesh))
        if jax.process_index() != 0:
            return
        sheet = grids.prediction_grid(
            self._images, self._labels, np.asarray(probabilities), self._names
        )
        write_png(self._directory / f"step_{step:08d}.png", sheet)


def draw_augmentations(task: Any, data: Any, path: pathlib.Path, count: int = 32) -> None:
    """Draws training images as the model sees them: cropped, augmented, erased, mixed.

    They are spread over the batch of step 0, so of many mix groups.

    Args:
      task: `Finetune`.
      data: `Splits`.
      path: of the PNG.
    """
    positions = local_positions(task.batch_size, task.mesh)
    with data.train_batches(positions, 0, 1) as batches:
        batch = next(batches)
    arrays = {name: batch[name] for name in task.batch_schema}
    arrays = global_batch(arrays, positions, task.batch_size, task.mesh)

    def some_images(batch: dict) -> jax.Array:
        images, _, _ = task.augmented(batch, 0)
        images = images[:: max(1, len(images) // count)][:count]
        return denormalize(images, task.mean, task.std)

    images = jax.jit(some_images, out_shardings=replicated(task.mesh))(arrays)
    if jax.process_index() == 0:
        write_png(path, grids.image_grid(np.asarray(images)))
