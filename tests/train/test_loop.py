import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax import UserError
from mae_jax.distributed.stopping import StoppedError
from mae_jax.train.ledger import Ledger
from mae_jax.train.loop import Action, add_totals, train

handed_over = []  # the sums of unfinished intervals


def run(losses, *, start=0, log_every=2, actions=(), stop_at=None, total=None, begun=None):
    """Trains a state that is a step counter; step i reports losses[i]."""
    intervals, stopped, polls = [], [], itertools.count(start + 1)

    @jax.jit
    def step_fn(state, totals, batch):
        return state + 1, add_totals(totals, {"loss": batch}, state)

    def report(interval):
        intervals.append(interval)
        return ""

    state, done, _ = train(
        step_fn,
        jnp.asarray(start),
        (jnp.asarray(loss, jnp.float32) for loss in losses[start:]),
        metric_names=("loss",),
        place_totals=lambda totals: totals,
        start_step=start,
        total_steps=total or len(losses),
        log_every=log_every,
        report=report,
        actions=actions,
        stop_requested=lambda: next(polls) == stop_at,
        on_stop=lambda step, state, due, totals: (
            stopped.append((step, int(state), due)),
            handed_over.append(totals),
        ),
        ledger=Ledger("start"),
        begun=begun,
    )
    return int(state), done, intervals, stopped


def test_every_step_is_reported_once_as_interval_means():
    state, done, intervals, _ = run([1, 2, 3, 4, 5])
    assert state == done == 5
    assert [(i.step, i.steps, i.metrics["loss"]) for i in intervals] == [
        (2, 2, 1.5),
        (4, 2, 3.5),
        (5, 1, 5.0),
    ]


def test_actions_run_in_order_at_their_steps_and_at_the_end():
    calls = []
    actions = [
        Action("evaluation", 0, lambda step, state: calls.append(("end", step, int(state)))),
        Action("save", 3, lambda step, state: calls.append(("third", step, int(state)))),
    ]
    run([0.0] * 7, actions=actions)
    assert calls == [("third", 3, 3), ("third", 6, 6), ("end", 7, 7), ("third", 7, 7)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_loss_stops_the_run_naming_its_step_and_saves_nothing_after(bad):
    saved = []
    actions = [Action("save", 2, lambda step, state: saved.append(step))]
    with pytest.raises(UserError, match="at step 4 "):
        run([1, 1, 1, 1, bad, 1, 1, 1], log_every=1, actions=actions)
    assert saved == [2, 4]


def test_a_non_finite_loss_between_logs_is_seen_before_a_save():
    saved = []
    actions = [Action("save", 6, lambda step, state: saved.append(step))]
    with pytest.raises(UserError, match="at step 3 "):
        run([1, 1, 1, np.nan, 1, 1, 1], log_every=100, actions=actions)
    assert saved == []


def test_a_stop_request_hands_over_the_state_of_that_step():
    state, done, intervals, stopped = run([1.0] * 9, stop_at=5)
    assert (state, done, stopped) == (5, 5, [(5, 5, [])])
    assert [i.step for i in intervals] == [2, 4]


@pytest.mark.parametrize("stop_at", [None, 6, 9])
def test_a_stop_hands_over_what_was_still_to_be_done(stop_at):
    """Whether it is told before an action (at step 6, at the last one), or given up by it."""

    def given_up(step, state):
        raise StoppedError

    calls = []
    first = Action("evaluation", 3, lambda *_: calls.append("evaluation"))
    probe = Action("probe", 3, given_up if stop_at is None else lambda *_: calls.append("probe"))
    every = [first, probe, Action("save", 3, lambda *_: calls.append("save"))]
    _, done, _, stopped = run([1.0] * 9, actions=every, stop_at=stop_at)
    if stop_at is None:
        assert (calls, stopped) == (["evaluation"], [(3, 3, ["probe", "save"])])
    else:
        assert calls == ["evaluation", "probe", "save"] * (stop_at // 3 - 1)
        assert stopped == [(stop_at, stop_at, ["evaluation", "probe", "save"])]
    assert done == stopped[0][0]


def test_a_run_continued_in_the_middle_draws_the_batches_from_there():
    _, _, intervals, _ = run([1, 2, 3, 4, 5, 6], start=3)
    assert [(i.step, i.metrics["loss"]) for i in intervals] == [(4, 4.0), (6, 5.5)]


def test_an_interval_that_a_stop_cut_in_two_is_reported_as_if_it_was_whole():
    run([1, 2, 3, 4, 5, 6, 7, 8], log_every=4, stop_at=6)
    begun = handed_over.pop()
    assert (int(begun.count), float(begun.sums["loss"])) == (2, 5 + 6)
    _, _, intervals, _ = run([1, 2, 3, 4, 5, 6, 7, 8], log_every=4, start=6, begun=begun)
    assert [(i.step, i.steps, i.metrics["loss"]) for i in intervals] == [(8, 2, 6.5)]


def test_an_action_may_be_due_by_the_clock_which_is_asked_at_log_intervals():
    asked, saved = [], []

    def over():
        asked.append(True)
        return len(asked) == 2

    action = Action("save", 0, lambda step, _: saved.append(step), also=over)
    run([0.0] * 9, log_every=3, actions=[action])
    assert (len(asked), saved) == (3, [6, 9])
