"""Traces of steps as JAX's profiler reads them back."""

import jax
import jax.numpy as jnp
import pytest

from mae_jax.train.ledger import Ledger
from mae_jax.train.profiler import Profiled


def run(folder, *, start_step, total=6, start=2, steps=2):
    """Calls a step that marks itself in the trace; the names it went by are what is returned."""
    ledger = Ledger("step")
    double = jax.jit(lambda x: 2 * x)

    def step_fn(state, totals, batch):
        with jax.profiler.TraceAnnotation(f"traced {batch}"):
            return double(state), totals

    options = {"start": start, "steps": steps, "start_step": start_step, "ledger": ledger}
    with Profiled(step_fn, folder, **options) as profiled:
        state = jnp.float32(1)
        for batch in range(start_step, total):
            state, _ = profiled(state, None, batch)
    assert float(state) == 2.0 ** (total - start_step)
    return ledger


def traced(folder):
    [file] = folder.rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    names = {event.name for plane in data.planes for line in plane.lines for event in line.events}
    return {name for name in names if name.startswith("traced ")}


def test_the_steps_asked_for_are_traced_and_no_others(tmp_path):
    ledger = run(tmp_path / "profile", start_step=0)
    assert traced(tmp_path / "profile") == {"traced 2", "traced 3"}
    assert ledger.seconds["profile"] > 0


def test_a_run_that_ends_first_leaves_what_was_traced(tmp_path):
    run(tmp_path / "profile", start_step=0, start=4, steps=9)
    assert traced(tmp_path / "profile") == {"traced 4", "traced 5"}


@pytest.mark.parametrize(("start_step", "steps"), [(3, 2), (0, 0), (4, 9)])
def test_steps_that_are_past_or_not_asked_for_are_not_traced(tmp_path, start_step, steps):
    ledger = run(tmp_path / "profile", start_step=start_step, steps=steps)
    assert not (tmp_path / "profile").exists()
    assert "profile" not in ledger.seconds


def test_a_run_that_goes_on_at_the_first_of_them_traces_them(tmp_path):
    run(tmp_path / "profile", start_step=2)
    assert traced(tmp_path / "profile") == {"traced 2", "traced 3"}
