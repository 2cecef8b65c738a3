"""What can be trained: one file a task, each a `train.task.Task`."""

import importlib
from collections.abc import Sequence

from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import config as config_lib
from mae_jax.models.spec import ModelSpec
from mae_jax.train.task import Task


def create_task(
    config: ConfigDict,
    examples: int,
    classes: int | None,
    mesh: Mesh,
    class_names: Sequence[str] | None = None,
) -> Task:
    """The task that a validated config names; `examples` of the split make an epoch."""
    for line in config_lib.adjustments(config, examples):
        logging.info("%s", line)
    module, name = config_lib.TASKS[config.task].split(".")
    task = getattr(importlib.import_module(f"mae_jax.tasks.{module}"), name)
    spec = ModelSpec.from_config(config, classes or 0, class_names or ())
    return task(config, examples, spec, mesh)
