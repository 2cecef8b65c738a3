"""Ends a process that makes no progress, so that a supervisor can start it again."""

import contextlib
import faulthandler
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

from absl import logging
from etils import epath

from mae_jax.distributed import fate, stopping
from mae_jax.storage.files import write_atomically

# Phases of the time ledger in which nothing counts progress: they are given so many times longer.
PATIENCE = {"start": 3, "open": 3, "restore": 3, "compile": 3, "save": 3}


@contextlib.contextmanager
def watching(phase: Callable[[], str], minutes: float, workdir: epath.Path) -> Iterator[None]:
    """Ends all processes of the run when one stays in a phase for so long (0: never).

    Progress is another phase, or a question whether to stop: once a step, once a batch of what is
    evaluated. Every process leaves the stacks of its threads in the workdir, and exits with 134.
    """
    ended = threading.Event()
    number = 0 if fate.peers is None else fate.peers.process

    def write_stacks() -> None:
        writing = threading.Thread(target=_write_stacks, args=(workdir, number), daemon=True)
        writing.start()
        writing.join(3)  # not for ever: storage may be what hangs

    def watch() -> None:
        seen, since, woken = None, 0.0, time.monotonic()
        while not ended.wait(1.0):
            before, woken = woken, time.monotonic()
            now = phase(), stopping.count()
            if now != seen or woken - before > 30:  # the process itself was stopped for a while
                seen, since = now, woken
            allowed = 60 * minutes * PATIENCE.get(now[0], 1)
            if woken - since > allowed:
                write_stacks()
                text = f"no progress for {allowed / 60:g} minutes in phase {now[0]!r}"
                where = f"the stacks of all threads are in {workdir}/stacks-*.txt"
                line = f"error: process {number}: {text}; {where}"
                fate.leave(fate.LOST, line, stacks=True)

    if fate.peers is not None:
        fate.peers.write_stacks = write_stacks
    if minutes:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _write_stacks(workdir: epath.Path, number: int) -> None:
    with tempfile.TemporaryFile("w+") as file:
        print(time.strftime("%F %T %z"), *sys.argv, file=file, flush=True)
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        try:
            write_atomically(workdir / f"stacks-{number}.txt", file.read())
        except Exception as error:
            logging.error("the stacks could not be written: %s", error)
            faulthandler.dump_traceback(all_threads=True)
