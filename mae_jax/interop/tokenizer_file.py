"""Tokenizers out of files and into them: FLAVA's codebook, which is DALL-E's encoder, and our own.

Names are those of transformers' `FlavaImageCodebook`, kernels [out, in, height, width]; a decoder's
have `decoder.` before them. DALL-E's own spelling (`w`, `b`) is read too. Nothing is executed.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from mae_jax import UserError
from mae_jax.interop.checkpoint import file_of
from mae_jax.interop.names import some
from mae_jax.interop.tensor_files import read_tensors, save_safetensors
from mae_jax.interop.weights import Params
from mae_jax.models.dvae import DVAE, STRIDE, DVAEShape
from mae_jax.storage.files import PathLike, to_path

TOKENIZER_FILE = "tokenizer.safetensors"
_PATTERN = re.compile(
    r"(?:image_codebook\.)?(decoder\.)?blocks\."
    r"(?:group_(\d+)\.(?:group\.)?block_(\d+)\.(?:res_path\.(?:path\.)?)?)?"
    r"(input|id_path|conv_\d|output(?=\.conv))(?:\.conv)?\.(w|weight|b|bias)"
)


def _path(name: str) -> str:
    """The place in `DVAE`'s parameters of a tensor."""
    match = _PATTERN.fullmatch(name)
    if match is None:
        return ""
    decoder, group, block, part, leaf = match.groups()
    where = f"group_{group}_block_{block}/{part}" if group else part
    return f"{'decoder' if decoder else 'encoder'}/{where}/{'kernel' if leaf[0] == 'w' else 'bias'}"


def _name(path: str) -> str:
    """The inverse of `_path`."""
    side, *parts, leaf = path.split("/")
    name = ".".join(parts)
    if match := re.fullmatch(r"group_(\d+)_block_(\d+)\.(.+)", name):
        group, block, part = match.groups()
        part = part if part == "id_path" else f"res_path.path.{part}"
        name = f"group_{group}.group.block_{block}.{part}"
    elif name == "output":
        name = "output.conv"
    prefix = "decoder." if side == "decoder" else ""
    return f"{prefix}blocks.{name}.{'weight' if leaf == 'kernel' else 'bias'}"


def read_tokenizer(path: PathLike, channels: int = 3) -> tuple[DVAEShape, Params]:
    """Architecture and weights, float32, of a file, a folder with one, or a tokenizer's workdir.

    UserError: no such file, not a dVAE of this kind, damaged, for other channels, NaN in it.
    """
    where = _file(to_path(path))
    tensors = {_path(name): x for name, x in read_tensors(where)[0].items()}
    kernel, output = (tensors.get(f"encoder/{name}/kernel") for name in ("input", "output"))
    if kernel is None or output is None or kernel.ndim != 4 or "" in tensors:
        kind = "DALL-E's encoder as facebook/flava-image-codebook holds it, or of task=tokenizer"
        raise UserError(f"tokenizer = {path}: {where.name} holds no dVAE; give {kind}")
    blocks = [int(m[1]) for name in tensors if (m := re.search(r"_block_(\d+)/", name))]
    decoder = int(any(name.startswith("decoder/") for name in tensors))
    shape = DVAEShape(output.shape[0], kernel.shape[0], max(blocks, default=0), decoder)
    if kernel.shape[1] != channels:
        pictures = f"pictures of {kernel.shape[1]} channel(s), model.channels = {channels}"
        raise UserError(f"tokenizer = {path}: it is for {pictures}; give another tokenizer")
    x = jax.ShapeDtypeStruct((1, STRIDE, STRIDE, channels), jnp.float32)
    expected = jax.eval_shape(DVAE(shape, channels).init, jax.random.key(0), x)["params"]
    expected = {name: leaf.shape for name, leaf in flatten_dict(expected, sep="/").items()}
    found = {
        name: np.ascontiguousarray(x.transpose(2, 3, 1, 0) if x.ndim == 4 else x, np.float32)
        for name, x in tensors.items()
    }
    wrong = [k for k in expected | found if expected.get(k) != np.shape(found.get(k))]
    if wrong:
        raise UserError(f"tokenizer = {path}: {some(sorted(wrong))} missing or of another shape")
    if bad := [name for name, x in found.items() if not np.isfinite(x).all()]:
        raise UserError(f"tokenizer = {path}: NaN or infinite values in {some(sorted(bad))}")
    return shape, unflatten_dict(found, sep="/")


def _file(path: epath.Path) -> epath.Path:
    if not path.exists():
        raise UserError(f"tokenizer = {path}: there is no such file or folder")
    exported = path / "export" / TOKENIZER_FILE  # of a workdir
    if exported.exists() or path.is_file():
        return path if path.is_file() else exported
    return file_of(path)


def write_tokenizer(params: Params, path: PathLike) -> None:
    """Writes parameters of `DVAE` for `read_tokenizer`; the encoder's tensors are FLAVA's."""
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    tensors = {
        _name(name): np.asarray(x, np.float32).transpose(3, 2, 0, 1) if x.ndim == 4 else x
        for name, x in flat.items()
    }
    save_safetensors(path, tensors, {"format": "pt"})
