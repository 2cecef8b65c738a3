"""Weights for the rest of the world: timm, official MAE, Hugging Face, Orbax.

Every function writes a folder with a model card (README.md), checks first that the format can hold
the model (UserError), and returns the path of the weights. For `facts` see `card.write_card`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from mae_jax import UserError
from mae_jax.interop.beit import export_beit
from mae_jax.interop.card import write_card
from mae_jax.interop.image_processor import write_image_processor
from mae_jax.interop.names import HF_FILE, to_hugging_face
from mae_jax.interop.tensor_files import save_safetensors
from mae_jax.interop.weights import Params, to_official
from mae_jax.models.spec import ModelSpec
from mae_jax.models.vit import LAYER_NORM_EPS, MLP_RATIO
from mae_jax.storage.checkpoints import save_params
from mae_jax.storage.files import PathLike, to_path, write_atomically, write_json

ENCODER_FILE = "encoder.safetensors"
CLASSIFIER_FILE = "classifier.safetensors"
OFFICIAL_FILE = "mae.safetensors"
SEGMENTER_FILE = "segmenter.safetensors"
ORBAX_FOLDER = "params"
DESCRIPTION_FILE = "description.json"

Facts = Mapping[str, Any]
Exporter = Callable[[Params, PathLike, ModelSpec, Facts], epath.Path]


def export_encoder(
    params: Params, directory: PathLike, spec: ModelSpec, facts: Facts
) -> epath.Path:
    """Writes the encoder, or the classifier where there is a head, as timm names it, no decoder;
    from `config.json` timm builds the model at its own image size."""
    if spec.segments:
        raise UserError("timm has no segmentation models: export with --format=hf or orbax")
    directory, spec = to_path(directory), spec.without_decoder()
    path = directory / (CLASSIFIER_FILE if spec.classes else ENCODER_FILE)
    tensors = to_official(params, spec, include_decoder=False)
    save_safetensors(path, tensors, spec.to_metadata())
    write_json(directory / "config.json", timm_config(spec))
    form = f"under the tensor names of timm and of the official MAE code ({path.name})"
    load = "import timm\n\nmodel = timm.create_model("
    load += '"local-dir:PATH_OF_THIS_FOLDER", pretrained=True)'
    write_card(directory, spec, facts, form, load)
    return path


def export_segmenter(
    params: Params, directory: PathLike, spec: ModelSpec, facts: Facts
) -> epath.Path:
    """Writes a segmentation model, running `statistics` included, for this project to read."""
    directory = to_path(directory)
    path = directory / SEGMENTER_FILE
    tensors = to_official(params, spec)
    save_safetensors(path, tensors, spec.to_metadata())
    form = f"with its encoder under the tensor names of timm's BEiT ({path.name})"
    load = "from mae_jax.interop.checkpoint import open_checkpoint\n"
    load += "from mae_jax.models.inference import segment_function\n\n"
    load += f'checkpoint = open_checkpoint("{path.name}")\n'
    load += "segment = segment_function(checkpoint.spec)\n"
    load += 'segment(checkpoint.params(), images)["classes"]  # images are [B, H, W, C] uint8'
    write_card(directory, spec, facts, form, load)
    return path


def export_official(
    params: Params, directory: PathLike, spec: ModelSpec, facts: Facts
) -> epath.Path:
    """Writes everything, decoder included, under the names of the official MAE code."""
    _require_decoder_of_others(spec)
    if spec.pool == "normed_mean":
        raise UserError(
            "the official code has no head on the mean of normed tokens (a linear probe with "
            "head.pool=mean). Export it with --format=timm"
        )
    path = to_path(directory) / OFFICIAL_FILE
    save_safetensors(path, to_official(params, spec), spec.to_metadata())
    if spec.decoder_depth:
        model = "models_mae of facebookresearch/mae, with norm_pix_loss as the target below says"
    else:
        model = f"models_vit of facebookresearch/mae, with global_pool={spec.pool == 'mean'}"
        model += f" and num_classes={spec.classes}"
    form = f"under the tensor names of the official MAE code ({path.name})"
    load = f"from safetensors.torch import load_file\n\n# {model}\n"
    load += f'model.load_state_dict(load_file("{path.name}"))'
    write_card(path.parent, spec, facts, form, load)
    return path


def export_hugging_face(
    params: Params, directory: PathLike, spec: ModelSpec, facts: Facts
) -> epath.Path:
    """Writes a folder for `from_pretrained` of transformers 4 and 5: ViTMAEForPreTraining,
    ViTMAEModel (encoder alone), ViTForImageClassification (classifier on the class token) or
    BeitForSemanticSegmentation."""
    if spec.segments:
        return export_beit(params, directory, spec, facts)
    config = hugging_face_config(spec)
    directory = to_path(directory)
    path = directory / HF_FILE
    save_safetensors(path, to_hugging_face(to_official(params, spec)), spec.to_metadata())
    write_json(directory / "config.json", config)
    write_image_processor(directory, spec, "ViTImageProcessor")
    name = config["architectures"][0]
    form = f"for Hugging Face transformers 4 and 5 as {name}"
    load = f"from transformers import {name}\n\n"
    load += f'model = {name}.from_pretrained("PATH_OF_THIS_FOLDER")'
    write_card(directory, spec, facts, form, load)
    return path


def export_orbax(params: Params, directory: PathLike, spec: ModelSpec, facts: Facts) -> epath.Path:
    """Writes the Flax parameters as an Orbax checkpoint in `params/`, described by a JSON file."""
    directory = to_path(directory)
    save_params(directory / ORBAX_FOLDER, params)
    write_atomically(directory / DESCRIPTION_FILE, spec.to_json() + "\n")
    form = "as a tree of Flax parameters in an Orbax checkpoint"
    load = "import orbax.checkpoint as ocp\n\nparams = ocp.StandardCheckpointer().restore("
    load += '"ABSOLUTE_PATH_OF_THIS_FOLDER/params")'
    write_card(directory, spec, facts, form, load)
    return directory / ORBAX_FOLDER


def timm_config(spec: ModelSpec) -> dict[str, Any]:
    """`config.json` for timm's `local-dir:` and `hf-hub:` sources."""
    labels = {"label_names": spec.class_names} if spec.class_names else {}
    return {
        # Any plain ViT will do: model_args overrides all of its sizes.
        "architecture": "vit_base_patch16_224",
        "num_classes": spec.classes,
        "num_features": spec.width,
        **labels,
        "model_args": {
            "img_size": spec.image_size,
            "patch_size": spec.patch_size,
            "in_chans": spec.channels,
            "embed_dim": spec.width,
            "depth": spec.depth,
            "num_heads": spec.heads,
            "global_pool": "avg" if spec.summary == "mean" else "token",
            "fc_norm": spec.pool == "mean",
        },
        "pretrained_cfg": {
            "input_size": [spec.channels, *spec.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.875 if max(spec.image_size) <= 224 else 1.0,
            "crop_mode": "center",
            "mean": spec.mean,
            "std": spec.std,
            "num_classes": spec.classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def hugging_face_config(spec: ModelSpec) -> dict[str, Any]:
    """`config.json` of the transformers model that can hold this one."""
    _require_decoder_of_others(spec)
    if spec.decoder_depth:
        spec.mae()  # its heads and target are to be written down: they must be known
    if spec.summary == "mean":
        raise UserError(
            "transformers has no classifier on the mean patch token: its ViTForImageClassification "
            "reads the class token after the final norm. Export with --format=timm"
        )
    height, width = spec.image_size
    if height != width and not spec.classes:
        raise UserError("transformers' ViTMAE: images are not square. Export with --format=timm")
    config: dict[str, Any] = {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "intermediate_size": MLP_RATIO * spec.width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": LAYER_NORM_EPS,  # transformers' own default, 1e-12, gives other numbers
        "qkv_bias": True,
        "image_size": height if height == width else [height, width],
        "patch_size": spec.patch_size,
        "num_channels": spec.channels,
        "torch_dtype": "float32",
    }
    if spec.classes:
        names = spec.class_names or [f"LABEL_{i}" for i in range(spec.classes)]
        kind = {"architectures": ["ViTForImageClassification"], "model_type": "vit"}
        config |= {"id2label": dict(enumerate(names))}
        return {**kind, **config, "label2id": {name: i for i, name in enumerate(names)}}
    config |= {"mask_ratio": spec.mask_ratio or 0.75, "norm_pix_loss": spec.target == "norm_pixel"}
    if spec.decoder_depth:
        config |= {
            "decoder_hidden_size": spec.decoder_width,
            "decoder_num_hidden_layers": spec.decoder_depth,
            "decoder_num_attention_heads": spec.decoder_heads,
            "decoder_intermediate_size": MLP_RATIO * spec.decoder_width,
        }
    architecture = "ViTMAEForPreTraining" if spec.decoder_depth else "ViTMAEModel"
    return {"architectures": [architecture], "model_type": "vit_mae", **config}


def _require_decoder_of_others(spec: ModelSpec) -> None:
    """UserError for a decoder, or a head, that other programs do not have."""
    if spec.segments:
        raise UserError("the official code has no segmentation: export with --format=hf or orbax")
    what = f"a decoder that predicts {spec.target}"
    if spec.encoder_tokens:
        what = "a model with mask tokens in its encoder"
    if spec.encoder_tokens or spec.target not in ("", "pixel", "norm_pixel"):
        raise UserError(
            f"{what} has no place in other programs. Export it with "
            "--format=orbax, or the encoder alone with --format=timm"
        )
