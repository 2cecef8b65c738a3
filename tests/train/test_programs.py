import json
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from program import ROOT

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


DRIVER = """
import collections, json, sys
import jax, jax.numpy as jnp
from mae_jax.train.programs import keep_compiled

keep_compiled(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event]))
x = jnp.arange(12.0).reshape(3, 4)
found = jax.jit(lambda x: jnp.sin(x @ x.T).sum())(x)
misses, hits = (seen[f"/jax/compilation_cache/cache_{what}"] for what in ("misses", "hits"))
print(json.dumps([float(found).hex(), misses > 0, hits > 0, jax.config.jax_compilation_cache_dir]))
"""


def run_driver(cache_dir, **environment):
    variables = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", DRIVER, cache_dir]
    environment = {**variables, "PYTHONPATH": str(ROOT), **environment}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_programs_are_kept_in_the_users_cache_and_serve_the_next_start(tmp_path):
    first, *missed, folder = run_driver("", XDG_CACHE_HOME=str(tmp_path))
    assert folder.startswith(f"{tmp_path}/mae_jax/compiled/cpu-")
    assert missed == [True, False]
    second, *hit, _ = run_driver("", XDG_CACHE_HOME=str(tmp_path))
    assert hit == [False, True]
    assert second == first
    # A kind of CPU has its own; so has another folder.
    moved = run_driver(f"{tmp_path}/else", XDG_CACHE_HOME=str(tmp_path))
    assert moved == [first, True, False, f"{tmp_path}/else/{pathlib.Path(folder).name}"]


@pytest.mark.parametrize(
    ("cache_dir", "environment", "expected"),
    [
        ("none", {}, [False, False, None]),
        ("none", {"JAX_COMPILATION_CACHE_DIR": "/tmp/any"}, [False, False, None]),
        ("/proc/nowhere", {}, [False, False, None]),  # not to be written to, by root neither
    ],
)
def test_without_a_place_for_them_programs_are_compiled_each_time(cache_dir, environment, expected):
    assert run_driver(cache_dir, **environment)[1:] == expected


def test_where_jax_was_told_to_keep_them_they_stay(tmp_path):
    assert run_driver("", JAX_COMPILATION_CACHE_DIR=str(tmp_path))[3] == str(tmp_path)
