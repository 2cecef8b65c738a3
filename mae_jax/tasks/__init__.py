"""What can be trained: one file a task, each a `train.task.Task`."""

import dataclasses
import importlib
from collections.abc import Sequence

from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import config as config_lib
from mae_jax.models.spec import ModelSpec
from mae_jax.tasks.inputs import tokenizer_shape
from mae_jax.train.task import Task


def create_task(
    config: ConfigDict,
    examples: int,
    classes: int | None,
    mesh: Mesh,
    class_names: Sequence[str] | None = None,
    workdir: epath.Path | None = None,
) -> Task:
    """The task that a validated config names; `examples` of the split make an epoch; a run that
    goes on in `workdir` needs no file of a tokenizer."""
    for line in config_lib.adjustments(config, examples):
        logging.info("%s", line)
    module, name = config_lib.TASKS[config.task].split(".")
    task = getattr(importlib.import_module(f"mae_jax.tasks.{module}"), name)
    spec = ModelSpec.from_config(config, classes or 0, class_names or ())
    if config.target == "token":
        shape = tokenizer_shape(config.tokenizer, config.model.channels, workdir)
        spec = dataclasses.replace(spec, tokenizer=shape)
    return task(config, examples, spec, mesh)
