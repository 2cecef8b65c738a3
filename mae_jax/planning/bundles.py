"""Cycles of final instruction bundles, for as many instructions as the TPU compiler counts.

libtpu walks through the bundles of every instruction when told to before it is loaded. That takes
about a second for 100,000 cycles, and it aborts the whole process on instructions that it cannot
follow (in 0.0.52 attention's products and some copies): hence a process of its own, and what it
has written until its end.
"""

import contextlib
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Sequence

FLAG = "--xla_jf_dump_static_llo_profile_to"


def collect(command: Sequence[str], seconds: float) -> dict[str, int]:
    """Cycles by the names of instructions that `command` compiles for a TPU in at most `seconds`;
    those that it did not come to are missing."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {FLAG}={folder}"
        environment = os.environ | {"LIBTPU_INIT_ARGS": flags.strip()}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with contextlib.suppress(subprocess.TimeoutExpired):  # what it has written counts
            subprocess.run(command, env=environment, timeout=seconds, check=False, **quiet)
        texts = (path.read_text() for path in pathlib.Path(folder).glob("*.textproto"))
        return dict(found for found in map(_cycles, texts) if found)


def _cycles(text: str) -> tuple[str, int] | None:
    name = re.search(r'hlo_op_name: "([^"]+)"', text)
    cycles = re.search(r"estimated_cycles: (\d+)", text)
    return (name[1], int(cycles[1])) if name and cycles else None
