"""Runs ablations: members that differ in a field or two, each with its fine-tuning and probing.

    python launch/sweep.py configs/ablations/mask_ratio.py --base=small --workdir=DIR
    python launch/sweep.py --grid mask.ratio=0.5,0.75,0.9 --base=quickstart --workdir=DIR
    python -m mae_jax.report DIR

Every run is an ordinary one in DIR/members, its output in its `log.txt`; `--print` lists those that
are still to be made as commands and starts nothing. The same command goes on where it was stopped.
Runs of one config are made once, whatever members and sweeps of this DIR they belong to. A run that
fails leaves out only its own follow-ups; one that is preempted or killed is started again. Ends
with 0 where all is done, 1 where something failed, 130 after Ctrl-C, 42 after SIGTERM.

`--base` is a file with a dict BASE, {task: (recipe, fields)}, as in configs/ablations/bases, or any
recipe, alone and without follow-ups. Fields come from the recipe, then from BASE, then from
`--config.FIELD=VALUE`, then from the member. `--finetune.FIELD=`, `--linear_probe.FIELD=` are for
follow-ups, which also take model and data from `--config`.

`--parallel=N` gives each of N runs at a time its part of the CPU cores (GPUs are not divided).
`--slurm="--nodes=4 --gpus-per-node=8"` submits all by launch/slurm.sbatch, follow-ups after their
pretraining.
"""

import argparse
import collections
import contextlib
import ctypes
import fcntl
import os
import pathlib
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from etils import epath
from tqdm import tqdm

from mae_jax import UserError
from mae_jax.config import TASKS
from mae_jax.storage.files import explain_failure, in_bucket, to_path
from mae_jax.sweeps import LOG, Run, Sweeps, keep_record, last_line, prepare
from mae_jax.train.ledger import read_times, seconds_at_work

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Told to stop and saved, a hang or a lost peer, killed; other codes are final (docs/failures.md).
RESTART = (42, 134, 135, 137, 139, 143)
RESTARTS = 100  # of one run; a run itself stops where starts fail without getting on


# How it is run.


class Runner:
    """Makes runs on this machine, some at a time, until all are done or cannot be."""

    def __init__(self, sweeps: Sweeps, parallel: int, lock: int):
        self._runs, self._rows = sweeps.runs, sweeps.rows
        self._parallel, self._lock = parallel, lock
        self._running: dict[int, tuple[Run, subprocess.Popen]] = {}  # by place
        self._told: int | None = None
        self._lines, self._drawn = 0, 0.0
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)

    def run(self) -> int:
        """The exit status."""
        while True:
            ready = []
            for run in (run for run in self._runs if run.state == "waiting"):
                if run.needs is None or run.needs.state == "done":
                    ready.append(run)
                elif run.needs.state in ("failed", "left out"):
                    run.state = "left out"
            free = [place for place in range(self._parallel) if place not in self._running]
            if self._told is None:
                for place, run in zip(free, ready, strict=False):
                    self._start(place, run)
            if not self._running:
                break
            time.sleep(0.2)
            for place, (run, process) in list(self._running.items()):
                if process.poll() is not None:
                    del self._running[place]
                    self._ended(run, process.returncode)
            self._draw()
        self._draw(last=True)
        if self._told is not None:
            print("stopped; the same command goes on from here")
            return 130 if self._told == signal.SIGINT else 42
        return 0

    def _start(self, place: int, run: Run) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        run.state, run.began = "running", time.time()

        def before() -> None:
            cores = sorted(os.sched_getaffinity(0))
            if self._parallel > 1:
                os.sched_setaffinity(0, cores[place :: self._parallel] or cores)
            # 1 is PR_SET_PDEATHSIG: where this program is killed, the run saves and leaves.
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)

        with open(run.folder / LOG, "a") as log:
            process = subprocess.Popen(
                run.command(sys.executable),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C comes from here, once
                preexec_fn=before if sys.platform == "linux" else None,
                pass_fds=[self._lock],  # theirs, too, until they have left
            )
        self._running[place] = run, process
        self._say(f"started   {run.folder.name}")

    def _ended(self, run: Run, status: int) -> None:
        status = 128 - status if status < 0 else status  # as a shell says it
        took = tqdm.format_interval(time.time() - run.began)
        if status == 0 and run.is_done():
            run.state = "done"
            self._say(f"done      {run.folder.name} in {took}; {self._counts()}")
        elif self._told is not None:
            run.state = "waiting"
            self._say(f"stopped   {run.folder.name}")
        elif status in RESTART and run.restarts < RESTARTS:
            run.state, run.restarts = "waiting", run.restarts + 1
            self._say(f"again     {run.folder.name} after exit status {status}")
        else:
            run.state = "failed"
            self._say(
                f"failed    {run.folder.name} with exit status {status}: {last_line(run.folder)}"
            )

    def _stop(self, number: int, _: object) -> None:
        """Tells the runs to save and leave; a second time, that they leave at once."""
        again, self._told = self._told is not None, number
        for _run, process in self._running.values():
            process.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    # What people see: a table on a terminal, lines in a log.

    def _say(self, text: str) -> None:
        self._erase()
        print(time.strftime("%H:%M:%S"), text, flush=True)

    def _erase(self) -> None:
        if self._lines:
            sys.stdout.write(f"\x1b[{self._lines}A\x1b[J")
            self._lines = 0

    def _draw(self, last: bool = False) -> None:
        if not sys.stdout.isatty() or (time.time() < self._drawn + 1 and not last):
            return
        self._erase()
        size = shutil.get_terminal_size()
        lines = [*table(self._rows, size.lines - 4), self._counts()]
        print("\n".join(line[: size.columns - 1] for line in lines), flush=True)
        self._lines, self._drawn = len(lines), time.time()

    def _counts(self) -> str:
        counts = collections.Counter(run.state for run in self._runs)
        states = ("running", "done", "failed", "left out", "waiting")
        text = ", ".join(f"{counts[s]} {s}" for s in states if counts[s])
        left = time_left(self._runs, self._parallel)
        return f"{text} of {len(self._runs)} runs" + f"; {left}" * bool(left)


def time_left(runs: list[Run], parallel: int) -> str:
    """An estimate: by the time that finished runs of the same kind took for their work."""
    paces = collections.defaultdict(list)
    for run in runs:
        if run.state == "done" and (times := read_times(run.folder)):
            paces[run.kind].append(seconds_at_work(times) / run.work())
    left, unknown = 0.0, 0
    for run in (run for run in runs if run.state in ("waiting", "running")):
        share = run.share() if run.state == "running" else 0.0
        if run.kind in paces:
            left += statistics.median(paces[run.kind]) * run.work() * (1 - share)
        elif share:
            left += (time.time() - run.began) * (1 - share) / share
        else:
            unknown += 1
    known = (
        f"left about {tqdm.format_interval(round(left / parallel))}"
        if left
        else "time left" * bool(unknown)
    )
    return known + (f" and {unknown} runs" * bool(left) + " not yet known") * bool(unknown)


def table(rows: dict[str, dict[str, Run]], room: int) -> list[str]:
    """A line a member and seed, a column a task; without room only what runs or failed."""
    tasks = list(dict.fromkeys(task for runs in rows.values() for task in runs))
    lines, eager = [], []
    wide = max(len(name) for name in rows)
    for name, runs in rows.items():
        cells = [cell(runs[task]) if task in runs else "-" for task in tasks]
        lines.append(" ".join([f"{name:{wide}}", *(f"{text:>12}" for text in cells)]))
        if any(run.state in ("running", "failed") for run in runs.values()):
            eager.append(lines[-1])
    head = " ".join([" " * wide, *(f"{task:>12}" for task in tasks)])
    if len(lines) + 1 > room:
        shown = eager[: max(0, room - 2)]
        lines = [*shown, f"... and {len(lines) - len(shown)} more"]
    return [head, *lines]


def cell(run: Run) -> str:
    """Where a run is, in a word."""
    return f"{run.share():.0%}" if run.state == "running" else run.state or "not asked"


def submit(runs: list[Run], options: list[str]) -> int:
    """Submits all that is to be done and not in the queue; follow-ups wait for what they need."""
    queue = output(["squeue", "--me", "--noheader", "--format=%i %j"]).splitlines()
    jobs = {name: number for number, name in (line.split(maxsplit=1) for line in queue if line)}
    for run in runs:
        if run.state == "done" or run.folder.name in jobs:
            continue
        run.folder.mkdir(parents=True, exist_ok=True)
        after = jobs.get(run.needs.folder.name) if run.needs else None
        waits = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
        names = [f"--job-name={run.folder.name}", f"--output={run.folder / LOG}"]
        script = [str(ROOT / "launch" / "slurm.sbatch"), *run.command()]
        number = output(["sbatch", "--parsable", *options, *names, *waits, *script]).strip()
        jobs[run.folder.name] = number.partition(";")[0]
        print(f"submitted {run.folder.name} as {jobs[run.folder.name]}")
    return 0


def output(command: list[str]) -> str:
    """What a program of Slurm's prints; UserError where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise UserError(
            f"{command[0]}: {error.strerror}; --slurm needs Slurm's programs"
        ) from error
    if done.returncode:
        raise UserError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


# The command.


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options; `given`: {task or config: fields}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument(
        "sweeps", nargs="*", metavar="FILE", help="or its name in configs/ablations"
    )
    parser.add_argument("--workdir", required=True, help="folder of these sweeps")
    parser.add_argument("--base", default="paper", help="paper, small, tiny, a file or a recipe")
    parser.add_argument(
        "--grid", action="append", metavar="FIELD=VALUE,...", help="in place of FILE"
    )
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=[], help="names of members"
    )
    parser.add_argument("--seeds", type=integers, default=[0], help="as 0,1")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--parallel", type=int, default=1, help="runs at a time")
    how.add_argument("--slurm", nargs="?", const="", help="submit, with these options of sbatch")
    how.add_argument("--print", action="store_true", help="only print what would be run")
    own, given = [], collections.defaultdict(dict)
    for token in argv:
        field = re.fullmatch(r"--(\w+)\.([\w.]+)=(.*)", token, re.DOTALL)
        if field and field[1] in ("config", *TASKS):
            given[field[1]][field[2]] = field[3]
        else:
            own.append(token)
    arguments = parser.parse_args(own)
    arguments.given = given
    if bool(arguments.sweeps) == bool(arguments.grid):
        parser.error("give sweep files, or --grid")
    if arguments.parallel < 1:
        parser.error("--parallel: at least 1")
    return arguments


def integers(text: str) -> list[int]:
    """`0,1` as numbers, each once."""
    return list(dict.fromkeys(int(part) for part in text.split(",")))


@contextlib.contextmanager
def alone(workdir: epath.Path) -> Iterator[int]:
    """Waits until no other sweep, nor what one left running, works in DIR; gives the lock."""
    if in_bucket(workdir):
        raise UserError("--workdir: a bucket is for --print; here logs are kept, give a folder")
    with explain_failure(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = os.open(workdir / "sweep.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another sweep in {workdir}, or for runs it left, to end", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield file
    finally:
        os.close(file)


def main() -> int:
    """Command line."""
    arguments = parse(sys.argv[1:])
    try:
        return carry_out(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def carry_out(arguments: argparse.Namespace) -> int:
    """What the options ask for; returns the exit status."""
    workdir = to_path(arguments.workdir)

    def plan() -> Sweeps:
        sweeps = prepare(
            workdir,
            arguments.base,
            files=arguments.sweeps,
            grids=arguments.grid,
            only=arguments.only,
            seeds=arguments.seeds,
            given=arguments.given,
        )
        for label, reason in sweeps.refused:
            print(f"refused   {label}: {reason}", file=sys.stderr, flush=True)
        return sweeps

    if arguments.print:
        sweeps = plan()
        for run in (run for run in sweeps.runs if run.state == "waiting"):
            print(shlex.join(run.command()))
        return 1 if sweeps.refused else 0
    with alone(workdir) as lock:
        sweeps = plan()
        keep_record(workdir, sweeps.record)
        if arguments.slurm is not None:
            status = submit(sweeps.runs, shlex.split(arguments.slurm))
        else:
            status = Runner(sweeps, arguments.parallel, lock).run()
    bad = [run for run in sweeps.runs if run.state in ("failed", "left out")]
    for run in bad:
        reason = (
            last_line(run.folder) if run.state == "failed" else f"without {run.needs.folder.name}"
        )
        print(f"{run.state:9} {run.folder.name}: {reason}")
    for label, reason in sweeps.refused:
        print(f"refused   {label}: {reason}")
    return status or (1 if bad or sweeps.refused else 0)


if __name__ == "__main__":
    sys.exit(main())
