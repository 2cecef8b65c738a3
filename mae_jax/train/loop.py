"""The training loop. It knows no task: a step function, batches, and things to do at intervals."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mae_jax import UserError
from mae_jax.train.progress import Progress
from mae_jax.train.state import Metrics, TrainState


class Totals(NamedTuple):
    """Metrics summed on the device over a log interval.

    Attributes:
      sums: name -> float32 sum over `count` steps.
      bad_step: first step (0-based) with a non-finite metric, -1 for none.
    """

    sums: Metrics
    count: jax.Array
    bad_step: jax.Array


def zero_totals(names: Iterable[str]) -> Totals:
    """Totals of no steps."""
    return Totals(
        {name: jnp.zeros((), jnp.float32) for name in names},
        jnp.zeros((), jnp.int32),
        jnp.full((), -1, jnp.int32),
    )


def add_totals(totals: Totals, metrics: Metrics, step: jax.Array) -> Totals:
    """Adds the metrics of `step`; runs inside the compiled step."""
    finite = jnp.all(jnp.stack([jnp.isfinite(m) for m in metrics.values()]))
    first_bad = (totals.bad_step < 0) & ~finite
    return Totals(
        {name: totals.sums[name] + value for name, value in metrics.items()},
        totals.count + 1,
        jnp.where(first_bad, step, totals.bad_step),
    )


StepFn = Callable[[TrainState, Totals, Any], tuple[TrainState, Totals]]


@dataclasses.dataclass(frozen=True)
class Action:
    """Something to do at the end of every `every`-th step (0: never), and of the last one.

    Attributes:
      run: called with (steps done, state).
    """

    every: int
    run: Callable[[int, TrainState], None]

    def due(self, step: int, last: bool) -> bool:
        """Whether to run after `step` steps."""
        return last or (self.every > 0 and step % self.every == 0)


class Interval(NamedTuple):
    """One log interval: mean metrics of its steps, seconds they took, seconds spent on data."""

    step: int
    metrics: dict[str, float]
    steps: int
    seconds: float
    data_seconds: float


def train(
    step_fn: StepFn,
    state: TrainState,
    batches: Iterator[Any],
    *,
    metric_names: Sequence[str],
    place_totals: Callable[[Totals], Totals],
    start_step: int,
    total_steps: int,
    log_every: int,
    report: Callable[[Interval], str],
    actions: Sequence[Action],
    stop_requested: Callable[[int], bool],
    on_stop: Callable[[int, TrainState], None],
) -> tuple[TrainState, int]:
    """Runs steps `start_step` to `total_steps`.

    Args:
      step_fn: compiled; may reuse the memory of the state it is given.
      batches: device batches, the first one for `start_step`.
      report: takes every finished interval, one interval late, and returns the line to show.
      actions: run in order after a step; before any runs, the interval is checked for NaN, so
        that nothing is ever saved from a broken state.
      stop_requested: asked after every step with the number of steps done; True ends the run.
      on_stop: called in that case with the state to save.

    Returns:
      The state and the number of steps done, less than `total_steps` after a stop.

    Raises:
      UserError: naming the step.
    """
    clock = _Clock()
    previous: jax.Array | None = None
    pending: tuple[Totals, int, float, float] | None = None
    totals = place_totals(zero_totals(metric_names))
    bar = Progress(start_step, total_steps)

    def flush() -> None:
        nonlocal pending
        if pending is not None:
            finished, step, seconds, waited = pending
            interval = _read(finished, step, seconds, waited)
            bar.show(report(interval), step, seconds / interval.steps)
            pending = None

    with bar:
        for step in range(start_step, total_steps):
            with clock.waiting_for_data():
                batch = next(batches)
            state, totals = step_fn(state, totals, batch)
            done = step + 1
            # Waits for the step before: bounds the batches held, and makes the host's clock the
            # device's. The device does not pause for this, it has the step just sent.
            if previous is not None:
                previous.block_until_ready()
            previous = totals.count
            bar.advance()

            if done % log_every == 0 or done == total_steps:
                # Blocks until the previous interval is finished, while this one runs.
                flush()
                jax.tree.map(lambda x: x.copy_to_host_async(), totals)
                pending = (totals, done, *clock.lap())
                totals = place_totals(zero_totals(metric_names))

            due = [action for action in actions if action.due(done, done == total_steps)]
            stopping = done < total_steps and stop_requested(done)
            if due or stopping:
                with clock.paused():
                    flush()
                    _check_finite(totals)  # waits for the device: what follows reads the state
                    for action in due:
                        action.run(done, state)
            if stopping:
                on_stop(done, state)
                return state, done
        flush()
    return state, total_steps


def _check_finite(totals: Totals) -> None:
    bad_step = int(totals.bad_step)
    if bad_step >= 0:
        raise UserError(
            f"the loss or the gradient norm is not finite at step {bad_step} (0-based). Nothing "
            "was saved since; the last checkpoint is good. Lower optim.base_lr, set "
            "optim.clip_norm, or compute in float32 (compute_dtype), with a new workdir."
        )


def _read(totals: Totals, step: int, seconds: float, waited: float) -> Interval:
    totals = jax.device_get(totals)
    _check_finite(totals)
    count = int(totals.count)
    means = {name: float(total) / count for name, total in totals.sums.items()}
    return Interval(step, means, count, seconds, waited)


class _Clock:
    """Seconds of training since the last lap, and how many of them went into waiting for data."""

    def __init__(self):
        self._start = time.perf_counter()
        self._waited = 0.0

    @contextlib.contextmanager
    def waiting_for_data(self):
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self):
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def lap(self) -> tuple[float, float]:
        now = time.perf_counter()
        lap = now - self._start, self._waited
        self._start, self._waited = now, 0.0
        return lap
