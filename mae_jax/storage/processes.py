"""What the processes of a run must do together: fail, and own a workdir."""

import collections
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from absl import logging
from etils import epath
from jax._src import distributed  # whose store of keys and values has no public name

from mae_jax import PeerError, TryAgainError, UserError
from mae_jax.storage.claim import Claim, taken
from mae_jax.storage.files import explain_failure, in_bucket

T = TypeVar("T")

LONGEST_WAIT_MS = 7 * 24 * 3600 * 1000  # for a process that writes or reads; a dead one ends all
_rounds, _sayings = itertools.count(), itertools.count()


def in_every_process(function: Callable[..., T], *args: object) -> T:
    """`function(*args)`, or an error in every process: its own, or one with the others' message.

    Without this, one process would leave and the others wait for it in their next collective. The
    function itself must not contain collectives that a failure could miss.
    """
    if jax.process_count() == 1:
        return function(*args)
    try:
        result = function(*args)
    except Exception as error:  # Whatever it is, the others must learn of it.
        tell_all(f"{getattr(error, 'exit_code', 1)} {first_line(error)}")
        raise
    told = [text.partition(" ") for text in tell_all("")]
    if problems := [f"process {i}: {text}" for i, (code, _, text) in enumerate(told) if code]:
        code = min(int(code) for code, *_ in told if code)
        kinds = {kind.exit_code: kind for kind in (UserError, TryAgainError)}
        make = kinds.get(code, functools.partial(PeerError, exit_code=code))
        raise make("; ".join(problems))
    return result


def in_process_0(function: Callable[..., T], *args: object) -> T | None:
    """`function(*args)` in process 0 alone; what it raises is raised in every process."""
    return in_every_process(function if jax.process_index() == 0 else lambda *_: None, *args)


def tell_all(text: str) -> list[str]:
    """The texts of all processes, by their number, in every process.

    Through the service that joins the processes, so that no device takes part: they may speak
    before their programs are known to be the same. Every process must call it equally often.
    """
    if jax.process_count() == 1:
        return [text]
    client, rounds = distributed.global_state.client, next(_rounds)
    client.key_value_set(f"mae_jax/told/{rounds}/{jax.process_index()}", text)
    client.wait_at_barrier(f"mae_jax/told/{rounds}", LONGEST_WAIT_MS)
    if jax.process_index() == 0:  # all have left the round before, and so read the one before it
        client.key_value_delete(f"mae_jax/told/{rounds - 2}/")
    told = client.key_value_dir_get(f"mae_jax/told/{rounds}/")
    by_process = {int(key.rpartition("/")[2]): value for key, value in told}
    return [by_process[process] for process in range(jax.process_count())]


def require_same(facts: Mapping[str, Any]) -> None:
    """Raises UserError in every process unless it was given the same (JSON) in all: who differs."""
    own = json.dumps(facts)
    if len({*tell_all(hashlib.sha256(own.encode()).hexdigest())}) == 1:
        return
    told = [json.loads(text) for text in tell_all(own)]
    for name in {**told[0], **told[-1]}:  # in the order given
        values = [json.dumps(other.get(name)) for other in told]
        usual, _ = collections.Counter(values).most_common(1)[0]  # the lowest process's of equals
        if odd := [process for process, value in enumerate(values) if value != usual]:
            raise UserError(
                f"process {odd[0]} has {name} = {values[odd[0]]} where process "
                f"{values.index(usual)} has {usual}: start all with the same command, version and "
                f"data ({len(odd)} of {len(told)} differ)"
            )


def first_line(error: BaseException) -> str:
    """An error in one line: the message of those meant for people, others with their type."""
    text = (str(error).strip().splitlines() or [""])[0]
    ours = isinstance(error, (UserError, TryAgainError, PeerError))
    return text if ours else f"{type(error).__name__}: {text}"[:500]


def from_process_0(text: str) -> str:
    """The text of process 0, in every process; all must call it equally often."""
    if jax.process_count() == 1:
        return text
    client, number = distributed.global_state.client, next(_sayings)
    if jax.process_index() != 0:
        return client.blocking_key_value_get(f"mae_jax/said/{number}", LONGEST_WAIT_MS)
    client.key_value_set(f"mae_jax/said/{number}", text)
    if number >= 100:  # which no step is behind
        client.key_value_delete(f"mae_jax/said/{number - 100}")
    return text


class Timer:
    """Says every so many minutes, by the clock of process 0, in every process alike."""

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes
        self.restart()

    def restart(self) -> None:
        """Counts from now on."""
        self._since = time.monotonic()

    def is_over(self) -> bool:
        """Whether the time is over; all processes must ask equally often."""
        return from_process_0(str(time.monotonic() - self._since >= self._seconds)) == "True"


@contextlib.contextmanager
def sole_run(
    workdir: epath.Path, lost: Callable[[str], None] = lambda text: None
) -> Iterator[Claim | None]:
    """Keeps a second run out of `workdir` for as long as the block, or the process, lives.

    By a lock that process 0 holds on a file in it, and a kill releases; and by a claim, which it is
    given, as locks are not known everywhere, and seldom to other hosts. A second run is a UserError
    in every process, naming the first. `lost`: of `Claim`.
    """
    claim = Claim(epath.Path(workdir) / "claim.json", lost)

    def take() -> int | None:
        file = _lock(workdir / "lock")
        try:
            claim.take(locked=file is not None)
        except BaseException:
            if file is not None:
                os.close(file)
            raise
        return file

    file = in_process_0(take)
    try:
        yield claim if jax.process_index() == 0 else None
    finally:
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                claim.release()
        if file is not None:
            os.close(file)


def _lock(path: epath.Path) -> int | None:
    """An open file that holds the lock; None where there are no locks."""
    if in_bucket(path):
        return None
    with explain_failure(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        import fcntl  # not on every system

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        holder = os.read(file, 1000).decode(errors="replace").strip()
        os.close(file)
        if getattr(error, "errno", None) in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(taken(path.parent, holder or "not yet named")) from None
        logging.info("%s: no locks here (%s)", path.parent, error)
        return None
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file
