"""Warm-up and groups that fit a shorter run and a smaller batch."""

import logging

import jax
import numpy as np
import pytest

from mae_jax.distributed.mesh import make_mesh
from mae_jax.tasks import create_task

BATCH = 24


def task_of(config, caplog):
    """The task, and what the log says was fitted."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        task = create_task(config, 480, 3, make_mesh(devices=jax.devices()[:1]))
    lines = [record.getMessage() for record in caplog.records]
    return task, [line for line in lines if "in place of the recipe's" in line]


def test_batch_norm_of_a_smaller_batch_runs_over_all_of_it(supervised_config, caplog):
    task, said = task_of(supervised_config("linear_probe", head__norm_group=512), caplog)
    assert said == [
        "head.norm_group: 24 in place of the recipe's 512, to fit batch_size = 24",
    ]
    x = np.random.default_rng(0).normal(3, 2, (BATCH, 32)).astype(np.float32)
    running = {"mean": np.zeros(32, np.float32), "var": np.ones(32, np.float32)}
    found, _ = task.normalise_groups(x, running)
    expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_smaller_batch_is_mixed_in_groups_that_divide_it(supervised_config, caplog):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (BATCH, 32, 32, 3), np.uint8)
    batch = {"image": images, "label": rng.integers(0, 3, BATCH).astype(np.int32)}
    task, said = task_of(supervised_config("finetune", augment__mix_group=32), caplog)
    assert said == [
        "augment.mix_group: 24 in place of the recipe's 32, to fit batch_size = 24",
    ]
    found = task.augmented(batch, 0)
    task, said = task_of(supervised_config("finetune", augment__mix_group=24), caplog)
    assert said == []
    for a, b in zip(found[:2], task.augmented(batch, 0)[:2], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("steps", "warmup"), [(5, 0), (30, 3)])
def test_a_shorter_run_warms_up_for_a_tenth_of_it(steps, warmup, tiny_config, caplog):
    tiny_config.steps, tiny_config.optim.warmup_steps = steps, 40
    task, said = task_of(tiny_config, caplog)
    assert said == [
        f"optim.warmup_steps: {warmup} in place of the recipe's 40, to fit a run of {steps} steps"
    ]
    rates = [float(task.schedule(step)) for step in range(steps)]
    assert int(np.argmax(rates)) == warmup
    np.testing.assert_allclose(max(rates), tiny_config.optim.base_lr * 16 / 256, rtol=1e-6)
