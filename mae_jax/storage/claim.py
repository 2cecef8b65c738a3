"""One run in a workdir, also across hosts and in buckets: a file that its owner keeps renewing.

No clocks are compared: whoever finds a claim watches whether it changes.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from absl import logging
from etils import epath

from mae_jax import TryAgainError, UserError
from mae_jax.storage.files import read_bytes, write_json

SECONDS_RENEWED = 15.0
SECONDS_STALE = 60.0  # after which a claim that nobody renewed is nobody's
SECONDS_SETTLED = 2.0  # in which one of two who claim at once, without locks, sees the other


class Claim:
    """The file `path`, ours from `take` to `release`.

    Args:
      lost: called, from a thread, with a message if another run took it over, which it does only
        where this one could not renew it for a minute.
    """

    def __init__(self, path: epath.Path, lost: Callable[[str], None]):
        self._path, self._lost = path, lost
        self._run, self._host, self._renewals = uuid.uuid4().hex, socket.gethostname(), 0
        self._released = threading.Event()
        self._writes = threading.Lock()  # a renewal under way must not bring back what is released

    def take(self, locked: bool) -> None:
        """Returns when the claim is ours; UserError where another run renews it.

        `locked`: we hold a lock that no other process of this host can hold.
        """
        found = self._read()
        if found is not None and not self._is_dead(found, locked):
            text = "%s: claimed by %s; watching for %.0f s whether it lives"
            logging.info(text, self._path.parent, _owner(found), SECONDS_STALE)
            until = time.monotonic() + SECONDS_STALE
            while time.monotonic() < until and (now := self._read()) is not None:
                if now != found:
                    raise UserError(self._taken(now))
                time.sleep(1)
        self._write()
        if not locked:
            time.sleep(SECONDS_SETTLED)
        self.require()
        threading.Thread(target=self._renew, daemon=True).start()

    def require(self) -> None:
        """Raises UserError where the claim is another run's."""
        found = self._read()
        if found is not None and found["run"] != self._run:
            raise UserError(self._taken(found))

    def release(self) -> None:
        """Gives the claim up; once is enough."""
        if not self._released.is_set():
            self._released.set()
            with self._writes:
                found = self._read()
                if found is not None and found["run"] == self._run:
                    self._path.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._released.wait(SECONDS_RENEWED):
            try:
                with self._writes:
                    if self._released.is_set():
                        return
                    self.require()
                    self._write()
            except UserError as error:
                if not self._released.is_set():
                    self._lost(str(error))
            except Exception as error:  # the storage may be away for a while
                logging.debug("the claim could not be renewed: %s", error)

    def _write(self) -> None:
        owner = {"run": self._run, "host": self._host, "pid": os.getpid()}
        self._renewals += 1
        try:
            write_json(self._path, {**owner, "renewals": self._renewals})
        except UserError as error:  # a moment ago this could be written to
            if self._released.is_set() or self._read() is None:
                raise
            raise TryAgainError(str(error)) from error

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(read_bytes(self._path))
        except FileNotFoundError:
            return None
        except ValueError:
            return {"run": "", "host": "an unknown host", "pid": 0}

    def _is_dead(self, found: dict[str, Any], locked: bool) -> bool:
        if found["host"] != self._host:
            return False
        if locked or found["pid"] == os.getpid():
            return True
        try:
            os.kill(found["pid"], 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
        return False

    def _taken(self, found: dict[str, Any]) -> str:
        return taken(self._path.parent, _owner(found))


def taken(workdir: epath.Path, owner: str) -> str:
    """What to say to whoever starts a second run in `workdir`."""
    return (
        f"--workdir={workdir}: another run trains here ({owner}); wait for its end, stop it, or "
        "choose another --workdir"
    )


def _owner(found: dict[str, Any]) -> str:
    return f"process {found['pid']} on {found['host']}"
