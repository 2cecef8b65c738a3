"""Opening weights of any origin: what they are, and every check that needs no target model.

Formats: official MAE `.pth` (encoder, with decoder, fine-tuned), timm and our own safetensors,
Hugging Face folders and files (ViTMAE, ViT), our Orbax exports, and workdirs of this project.
"""

import dataclasses
import hashlib
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from mae_jax import UserError
from mae_jax.interop.class_names import informative
from mae_jax.interop.export import DESCRIPTION_FILE, ORBAX_FOLDER
from mae_jax.interop.infer import infer_spec
from mae_jax.interop.names import Tensors, from_hugging_face, is_decoder, is_hugging_face, some
from mae_jax.interop.orbax_file import read_workdir
from mae_jax.interop.tensor_files import SUFFIXES, read_tensors
from mae_jax.interop.weights import Params, from_official, official_shapes, to_official
from mae_jax.models.spec import METADATA_KEY, ModelSpec
from mae_jax.models.vit import LAYER_NORM_EPS, MLP_RATIO
from mae_jax.storage.checkpoints import read_params
from mae_jax.storage.files import PathLike, read_json, to_path

# Tensors beside the model that some writers add and nobody here needs.
_IGNORED = ("pooler.", "vit.pooler.")
_HF_DEFAULT_EPS = 1e-12


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights that have been read and found whole."""

    tensors: dict[str, np.ndarray]  # official names, float32, position tables included
    spec: ModelSpec
    source: str  # what was read, in words
    notes: tuple[str, ...]  # what a user should know of the reading
    facts: dict[str, Any]  # what the source tells of its training, for model cards

    def params(self, *, decoder: bool = True) -> Params:
        """Our parameter tree, position tables in it, with or without the decoder."""
        tensors = self.tensors.items()
        return from_official({name: x for name, x in tensors if decoder or not is_decoder(name)})

    def digest(self) -> str:
        """Identifies the weights by their content, wherever they lie."""
        total = hashlib.sha256()
        for _, x in sorted(self.tensors.items()):
            total.update(np.ascontiguousarray(x).data)
        return total.hexdigest()


def open_checkpoint(
    path: PathLike, *, fallback: ModelSpec | None = None, **overrides: Any
) -> Checkpoint:
    """Reads weights of any format: a file, a Hugging Face or timm folder, an export or a workdir.

    `fallback` is the model the weights are for, believed where the source does not tell;
    `overrides` are fields of `ModelSpec` that it does not tell (`heads`, `image_size`, `target`,
    `mean` ...). UserError: no weights of a ViT or MAE, damaged, hostile, or with NaN in them.
    """
    path = to_path(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if (path / DESCRIPTION_FILE).is_file() and (path / ORBAX_FOLDER).is_dir():
        text = (path / DESCRIPTION_FILE).read_text()
        spec = _complete(ModelSpec.from_json(text), overrides, path)
        tensors = to_official(read_params(path / ORBAX_FOLDER), spec)
        return _checked(tensors, spec, f"Orbax export {path}", [], {})
    if (path / "checkpoints").is_dir():
        params, spec, facts, notes = read_workdir(path)
        spec = _complete(spec, overrides, path)
        source = f"workdir {path}, step {facts['steps']}"
        return _checked(to_official(params, spec), spec, source, notes, facts)
    return _from_tensors(path if path.is_file() else file_of(path), fallback, overrides)


def file_of(folder: epath.Path) -> epath.Path:
    """The weights in a folder: one file of tensors, or the index of several."""
    if (index := folder / "model.safetensors.index.json").is_file():
        return index
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)
    # Hugging Face folders often hold the same weights twice; the pickle is the older one.
    files = [p for p in files if p.suffix == ".safetensors"] or files
    if len(files) != 1:
        raise UserError(
            f"{folder}: expected one file of weights ({', '.join(SUFFIXES)}), found "
            f"{[p.name for p in files] or 'none'}; and it is no workdir (no checkpoints/)"
        )
    return files[0]


def _read_shards(index: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(read_json(index)["weight_map"].values())):
        if epath.Path(name).name != name:
            raise UserError(f"{index}: names {name!r}, a file outside the folder")
        tensors |= read_tensors(index.parent / name)[0]
    return tensors, {}


def _from_tensors(
    path: epath.Path, fallback: ModelSpec | None, overrides: dict[str, Any]
) -> Checkpoint:
    tensors, metadata = _read_shards(path) if path.suffix == ".json" else read_tensors(path)
    ignored = [name for name in tensors if name.startswith(_IGNORED)]
    notes = [f"left out: {', '.join(ignored)}"] if ignored else []
    tensors = {name: x for name, x in tensors.items() if name not in ignored}
    hugging_face = is_hugging_face(tensors)
    if hugging_face:
        try:
            tensors = from_hugging_face(tensors)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
    if METADATA_KEY in metadata:
        spec = ModelSpec.from_json(metadata[METADATA_KEY])
        kind, stated = "own", dataclasses.asdict(_complete(spec, overrides, path))
    else:
        config = path.parent / "config.json"
        if hugging_face:
            kind, fields = "Hugging Face", _hugging_face_fields(config, notes)
        else:
            fields = _timm_fields(config)
            kind = "timm" if fields else "official MAE or timm"
        labels = fields.pop("class_names", None) or ()
        if isinstance(labels, dict):
            labels = [labels[i] for i in sorted(labels, key=int)]
        if "head.weight" in tensors:
            fields["class_names"] = informative(labels)
        else:
            fields.pop("pool", None)
        stated = fields | overrides
    spec = infer_spec(tensors, str(path), fallback, **stated)
    return _checked(tensors, spec, f"{kind} weights {path}", notes, {})


def _checked(
    tensors: Tensors, spec: ModelSpec, source: str, notes: list[str], facts: dict[str, Any]
) -> Checkpoint:
    """A checkpoint with every tensor there, none besides, each of its shape and finite."""
    expected = official_shapes(spec)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise UserError(f"{source}: {some(missing)} missing; this is not a whole model")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise UserError(f"{source}: {some(extra)} unexpected; the weights of another model")
    whole = {}
    for name, shape in expected.items():
        x = tensors[name]
        if x.shape != shape:
            model = f"a model of width {spec.width}, MLP ratio {MLP_RATIO}"
            raise UserError(f"{source}: {name} is {x.shape}, not {shape} as in {model}")
        if not np.issubdtype(x.dtype, np.floating) and x.dtype != ml_dtypes.bfloat16:
            raise UserError(f"{source}: {name} holds {x.dtype}, not floating-point numbers")
        whole[name] = np.asarray(x, np.float32)
        if bad := x.size - int(np.isfinite(whole[name]).sum()):
            remedy = "take an earlier checkpoint"
            raise UserError(f"{source}: {name} has {bad} NaN or infinite value(s); {remedy}")
    return Checkpoint(whole, spec, source, tuple(notes), facts)


def _hugging_face_fields(where: epath.Path, notes: list[str]) -> dict[str, Any]:
    """What config.json and the preprocessor_config.json beside it tell; adds to `notes`."""
    if not where.is_file():
        notes.append("no config.json beside the weights: image size and heads by convention")
        return {}
    config = read_json(where)
    if config.get("model_type") not in ("vit_mae", "vit"):
        raise UserError(f"{where}: model_type {config.get('model_type')!r} is not vit_mae or vit")
    for field, needed in (("hidden_act", "gelu"), ("qkv_bias", True)):
        if config.get(field, needed) != needed:
            raise UserError(f"{where}: {field} {config[field]!r}; models here have {needed!r}")
    eps = config.get("layer_norm_eps", _HF_DEFAULT_EPS)
    if eps == _HF_DEFAULT_EPS:
        notes.append(f"config.json: layer_norm_eps {eps:g}; computed with {LAYER_NORM_EPS:g}")
    elif eps != LAYER_NORM_EPS:
        raise UserError(f"{where}: layer_norm_eps {eps:g}; models here have {LAYER_NORM_EPS:g}")
    size = config.get("image_size", 224)
    size = tuple(size) if isinstance(size, list) else (size, size)
    fields: dict[str, Any] = {"class_names": config.get("id2label"), "image_size": size}
    if "num_attention_heads" in config:
        fields["heads"] = config["num_attention_heads"]
    if config["model_type"] == "vit_mae":
        fields["decoder_heads"] = config.get("decoder_num_attention_heads", 16)
        fields["target"] = "norm_pixel" if config.get("norm_pix_loss", False) else "pixel"
        fields["mask_ratio"] = config.get("mask_ratio", 0.75)
    beside = where.with_name("preprocessor_config.json")
    processor = read_json(beside) if beside.is_file() else {}
    if (mean := processor.get("image_mean")) and (std := processor.get("image_std")):
        fields |= {"mean": tuple(mean), "std": tuple(std)}
    return fields


def _timm_fields(where: epath.Path) -> dict[str, Any]:
    """What timm's config.json tells; nothing where there is none."""
    config = read_json(where) if where.is_file() else {}
    if "architecture" not in config:
        return {}
    cfg, args = config.get("pretrained_cfg", config), config.get("model_args", {})
    fields: dict[str, Any] = {"class_names": config.get("label_names", cfg.get("label_names"))}
    if "input_size" in cfg:
        fields["image_size"] = tuple(cfg["input_size"][1:])
    if "num_heads" in args:
        fields["heads"] = args["num_heads"]
    pooling = args.get("global_pool", config.get("global_pool"))
    own_norm = args.get("fc_norm") in (None, True)
    pools = {"avg": "mean" if own_norm else "normed_mean", "token": "cls"}
    if pooling in pools:  # stated, so that it must agree with the tensors
        fields["pool"] = pools[pooling]
    if "mean" in cfg and "std" in cfg:
        fields |= {"mean": tuple(cfg["mean"]), "std": tuple(cfg["std"])}
    return fields


def _complete(spec: ModelSpec, overrides: dict[str, Any], where: epath.Path) -> ModelSpec:
    """A description with `overrides` where it says nothing; they must not contradict it."""
    for field, value in overrides.items():
        stated = getattr(spec, field)
        if stated not in ("", 0) and stated != value and field != "class_names":
            raise UserError(f"{where}: {field} is {stated}, not {value}")
    return dataclasses.replace(spec, **overrides)
