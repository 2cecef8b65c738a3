"""Joining the other processes of a run."""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
from jax._src import distributed
from jax._src.lib import _jax

from mae_jax import UserError
from mae_jax.distributed import fate, stopping

SECONDS_TO_COME = 300  # between the first and the last process of a run


def initialize() -> None:
    """Connects the processes of a run, where it has several, before anything asks for devices.

    It has several when `JAX_NUM_PROCESSES` says so (with `JAX_COORDINATOR_ADDRESS`
    and `JAX_PROCESS_ID`; `launch/local.py` sets the three), or when Slurm, Open MPI or a TPU pod
    started it, which JAX recognises by itself. `JAX_NUM_PROCESSES=auto` asks JAX to recognise a
    cluster that sets no environment of its own, such as plain TPU VMs. From here on the processes
    end together (`fate`), and SIGTERM is heard (`stopping`).
    """
    count, joining = os.environ.get("JAX_NUM_PROCESSES", ""), None
    if count not in ("", "auto"):
        if _number("JAX_NUM_PROCESSES") > 1:
            # No detection: inside Slurm it would take all GPUs but one from the process.
            joining = {
                "num_processes": _number("JAX_NUM_PROCESSES"),
                "process_id": _number("JAX_PROCESS_ID"),
                "cluster_detection_method": "deactivate",
            }
            if "JAX_COORDINATOR_ADDRESS" not in os.environ:
                raise UserError("JAX_COORDINATOR_ADDRESS: set it to HOST:PORT of process 0")
    elif count == "auto" or _several_by_environment():
        joining = {"local_device_ids": _gpus_of_the_only_process_of_a_node()}
    if joining is not None:
        _join(**joining)
    stopping.listen()


def _join(**arguments: Any) -> None:
    timeouts = {
        "initialization_timeout": SECONDS_TO_COME,
        "shutdown_timeout_seconds": fate.SECONDS_TO_END,
    }
    with _client_made_with(fate.on_error_of_service()):
        try:
            jax.distributed.initialize(**arguments, **timeouts)
        except RuntimeError as error:
            told = f"the processes of the run did not find each other in {SECONDS_TO_COME} s"
            remedy = "see that all were started and reach process 0"
            reason = " ".join(str(error).split())[:300].replace("std::bad_cast", remedy)
            fate.leave(fate.LOST, f"error: {told}: {reason}")
    state = distributed.global_state
    fate.watch(state.client, state.process_id, state.num_processes, state.coordinator_address)


@contextlib.contextmanager
def _client_made_with(more: dict[str, Any]) -> Iterator[None]:
    """Passes JAX's client arguments that `jax.distributed.initialize` has no words for."""
    name = "get_distributed_runtime_client"
    make = getattr(_jax, name, None)
    if make is None or not all(argument in (make.__doc__ or "") for argument in more):
        yield
        return
    setattr(_jax, name, partial(make, **more))
    try:
        yield
    finally:
        setattr(_jax, name, make)


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        given = os.environ.get(name, "")
        raise UserError(f"{name}={given!r}: give an integer in every process of the run") from None


def _several_by_environment() -> bool:
    counts = (os.environ.get("SLURM_NTASKS", "1"), os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    slices = os.environ.get("MEGASCALE_NUM_SLICES", "1")
    lists = (
        os.environ.get(f"TPU_{name}", "") for name in ("WORKER_HOSTNAMES", "PROCESS_ADDRESSES")
    )
    return any(int(count) > 1 for count in (*counts, slices)) or any("," in x for x in lists)


def _gpus_of_the_only_process_of_a_node() -> list[int] | None:
    """All GPUs, where Slurm runs one process a node: JAX would take the first alone."""
    nodes, tasks = os.environ.get("SLURM_STEP_NUM_NODES"), os.environ.get("SLURM_NTASKS")
    if nodes is None or nodes != tasks or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    count = len(visible.split(",")) if visible else int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    return list(range(count)) or None
