"""Learning that this process is about to be stopped, whatever it is doing.

SIGTERM to any process, or Ctrl-C, stops all of a run after the same step, agreed on without talking
to the devices; before the first step there is nothing to lose, and they leave at once. In a run of
several processes JAX has the signal and its service tells the others.
"""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

from absl import logging
from jax.experimental.multihost_utils import reached_preemption_sync_point

from mae_jax.distributed import fate

T = TypeVar("T")


class StoppedError(Exception):
    """What was being done is given up, as the process was told to stop: in every process alike."""


class _Stop:
    """What this process knows of being stopped."""

    armed = False  # there are steps to lose
    requested = False  # of a process alone
    agreed = False
    by_ctrl_c = False
    polls = 0


_stop = _Stop()


def listen() -> None:
    """Minds the signals from here on; called by the main thread."""
    if fate.peers is not None:
        fate.peers.told_to_stop = _leave_unless_armed
        return
    # Python calls handlers between two lines of the main thread, and a compiler is one line of
    # minutes: a thread hears of the signal as well.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, _handle)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def hear() -> None:
        while True:
            if os.read(reader, 1)[0] == signal.SIGTERM:
                _leave_unless_armed()

    threading.Thread(target=hear, daemon=True).start()


def arm() -> None:
    """From here on there are steps to lose: `poll` says when to save them."""
    _stop.__dict__.clear()
    _stop.armed = True
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _handle)


def disarm() -> None:
    """From here on there is nothing to lose."""
    _stop.armed = False
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def poll() -> bool:
    """Whether to save and leave now; every process asks at the same points in the same order."""
    _stop.polls += 1
    if _stop.armed and not _stop.agreed:
        alone = fate.peers is None
        _stop.agreed = _stop.requested if alone else reached_preemption_sync_point(_stop.polls)
    return _stop.agreed


def until_told(items: Iterable[T]) -> Iterator[T]:
    """The items of what takes longer than a step; StoppedError where it is time to leave."""
    for item in items:
        if poll():
            raise StoppedError
        yield item


def count() -> int:
    """How often was asked: it moves while there is progress."""
    return _stop.polls


def told() -> bool:
    """Whether this process, or any other of the run, was told to stop."""
    return _stop.requested or (fate.peers is not None and fate.peers.told)


def by_ctrl_c() -> bool:
    """Whether it was a person who stopped the run."""
    return _stop.by_ctrl_c


def _leave_unless_armed() -> None:
    if not _stop.armed and not _stop.agreed:
        _stop.requested = True
        fate.leave(fate.RETRY, "told to stop where there is nothing to lose: start it again")


def _handle(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        _stop.by_ctrl_c = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one is obeyed at once
        if fate.peers is not None:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX tells the others
            return
    _leave_unless_armed()
    if not _stop.requested:
        logging.warning("%s: saving and leaving", signal.Signals(number).name)
    _stop.requested = True
