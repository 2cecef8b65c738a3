"""Where the time of a run goes."""

import collections
import contextlib
import time
from collections.abc import Iterator


class Ledger:
    """Seconds by phase. Phases nest; time counts for the innermost."""

    def __init__(self, phase: str):
        self.seconds: collections.Counter[str] = collections.Counter()
        self._phases = [phase]
        self._since = time.perf_counter()

    @property
    def phase(self) -> str:
        """What the process is doing."""
        return self._phases[-1]

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Counts the block as `phase`."""
        self._count()
        self._phases.append(phase)
        try:
            yield
        finally:
            self._count()
            self._phases.pop()

    def _count(self) -> None:
        now = time.perf_counter()
        self.seconds[self.phase] += now - self._since
        self._since = now
