"""How a process ends, and that those of one run end together.

JAX alone lets the others wait for minutes and then abort, whatever happened to the first. Here each
process has two threads that do not depend on what its main thread is doing. One talks to the
service that `jax.distributed` runs in process 0, about once a second: it says that this process
lives, and reads how others ended. One counts how long process 0 has been silent. Exit codes are
those of docs/failures.md.
"""

import atexit
import contextlib
import ctypes
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from absl import logging

from mae_jax import PeerError
from mae_jax.storage.retry import with_causes

BUG, MENDABLE, RETRY, BY_CTRL_C, LOST = 1, 2, 42, 130, 134

SECONDS_SILENT = 30.0  # after which a peer is lost; a thread can be kept waiting for a while
SECONDS_SUSPECTED = 10.0  # the same, once another process failed to communicate
SECONDS_TO_LEAVE = 10.0  # for what is done on the way out, which a disk or a network may hold up
SECONDS_TO_END = 60  # between the first and the last process of a run that is over

SECONDS_FROZEN = 10.0  # without running at all, as all of a run may be: others are heard anew

_FATES, _BEATS = "mae_jax/fate/", "mae_jax/beat/"
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # where XLA's service notes a SIGTERM to any process
# Exceptions that a peer's death causes where processes exchange something.
_COMMUNICATION = re.compile(
    "gloo|nccl|JaxRuntimeError: (UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED)", re.I
)

_leaving = threading.Lock()
_leaver: int | None = None
_last_acts: list[Callable[[int], None]] = []
_kept: list[Any] = []  # what C++ calls must not be collected
peers: "Peers | None" = None  # of this process, where the run has several


def before_leaving(act: Callable[[int], None]) -> None:
    """Has `act` called with the exit code when this process leaves at once."""
    _last_acts.append(act)


def leave(code: int, line: str, for_peers: str = "", *, stacks: bool = False) -> None:
    """Ends this process now, from any thread, and its peers with the same code.

    `line` is for people; `for_peers`: what they are told in its place. `stacks`: they write theirs.
    """
    global _leaver
    if not _leaving.acquire(blocking=False):
        if _leaver == threading.get_ident():  # a signal's handler, in a thread that leaves already
            return
        threading.Event().wait()  # another thread is ending the process
    _leaver = threading.get_ident()
    os.write(2, f"{line}\n".encode())

    def last_acts() -> None:
        if peers is not None:
            peers.tell(code, for_peers or line, stacks)
        for act in reversed(_last_acts):
            try:
                act(code)
            except Exception:
                logging.debug("while leaving", exc_info=True)
        sys.stdout.flush()
        if peers is not None and peers.process == 0:
            peers.wait_until_known(3 if code == LOST else SECONDS_TO_LEAVE)

    acting = threading.Thread(target=last_acts, daemon=True)
    acting.start()
    acting.join(SECONDS_TO_LEAVE)
    os._exit(code)  # `sys.exit` would wait minutes for the others


def fail(error: BaseException) -> None:
    """Ends all processes of a run of several for what one of them raised; returns in others."""
    if peers is None:
        return
    if isinstance(error, KeyboardInterrupt):
        leave(BY_CTRL_C, "stopped by Ctrl-C")
    code = getattr(error, "exit_code", BUG)
    text = " ".join(str(error).split())
    if not isinstance(error, PeerError) and caused_by_peer(error):
        # How that one ended will be known soon, and `Peers` ends this process then.
        peers.tell(0, "")
        time.sleep(SECONDS_SILENT + 5)
        code = LOST  # the network, then
    elif code != BUG or isinstance(error, PeerError):
        start = "error: " * (code != RETRY)
        source = "" if text.startswith("process ") else f"process {peers.process}: "
        leave(code, f"{start}{text}", f"{start}{source}{text}")
    traceback.print_exception(error)
    kind = f"{type(error).__name__}: {text}"[:500]
    told = f"error: process {peers.process} failed, its output has the traceback: {kind}"
    leave(code, f"process {peers.process} ends all others", told)


def caused_by_peer(error: BaseException | None) -> bool:
    """Whether this, or what it came from, is what the end of another process looks like in here."""
    texts = (f"{type(one).__name__}: {one}" for one in with_causes(error))
    return peers is not None and any(_COMMUNICATION.search(text) for text in texts)


def watch(client: Any, process: int, count: int, coordinator: str) -> None:
    """Begins to watch the other processes of a run, until this one exits."""
    global peers
    peers = Peers(client, process, count, coordinator)
    atexit.register(peers.end)  # before what JAX registered, which ends its service


class Peers:
    """The other processes of a run, watched until it ends."""

    def __init__(self, client: Any, process: int, count: int, coordinator: str):
        self.process, self.count = process, count
        self.told = False  # to stop, any of them
        self.told_to_stop: Callable[[], None] = lambda: None  # called when any of them is
        self.write_stacks: Callable[[], None] = lambda: None
        self._client, self._coordinator = client, coordinator
        self._period = 1.0 + count / 500  # the service answers all of them
        self._heard = time.monotonic()
        self._ended = threading.Event()
        functions = (self._talk, self._listen_for_silence)
        self._threads = [threading.Thread(target=f, daemon=True) for f in functions]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Watches until every process is done, and no more.

        One that fails after others are done still ends them, with what it has to say; JAX would
        have them abort. Waits for the threads: one that is in JAX's client when Python's
        interpreter is taken down is unwound through C++ that does not allow it, which ends a
        finished process by a signal.
        """
        with contextlib.suppress(Exception):  # then JAX, which waits next, says so
            self._client.wait_at_barrier("mae_jax/end", 1000 * SECONDS_TO_END)
        self._ended.set()
        for thread in self._threads:
            thread.join(SECONDS_TO_LEAVE)

    def tell(self, code: int, line: str, stacks: bool = False) -> None:
        """Tells the others how this process ends, 0: that it may have lost one of them."""
        entry = json.dumps({"code": code, "line": line, "stacks": stacks})
        self._client.key_value_set(f"{_FATES}{self.process}", entry, allow_overwrite=True)

    def wait_until_known(self, seconds: float) -> None:
        """Waits in process 0, from which the others learn how it ends, until all are leaving."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if sum(fate["code"] > 0 for fate in self._fates()) == self.count:
                return
            time.sleep(0.2)

    def lost_service(self) -> None:
        """Leaves because process 0 does not answer; called by JAX's own threads, too."""
        if not self._ended.is_set():
            global peers
            peers = None  # there is nobody to tell
            place = f"process 0 at {self._coordinator}"
            leave(LOST, f"error: lost {place}: it died, or its machine or the network is gone")

    def healthy(self) -> bool:
        """Whether process 0 answers now."""
        answers: list[bool] = []

        def ask() -> None:
            self._client.key_value_dir_get(_FATES)
            answers.append(True)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(2)
        return bool(answers)

    def _fates(self) -> list[dict]:
        """How processes ended, and suspicions, of code 0."""
        return [json.loads(text) for _, text in self._client.key_value_dir_get(_FATES)]

    def _notice(self) -> bool:
        """Whether any process was told to stop."""
        try:
            self._client.key_value_try_get(_NOTICE)
        except Exception as error:
            if "NOT_FOUND" in str(error):
                return False
            raise
        return True

    def _talk(self) -> None:
        beats: dict[str, tuple[str, float]] = {}  # of each process: its newest, and since when
        host = socket.gethostname()
        for number in itertools.count():
            if self._ended.wait(self._period):
                return
            try:
                beat = f"{number} {host}"
                self._client.key_value_set(f"{_BEATS}{self.process}", beat, allow_overwrite=True)
                fates, self.told = self._fates(), self.told or self._notice()
                heard = self._client.key_value_dir_get(_BEATS) if self.process == 0 else []
            except Exception:
                continue  # `_listen_for_silence` counts how long
            if self._ended.is_set():
                return
            before, self._heard = self._heard, time.monotonic()
            if self._heard - before > SECONDS_FROZEN:
                beats.clear()
            for fate in fates:
                if fate["code"]:
                    if fate["stacks"]:
                        self.write_stacks()
                    leave(fate["code"], fate["line"])
            limit = SECONDS_SUSPECTED if fates else SECONDS_SILENT
            for key, text in heard:
                newest, since = beats.get(key, ("", self._heard))
                if newest != text:
                    beats[key] = text, self._heard
                elif self._heard - since > limit:
                    place = f"process {key.rpartition('/')[2]} on {text.partition(' ')[2]}"
                    silent = f"silent for {self._heard - since:.0f} s, it died or hangs"
                    leave(LOST, f"error: lost {place}: {silent}")
            if self.told:
                self.told_to_stop()

    def _listen_for_silence(self) -> None:
        woken = time.monotonic()
        while not self._ended.wait(1):
            before, woken = woken, time.monotonic()
            if woken - before > SECONDS_FROZEN:
                self._heard = woken
            if time.monotonic() - self._heard > SECONDS_SILENT + self._period:
                self.lost_service()


def on_error_of_service() -> dict[str, Any]:
    """Arguments for JAX's client, so that it ends by `Peers.lost_service` where it would abort.

    It aborts with a C++ stack when process 0 dies. The callback it takes instead cannot be called
    in jaxlib up to 0.10.2 (its argument has no Python type), and ends in `std::terminate`.
    """

    def lost(*_: object) -> None:
        if peers is not None:
            peers.lost_service()

    @ctypes.CFUNCTYPE(None)
    def terminate() -> None:
        if peers is not None and not peers.healthy():
            peers.lost_service()
        before()

    try:
        set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
    except (OSError, AttributeError):  # not GNU's: its abort, 134 as well, has to do
        return {}
    set_terminate.restype = ctypes.CFUNCTYPE(None)
    before = set_terminate(terminate)
    _kept.append(terminate)
    atexit.register(set_terminate, before)  # ours needs an interpreter
    return {"missed_heartbeat_callback": lost}
