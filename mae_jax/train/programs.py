"""The compiled programs of a run: all of them before its first step, and kept for the next."""

import concurrent.futures
import hashlib
import os
import pathlib
import platform
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

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


def keep_compiled(folder: str) -> None:
    """Makes compiled programs serve later starts of the same; call it before the first.

    In `folder`, which may be a bucket; empty: where JAX was told to, else in the user's cache
    folder; "none": nowhere. Programs for a CPU lie in a folder for its kind, as JAX does not ask
    whether this one has the instructions of the one they were made for.
    """
    if not folder and jax.config.jax_compilation_cache_dir:
        return
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = epath.Path(folder or f"{cache}/mae_jax/compiled").expanduser()
    if jax.default_backend() == "cpu":
        path /= f"cpu-{_cpu_kind()}"
    if folder != "none":
        try:
            path.mkdir(parents=True, exist_ok=True)
            trial = path / f".{uuid.uuid4().hex}"
            trial.write_bytes(b"room?" * 1000)
            trial.unlink()
        except OSError as error:
            logging.info("%s: programs are not kept there (%s)", path, error.strerror or error)
            folder = "none"
    jax.config.update("jax_compilation_cache_dir", None if folder == "none" else str(path))


def _cpu_kind() -> str:
    """Differs where the instructions of the processor may."""
    kind, file = platform.machine() + platform.processor(), pathlib.Path("/proc/cpuinfo")
    if file.exists():
        lines = re.findall(r"^(?:model name|flags|Features)\s.*$", file.read_text(), re.MULTILINE)
        kind += "".join(lines[:2])  # of the first of its cores
    return hashlib.sha256(kind.encode()).hexdigest()[:12]


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
