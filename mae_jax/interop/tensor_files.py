"""Files of tensors. Nothing in a file is ever executed."""

from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy

from mae_jax import UserError
from mae_jax.interop.names import Tensors
from mae_jax.interop.torch_file import TorchFileError, read_torch
from mae_jax.storage.files import PathLike, complete_or_absent, local_copy, to_path

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def save_safetensors(path: PathLike, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Writes one file, which appears complete or not at all."""
    # Not ascontiguousarray, which makes a number a vector of one.
    contiguous = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    with complete_or_absent(path) as temporary:
        try:
            safetensors.numpy.save_file(contiguous, temporary, metadata=dict(metadata))
        except safetensors.SafetensorError as error:  # so it tells of a full disk
            raise OSError(str(error)) from error


def read_tensors(path: PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every tensor of a `.safetensors`, `.pth`, `.pt` or `.bin` file, and the file's metadata."""
    path = to_path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: weights are read from {', '.join(SUFFIXES)} files")
    try:
        with local_copy(path) as copy:
            if path.suffix != ".safetensors":
                return read_torch(copy), {}
            with safetensors.safe_open(copy, framework="numpy") as file:
                return file.get_tensors(), file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: truncated or damaged ({error}); fetch it again") from error
    except TorchFileError as error:
        raise UserError(f"{path}: {error}") from error
