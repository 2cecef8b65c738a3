"""Opening weights of any origin: what they are, and every check that needs no target model.

Formats: official MAE `.pth` (encoder, with decoder, fine-tuned), timm and our own safetensors,
Hugging Face folders and files (ViTMAE, ViT), our Orbax exports, and workdirs of this project.
"""

import dataclasses
import hashlib
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from mae_jax import UserError
from mae_jax.interop.description import METADATA_KEY, Description, expected_shapes, infer
from mae_jax.interop.export import DESCRIPTION_FILE, ORBAX_FOLDER
from mae_jax.interop.names import Tensors, from_hugging_face, is_hugging_face
from mae_jax.interop.orbax_file import read_workdir
from mae_jax.interop.tensor_files import SUFFIXES, read_tensors
from mae_jax.interop.weights import Params, from_official, to_official
from mae_jax.models.vit import LAYER_NORM_EPS, MLP_RATIO, sincos_position_table
from mae_jax.storage.checkpoints import read_params
from mae_jax.storage.files import read_json

# Tensors beside the model that some writers add and nobody here needs.
_IGNORED = ("pooler.", "vit.pooler.")
_POSITION_TOLERANCE = 1e-5
_HF_DEFAULT_EPS = 1e-12
_TIMM_POOLS = {"avg": "mean", "token": "cls"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights that have been read and found whole.

    Attributes:
      tensors: under official names, float32, position tables included.
      source: what was read, in words.
      trained_positions: the encoder's position table is not the fixed sine-cosine one.
      trained_decoder_positions: likewise for the decoder.
      notes: what a user should know of the reading.
      facts: what the source tells of its training, for model cards.
    """

    tensors: dict[str, np.ndarray]
    description: Description
    source: str
    trained_positions: bool
    trained_decoder_positions: bool
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def params(self) -> Params:
        """Our parameter tree.

        `encoder/pos_embed` is in it where positions were trained, and in classifiers.
        """
        if self.trained_decoder_positions:
            raise UserError(
                f"{self.source}: the decoder's position table is not the fixed sine-cosine one "
                "and no model here can hold it"
            )
        keep_positions = self.trained_positions or self.description.classes > 0
        return from_official(self.tensors, keep_positions=keep_positions)

    def digest(self) -> str:
        """Identifies the weights by their content, wherever they lie."""
        total = hashlib.sha256()
        for _, x in sorted(self.tensors.items()):
            total.update(np.ascontiguousarray(x).data)
        return total.hexdigest()


def open_checkpoint(
    path: str | pathlib.Path, *, fallback: Description | None = None, **known: Any
) -> Checkpoint:
    """Reads weights, whatever their format.

    Args:
      path: a file, a Hugging Face or timm folder, an export or a workdir of this project.
      fallback: the model the weights are for, believed where the source does not tell.
      known: fields of `Description` that the source does not tell (`heads`, `image_size`,
        `target`, `mean`, `std` ...).

    Raises:
      FileNotFoundError: nothing there.
      UserError: not weights of a ViT or MAE, damaged, hostile, or with NaN in them.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if path.is_file():
        return _from_file(path, known, fallback)
    if (path / DESCRIPTION_FILE).is_file() and (path / ORBAX_FOLDER).is_dir():
        description = Description.from_json((path / DESCRIPTION_FILE).read_text())
        params = read_params(path / ORBAX_FOLDER)
        description = _agree(description, known, path)
        return _from_params(params, description, f"Orbax export {path}", [], {})
    if (path / "checkpoints").is_dir():
        params, description, facts, notes = read_workdir(path)
        where = f"workdir {path}, step {facts['steps']}"
        return _from_params(params, _agree(description, known, path), where, notes, facts)
    if (path / "model.safetensors.index.json").is_file():
        return _from_shards(path, known, fallback)
    files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
    # Hugging Face folders often hold the same weights twice; the pickle is the older one.
    files = [p for p in files if p.suffix == ".safetensors"] or files
    if len(files) != 1:
        raise UserError(
            f"{path}: expected one file of weights ({', '.join(SUFFIXES)}), found "
            f"{[p.name for p in files] or 'none'}; and it is no workdir (no checkpoints/)"
        )
    return _from_file(files[0], known, fallback)


def _from_file(
    path: pathlib.Path, known: dict[str, Any], fallback: Description | None
) -> Checkpoint:
    tensors, metadata = read_tensors(path)
    return _from_tensors(tensors, metadata, path, known, fallback)


def _from_shards(
    folder: pathlib.Path, known: dict[str, Any], fallback: Description | None
) -> Checkpoint:
    index = read_json(folder / "model.safetensors.index.json")
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(index["weight_map"].values())):
        if pathlib.Path(name).name != name:
            raise UserError(f"{folder}: its index names {name!r}, a file outside the folder")
        tensors |= read_tensors(folder / name)[0]
    return _from_tensors(tensors, {}, folder / "model.safetensors.index.json", known, fallback)


def _from_tensors(
    tensors: Tensors,
    metadata: dict[str, str],
    path: pathlib.Path,
    known: dict[str, Any],
    fallback: Description | None,
) -> Checkpoint:
    notes: list[str] = []
    ignored = [name for name in tensors if name.startswith(_IGNORED)]
    if ignored:
        notes.append(f"left out: {', '.join(ignored)}")
    tensors = {name: x for name, x in tensors.items() if name not in ignored}
    hugging_face = is_hugging_face(tensors)
    if hugging_face:
        try:
            tensors = from_hugging_face(tensors)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
    if METADATA_KEY in metadata:
        described = Description.from_json(metadata[METADATA_KEY])
        told = dataclasses.asdict(_agree(described, known, path))
        kind = "own"
    else:
        if hugging_face:
            told, more = _hugging_face_facts(path.parent)
            kind = "Hugging Face"
            notes += more
        else:
            told = _timm_facts(path.parent, has_head="head.weight" in tensors)
            kind = "timm" if told else "official MAE or timm"
        told = told | known
    description = infer(tensors, str(path), fallback, **told)
    return _check(tensors, description, f"{kind} weights {path}", notes, {})


def _from_params(
    params: Params,
    description: Description,
    source: str,
    notes: list[str],
    facts: dict[str, Any],
) -> Checkpoint:
    tensors = to_official(
        params,
        image_size=description.image_size,
        patch_size=description.patch_size,
        channels=description.channels,
    )
    return _check(tensors, description, source, notes, facts)


def _check(
    tensors: Tensors, d: Description, source: str, notes: list[str], facts: dict[str, Any]
) -> Checkpoint:
    """Every tensor there, none besides, each of its shape and finite."""
    expected = expected_shapes(d, final_norm=d.pool != "mean")
    if missing := sorted(expected.keys() - tensors.keys()):
        raise UserError(f"{source}: {_list(missing)} missing; this is not a whole model")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise UserError(
            f"{source}: {_list(extra)} unexpected; this is a checkpoint of another model"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{source}: {name} is {tensors[name].shape}, a model of width {d.width} and "
                f"MLP ratio {MLP_RATIO} has {shape}; this is a checkpoint of another model"
            )
    for name, x in tensors.items():
        if not np.issubdtype(x.dtype, np.floating) and x.dtype != ml_dtypes.bfloat16:
            raise UserError(f"{source}: {name} holds {x.dtype}, not floating-point numbers")
        bad = x.size - int(np.isfinite(x.astype(np.float32)).sum())
        if bad:
            raise UserError(
                f"{source}: {name} has {bad} NaN or infinite value(s) of {x.size}; these weights "
                "are broken, take an earlier checkpoint"
            )
    trained = _is_trained(tensors["pos_embed"], d)
    decoder_table = tensors.get("decoder_pos_embed")
    return Checkpoint(
        tensors={name: np.asarray(x, np.float32) for name, x in tensors.items()},
        description=d,
        source=source,
        trained_positions=trained,
        trained_decoder_positions=decoder_table is not None and _is_trained(decoder_table, d),
        notes=tuple(notes),
        facts=facts,
    )


def _is_trained(table: np.ndarray, d: Description) -> bool:
    fixed = sincos_position_table(table.shape[-1], d.grid)[None].astype(table.dtype)
    difference = np.abs(table.astype(np.float32) - fixed.astype(np.float32)).max()
    return bool(difference > _POSITION_TOLERANCE)


def _hugging_face_facts(folder: pathlib.Path) -> tuple[dict[str, Any], list[str]]:
    """What config.json and preprocessor_config.json tell, and notes on it."""
    if not (folder / "config.json").is_file():
        return {}, ["no config.json beside the weights: image size and heads by convention"]
    where = folder / "config.json"
    config = read_json(where)
    if config.get("model_type") not in ("vit_mae", "vit"):
        raise UserError(f"{where}: model_type {config.get('model_type')!r} is not vit_mae or vit")
    for field, needed in (("hidden_act", "gelu"), ("qkv_bias", True)):
        if config.get(field, needed) != needed:
            raise UserError(f"{where}: {field} {config[field]!r}; models here have {needed!r}")
    notes = []
    eps = config.get("layer_norm_eps", _HF_DEFAULT_EPS)
    if eps == _HF_DEFAULT_EPS:
        notes.append(
            f"config.json says layer_norm_eps {eps:g}; computed with {LAYER_NORM_EPS:g}, which "
            "MAE models are trained with"
        )
    elif eps != LAYER_NORM_EPS:
        raise UserError(f"{where}: layer_norm_eps {eps:g}; models here have {LAYER_NORM_EPS:g}")
    told: dict[str, Any] = {}
    if "num_attention_heads" in config:
        told["heads"] = config["num_attention_heads"]
    size = config.get("image_size", 224)
    told["image_size"] = tuple(size) if isinstance(size, list) else (size, size)
    if config["model_type"] == "vit_mae":
        told["decoder_heads"] = config.get("decoder_num_attention_heads", 16)
        told["target"] = "norm_pixel" if config.get("norm_pix_loss", False) else "pixel"
        told["mask_ratio"] = config.get("mask_ratio", 0.75)
    processor_file = folder / "preprocessor_config.json"
    if processor_file.is_file():
        processor = read_json(processor_file)
        if processor.get("image_mean") and processor.get("image_std"):
            told["mean"] = tuple(processor["image_mean"])
            told["std"] = tuple(processor["image_std"])
    return told, notes


def _timm_facts(folder: pathlib.Path, *, has_head: bool) -> dict[str, Any]:
    """What timm's config.json tells; nothing where there is none."""
    where = folder / "config.json"
    if not where.is_file():
        return {}
    config = read_json(where)
    if "architecture" not in config:
        return {}
    cfg, args = config.get("pretrained_cfg", config), config.get("model_args", {})
    told: dict[str, Any] = {}
    if "input_size" in cfg:
        told["image_size"] = tuple(cfg["input_size"][1:])
    if "num_heads" in args:
        told["heads"] = args["num_heads"]
    pooling = args.get("global_pool", config.get("global_pool"))
    if has_head and pooling in _TIMM_POOLS:  # told, so that it must agree with the tensors
        told["pool"] = _TIMM_POOLS[pooling]
    if "mean" in cfg and "std" in cfg:
        told["mean"], told["std"] = tuple(cfg["mean"]), tuple(cfg["std"])
    return told


def _agree(d: Description, known: dict[str, Any], where: pathlib.Path) -> Description:
    """The description, where what the user says of it does not contradict it."""
    for field, value in known.items():
        told = getattr(d, field)
        if told not in ("", 0) and told != value:
            raise UserError(f"{where}: {field} is {told}, not {value}")
    return dataclasses.replace(d, **known)


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
