"""Every second of a run is in one phase, over all of its starts."""

import contextlib
import json
import types

import jax
import pytest

from mae_jax.train import ledger as module
from mae_jax.train.ledger import Ledger, read_times, summary
from mae_jax.train.loop import Action, add_totals, train


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved: `clock(seconds)`."""
    now = [1000.0]

    def move(seconds):
        now[0] += seconds

    fake = types.SimpleNamespace(perf_counter=lambda: now[0] - 990, time=lambda: now[0])
    fake.strftime, fake.localtime = module.time.strftime, module.time.localtime
    monkeypatch.setattr(module, "time", fake)
    return move


def test_phases_nest_and_time_counts_for_the_innermost(clock):
    ledger = Ledger("start")
    clock(1)
    with ledger.during("step"):
        clock(2)
        with ledger.during("data"):
            clock(4)
        with ledger.during("data", unless=lambda: True):  # devices had work meanwhile
            clock(8)
        with contextlib.suppress(KeyError), ledger.during("save"):
            assert ledger.phase == "save"
            clock(16)
            raise KeyError
    assert ledger.phase == "start"
    assert ledger.seconds == {"start": 1, "step": 10, "data": 4, "save": 16}
    assert ledger.goodput == 10 / 31


def start(workdir, clock, from_step, to_step, *, total=10, killed=False):
    """One start of a run with steps of a second; a killed one never says its last word."""
    ledger = Ledger("start")
    clock(3)
    ledger.resume(workdir, from_step, total)
    with ledger.during("step"):
        for step in range(from_step + 1, to_step + 1):
            clock(1)
            ledger.advance(step)
        ledger.write()
        if not killed:
            with ledger.during("save"):
                clock(2)
            ledger.close()


def test_the_phases_of_all_starts_add_up_to_the_time_since_the_first(tmp_path, clock):
    start(tmp_path, clock, 0, 6, killed=True)
    clock(100)
    start(tmp_path, clock, 4, 5, killed=True)
    clock(50)
    start(tmp_path, clock, 4, 10)
    times = read_times(tmp_path)
    expected = {"step": 10, "repeated": 3, "start": 9, "save": 2, "away": 150}
    assert times["seconds"] == expected
    assert sum(expected.values()) == times["until"] - times["began"]
    assert times["steps_repeated"] == 3  # 5, then 5 and 6
    assert (times["starts"], times["step"], times["total_steps"]) == (3, 10, 10)
    assert times["goodput"] == 10 / 174


def test_what_came_before_the_first_step_is_told_of_the_newest_start(tmp_path, clock):
    start(tmp_path, clock, 0, 6)
    clock(100)
    ledger = Ledger("start", began=1000.0 + 3 + 6 + 2 + 100 - 7)  # 7 s before this line
    with ledger.during("restore"):
        ledger.resume(tmp_path, 6, 10)
        clock(5)
    with ledger.during("step"):
        clock(2)
        ledger.made_first_step()
        clock(50)
    ledger.close()
    times = read_times(tmp_path)
    assert times["to_first_step"] == {"imports": 7, "restore": 5, "step": 2}
    assert times["cpu_to_first_step"] > 0
    assert times["seconds"]["away"] == 93
    assert sum(times["seconds"].values()) == times["until"] - times["began"]


def test_a_process_knows_when_it_began():
    began = module.process_began()
    assert began is None or 0 < module.time.time() - began < 24 * 3600


def test_a_run_goes_on_counting_where_its_figures_were_damaged(tmp_path, clock, caplog):
    (tmp_path / "time.json").write_text("{")
    start(tmp_path, clock, 4, 10)
    assert "counted anew" in caplog.text
    assert read_times(tmp_path)["seconds"] == {"step": 6, "start": 3, "save": 2}


def test_a_summary_tells_how_far_and_how_well(tmp_path, clock):
    assert summary(tmp_path) == ""
    start(tmp_path, clock, 0, 6, killed=True)
    pace = {"step": 2, "train/seconds_per_step": 1.0, "train/data_wait": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(pace) + "\n")
    first, *lines = summary(tmp_path).splitlines()
    assert "6 of 10 steps, 1 start(s), 00:09 in all, goodput 66.7%, last heard of" in first
    assert [line.split()[:3] for line in lines] == [
        ["step", "00:06", "66.7%"],
        ["start", "00:03", "33.3%"],
    ]
    assert "median 0.5 s; what slower steps took beyond it: 33.3%" in lines[0]  # 6 - 6 * 0.5


def test_the_loop_tells_steps_waiting_and_actions_apart(clock):
    """Waiting for a batch counts where no step is under way, and actions are in no interval."""
    intervals = []

    def batches():
        for _ in range(4):
            clock(1)
            yield 0.0

    def step_fn(state, totals, batch):
        clock(10)
        return state, add_totals(totals, {"loss": jax.numpy.float32(batch)}, state)

    ledger = Ledger("start")
    train(
        step_fn,
        jax.numpy.int32(0),
        batches(),
        metric_names=("loss",),
        place_totals=jax.device_put,
        start_step=0,
        total_steps=4,
        log_every=2,
        report=lambda interval: intervals.append(interval) or "",
        actions=[Action("evaluation", 2, lambda step, state: clock(100))],
        stop_requested=lambda: False,
        on_stop=lambda *_: None,
        ledger=ledger,
    )
    assert ledger.seconds["evaluation"] == 200
    assert ledger.seconds["step"] + ledger.seconds["data"] == 44
    assert ledger.seconds["data"] >= 1  # the first, at least; the rest depends on the device
    assert [interval.seconds for interval in intervals] == [22, 22]
