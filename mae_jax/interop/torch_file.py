"""Tensors out of PyTorch's zip files (`.pth`, `.pt`, `.bin`), without PyTorch and without risk.

Such a file is a pickle beside raw storages. A pickle can call any function it names, so this
reader gives it nothing to call but the few builders of plain data below; any other name ends the
reading. Storages are read last, and only those of the state dict.
"""

import io
import math
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided

from mae_jax import UserError

# In the order in which containers name their state dict: MAE and timm, Lightning and others.
_STATE_DICT_KEYS = ("model", "state_dict")

_STORAGE_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}

# What reading a damaged or contrived file may raise; RuntimeError of encrypted or too deep ones.
_DAMAGE = (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError)
_DAMAGE = (*_DAMAGE, OverflowError, RuntimeError)


class TorchFileError(UserError):
    """A file that is damaged, or that is not plain data."""


class _Storage(NamedTuple):
    key: str
    dtype: Any


class _Tensor(NamedTuple):
    """A tensor whose numbers have not been read yet."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Inert:
    """Stands for objects beside the weights whose content nobody needs, such as `args`."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Dict(dict):
    """Stands for OrderedDict; drops the attributes that PyTorch hangs on it."""

    __setstate__ = _Inert.__setstate__


class _Builder:
    """A callable that a pickle cannot take apart or change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise TorchFileError("the pickle tries to change a function")


def _rebuild_tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> Any:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


# Classes go out as they are, to be made by either opcode for objects. Their `__setstate__` is what
# keeps a pickle from writing attributes.
_ALLOWED = {
    ("collections", "OrderedDict"): _Dict,
    ("argparse", "Namespace"): _Inert,
    ("torch", "device"): _Inert,
    ("torch", "Size"): _Builder(lambda *args: tuple(*args)),
    ("torch._utils", "_rebuild_tensor_v2"): _Builder(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Builder(lambda data, *_: data),
    **{("torch", name): name for name in _STORAGE_DTYPES},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise TorchFileError(
            f"its pickle asks for {module}.{name}, which is not weights; nothing was run. If you "
            "trust it, load it with PyTorch and save the tensors alone as safetensors"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) >= 3 and pid[0] == "storage"):
            raise TorchFileError("its pickle refers to something that is not a storage")
        if pid[1] not in _STORAGE_DTYPES:
            raise TorchFileError(f"its pickle refers to a storage of unknown type {pid[1]!r}")
        return _Storage(str(pid[2]), _STORAGE_DTYPES[pid[1]])


def read_torch(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The state dict of a file written by `torch.save` (PyTorch 1.6 or newer): its only content, or
    its `model` or `state_dict` entry, in the types stored."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive)
    except TorchFileError:
        raise
    except zipfile.BadZipFile as error:
        raise TorchFileError(
            f"not a PyTorch zip file, or truncated ({error}); save one older than PyTorch 1.6 again"
        ) from error
    except _DAMAGE as error:
        raise TorchFileError(f"its pickle is damaged: {error!r}") from error


def _read_archive(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise TorchFileError("a zip file without weights in it (no data.pkl)")
    root = pickles[0].removesuffix("data.pkl")
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED:  # PyTorch never compresses; bombs do
            raise TorchFileError(f"{info.filename} is compressed, which PyTorch never does")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise TorchFileError("written on a big-endian machine")
    content = _Unpickler(io.BytesIO(archive.read(pickles[0]))).load()
    return {
        name: _materialise(archive, f"{root}data/", name, tensor)
        for name, tensor in _state_dict(content).items()
    }


def _state_dict(content: Any) -> dict[str, _Tensor]:
    if isinstance(content, dict):
        entries = (content.get(key) for key in _STATE_DICT_KEYS)
        content = next((entry for entry in entries if isinstance(entry, dict)), content)
    if not isinstance(content, dict) or not content:
        raise TorchFileError("no state dict: expected named tensors, or them under `model`")
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, _Tensor)):
            raise TorchFileError(f"no state dict: entry {name!r} is not a tensor")
    return content


def _materialise(archive: zipfile.ZipFile, folder: str, name: str, tensor: _Tensor) -> np.ndarray:
    storage = np.frombuffer(archive.read(folder + tensor.storage.key), tensor.storage.dtype)
    sizes = (tensor.offset, *tensor.shape, *tensor.strides)
    whole = all(isinstance(n, int) and n >= 0 for n in sizes)
    if not whole or len(tensor.shape) != len(tensor.strides):
        raise TorchFileError(f"tensor {name} has an impossible shape")
    count = math.prod(tensor.shape)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((size - 1) * stride for size, stride in steps)
    # Strides outside the storage would read foreign memory; overlapping ones make bombs.
    if count > storage.size or (count and last >= storage.size):
        raise TorchFileError(f"tensor {name} reaches beyond its storage")
    strides = [stride * storage.itemsize for stride in tensor.strides]
    view = as_strided(storage[tensor.offset :], tensor.shape, strides, writeable=False)
    return np.ascontiguousarray(view).reshape(tensor.shape)
