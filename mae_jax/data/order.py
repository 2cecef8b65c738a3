"""Which record every training example is: pure functions of the seed and the example's number.

`example_index` shuffles all records of an epoch. `Windows` is for storage where every read costs:
records that lie side by side are read at once, and are used soon after each other.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import threading
from typing import Any

import numpy as np
from grain.experimental import index_shuffle

from mae_jax.data.record import Record, Source

LANES = 256


def example_index(seed: int, g: int, n: int) -> int:
    """Record that training example ``g`` is, in a dataset of ``n`` records: shuffled by epoch."""
    epoch, place = divmod(g, n)
    return index_shuffle(place, max_index=n - 1, seed=_shuffle_seed(seed, epoch), rounds=4)


@functools.lru_cache(maxsize=16)  # one epoch's seed serves all its examples
def _shuffle_seed(seed: int, epoch: int) -> int:
    # NumPy promises SeedSequence never changes; index_shuffle wants 32 bits.
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def _permutation(n: int, *key: int) -> np.ndarray:
    """Of [0, n), by numbers that NumPy promises never change. index_shuffle is slow at a small n:
    0.1 ms of 256, 7 ms of 4."""
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable")


_pool_order = functools.lru_cache(maxsize=4 * LANES)(_permutation)


@functools.lru_cache(maxsize=4)
def _window_order(windows: int, seed: int, epoch: int) -> tuple[np.ndarray, int]:
    """All windows in the order of the epoch, and where the last one is in it."""
    order = _permutation(windows, seed, epoch)
    return order, int(np.argmax(order))


@dataclasses.dataclass(frozen=True)
class Windows:
    """An order in which few records are read long before or after their neighbours.

    An epoch is all windows of `size` consecutive records, in random order. Neighbouring positions
    of the batch make a lane, which gets its own stretch of that: a process needs the windows of its
    lanes only, and as lanes do not depend on processes, nor does the order. Of its stretch a lane
    shuffles `pool / LANES` examples at a time. So about `pool` examples, from windows all over the
    dataset, are mixed at any time; compare a shuffle buffer of that size.
    """

    size: int
    pool: int

    def index(self, seed: int, g: int, n: int, batch_size: int) -> int:
        """Record that training example ``g`` is, in a dataset of ``n`` records: each once an epoch.

        Of the epoch's examples, the lane has those numbered [0, count) in `batch_size` rows; the
        stretches of all lanes follow each other in a line of n places.
        """
        epoch, position = g // n, g % batch_size
        lanes = min(LANES, batch_size)
        lane = position * lanes // batch_size

        def before(g: int, lane: int) -> int:
            """How many examples before ``g`` belong to lanes before `lane`."""
            rows = -(-lane * batch_size // lanes)
            return g // batch_size * rows + min(g % batch_size, rows)

        def of_epoch(g: int, lane: int) -> int:
            return before(g, lane) - before(epoch * n, lane)

        begin, end = of_epoch((epoch + 1) * n, lane), of_epoch((epoch + 1) * n, lane + 1)
        number = of_epoch(g, lane + 1) - of_epoch(g, lane)
        # Lanes begin new pools one after the other, not all at the same step.
        size = max(1, self.pool // lanes)
        pool = (number + lane * size // lanes) // size
        low = max(0, pool * size - lane * size // lanes)
        high = min(end - begin, (pool + 1) * size - lane * size // lanes)
        pool_order = _pool_order(high - low, seed, epoch, 1 + lane, pool)
        place = begin + low + int(pool_order[number - low])

        # The dataset's last window, wherever the line has it, may lack some records.
        windows = -(-n // self.size)
        missing = windows * self.size - n
        order, short = _window_order(windows, seed, epoch)
        place += missing * (place >= (short + 1) * self.size - missing)
        return int(order[place // self.size]) * self.size + place % self.size

    def in_use(self, positions: np.ndarray, batch_size: int) -> int:
        """Windows that are in use at a time, at most, by these positions of the batch."""
        lanes = min(LANES, batch_size)
        own = len(np.unique(positions * lanes // batch_size))
        # A pool lies in so many windows; with batches made ahead, two pools of a lane are in use.
        return own * 2 * (-(-max(1, self.pool // lanes) // self.size) + 1)


class WindowReader:
    """A source whose records are read by windows: once, where they are used soon and once.

    Keeps the records not yet used of the `capacity` windows used last.
    """

    def __init__(self, source: Source, size: int, capacity: int):
        self.name, self.split = source.name, source.split
        self._source, self._size, self._capacity = source, size, capacity
        self._start()

    def _start(self) -> None:
        self._windows: collections.OrderedDict[int, concurrent.futures.Future] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_windows", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        number = index // self._size
        for _ in range(2):
            window = self._window(number)
            records = window.result()
            record = records.pop(index, None)
            if record is None or not records:
                self._forget(number, window)
            if record is not None:
                return record
            # Used before, or damaged: the window is read again, then the record by itself.
        return self._source[index]

    @property
    def kept(self) -> int:
        """Records in memory."""
        with self._lock:
            return sum(len(w.result()) for w in self._windows.values() if w.done())

    def _window(self, number: int) -> concurrent.futures.Future:
        """What will be {index: record} of a window: read here, or by another thread already."""
        with self._lock:
            window = self._windows.get(number)
            if window is not None:
                self._windows.move_to_end(number)
                return window
            window = self._windows[number] = concurrent.futures.Future()
            if len(self._windows) > self._capacity:
                self._windows.popitem(last=False)
        start = number * self._size
        try:
            window.set_result(self._source.read(start, min(start + self._size, len(self))))
        except BaseException as error:
            self._forget(number, window)
            window.set_exception(error)
        return window

    def _forget(self, number: int, window: concurrent.futures.Future) -> None:
        with self._lock:
            if self._windows.get(number) is window:
                del self._windows[number]
