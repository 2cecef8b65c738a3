"""How long kernels take: the cycles of their final instruction bundles, as libtpu counts them.

It counts when told to before it is loaded, slowly, and may abort the whole process behind a kernel
that it has counted: hence a process for each, and a few images in place of all.
"""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.experimental.layout import Format, Layout

from mae_jax import UserError
from mae_jax.models import attention_kernel, stacked_attention_kernel
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


class Known(NamedTuple):
    """A kernel of ours.

    Attributes:
      run: runs it on arrays.
      arguments: how many of these, all of one shape.
      pieces: of their shape and bytes a number, what it works on at a time.
    """

    run: Callable[..., list[jax.Array]]
    arguments: int
    pieces: Callable[..., tuple[int, int]]


def _known(name: str) -> Known:
    stacked, _, head_dim = name.rpartition("_")
    if stacked in stacked_attention_kernel.KERNELS:
        run = functools.partial(stacked_attention_kernel.run, stacked, int(head_dim))
        arguments = stacked_attention_kernel.KERNELS[stacked][1]

        def pieces(images: int, tokens: int, _: int, itemsize: int) -> tuple[int, int]:
            return stacked_attention_kernel.pieces(images, tokens, int(head_dim), itemsize)

        return Known(run, arguments, pieces)
    run = functools.partial(attention_kernel.run, name)
    return Known(run, attention_kernel.KERNELS[name][1], attention_kernel.pieces)


@functools.cache
def cycles(kernel: Kernel, chip: Chip) -> float:
    """Of a device of `chip`, waiting for memory left out."""
    units, *size = kernel.shape
    bits, known = kernel.bits, _known(kernel.name)
    few = min(units, PIECES * math.prod(known.pieces(units, *size, bits // 8)))
    if known.pieces(few, *size, bits // 8) != known.pieces(units, *size, bits // 8):
        few = units
    name = STAND_INS.get(chip.name, chip.name)
    with tempfile.TemporaryDirectory() as folder:
        flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {FLAG}={folder}"
        command = [sys.executable, "-m", "mae_jax.planning.bundles", name, kernel.name]
        command += [str(number) for number in (few, *size, bits)]
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
    """Compiles a kernel, given its first argument's shape and bits, for libtpu to count."""
    *shape, bits = map(int, numbers)
    device = Pod(CHIPS[chip], products(CHIPS[chip])[0]).topology().devices[0]
    here = jax.sharding.SingleDeviceSharding(device)
    dtype = {16: "bfloat16", 32: "float32"}[bits]
    array = jax.ShapeDtypeStruct(shape, dtype, sharding=here)
    known = _known(name)
    as_read = Format(Layout((0, 1, 2)), here)  # a copy before the kernel may end the count
    alone = jax.jit(known.run, in_shardings=as_read, out_shardings=as_read)
    alone.lower(*[array] * known.arguments).compile()


if __name__ == "__main__":
    compile_alone(*sys.argv[1:])
