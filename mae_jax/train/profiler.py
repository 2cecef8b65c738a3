"""A trace of chosen steps, as TensorBoard's profiler and https://ui.perfetto.dev show them."""

import contextlib
import pathlib
import tempfile
from typing import Any

import jax
from absl import logging

from mae_jax.storage.files import PathLike, complete_or_absent_folder
from mae_jax.train.ledger import Ledger
from mae_jax.train.loop import StepFn


class Profiled(contextlib.AbstractContextManager):
    """A step function, of which process 0 traces `steps` calls (0: none) after the first `start`.

    It waits for devices only where the trace begins and ends. A run that goes on from a step after
    `start` does not trace again.
    """

    def __init__(
        self,
        step_fn: StepFn,
        folder: PathLike,
        *,
        start: int,
        steps: int,
        start_step: int,
        ledger: Ledger,
    ):
        self._step_fn, self._folder, self._ledger = step_fn, folder, ledger
        self._done, self._begin, self._end = start_step, -1, start + steps
        self._traced: tempfile.TemporaryDirectory | None = None
        if steps and jax.process_index() == 0:
            self._begin = start
            if start_step > start:
                logging.info("profile.start = %d is past: these steps are not traced", start)

    def __call__(self, state: Any, totals: Any, batch: Any) -> Any:
        """The step, between the beginning or the end of the trace where it is its turn."""
        if self._done == self._begin:
            with self._ledger.during("profile"):
                jax.block_until_ready(state)
                self._traced = tempfile.TemporaryDirectory()
                jax.profiler.start_trace(self._traced.name)
        with jax.profiler.StepTraceAnnotation("train", step_num=self._done):
            results = self._step_fn(state, totals, batch)
        self._done += 1
        if self._traced is not None and self._done == self._end:
            jax.block_until_ready(results)
            self._stop()
        return results

    def __exit__(self, *exc: object) -> None:
        if self._traced is not None:  # the run ends first
            self._stop()

    def _stop(self) -> None:
        with (
            self._ledger.during("profile"),
            self._traced as name,
            complete_or_absent_folder(self._folder) as folder,
        ):
            self._traced = None
            jax.profiler.stop_trace()
            for file in (path for path in pathlib.Path(name).rglob("*") if path.is_file()):
                target = folder / str(file.relative_to(name))
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
        logging.info("the profiler's trace is in %s", self._folder)
