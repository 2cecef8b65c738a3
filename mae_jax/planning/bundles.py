"""How long kernels take: the cycles of their final instruction bundles, as libtpu counts them.

It counts when told to before it is loaded, slowly, and may abort the whole process behind a kernel
that it has counted: hence a process for each, and a few heads in place of all.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jax

from mae_jax import UserError
from mae_jax.models import attention_kernel
from mae_jax.planning.chips import CHIPS, Chip, Pod, products
from mae_jax.planning.program import Kernel, Program

FLAG = "--xla_jf_dump_static_llo_profile_to"
SECONDS = 300  # for one kernel; it takes ten
PIECES = 4  # of a kernel's grid that are counted
# For v4 libtpu 0.0.52 counts nothing: there are as many cycles as on v5p, the next of its kind.
STAND_INS = {"v4": "v5p"}


def counted(program: Program, pod: Pod) -> Program:
    """`program` with the cycles of its kernels; UserError where libtpu does not tell them."""
    return Program(
        tuple(
            dataclasses.replace(i, cycles=cycles(i.kernel, pod.chip)) if i.kernel else i
            for i in program.instructions
        )
    )


@functools.cache
def cycles(kernel: Kernel, chip: Chip) -> float:
    """Of a device of `chip`, waiting for memory left out."""
    units, *size = kernel.shape  # [U, head_dim, N]
    together, rounds = attention_kernel.pieces(*kernel.shape, kernel.bits // 8)
    few = min(units, PIECES * together * rounds)
    if attention_kernel.pieces(few, *size, kernel.bits // 8) != (together, rounds):
        few = units
    name = STAND_INS.get(chip.name, chip.name)
    with tempfile.TemporaryDirectory() as folder:
        flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {FLAG}={folder}"
        command = [sys.executable, "-m", "mae_jax.planning.bundles", name, kernel.name]
        command += [str(number) for number in (few, *size, kernel.bits)]
        environment = os.environ | {"LIBTPU_INIT_ARGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with contextlib.suppress(subprocess.TimeoutExpired):  # what it has written counts
            subprocess.run(command, env=environment, timeout=SECONDS, check=False, **quiet)
        for path in pathlib.Path(folder).glob(f"{kernel.name}*.textproto"):
            if match := re.search(r"estimated_cycles: (\d+)", path.read_text()):
                return int(match[1]) * units / few
    raise UserError(
        f"libtpu does not count the cycles of {kernel.name} for {chip.name}: plan there with "
        "model.attention=plain"
    )


def compile_alone(chip: str, name: str, *numbers: str) -> None:
    """Compiles a kernel of numbers U, head_dim, N, bits, for libtpu to count."""
    *shape, bits = map(int, numbers)
    device = Pod(CHIPS[chip], products(CHIPS[chip])[0]).topology().devices[0]
    here = jax.sharding.SingleDeviceSharding(device)
    dtype = {16: "bfloat16", 32: "float32"}[bits]
    array = jax.ShapeDtypeStruct(shape, dtype, sharding=here)
    arrays = [array] * attention_kernel.KERNELS[name][1]
    run = functools.partial(attention_kernel.run, name)
    jax.jit(run, out_shardings=here).lower(*arrays).compile()


if __name__ == "__main__":
    compile_alone(*sys.argv[1:])
