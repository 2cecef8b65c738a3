"""Pictures a run leaves in its workdir."""

from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mae_jax.data.splits import Splits
from mae_jax.distributed.mesh import global_batch, local_positions, replicate, replicated
from mae_jax.models.patches import denormalize
from mae_jax.pictures.grids import image_grid, prediction_grid, reconstruction_grid
from mae_jax.storage.files import write_png
from mae_jax.train.state import TrainState
from mae_jax.train.task import Pretraining, Recoding, Tuning


class Drawing:
    """Draws what a function of (state, images [B, H, W, C] uint8) makes of a few fixed images.

    `draw`: (title, its arrays on the host) -> [height, width, 3] uint8,
    `directory`/`step_NNNNNNNN.png`.
    """

    def __init__(
        self,
        function: Callable,
        images: np.ndarray,
        draw: Callable,
        directory: epath.Path,
        mesh: Mesh,
    ):
        self._function = jax.jit(function, out_shardings=replicated(mesh))
        self._images, self._draw, self._directory, self._mesh = images, draw, directory, mesh

    def compile(self, state: TrainState) -> list[jax.stages.Compiled]:
        """Its program, for an abstract state, ahead of the first call."""
        where = replicated(self._mesh)
        images = jax.ShapeDtypeStruct(self._images.shape, self._images.dtype, sharding=where)
        self._function = self._function.lower(state, images).compile()
        return [self._function]

    def __call__(self, step: int, state: TrainState) -> None:
        """Writes the picture of `step`."""
        results = self._function(state, replicate(self._images, self._mesh))
        if jax.process_index() == 0:
            picture = self._draw(f"step {step:,}", jax.device_get(results))
            write_png(self._directory / f"step_{step:08d}.png", picture)


def draw_reconstructions(
    task: Pretraining, data: Splits, count: int, directory: epath.Path
) -> Drawing:
    """What the autoencoder of `Pretrain` makes of `count` images of the evaluation split."""
    images, _, names = data.examples(data.eval, count)

    def draw(title: str, result: dict[str, np.ndarray]) -> np.ndarray:
        note = task.model.target.note
        return reconstruction_grid(images, **result, names=names, title=title, note=note)

    return Drawing(task.reconstruct, images, draw, directory, task.mesh)


def draw_pairs(task: Recoding, data: Splits, count: int, directory: epath.Path) -> Drawing:
    """`count` images of the evaluation split, each left of what their codes give."""
    images, _, _ = data.examples(data.eval, count)

    def function(state: TrainState, images: jax.Array) -> jax.Array:
        return (task.reconstruct(state, images)[0] * 255).round().astype(images.dtype)

    def draw(title: str, again: np.ndarray) -> np.ndarray:
        pairs = np.stack([images, again], axis=1).reshape(-1, *images.shape[1:])
        return image_grid(pairs, f"{title}: originals, and right of each what its codes give")

    return Drawing(function, images, draw, directory, task.mesh)


def draw_predictions(task: Tuning, data: Splits, count: int, directory: epath.Path) -> Drawing:
    """What the classifier of `Finetune` takes `count` images of the evaluation split for."""
    images, labels, names = data.examples(data.eval, count)
    texts = {"names": names, "class_names": data.train.class_names}

    def draw(title: str, probabilities: np.ndarray) -> np.ndarray:
        return prediction_grid(images, labels, probabilities, title=title, **texts)

    return Drawing(task.probabilities, images, draw, directory, task.mesh)


def draw_augmentations(task: Tuning, data: Splits, path: epath.Path, count: int = 32) -> None:
    """Training images of many mix groups of step 0's batch, as `Finetune`'s model sees them."""
    mesh, positions = task.mesh, local_positions(task.batch_size, task.mesh)
    with data.train_batches(positions, 0, 1) as batches:
        batch = next(batches)
    arrays = {name: batch[name] for name in task.batch_schema}
    arrays = global_batch(arrays, positions, task.batch_size, mesh)

    def some_images(batch: dict) -> jax.Array:
        images, _, _ = task.augmented(batch, 0)
        images = images[:: max(1, len(images) // count)][:count]
        return denormalize(images, task.mean, task.std)

    images = jax.jit(some_images, out_shardings=replicated(mesh))(arrays)
    if jax.process_index() == 0:
        title = f"step 0: {len(images)} of {task.batch_size} training images as the model sees them"
        write_png(path, image_grid(np.asarray(images), title))
