"""What a person at a terminal sees of a run, and what a log does."""

import concurrent.futures
import contextlib
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

import jax
from absl import logging
from tqdm import tqdm

T = TypeVar("T")


def _on_terminal() -> bool:
    return sys.stderr.isatty() and jax.process_index() == 0


def with_clock(what: str, function: Callable[[], T]) -> T:
    """`function()`, with its seconds shown on a terminal; in a thread, as Python hears of Ctrl-C
    only between two of its own lines, and a compiler is one line of a minute."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    with tqdm(bar_format=what + " {elapsed}", leave=False, disable=not _on_terminal()) as clock:
        while not concurrent.futures.wait([future], timeout=0.5).done:
            clock.refresh()
    return future.result()


class Progress(contextlib.AbstractContextManager):
    """A bar with rate and time left on a terminal, plain lines in a log."""

    def __init__(self, start_step: int, total_steps: int):
        self._total = total_steps
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            bar_format="{percentage:3.0f}%|{bar:10}| {n}/{total} [{elapsed}<{remaining}{postfix}]",
            dynamic_ncols=True,
            smoothing=0.1,
            disable=not _on_terminal(),
        )

    def __exit__(self, *exc: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        """One more step was sent to the devices."""
        self._bar.update()

    def show(self, line: str, step: int, seconds_per_step: float) -> None:
        """Figures of the interval that ends at `step`."""
        if not self._bar.disable:
            self._bar.set_postfix_str(line)
            return
        left = tqdm.format_interval((self._total - step) * seconds_per_step)
        logging.info("step %d/%d  %s  left %s", step, self._total, line, left)
