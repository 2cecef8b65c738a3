"""Reading and writing files of tensors. Nothing in a file is ever executed."""

import os
import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from mae_jax.interop.description import WeightsError
from mae_jax.interop.names import Tensors
from mae_jax.interop.torch_file import TorchFileError, read_torch

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
    data = safetensors.numpy.save(contiguous, metadata=dict(metadata))
    write_atomically(path, data)


def write_atomically(path: str | pathlib.Path, content: bytes | str) -> None:
    """Writes a file that is complete or absent, making its folder where needed."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: str | pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every tensor of a `.safetensors`, `.pth`, `.pt` or `.bin` file, and the file's metadata.

    Raises:
      FileNotFoundError: there is no such file.
      WeightsError: not a file of weights, damaged, or a pickle that holds more than data.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"{path}: weights are read from {', '.join(SUFFIXES)} files")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        return read_torch(path), {}
    except (safetensors.SafetensorError, TorchFileError) as error:
        raise WeightsError(f"{path}: {error}") from error


def _read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safetensors.safe_open(path, framework="numpy") as opened:  # refuses truncated files
        metadata = opened.metadata() or {}
    tensors = {}
    for name, entry in safetensors.deserialize(path.read_bytes()):
        if entry["dtype"] not in _DTYPES:
            raise WeightsError(f"{path}: tensor {name} is of type {entry['dtype']}")
        flat = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors, metadata
