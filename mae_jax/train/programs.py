"""The compiled programs of a run: all of them before its first step, and kept for the next."""

import concurrent.futures
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from mae_jax import UserError
from mae_jax.distributed.sharding import bytes_per_device
from mae_jax.train.progress import with_clock

Compile = Callable[[], Sequence[jax.stages.Compiled]]
REMEDIES = {
    "step": "raise optim.accumulate or mesh.fsdp, set model.remat, or lower batch_size",
    "evaluation": "lower eval.batch_size",
    "probe": "lower eval.batch_size",
    "pictures": "lower pictures.count",
}


def compile_ahead(programs: Mapping[str, Compile], state: Any) -> dict[str, Any]:
    """What the functions compile, by name and at the same time, with a line on the memory it takes.

    `state`: abstract, on the devices whatever runs. UserError: names the program that has no room.
    """
    names = ", ".join(programs)
    logging.info("compiling the %s (usually 20 to 60 s) ...", names)
    start = time.time()

    def compile_all() -> dict[str, Sequence[jax.stages.Compiled]]:
        with concurrent.futures.ThreadPoolExecutor(len(programs)) as pool:
            running = {name: pool.submit(_compile, name, f) for name, f in programs.items()}
        return {name: future.result() for name, future in running.items()}

    compiled = with_clock("compiling", compile_all)
    working = {name: sum(map(_working_bytes, parts)) for name, parts in compiled.items()}
    sizes = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in working.items())
    kept, largest = bytes_per_device(state), max(working, key=working.get)
    need = f"{(kept + working[largest]) / 1e9:.2f}"
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    room = f" of {limit / 1e9:.2f}" if limit else ""
    text = "compiled in %.0f s; working memory a device: %s GB; with the state at most %s%s GB"
    logging.info(text, time.time() - start, sizes, need, room)
    if limit and kept + working[largest] > limit:
        text = "the %s will hardly find the memory it needs: %s"
        logging.warning(text, largest, REMEDIES.get(largest, ""))
    return compiled


def _compile(name: str, function: Compile) -> Sequence[jax.stages.Compiled]:
    try:
        return function()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        remedy = REMEDIES.get(name, "use more devices")
        raise UserError(f"the {name} does not fit: {reason}; {remedy}") from error


def _working_bytes(program: jax.stages.Compiled) -> int:
    """What a program takes on a device beside its arguments; 0 where the backend does not tell."""
    memory = program.memory_analysis()
    if memory is None:
        return 0
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + max(0, new)
