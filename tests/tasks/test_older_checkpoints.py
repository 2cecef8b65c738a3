"""Checkpoints of version 0.1: without the position tables that it computed, and with the
statistics of batch norm in a field of their own."""

import dataclasses

import jax
import numpy as np
import pytest
from task_runs import make

from mae_jax import UserError
from mae_jax.distributed.sharding import abstract_state
from mae_jax.models.vit import sincos_position_table
from mae_jax.storage.checkpoints import Checkpoints


def without_tables(tree):
    return {
        name: without_tables(x) if isinstance(x, dict) else x
        for name, x in tree.items()
        if name != "pos_embed"
    }


@pytest.mark.parametrize("task_name", ["linear_probe", "pretrain"])
def test_a_run_continues_with_the_tables_and_statistics_it_had(
    task_name, tiny_config, supervised_config, tmp_path
):
    config = tiny_config if task_name == "pretrain" else supervised_config(task_name)
    config.init_from = "/some/weights"
    task, _, state = make(config, devices=2, fsdp=2)
    frozen = without_tables(jax.device_get(state.frozen))
    old = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    extra = old.pop("extra")
    old |= {
        "frozen": frozen if task_name == "linear_probe" else None,
        "statistics": extra.get("statistics"),
    }
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(3, old, {"config": config.to_dict()})
    checkpoints.close()

    abstract = abstract_state(task.init, task.mesh)
    with pytest.raises(UserError, match="missing"):
        Checkpoints(tmp_path, keep=1).restore_newest(abstract, lambda record: None)
    restored, _ = Checkpoints(tmp_path, keep=1).restore_newest(
        abstract, lambda record: None, task.fixed_positions
    )
    table = sincos_position_table(32, (4, 4))[None]
    np.testing.assert_array_equal(restored.frozen["encoder"]["pos_embed"], table)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
