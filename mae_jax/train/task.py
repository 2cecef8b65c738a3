"""What the trainer, evaluators and pictures ask of a task."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mae_jax.data.record import ArraySpec
from mae_jax.models.mae import MAE
from mae_jax.models.vit import ViT
from mae_jax.train.loop import Action
from mae_jax.train.state import Metrics, TrainState


class Task(Protocol):
    """Pure functions of (state, batch) and what surrounds them."""

    mesh: Mesh  # where steps run
    compiler_options: Mapping[str, Any]  # of XLA, for the training step
    total_steps: int
    batch_size: int  # global, as the next
    eval_batch_size: int
    image_shape: tuple[int, int, int]  # (H, W, C) of what the model takes
    batch_schema: dict[str, ArraySpec]  # what a step takes
    metric_names: Sequence[str]  # of what `train_step` returns
    train_flops_per_image: int  # of the matrix products of a training step
    fixed_positions: dict[str, np.ndarray]  # by name in the state: missing from old checkpoints
    digests: dict[str, str]  # by field: of files read anew at each start, which must not change

    def init(self) -> TrainState:
        """The state at step 0, a function of the seed alone."""

    def prepare(self, state: TrainState, data: Any) -> TrainState:
        """The state at step 0 with what it needs from the data; once a run."""

    def train_step(self, state: TrainState, batch: dict) -> tuple[TrainState, Metrics]:
        """One update; metrics are means."""

    def evaluation(self, inputs: Any, writer: Any, shardings: Any, max_batches: int) -> Any:
        """What evaluates a state on `inputs`, as `evaluators.means.Evaluation` does."""

    def inputs(self, data: Any, state: TrainState, workdir: epath.Path) -> Any:
        """Where batches come from: `data`, unless the task makes something of it first."""

    def draw_inputs(self, data: Any, workdir: epath.Path) -> None:
        """Pictures of what training starts with, where there is something to see; once a run."""

    def actions(self, config: Any, data: Any, writer: Any, workdir: epath.Path) -> list[Action]:
        """What to do at intervals beside evaluating and saving."""

    def export(self, state: TrainState, directory: epath.Path, facts: dict[str, Any]) -> None:
        """Writes the trained model of a host-side `state` for others to load."""


class Averaging(Task, Protocol):
    """What the evaluation by means asks beside."""

    def eval_step(self, state: TrainState, batch: dict, index: jax.Array) -> Metrics:
        """Sums over batch number `index`, each example times its "weight" [B], with their count."""

    def scalars(self, means: dict[str, Any]) -> dict[str, float]:
        """What is told of an evaluation, from the means of `eval_step` over its examples."""


class Pretraining(Task, Protocol):
    """What the online probe and pictures of reconstructions ask beside."""

    model: MAE

    def encode(self, params: Any, images: jax.Array) -> jax.Array:
        """Tokens [B, 1 + L, D] of whole images [B, H, W, C] uint8."""

    def reconstruct(self, state: TrainState, images: jax.Array) -> dict[str, jax.Array]:
        """Images [B, H, W, C] uint8 with removed patches as predicted."""


class Recoding(Task, Protocol):
    """What pictures of a tokenizer ask beside."""

    def reconstruct(self, state: TrainState, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [B, H, W, C] uint8 from their codes: pixels in [0, 1], codes [B, h, w]."""


class Tuning(Task, Protocol):
    """What pictures of predictions and of augmented images ask beside."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def augmented(self, batch: dict, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What the model is trained on: images [B, H, W, C] float32, normalised; targets; keys."""

    def probabilities(self, state: TrainState, images: jax.Array) -> jax.Array:
        """Softmax over classes [B, classes] of images [B, H, W, C] uint8."""


class Probing(Task, Protocol):
    """What the cache of features asks beside."""

    encoder: ViT
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pool: str

    def features(self, frozen: Any, images: jax.Array) -> jax.Array:
        """What the head sees of images [B, H, W, C] uint8: [B, D] float32."""


class Segmenting(Task, Protocol):
    """What the evaluation and pictures of segmentation ask beside."""

    def windows_logits(self, state: TrainState, images: jax.Array, size: jax.Array) -> jax.Array:
        """Logits [B, s, s', K] of windows [B, S, S', C] uint8. Of each the upper left, whose height
        and width are `size` [B, 2] int32, shows something; the rest is 0 once normalised."""
