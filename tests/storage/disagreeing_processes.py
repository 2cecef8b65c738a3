"""Restores checkpoints in several processes where something fails in process 1 alone.

Run by test_processes.py; prints what came of it in this process, a line for every phase.
"""

import contextlib
import os
import pathlib
import shutil
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mae_jax import UserError
from mae_jax.distributed import startup
from mae_jax.storage import checkpoints as module
from mae_jax.storage.checkpoints import Checkpoints
from mae_jax.storage.processes import require_same


def values_at(step):
    return {"step": np.int32(step), "w": np.arange(64, dtype=np.float32).reshape(8, 8) + step}


def cannot_list(function):
    def failing(directory):
        raise OSError(13, "Permission denied")

    return failing


def cannot_read_3(function):
    def failing(self, folder, *args, **kwargs):
        if "/3/" in f"{folder}/":
            raise ValueError("checksum does not match")
        return function(self, folder, *args, **kwargs)

    return failing


def changed_3(function):
    def failing(self, sums):
        return function(self, sums | {"w": 1} if self.record["note"] == "step 3" else sums)

    return failing


PHASES = {
    "nothing": (module, "steps_in", lambda function: function),
    "late": (module, "steps_in", lambda f: lambda directory: [s for s in f(directory) if s < 3]),
    "elsewhere": (module, "steps_in", lambda function: lambda directory: []),
    "list": (type(epath.Path()), "iterdir", cannot_list),
    "record": (ocp.JsonCheckpointHandler, "restore", cannot_read_3),
    "tree": (ocp.PyTreeCheckpointHandler, "metadata", cannot_read_3),
    "tensors": (ocp.PyTreeCheckpointHandler, "restore", cannot_read_3),
    "fingerprint": (module.Checkpoint, "check", changed_3),
}


def restore(folder, shardings):
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        values_at(0),
        shardings,
    )
    with contextlib.closing(Checkpoints(folder, keep=3)) as checkpoints:
        state, record = checkpoints.restore_newest(abstract, lambda record: None)
        found = multihost_utils.process_allgather(state, tiled=True)
        jax.tree.map(np.testing.assert_array_equal, found, values_at(int(found["step"])))
        checkpoints.save(4, state, {})
    return record["note"]


def main(folder):
    startup.initialize()
    agree()
    mesh = Mesh(np.asarray(jax.devices()), "x")
    shardings = {"step": NamedSharding(mesh, P()), "w": NamedSharding(mesh, P("x"))}
    with contextlib.closing(Checkpoints(folder / "made", keep=3)) as made:
        for step in (1, 2, 3):
            state = jax.tree.map(jax.device_put, values_at(step), shardings)
            made.save(step, state, {"note": f"step {step}"})
    for name, (owner, function, failing) in PHASES.items():
        if jax.process_index() == 0:
            shutil.copytree(folder / "made", folder / name)
        multihost_utils.sync_global_devices(name)
        with pytest.MonkeyPatch.context() as patch:
            if jax.process_index() == 1:
                patch.setattr(owner, function, failing(getattr(owner, function)))
            try:
                outcome = restore(folder / name, shardings)
            except (UserError, OSError) as error:
                outcome = f"{type(error).__name__} {error}"
        os.write(1, f"OUTCOME {name}: {outcome}\n".encode())


def agree():
    """Facts that are the same, then some that are not."""
    process = jax.process_index()
    require_same({"batch_size": 16, "model.image_size": [32]})
    for name, facts in {
        "field": {"batch_size": 16 + process, "seed": 0},
        "absent": {"seed": 0} if process else {"seed": 0, "version": "1"},
    }.items():
        try:
            outcome = require_same(facts)
        except UserError as error:
            outcome = f"UserError {error}"
        os.write(1, f"OUTCOME {name}: {outcome}\n".encode())


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
