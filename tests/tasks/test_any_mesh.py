"""What a step computes does not depend on the devices it runs on."""

import types

import jax
import numpy as np
import pytest
from task_runs import assert_close, make, run_steps

from mae_jax.distributed.sharding import abstract_state, shardings_of
from mae_jax.evaluators.means import Evaluation

LAYOUTS = [
    (8, 8, 1, 1),
    pytest.param(8, 1, 8, 1, marks=pytest.mark.slow),
    pytest.param(8, 2, 4, 1, marks=pytest.mark.slow),
    (4, 2, 2, 2),
]


@pytest.mark.parametrize(("devices", "data", "fsdp", "accumulate"), LAYOUTS)
def test_pretraining(tiny_config, devices, data, fsdp, accumulate):
    compare(tiny_config, devices, data, fsdp, accumulate)


@pytest.mark.slow
def test_pretraining_on_repeated_jittered_crops_of_one_size(tiny_config):
    tiny_config.data.repeat, tiny_config.data.crop = 4, "fixed"  # of 16 rows, 2 on each device
    tiny_config.augment.color_jitter = 0.4
    compare(tiny_config, devices=8, data=8, fsdp=1, accumulate=2)


@pytest.mark.parametrize(("devices", "data", "fsdp", "accumulate"), LAYOUTS)
def test_fine_tuning_with_every_augmentation(supervised_config, devices, data, fsdp, accumulate):
    compare(supervised_config("finetune", optim__ema=0.9), devices, data, fsdp, accumulate)


@pytest.mark.parametrize(("devices", "data", "fsdp", "accumulate"), LAYOUTS[1:])
def test_partial_fine_tuning(supervised_config, devices, data, fsdp, accumulate):
    config = supervised_config("finetune", trainable_blocks=0.5)
    compare(config, devices, data, fsdp, accumulate)


@pytest.mark.parametrize(("devices", "data", "fsdp", "accumulate"), LAYOUTS[1:])
def test_linear_probing(supervised_config, devices, data, fsdp, accumulate):
    compare(supervised_config("linear_probe"), devices, data, fsdp, accumulate)


ON_ONE_DEVICE = {}  # config -> what `run_steps` gave


def compare(config, devices, data, fsdp, accumulate):
    key = config.to_json()
    if key not in ON_ONE_DEVICE:
        ON_ONE_DEVICE[key] = run_steps(config)
    expected, state = ON_ONE_DEVICE[key]
    config.optim.accumulate = accumulate
    losses, other = run_steps(config, devices, data, fsdp)
    assert losses[0] != losses[-1]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert_close(jax.device_get(state.weights), jax.device_get(other.weights))
    assert_close(jax.device_get(state.extra), jax.device_get(other.extra))


@pytest.mark.parametrize("task", ["finetune", "linear_probe"])
def test_evaluation_counts_every_example_once_on_any_device_count(supervised_config, task):
    config = supervised_config(task)
    expected = evaluate(config, devices=1)
    assert expected["eval/examples"] == 256
    for devices in (3, 8):
        found = evaluate(config, devices)
        for name in ("eval/examples", "eval/top1", "eval/top5"):
            assert found[name] == expected[name]
        np.testing.assert_allclose(found["eval/loss"], expected["eval/loss"], rtol=1e-6)


def evaluate(config, devices):
    config.eval.batch_size = 48  # does not divide the 256 examples
    task, splits, state = make(config, devices)
    written = {}
    writer = types.SimpleNamespace(write=lambda step, scalars: written.update(scalars))
    shardings = shardings_of(abstract_state(task.init, task.mesh))
    Evaluation(task, splits, writer, shardings, max_batches=0)(0, state)
    return written
