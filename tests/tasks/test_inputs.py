"""What a run reads, by its config."""

import numpy as np
import pytest
from PIL import Image

from mae_jax import UserError
from mae_jax.config import LABELS
from mae_jax.tasks.inputs import open_splits


@pytest.mark.parametrize("task", ["pretrain", "another", *LABELS])
def test_labels_are_asked_for_by_the_tasks_that_learn_from_them(tiny_config, tmp_path, task):
    for name in ("train", "validation"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / name / "a.png")
    tiny_config.task, tiny_config.data.name = task, "folder"
    tiny_config.data.dir = str(tmp_path)
    if task in LABELS:
        with pytest.raises(UserError, match=f"has no labels, and task {task} learns from labels"):
            open_splits(tiny_config)
    else:
        assert open_splits(tiny_config).classes is None
