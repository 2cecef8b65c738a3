"""Files of tensors. Nothing in a file is ever executed."""

import json
import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from mae_jax import UserError
from mae_jax.interop.names import Tensors
from mae_jax.interop.torch_file import TorchFileError, read_torch
from mae_jax.storage.files import complete_or_absent

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
}


def save_safetensors(
    path: str | pathlib.Path, tensors: Tensors, metadata: Mapping[str, str]
) -> None:
    """Writes one file, which appears complete or not at all."""
    contiguous = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    with complete_or_absent(path) as temporary:
        try:
            safetensors.numpy.save_file(contiguous, temporary, metadata=dict(metadata))
        except safetensors.SafetensorError as error:  # so it tells of a full disk
            raise OSError(str(error)) from error


def read_tensors(path: str | pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every tensor of a `.safetensors`, `.pth`, `.pt` or `.bin` file, and the file's metadata.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: not a file of weights, damaged, or a pickle that holds more than data.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: weights are read from {', '.join(SUFFIXES)} files")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        return read_torch(path), {}
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{path}: truncated or damaged ({error}); fetch or copy it again"
        ) from error
    except TorchFileError as error:
        raise UserError(f"{path}: {error}") from error


def _read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safetensors.safe_open(path, framework="numpy") as opened:  # checks sizes and offsets
        metadata = opened.metadata() or {}
    # Its own numpy reader knows no bfloat16. The layout: length of the header, header, numbers.
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    numbers = np.memmap(path, np.uint8, mode="r", offset=8 + length)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise UserError(f"{path}: tensor {name} is of type {entry['dtype']}")
        start, end = entry["data_offsets"]
        tensors[name] = numbers[start:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors, metadata
