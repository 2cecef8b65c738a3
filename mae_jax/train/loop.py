"""The training loop. It knows no task: a step function, batches, and things to do at intervals."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax import UserError
from mae_jax.distributed.stopping import StoppedError
from mae_jax.train.ledger import Ledger
from mae_jax.train.progress import Progress
from mae_jax.train.state import Metrics, TrainState


class Totals(NamedTuple):
    """Metrics summed on the device over a log interval."""

    sums: Metrics  # float32, over `count` steps
    count: jax.Array
    bad_step: jax.Array  # the first (0-based) with a non-finite metric, -1 for none


def zero_totals(names: Iterable[str]) -> Totals:
    """Totals of no steps."""
    sums = {name: np.float32(0) for name in names}  # of JAX each would be a program of its own
    return Totals(sums, count=np.int32(0), bad_step=np.int32(-1))


def add_totals(totals: Totals, metrics: Metrics, step: jax.Array) -> Totals:
    """Adds the metrics of `step`; runs inside the compiled step."""
    finite = jnp.all(jnp.stack([jnp.isfinite(m) for m in metrics.values()]))
    bad_step = jnp.where((totals.bad_step < 0) & ~finite, step, totals.bad_step)
    sums = {name: totals.sums[name] + value for name, value in metrics.items()}
    return Totals(sums, totals.count + 1, bad_step)


def totals_to_json(totals: Totals) -> dict[str, Any]:
    """Host totals of finite steps, as a checkpoint's record keeps an unfinished interval."""
    sums = {name: float(total) for name, total in totals.sums.items()}
    return {"sums": sums, "steps": int(totals.count)}


def totals_from_json(record: dict[str, Any]) -> Totals:
    """The inverse of `totals_to_json`."""
    sums = {name: np.float32(total) for name, total in record["sums"].items()}
    return Totals(sums, np.int32(record["steps"]), np.int32(-1))


StepFn = Callable[[TrainState, Totals, Any], tuple[TrainState, Totals]]


class Action(NamedTuple):
    """Something to do at the end of every `every`-th step (0: never), and of the last one."""

    phase: str  # of the ledger
    every: int
    run: Callable[[int, TrainState], None]  # of (steps done, state)
    # Compiles for an abstract state what `run` runs, which takes no time there then.
    compile: Callable[[TrainState], Sequence[jax.stages.Compiled]] | None = None
    # Asked at the end of every log interval: True makes it due besides.
    also: Callable[[], bool] | None = None

    def is_due(self, done: int, total_steps: int, log_every: int) -> bool:
        """Whether it is to be done after `done` steps."""
        also = self.also is not None and done % log_every == 0 and self.also()  # all must ask
        return also or done == total_steps or (self.every > 0 and done % self.every == 0)


class Interval(NamedTuple):
    """One log interval: mean metrics of its steps, seconds they took without actions."""

    metrics: dict[str, float]
    steps: int  # that took `seconds`: those since a start in the middle
    step: int
    seconds: float
    data_seconds: float  # of these, in which devices waited for data


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
    stop_requested: Callable[[], bool],
    on_stop: Callable[[int, TrainState, list[str], Totals], None],
    ledger: Ledger,
    begun: Totals | None = None,
) -> tuple[TrainState, int, bool]:
    """Steps `start_step` to `total_steps`: the state, the steps done, and whether it was stopped.

    UserError: names the first step with a loss or gradient norm that is not finite.

    Args:
      step_fn: compiled; may reuse the memory of the state it is given.
      batches: device batches, the first one for `start_step`.
      report: takes every finished interval, one interval late, and returns the line to show.
      actions: run in order after a step, after a check for NaN: no broken state is ever saved.
      stop_requested: asked after every step; True ends the run, as an action does that raises
        StoppedError.
      on_stop: called in that case with the state to save, the phases of actions still due, and
        what the unfinished log interval has summed.
      ledger: counts steps and their time, that of actions by their phase, and of waiting for
        batches while devices have nothing to do.
      begun: what `on_stop` was given, where the run was stopped before.
    """
    previous: jax.Array | None = None
    pending: tuple[Totals, int, int, float, float] | None = None
    totals = place_totals(begun or zero_totals(metric_names))
    newest, first = start_step, start_step + 1  # newest: that was reported, or was there before

    def spent() -> tuple[float, float]:
        """Seconds so far without actions, and of them those of waiting for data."""
        ledger.count()
        data = ledger.seconds["data"]
        return ledger.seconds["step"] + ledger.seconds["repeated"] + data, data

    start = spent()

    def devices_are_busy() -> bool:
        return previous is not None and not previous.is_ready()

    def flush() -> None:
        nonlocal pending
        if pending is not None:
            finished, *facts = jax.device_get(pending)
            _check_finite(finished)
            count = int(finished.count)
            means = {name: float(total) / count for name, total in finished.sums.items()}
            interval = Interval(means, *facts)
            bar.show(report(interval), interval.step, interval.seconds / interval.steps)
            pending = None

    with Progress(start_step, total_steps) as bar, ledger.during("step"):
        for done in range(start_step + 1, total_steps + 1):
            with ledger.during("data", unless=devices_are_busy):
                batch = next(batches)
            state, totals = step_fn(state, totals, batch)
            last = done == total_steps
            # Waits for the step before: bounds the batches held, and makes the host's clock the
            # device's. The device does not pause for this, it has the step just sent.
            if previous is not None:
                previous.block_until_ready()
            previous = totals.count
            ledger.advance(done)
            if done == first:
                previous.block_until_ready()
                ledger.made_first_step()
            bar.advance()

            if done % log_every == 0 or last:
                # Blocks until the previous interval is finished, while this one runs.
                flush()
                jax.tree.map(lambda x: x.copy_to_host_async(), totals)
                now = spent()
                pending = totals, done - newest, done, now[0] - start[0], now[1] - start[1]
                start, newest = now, done
                totals = place_totals(zero_totals(metric_names))

            due = [action for action in actions if action.is_due(done, total_steps, log_every)]
            stopped = stop_requested()
            if due or stopped:
                flush()
                _check_finite(totals)  # waits for the device: what follows reads the state
                try:
                    while due and not stopped:
                        with ledger.during(due[0].phase):
                            due[0].run(done, state)
                        ledger.write()
                        del due[0]
                except StoppedError:
                    stopped = True
            if stopped:
                with ledger.during("save"):
                    on_stop(done, state, [x.phase for x in due], jax.device_get(totals))
                return state, done, True
        flush()
    return state, total_steps, False


def _check_finite(totals: Totals) -> None:
    bad_step = int(totals.bad_step)
    if bad_step >= 0:
        raise UserError(
            f"the loss or the gradient norm is not finite at step {bad_step} (0-based). Nothing "
            "was saved since; the last checkpoint is good. Lower optim.base_lr, set "
            "optim.clip_norm, or compute in float32 (compute_dtype), with a new workdir."
        )
