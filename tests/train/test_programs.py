import re
import types

import jax
import jax.numpy as jnp
import pytest

from mae_jax import UserError
from mae_jax.distributed.mesh import make_mesh
from mae_jax.distributed.sharding import abstract_state
from mae_jax.train import programs as module
from mae_jax.train.programs import compile_ahead


@pytest.fixture
def state():
    """A million numbers: 4 MB."""
    mesh = make_mesh(devices=jax.devices()[:1])
    return abstract_state(lambda: jnp.zeros((1000, 1000)), mesh)


def two_products(state):
    """A program that must keep a matrix of 4 MB beside its argument and its result of 4 MB."""
    return jax.jit(lambda x: jnp.sin(x @ x) @ x).lower(state).compile()


def test_programs_come_by_name_and_the_memory_of_each_is_told(state, caplog):
    small = jax.jit(lambda x: x[0, 0]).lower(state)
    with caplog.at_level("INFO", logger="absl"):
        compiled = compile_ahead(
            {"step": lambda: [two_products(state)], "evaluation": lambda: [small.compile()]}, state
        )
    [step], [evaluation] = compiled["step"], compiled["evaluation"]
    assert float(evaluation(jnp.eye(1000))) == 1.0
    assert step(jnp.eye(1000)).shape == (1000, 1000)
    sizes = re.search(
        r"step (\S+), evaluation (\S+) GB; with the state at most (\S+) GB", caplog.text
    )
    step, evaluation, largest = map(float, sizes.groups())
    assert (step, evaluation, largest) == (0.01, 0.0, 0.01)  # 8, 0 and 12 MB


def test_a_device_with_too_little_memory_is_told_before_training(state, caplog, monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 10e6})
    monkeypatch.setattr(module.jax, "local_devices", lambda: [device])
    compile_ahead({"evaluation": lambda: [two_products(state)]}, state)
    assert (
        "the evaluation will hardly find the memory it needs: lower eval.batch_size" in caplog.text
    )


def test_a_program_that_does_not_fit_is_named_with_the_remedy(state):
    def fails():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 21.3G of 15.7G hbm\nmore")

    message = "^the probe does not fit: RESOURCE_EXHAUSTED: 21.3G of 15.7G hbm; lower eval.batch"
    with pytest.raises(UserError, match=message):
        compile_ahead({"step": lambda: [two_products(state)], "probe": fails}, state)


def test_other_errors_of_the_compiler_pass(state):
    def fails():
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compile_ahead({"step": fails}, state)
