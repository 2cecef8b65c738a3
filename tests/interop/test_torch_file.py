"""Reading PyTorch's files without PyTorch, and refusing what is not weights."""

import io
import os
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mae_jax.interop.torch_file import TorchFileError, read_torch

GOLDENS = pathlib.Path(__file__).parent / "goldens"


def test_every_kind_of_tensor_is_read():
    tensors = read_torch(GOLDENS / "types.pth")
    matrix = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = {
        "float": matrix,
        "transposed": matrix.T,
        "part": matrix[1:3, 2:5],
        "bfloat16": matrix.astype(ml_dtypes.bfloat16),
        "half": matrix.astype(np.float16),
        "double": matrix.astype(np.float64),
        "long": matrix.astype(np.int64),
        "parameter": matrix,
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 3), np.float32),
    }
    assert tensors.keys() == expected.keys()
    for name, x in expected.items():
        assert tensors[name].dtype == x.dtype, name
        assert tensors[name].shape == x.shape, name
        np.testing.assert_array_equal(tensors[name], x)


def test_a_training_checkpoint_gives_its_model_alone():
    tensors = read_torch(GOLDENS / "official.pth")
    assert "blocks.1.mlp.fc2.weight" in tensors
    assert not any("exp_avg" in name for name in tensors)


def torch_zip(path, data, storages=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in storages:
            archive.writestr(f"archive/data/{name}", content)
    return path


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("hidden", ["alone", "beside-weights", "in-args"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(hidden, tmp_path):
    trap = tmp_path / "trap"
    code = Calls(os.mkdir, str(trap))
    content = {
        "alone": code,
        "beside-weights": {"model": {}, "optimizer": code},
        "in-args": {"model": {}, "args": [code]},
    }[hidden]
    path = torch_zip(tmp_path / "evil.pth", pickle.dumps(content))
    with pytest.raises(TorchFileError, match=r"mkdir.*not weights"):
        read_torch(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cbuiltins\neval\n(S'1+1'\ntR.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n}S'x'\nI1\nsb.",  # changes a builder
        b"ccollections\nOrderedDict\n}S'update'\nI1\nsb.",  # changes a class
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
        b"\x80\x02\x82\x01.",  # extension registry
    ],
)
def test_hand_written_pickles_get_nothing_to_call(program, tmp_path):
    with pytest.raises(TorchFileError):
        read_torch(torch_zip(tmp_path / "evil.pth", program))


def tensor_file(path, shape, strides, offset=0, numbers=6):
    """A file with one tensor `x` over a storage of six floats."""
    storage = b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI6\ntQ"
    sizes = b"".join(b"I%d\n" % n for n in shape)
    steps = b"".join(b"I%d\n" % n for n in strides)
    program = (
        b"(dS'x'\nctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"I%d\n(" % offset
        + sizes
        + b"t("
        + steps
        + b"tI00\n(dtRs."
    )
    content = np.arange(numbers, dtype=np.float32).tobytes()
    return torch_zip(path, program, [("0", content)])


def test_a_plain_tensor_written_by_hand_is_read(tmp_path):
    tensors = read_torch(tensor_file(tmp_path / "x.pth", (2, 3), (3, 1)))
    np.testing.assert_array_equal(tensors["x"], np.arange(6).reshape(2, 3))


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((2, 3), (30, 1), 0),
        ((2, 3), (3, 1), 5),
        ((2, 3), (-3, 1), 0),
        ((2, 3), (3, 1), -1),
        ((1000, 1000, 1000), (0, 0, 0), 0),
        ((2, 3), (1,), 0),
    ],
    ids=["far-stride", "far-offset", "back-stride", "back-offset", "bomb", "ranks-differ"],
)
def test_a_tensor_beyond_its_storage_is_refused(shape, strides, offset, tmp_path):
    with pytest.raises(TorchFileError, match="tensor x"):
        read_torch(tensor_file(tmp_path / "x.pth", shape, strides, offset))


def test_a_storage_shorter_than_its_tensor_is_refused(tmp_path):
    with pytest.raises(TorchFileError, match="beyond its storage"):
        read_torch(tensor_file(tmp_path / "x.pth", (2, 3), (3, 1), numbers=5))


def test_a_compressed_archive_is_refused(tmp_path):
    path = torch_zip(tmp_path / "x.pth", pickle.dumps({}), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(TorchFileError, match="compressed"):
        read_torch(path)


def test_an_encrypted_archive_is_refused(tmp_path):
    path = torch_zip(tmp_path / "x.pth", pickle.dumps({}))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x03\x04") + 6] |= 1  # flags of the file and of its directory entry
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(TorchFileError, match="encrypted"):
        read_torch(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(share, tmp_path):
    content = (GOLDENS / "official.pth").read_bytes()
    path = tmp_path / "short.pth"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(TorchFileError, match="truncated"):
        read_torch(path)


def test_flipped_bits_in_a_storage_are_noticed(tmp_path):
    content = bytearray((GOLDENS / "official.pth").read_bytes())
    content[len(content) // 2] ^= 1
    path = tmp_path / "flipped.pth"
    path.write_bytes(content)
    with pytest.raises(TorchFileError):
        read_torch(path)


def test_something_else_than_a_state_dict_is_refused(tmp_path):
    for content in ([1, 2], {"model": {"x": 1.0}}, {}, {"epoch": 3}):
        with pytest.raises(TorchFileError, match="no state dict"):
            read_torch(torch_zip(tmp_path / "x.pth", pickle.dumps(content)))
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").close()
    (tmp_path / "empty.pth").write_bytes(buffer.getvalue())
    with pytest.raises(TorchFileError, match="without weights"):
        read_torch(tmp_path / "empty.pth")
