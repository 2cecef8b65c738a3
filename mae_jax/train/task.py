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
    """Pure functions of (state, batch) and what surrounds them."""

    mesh: Mesh  # where steps run
    total_steps: int
    batch_size: int  # global, as the next
    eval_batch_size: int
    image_shape: tuple[int, int, int]  # (H, W, C) of what the model takes
    batch_schema: dict[str, ArraySpec]  # what a step takes
    metric_names: Sequence[str]  # of what `train_step` returns
    train_flops_per_image: int  # of the matrix products of a training step
    fixed_positions: dict[str, np.ndarray]  # by name in the state: missing from old checkpoints

    def init(self) -> TrainState:
        """The state at step 0, a function of the seed alone."""

    def prepare(self, state: TrainState, data: Any) -> TrainState:
        """The state at step 0 with what it needs from the data; once a run."""

    def train_step(self, state: TrainState, batch: dict) -> tuple[TrainState, Metrics]:
        """One update; metrics are means."""

    def eval_step(self, state: TrainState, batch: dict, index: jax.Array) -> Metrics:
        """Sums over batch number `index`, each example times its "weight" [B], with their count."""

    def inputs(self, data: Any, state: TrainState, workdir: pathlib.Path) -> Any:
        """Where batches come from: `data`, unless the task makes something of it first."""

    def draw_inputs(self, data: Any, workdir: pathlib.Path) -> None:
        """Pictures of what training starts with, where there is something to see; once a run."""

    def actions(self, config: Any, data: Any, writer: Any, workdir: pathlib.Path) -> list[Action]:
        """What to do at intervals beside evaluating and saving."""

    def export(self, state: TrainState, directory: pathlib.Path, facts: dict[str, Any]) -> None:
        """Writes the trained model of a host-side `state` for others to load."""
