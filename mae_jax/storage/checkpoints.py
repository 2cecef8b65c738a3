"""Checkpoints, written and read by Orbax.

A checkpoint is a folder named by its step, with the state (`state/`) and a record (`record/`, JSON)
of what a resume needs beside it and of a fingerprint of every tensor, so that a file damaged on
disk is noticed instead of trained on.
"""

import contextlib
import errno
import functools
import json
import os
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from mae_jax import TryAgainError, UserError
from mae_jax.storage.files import (
    PathLike,
    explain_failure,
    in_bucket,
    to_path,
    write_atomically,
)
from mae_jax.storage.processes import first_line, in_every_process, in_process_0, tell_all
from mae_jax.storage.retry import is_transient, retried

# There from the start of a run until its first checkpoint is complete: only then may a run that
# finds no checkpoint begin at step 0.
_NONE_YET = "no-checkpoint-yet"
_COMPLETE = "commit_success.txt"  # Orbax's, in buckets
# The order of a state's parts in fingerprints that are lists (those of version 0.1).
_LISTED = ("step", "params", "opt_state", "ema", "frozen", "extra")


@jax.jit
def fingerprint(tree: Any) -> jax.Array:
    """The sum of every leaf's bits, modulo 2^32, the same on any device count: [leaves] uint32."""

    def sum_bits(x: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{x.dtype.itemsize * 8}")
        return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jnp.stack([sum_bits(x) for x in jax.tree.leaves(tree)])


class Checkpoint:
    """One complete checkpoint on disk. Its methods talk to no other process.

    Where files are damaged they raise what Orbax and TensorStore do, which is of many types.
    `tree`: the state that was saved, nested dicts and lists, with shapes and types; `record`:
    beside it.
    """

    def __init__(self, folder: epath.Path):
        self._path = folder / "state"
        self.record = ocp.JsonCheckpointHandler().restore(folder / "record")
        self.tree = ocp.PyTreeCheckpointHandler().metadata(self._path).tree

    def read(self, request: Any) -> dict[str, Any]:
        """Tensors by name, see `_read`."""
        return by_name(_read(self._path, request))

    def check(self, sums: dict[str, int]) -> None:
        """Raises UserError unless tensors are those that were saved; `sums`: their fingerprints."""
        saved = self.record["fingerprint"]
        if isinstance(saved, list):  # the sort is stable: within a part it keeps the tree's order
            names = sorted(by_name(self.tree), key=lambda name: _LISTED.index(name.split("/")[0]))
            saved = dict(zip(names, saved, strict=True))
        if damaged := [name for name in sums if sums[name] != saved.get(name)]:
            raise UserError(f"{len(damaged)} tensor(s) changed on disk, first {damaged[0]}")


def steps_in(directory: epath.Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending; none where there is no folder."""
    try:
        steps = [entry for entry in directory.iterdir() if entry.name.isdigit()]
        if in_bucket(directory):  # where a checkpoint has its name from the start
            steps = [entry for entry in steps if (entry / _COMPLETE).exists()]
        return sorted(int(entry.name) for entry in steps)
    except FileNotFoundError:
        return []
    except OSError as error:
        if is_transient(error):
            raise
        raise UserError(f"{directory}: cannot be read ({error})") from error


def read_newest(
    directory: epath.Path, parts: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The newest whole checkpoint of a run, for others than the run itself, who move nothing.

    Its `parts` as trees of numpy arrays, None for one that was not saved; its record; and a note on
    every newer checkpoint that is damaged.
    """
    notes = []
    for step in reversed(steps_in(directory)):
        try:
            checkpoint = Checkpoint(directory / str(step))
            chosen = {part: checkpoint.tree.get(part) for part in parts}
            tensors = checkpoint.read({k: tree for k, tree in chosen.items() if tree is not None})
            checkpoint.check({name: _sum_bits(x) for name, x in tensors.items()})
        except Exception as error:
            notes.append(f"checkpoint {step} is damaged and passed over ({first_line(error)})")
            continue
        return _map_names(tensors.__getitem__, chosen), checkpoint.record, notes
    raise UserError("; ".join([f"{directory}: no complete checkpoint here", *notes]))


class _Manager(ocp.CheckpointManager):
    """Orbax's, which leaves it to us to stop: its own questions would upset our count of ours."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The numbered checkpoints of one run, the newest `keep` of them.

    Saving is asynchronous: `save` returns once the state is copied off the devices, and a
    checkpoint gets its final name only when it is complete. Every process must call every method.
    """

    def __init__(self, directory: PathLike, keep: int):
        self.directory = to_path(directory)
        self._keep = keep
        self._newest: int | None = None

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, cleanup_tmp_directories=True)
        return _Manager(self.directory, options=options)

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Starts writing the checkpoint of `step`, unless that was done just before.

        Raises UserError if this save could not start, or the one before it failed.
        """
        if step == self._newest:
            return
        sums = jax.device_get(fingerprint(state)).tolist()
        record = record | {"fingerprint": dict(zip(by_name(state), sums, strict=True))}
        items = {"state": ocp.args.StandardSave(state), "record": ocp.args.JsonSave(record)}
        with self._explain_failure(step):
            self._manager.save(step, args=ocp.args.Composite(**items))  # waits for the save before
        if self._newest is not None:
            self._forget_none_yet()
        self._newest = step

    def wait(self) -> None:
        """Returns when the save in progress is complete; raises UserError if it failed."""
        if "_manager" in self.__dict__:
            with self._explain_failure(None):
                self._manager.wait_until_finished()
            self._forget_none_yet()

    def close(self) -> None:
        """Waits for the save in progress and releases the directory."""
        self.wait()
        if "_manager" in self.__dict__:
            self._manager.close()

    @contextlib.contextmanager
    def _explain_failure(self, step: int | None):
        try:
            yield
        except Exception as error:
            if is_transient(error):
                raise TryAgainError(
                    f"a checkpoint could not be written to {self.directory}: {first_line(error)}; "
                    "the same command continues from the newest complete one"
                ) from error
            kept = [s for s in steps_in(self.directory) if s != step]
            raise UserError(
                f"a checkpoint could not be written to {self.directory}: {first_line(error)}. "
                f"Complete checkpoints: {kept or 'none'}. Make room or mend the disk, then start "
                "the same command again: it continues from the newest of them"
            ) from error

    def restore_newest(
        self,
        abstract_state: Any,
        check: Callable[[dict[str, Any]], None],
        younger: Mapping[str, np.ndarray] = types.MappingProxyType({}),
    ) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole, as (state, record); None where there is none.

        The processes agree after every phase: what one of them cannot read, all pass over. Damaged
        ones are reported and, once a whole one is found, renamed to `damaged-STEP`. Raises
        UserError: none is whole, or one is whole but does not hold the tensors asked for.

        Args:
          abstract_state: shapes, types and shardings to restore into, on any device count.
          check: raises if the record belongs to another run; its error is passed on.
          younger: tensors by name that older checkpoints lack, with the values they stand for.
        """
        steps = self._agreed_steps()
        damaged: dict[int, str] = {}
        for step in reversed(steps):
            try:
                state, record = self._restore(step, abstract_state, check, younger)
            except _DamagedError as error:
                text = "CHECKPOINT %d IN %s IS DAMAGED AND PASSED OVER: %s"
                logging.error(text, step, self.directory, error)
                damaged[step] = str(error)
                continue
            for other in damaged:
                in_process_0(self._set_aside, other)
            self._forget_none_yet()
            self._newest = step
            return state, record
        if damaged:
            raise UserError(
                f"none of the checkpoints {steps} in {self.directory} can be read (the newest: "
                f"{damaged[steps[-1]]}); mend the disk, or choose a new --workdir"
            )
        return None

    def begin(self, traces: Sequence[str]) -> None:
        """Notes that a run begins at step 0, and has no checkpoint to lose yet.

        Raises UserError if it was under way before, of which `traces` in the workdir tell as well.
        """

        def note() -> None:
            marker = self.directory / _NONE_YET
            found = sorted(entry.name for entry in self.directory.glob("damaged-*"))
            found += [] if marker.exists() else traces
            if found:
                raise UserError(
                    f"{self.directory} holds no checkpoint that can be read, but this run was "
                    f"under way before ({', '.join(found)}): put a checkpoint back, choose a new "
                    "--workdir, or move these away to begin at step 0"
                )
            write_atomically(marker, "")

        in_process_0(note)

    def _forget_none_yet(self) -> None:
        # On its own: after an error other processes may not come this way.
        if jax.process_index() == 0:
            with explain_failure(self.directory):
                (self.directory / _NONE_YET).unlink(missing_ok=True)

    def _agreed_steps(self) -> list[int]:
        """The steps that any process sees, ascending."""
        own = in_every_process(retried(steps_in), self.directory)
        seen = [json.loads(text) for text in tell_all(json.dumps(own))]
        if any(seen) and not all(seen):
            raise UserError(
                f"--workdir: process {seen.index([])} sees no checkpoint in {self.directory} where "
                f"others see {max(seen)}: it must be one folder, shared by all processes"
            )
        return sorted(set().union(*seen))

    def _restore(self, step: int, abstract_state: Any, check: Callable, younger: Mapping) -> tuple:
        checkpoint = _agree(Checkpoint, self.directory / str(step))
        in_every_process(check, checkpoint.record)
        wanted, saved = by_name(abstract_state), by_name(checkpoint.tree)
        absent, unexpected = wanted.keys() - saved.keys(), saved.keys() - wanted.keys()
        lacking = absent & younger.keys()
        if (missing := absent - lacking) or unexpected:
            differing = {"missing": missing, "unexpected": unexpected}.items()
            found = [f"{len(x)} tensors {what} ({min(x)}, ...)" for what, x in differing if x]
            raise UserError(
                f"checkpoint {step} in {self.directory} is whole but not of this program: "
                f"{', '.join(found)}. Continue it with the version that wrote it (its record names "
                "it), or start again with a new workdir"
            )
        # Asked for in the tree that was saved: an absent part (None) need not be in both.
        tensors = _agree(checkpoint.read, _map_names(wanted.__getitem__, checkpoint.tree))
        for name in lacking:
            like, read = wanted[name], younger[name].__getitem__
            tensors[name] = jax.make_array_from_callback(like.shape, like.sharding, read)
        state = _map_names(tensors.__getitem__, abstract_state)
        sums = jax.device_get(fingerprint(state)).tolist()  # all processes at once
        sums = dict(zip(by_name(state), sums, strict=True))
        _agree(checkpoint.check, {name: sums[name] for name in sums if name not in lacking})
        return state, checkpoint.record

    def _set_aside(self, step: int) -> None:
        target, number = self.directory / f"damaged-{step}", 1
        while target.exists():
            number += 1
            target = self.directory / f"damaged-{step}-{number}"
        with explain_failure(target):
            (self.directory / str(step)).rename(target)


class _DamagedError(Exception):
    """A checkpoint that one process at least cannot read; raised in all."""


def _agree(function: Callable, *args: Any) -> Any:
    try:
        return in_every_process(retried(function), *args)
    except TryAgainError:  # no damage, and nothing to pass over
        raise
    except Exception as error:  # Orbax and TensorStore raise many types for bad files.
        raise _DamagedError(first_line(error)) from error


def save_params(folder: PathLike, params: Any) -> None:
    """Writes a tree of arrays alone, as Orbax's `StandardCheckpointer` reads it, in float32."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    with explain_failure(folder):
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(to_path(folder), params)
        except Exception as error:  # Orbax and TensorStore raise many types.
            full = os.strerror(errno.ENOSPC) in str(error)
            raise OSError(*[errno.ENOSPC] * full, first_line(error)) from error


def read_params(folder: epath.Path) -> Any:
    """The tree of numpy arrays that `save_params` wrote, whatever devices held it."""
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(folder).tree
        return _read(folder, tree)
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"{folder}: not a readable Orbax checkpoint ({reason})") from error


def _read(folder: epath.Path, request: Any) -> Any:
    """The tensors of `request` in the saved tree: as `ShapeDtypeStruct` leaves say, else numpy."""

    def how(leaf: Any) -> ocp.RestoreArgs:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return ocp.RestoreArgs(restore_type=np.ndarray)
        shape, dtype = leaf.shape, leaf.dtype
        return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=shape, dtype=dtype)

    item, hows = jax.tree.map(lambda _: 0, request), jax.tree.map(how, request)
    args = ocp.args.PyTreeRestore(item=item, restore_args=hows, partial_restore=True)
    # A checkpointer would look for a file of its own that a part of a step does not have.
    return ocp.PyTreeCheckpointHandler().restore(folder, args=args)


def by_name(tree: Any) -> dict[str, Any]:
    """Leaves by their path, `params/encoder/blocks/0/...`, in the order of the tree."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: Any) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return f"extra/{name}" if name.startswith("statistics/") else name  # their place in 0.1


def _map_names(function: Callable[[str], Any], tree: Any) -> Any:
    """A tree like `tree` of what `function` says for the name of every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: function(_name(path)), tree)


def _sum_bits(x: np.ndarray) -> int:
    """As `fingerprint` does, of one host array."""
    bits = np.ascontiguousarray(x).view(f"uint{x.dtype.itemsize * 8}")
    return int(bits.sum(dtype=np.uint32))
