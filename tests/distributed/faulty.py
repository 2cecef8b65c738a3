"""The program with a fault in one process, for test_fate.py.

`python faulty.py ACTION PROCESS PHASE NTH -- OPTIONS OF mae_jax.main`: process PROCESS does ACTION
when it enters PHASE of the time ledger for the NTH time (`start`: before anything; `close`: when
all is done). Marks beside the workdir, of faults that happened, keep a restarted program from
having it again. Which record every row of every batch was is noted there too, in
WORKDIR-examples.jsonl.
"""

import contextlib
import itertools
import json
import logging
import os
import pathlib
import signal
import sys
import threading
import time

from mae_jax import UserError
from mae_jax.cli import start
from mae_jax.data.pipeline import Batches
from mae_jax.data.splits import Splits
from mae_jax.train.ledger import Ledger

ACTIONS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "hang": lambda: time.sleep(1000),
}


def fail(action):
    os.write(1, f"FAULT {action} {time.time():.1f}\n".encode())
    if action == "bug":
        raise ZeroDivisionError("a fault of the program")
    if action == "mendable":
        raise UserError("data.dir: picture 7 cannot be read")
    if action == "later":  # while it works, at no moment that the program chose
        threading.Timer(1.0, ACTIONS["term"]).start()
    else:
        ACTIONS[action]()


def note_examples(path):
    """Has every process note step, positions and records of the batches it draws."""
    train_batches, following = Splits.train_batches, Batches.__next__

    def noted(self, positions, start_step, *rest):
        batches = train_batches(self, positions, start_step, *rest)
        batches.noted = positions.tolist(), itertools.count(start_step)
        return batches

    def noting(self):
        batch = following(self)
        if hasattr(self, "noted"):
            positions, steps = self.noted
            line = {"step": next(steps), "positions": positions, "ids": batch["id"].tolist()}
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return batch

    Splits.train_batches, Batches.__next__ = noted, noting


def main(action, process, phase, nth, options):
    workdir = pathlib.Path(next(x for x in options if x.startswith("--workdir=")).split("=")[1])
    mark = workdir.with_name(f"{workdir.name}-{action}-{phase}-{nth}")
    note_examples(workdir.with_name(f"{workdir.name}-examples.jsonl"))
    if os.environ.get("JAX_PROCESS_ID", "0") == process and not mark.exists():
        if phase == "start" and action == "config":
            options = [*options, "--config=/no/such/recipe.py"]
        during, entered = Ledger.during, []

        @contextlib.contextmanager
        def faulty(self, name, **options):
            entered.append(name)
            if mark.exists() and name == "data":
                time.sleep(0.3)  # steps of this size are over before the processes can agree
            if entered.count(phase) == int(nth) and name == phase:
                mark.touch()
                fail(action)
            with during(self, name, **options):
                yield

        Ledger.during = faulty
        if phase == "close":
            Ledger.close = lambda self: (mark.touch(), fail(action))
    logging.root.handlers.clear()  # which imports above made: the program logs as it always does
    raise SystemExit(start("train", options))


if __name__ == "__main__":
    before, after = sys.argv.index("--"), sys.argv[sys.argv.index("--") + 1 :]
    main(*sys.argv[1:before], after)
