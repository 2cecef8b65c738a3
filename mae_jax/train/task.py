"""What the trainer, evaluators and pictures ask of a task."""

import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from mae_jax.data.record import ArraySpec
from mae_jax.train.loop import Action
from mae_jax.train.state import Metrics, TrainState


class Task(Protocol):
    """Pure functions of (state, batch) and what surrounds them.

    Attributes:
      metric_names: of what `train_step` returns.
      batch_size, eval_batch_size: global.
      mesh: where steps run.
      fixed_positions: tables by their name in the state, for checkpoints of version 0.1 that lack
        them.
      image_shape: (H, W, C) of the images the model takes.
      batch_schema: what a step takes.
      train_flops_per_image: matrix-multiply FLOPs of one training step per image.
    """

    metric_names: Sequence[str]
    total_steps: int
    batch_size: int
    eval_batch_size: int
    mesh: Mesh

    @property
    def fixed_positions(self) -> dict[str, np.ndarray]: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def batch_schema(self) -> dict[str, ArraySpec]: ...

    @property
    def train_flops_per_image(self) -> int: ...

    def init(self) -> TrainState:
        """The state at step 0, a function of the seed alone."""
        ...

    def train_step(self, state: TrainState, batch: dict) -> tuple[TrainState, Metrics]:
        """One update on `batch`, the fields `batch_schema` names; metrics are means."""
        ...

    def eval_step(self, state: TrainState, batch: dict, index: jax.Array) -> Metrics:
        """Sums over batch number `index`, each example times its "weight" [B], with their count."""
        ...

    def prepare(self, state: TrainState, data: Any) -> TrainState:
        """The state at step 0 with what it needs from the data; once a run."""
        ...

    def inputs(self, data: Any, state: TrainState, workdir: pathlib.Path) -> Any:
        """Where batches come from: `data`, unless the task makes something of it first."""
        ...

    def draw_inputs(self, data: Any, workdir: pathlib.Path) -> None:
        """Pictures of what training starts with, where there is something to see; once a run."""
        ...

    def actions(self, config: Any, data: Any, writer: Any, workdir: pathlib.Path) -> list[Action]:
        """What to do at intervals beside evaluating and saving."""
        ...

    def export(self, state: TrainState, directory: pathlib.Path, facts: dict[str, Any]) -> None:
        """Writes the trained model of a host-side `state` for others to load."""
        ...
