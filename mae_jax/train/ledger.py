"""Where the time of a run goes, over all of its starts."""

import collections
import contextlib
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from absl import logging
from tqdm import tqdm

from mae_jax import UserError
from mae_jax.storage.files import PathLike, read_json, to_path, write_json
from mae_jax.train.metrics import read_metrics

FILE = "time.json"
PHASES = {  # in the order shown
    "step": "training steps, each once",
    "repeated": "steps made again, as the start that made them first did not save them",
    "data": "devices without work until a batch is there",
    "imports": "Python and its packages, before the first line of ours",
    "open": "data opened and looked at, the task built",
    "start": "other processes joined, whatever is not below",
    "restore": "weights drawn, loaded, or read from a checkpoint",
    "features": "computed and kept for linear probing",
    "compile": "programs",
    "evaluation": "",
    "probe": "",
    "pictures": "",
    "profile": "a trace begun and written",
    "save": "checkpoints, as far as steps wait for them, and the export",
    "away": "from the last word of one start to the next",
}


class Ledger:
    """Seconds by phase. Phases nest; time counts for the innermost.

    From `resume` on process 0 keeps them in the workdir, with those of earlier starts. Others, and
    runs without a workdir, count for themselves. `began`: when its process did, in seconds since
    1970; what is before now counts as imports.
    """

    def __init__(self, phase: str, began: float | None = None):
        self.step = self.repeated = self._furthest = 0
        self.seconds: collections.Counter[str] = collections.Counter()
        self._starts, self._path = 1, None
        self._phases = [phase]
        self._began, self._since = time.time(), time.perf_counter()
        if began is not None:
            self.seconds["imports"] = self._began - began
            self._began = began
        self._first_began = self._began
        self._before: collections.Counter[str] = collections.Counter()  # of earlier starts
        self._to_first_step: dict[str, float] = {}
        self._cpu_to_first_step = 0.0

    @property
    def phase(self) -> str:
        """What the process is doing."""
        return self._phases[-1]

    @property
    def goodput(self) -> float:
        """The share of steps, each counted once, in all the time since the run first started."""
        self.count()
        return self.seconds["step"] / self.seconds.total()

    @contextlib.contextmanager
    def during(self, phase: str, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Counts the block as `phase`; as what surrounds it where `unless()` is true at its end."""
        self.count()
        self._phases.append(phase)
        try:
            yield
        finally:
            if unless():
                self._phases[-1] = self._phases[-2]
            self.count()
            self._phases.pop()

    def advance(self, step: int) -> None:
        """So many steps are done."""
        if step <= self._furthest:
            self.repeated += 1
            if step == self._furthest:
                self.count()
        self.step = step

    def made_first_step(self) -> None:
        """The first step of this start has ended: what it took to come here is kept."""
        self.count()
        self._to_first_step = dict(self.seconds - self._before)
        self._cpu_to_first_step = sum(os.times()[:2])
        self.write()

    def count(self) -> None:
        """Adds the time since the last call to its phase."""
        now = time.perf_counter()
        again = self.phase == "step" and self.step < self._furthest
        self.seconds["repeated" if again else self.phase] += now - self._since
        self._since = now

    def resume(self, workdir: PathLike, step: int, total_steps: int) -> None:
        """Goes on from step `step` with what earlier starts left in the workdir."""
        self.step, self._total_steps = step, total_steps
        if jax.process_index() != 0:
            return
        self._path = to_path(workdir) / FILE
        try:
            before = read_times(workdir)
        except UserError as error:
            logging.warning("the run's time is counted anew: %s", error)
            before = None
        if before is not None:
            self._before.update(before["seconds"])
            self.seconds.update(before["seconds"])
            away = max(0.0, self._began - before["until"])
            self.seconds["away"] += away
            self._before["away"] += away
            self.repeated, self._furthest = before["steps_repeated"], before["step"]
            self._starts, self._first_began = before["starts"] + 1, before["began"]
        self.write()

    def write(self) -> None:
        """Keeps the figures; what a killed start did after its last call counts as away."""
        if self._path is not None:
            write_json(self._path, self.record())

    close = write

    def record(self) -> dict[str, Any]:
        """The figures as they are kept; times of day in seconds since 1970."""
        goodput = self.goodput
        return {
            "began": self._first_began,
            "until": time.time(),
            "starts": self._starts,
            "step": max(self.step, self._furthest),
            "total_steps": self._total_steps,
            "steps_repeated": self.repeated,
            "goodput": goodput,
            "to_first_step": _in_order(self._to_first_step),  # of the newest start, as the next
            "cpu_to_first_step": self._cpu_to_first_step,  # user and system, of this process
            "seconds": _in_order(self.seconds),
        }


def process_began() -> float | None:
    """When this process began, in seconds since 1970; None where the system does not tell."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        up = float(pathlib.Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return None
    return time.time() - up + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _in_order(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: seconds[name] for name in PHASES if seconds.get(name)}


def read_times(workdir: PathLike) -> dict[str, Any] | None:
    """The `Ledger.record` that a run keeps in its workdir, None where there is none."""
    path = to_path(workdir) / FILE
    return read_json(path) if path.exists() else None


def seconds_at_work(times: dict[str, Any]) -> float:
    """Seconds of a `Ledger.record` in which the run was there: all but those between starts."""
    return sum(times["seconds"].values()) - times["seconds"].get("away", 0.0)


def step_seconds(workdir: PathLike) -> float | None:
    """A step's usual time: the median over log intervals, without waiting for data."""
    lines = read_metrics(to_path(workdir) / "metrics.jsonl")
    paces = [
        line["train/seconds_per_step"] * (1 - line["train/data_wait"])
        for line in lines
        if "train/seconds_per_step" in line
    ]
    return statistics.median(paces) if paces else None


def summary(workdir: PathLike) -> str:
    """Where the time of a run went, as lines for people; empty where nothing was kept."""
    times, usual = read_times(workdir), step_seconds(workdir)
    if times is None:
        return ""
    total, done = sum(times["seconds"].values()), f"{times['step']} of {times['total_steps']} steps"
    lines = [
        f"{workdir}: {done}, {times['starts']} start(s), {tqdm.format_interval(total)} in all, "
        f"goodput {times['goodput']:.1%}"
    ]
    if times["step"] < times["total_steps"]:
        lines[0] += time.strftime(", last heard of %F %T", time.localtime(times["until"]))
    for name, seconds in times["seconds"].items():
        if seconds < 0.005:
            continue
        note = PHASES[name]
        if name == "step" and usual:
            slow = max(0.0, seconds - usual * times["step"])
            note = f"median {usual:.3g} s; what slower steps took beyond it: {slow / total:.1%}"
        if name == "repeated":
            note = f"{times['steps_repeated']} {note}"
        lines.append(
            f"  {name:10} {tqdm.format_interval(seconds):>9} {seconds / total:6.1%}  {note}"
        )
    return "\n".join(lines)
