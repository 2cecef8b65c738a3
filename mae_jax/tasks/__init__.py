"""What can be trained: one file a task, each a `train.task.Task`."""

from collections.abc import Sequence

from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import config as config_lib
from mae_jax.tasks.finetune import Finetune
from mae_jax.tasks.linear_probe import LinearProbe
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.train.task import Task

_CLASSES = {
    "pretrain": Pretrain,
    "finetune": Finetune,
    "scratch": Finetune,
    "linear_probe": LinearProbe,
}


def create_task(
    config: ConfigDict,
    examples: int,
    classes: int | None,
    mesh: Mesh,
    class_names: Sequence[str] | None = None,
) -> Task:
    """The task `config.task` names.

    Args:
      examples: size of the training split; sets the length of epochs.
      classes: of a labelled data set, with names where it has some.
    """
    for line in config_lib.adjustments(config, examples):
        logging.info("%s", line)
    return _CLASSES[config.task](config, examples, classes or 0, mesh, class_names or ())
