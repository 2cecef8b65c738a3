"""Joining the other processes of a run, and learning that this one is about to be stopped."""

import os
import signal
from types import FrameType

import jax
from absl import logging
from jax.experimental import multihost_utils


def initialize() -> None:
    """Connects the processes of a run, where it has several, before anything asks for devices.

    It has several when `JAX_NUM_PROCESSES` says so (with `JAX_COORDINATOR_ADDRESS`
    and `JAX_PROCESS_ID`; `launch/local.py` sets the three), or when Slurm, Open MPI or a TPU pod
    started it, which JAX recognises by itself. `JAX_NUM_PROCESSES=auto` asks JAX to recognise a
    cluster that sets no environment of its own, such as plain TPU VMs.
    """
    count = os.environ.get("JAX_NUM_PROCESSES", "")
    if count.isdigit():
        if int(count) > 1:
            jax.distributed.initialize(None, int(count), int(os.environ["JAX_PROCESS_ID"]))
    elif count == "auto" or _several_by_environment():
        jax.distributed.initialize()


def _several_by_environment() -> bool:
    counts = (os.environ.get("SLURM_NTASKS", "1"), os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    slices = os.environ.get("MEGASCALE_NUM_SLICES", "1")
    return any(int(count) > 1 for count in (*counts, slices)) or len(workers) > 1


class StopSignal:
    """Says when to save and leave: after SIGTERM, or after the first Ctrl-C.

    Any process's SIGTERM stops all after the same step, agreed on without talking to the devices.
    """

    def __init__(self):
        self._received = False
        self._alone = jax.process_count() == 1
        if self._alone:
            signal.signal(signal.SIGTERM, self._handle)
            signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        logging.warning("%s: saving and leaving after this step", signal.Signals(number).name)
        self._received = True
        # A second Ctrl-C is obeyed at once.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self, step: int) -> bool:
        """Whether to stop after `step` steps; every process must ask after every step."""
        if self._alone:
            return self._received
        return multihost_utils.reached_preemption_sync_point(step)
