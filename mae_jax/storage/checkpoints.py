"""Checkpoints: Orbax behind one small class.

A checkpoint is the state plus a record (JSON) of everything a resume needs beside it: config, seed,
data position, elapsed time, and a fingerprint of every tensor, so that a file damaged on disk is
noticed instead of trained on.
"""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from mae_jax import UserError


@jax.jit
def fingerprint(tree: Any) -> jax.Array:
    """The sum of every leaf's bits, modulo 2^32: [leaves] uint32.

    Integer sums do not depend on order, so the result is the same on any device count.
    """

    def sum_bits(x: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{x.dtype.itemsize * 8}")
        return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jnp.stack([sum_bits(x) for x in jax.tree.leaves(tree)])


class Checkpoints:
    """The numbered checkpoints of one run, the newest `keep` of them.

    Saving is asynchronous: `save` returns once the state is copied off the devices, and a
    checkpoint gets its final name only when it is complete.
    """

    def __init__(self, directory: str | pathlib.Path, keep: int):
        self.directory = pathlib.Path(directory).absolute()
        self._keep = keep
        self._manager = self._open()
        self._newest: int | None = None

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, create=True, cleanup_tmp_directories=True
        )
        return ocp.CheckpointManager(
            self.directory, options=options, item_names=("state", "record")
        )

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Starts writing the checkpoint of `step`, unless that was done just before.

        Raises:
          UserError: this save could not start, or the one before it failed.
        """
        if step == self._newest:
            return
        record = record | {"fingerprint": jax.device_get(fingerprint(state)).tolist()}
        with self._explain_failure(step):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
                ),
            )
        self._newest = step

    def wait(self) -> None:
        """Returns when the save in progress is complete; raises UserError if it failed."""
        with self._explain_failure(None):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save in progress and releases the directory."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _explain_failure(self, step: int | None):
        try:
            yield
        except Exception as error:
            kept = [s for s in self.steps() if s != step]
            raise UserError(
                f"a checkpoint could not be written to {self.directory}: {_first_line(error)}\n"
                f"Complete checkpoints: {kept or 'none'}. Make room or mend the disk, then start "
                "the same command again: it continues from the newest of them."
            ) from error

    def read_record(self, step: int) -> dict[str, Any]:
        """The record saved with `step`."""
        restored = self._manager.restore(
            step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
        )
        return restored["record"]

    def restore_newest(
        self, abstract_state: Any, check: Callable[[dict[str, Any]], None]
    ) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole, as (state, record); None where there is none.

        Args:
          abstract_state: shapes, types and shardings to restore into. The device count may differ
            from the run that saved.
          check: raises if the record belongs to another run; its error is passed on.

        A damaged checkpoint is reported, renamed to `damaged-STEP` and passed over.

        Raises:
          UserError: there are checkpoints and none is whole, or one is whole but does not
            hold the tensors of `abstract_state`.
        """
        steps = self.steps()
        for step in reversed(steps):
            state, record, tree, problem = None, None, None, None
            try:
                record = self.read_record(step)
            except Exception as error:  # Orbax and TensorStore raise many types for bad files.
                problem = _first_line(error)
            if record is not None:
                check(record)
                try:
                    tree = self._saved_tree(step)
                except Exception as error:
                    problem = _first_line(error)
            if problem is None:
                self._check_tensors(step, tree, abstract_state)
                try:
                    state = self._restore_state(step, tree, abstract_state, record["fingerprint"])
                except Exception as error:
                    problem = _first_line(error)
            if _none_in_any_process(problem):
                return state, record
            logging.error(
                "CHECKPOINT %d IN %s IS DAMAGED AND PASSED OVER: %s",
                step,
                self.directory,
                problem or "another process could not read it",
            )
            self._set_aside(step)
        if steps:
            raise UserError(
                f"none of the checkpoints {steps} in {self.directory} can be read; they are kept "
                "there as damaged-STEP. Start again with a new workdir."
            )
        return None

    def _saved_tree(self, step: int) -> Any:
        """What the checkpoint says it holds: nested dicts and lists, a leaf for every tensor."""
        path = self.directory / str(step) / "state"
        return ocp.StandardCheckpointHandler().metadata(path).tree

    def _check_tensors(self, step: int, saved: Any, abstract_state: Any) -> None:
        found, wanted = set(_by_path(saved)), set(_by_path(abstract_state))
        if found != wanted:
            raise UserError(
                f"checkpoint {step} in {self.directory} is whole but not of this program: "
                f"{_some(wanted - found, 'missing')}, {_some(found - wanted, 'unexpected')}. "
                "Continue it with the version that wrote it (its record names it), or start again "
                "with a new workdir."
            )

    def _restore_state(
        self, step: int, saved: Any, abstract_state: Any, expected: list[int]
    ) -> Any:
        # Asked for in the tree that was saved: an absent part (None) need not be in both.
        wanted = _by_path(abstract_state)
        request = jax.tree_util.tree_map_with_path(lambda path, _: wanted[_name(path)], saved)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(request))
        )
        tensors = _by_path(restored["state"])
        state = jax.tree_util.tree_map_with_path(
            lambda path, _: tensors[_name(path)], abstract_state
        )
        found = np.asarray(jax.device_get(fingerprint(state)))
        expected = np.asarray(expected, np.uint32)
        if found.shape != expected.shape:
            raise UserError(f"{len(expected)} tensors recorded, {len(found)} restored")
        damaged = np.flatnonzero(found != expected)
        if damaged.size:
            first = list(_by_path(state))[damaged[0]]
            raise UserError(f"{damaged.size} tensor(s) changed on disk, first {first}")
        return state

    def _set_aside(self, step: int) -> None:
        self._manager.close()
        if jax.process_index() == 0:
            target = self.directory / f"damaged-{step}"
            number = 1
            while target.exists():
                number += 1
                target = self.directory / f"damaged-{step}-{number}"
            (self.directory / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside checkpoint {step}")
        self._manager = self._open()


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _by_path(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _some(names: set[str], what: str) -> str:
    first = f" ({sorted(names)[0]}, ...)" if names else ""
    return f"{len(names)} tensors {what}{first}"


def _none_in_any_process(problem: str | None) -> bool:
    if jax.process_count() == 1:
        return problem is None
    return not multihost_utils.process_allgather(np.asarray(problem is not None)).any()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:500]
