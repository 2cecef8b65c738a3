"""Weights for the rest of the world: timm, official MAE, Hugging Face, Orbax.

Every function writes a folder with a model card (README.md) and checks first that the format can
hold the model.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mae_jax import UserError
from mae_jax.interop.card import model_card
from mae_jax.interop.description import Description
from mae_jax.interop.names import to_hugging_face
from mae_jax.interop.tensor_files import save_safetensors
from mae_jax.interop.weights import Params, to_official
from mae_jax.models.vit import LAYER_NORM_EPS, MLP_RATIO
from mae_jax.storage.checkpoints import save_params
from mae_jax.storage.files import write_atomically

ENCODER_FILE = "encoder.safetensors"
CLASSIFIER_FILE = "classifier.safetensors"
OFFICIAL_FILE = "mae.safetensors"
HF_FILE = "model.safetensors"
ORBAX_FOLDER = "params"
DESCRIPTION_FILE = "description.json"
CARD_FILE = "README.md"

_PIL_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, as image-processor configs write it


def export_encoder(
    params: Params, directory: str | pathlib.Path, d: Description, facts: Mapping[str, Any]
) -> pathlib.Path:
    """Writes the encoder, or the classifier where there is a head, as timm names it.

    The folder holds `encoder.safetensors` (or `classifier.safetensors`), a `config.json` with
    which timm builds the model at its own image size, patch size and channels, and the card.

    Args:
      params: host arrays; a decoder is left out.
      facts: see `card.model_card`.

    Returns:
      the path of the weights.
    """
    directory = pathlib.Path(directory)
    tensors = _official(params, d, include_decoder=False)
    path = directory / (CLASSIFIER_FILE if d.classes else ENCODER_FILE)
    save_safetensors(path, tensors, _without_decoder(d).to_metadata())
    config = json.dumps(timm_config(d), indent=2) + "\n"
    write_atomically(directory / "config.json", config)
    card = model_card(
        _without_decoder(d),
        facts,
        content=f"{_kind(_without_decoder(d))}, under the tensor names of timm and of the official "
        f"MAE code ({path.name}).",
        how_to_load=(
            "import timm\n\n"
            'model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True)'
        ),
    )
    write_atomically(directory / CARD_FILE, card)
    return path


def export_official(
    params: Params, directory: str | pathlib.Path, d: Description, facts: Mapping[str, Any]
) -> pathlib.Path:
    """Writes everything, decoder included, under the names of the official MAE code."""
    directory = pathlib.Path(directory)
    path = directory / OFFICIAL_FILE
    save_safetensors(path, _official(params, d), d.to_metadata())
    if d.decoder_depth:
        model = "models_mae of facebookresearch/mae, with norm_pix_loss as the target below says"
    else:
        model = f"models_vit of facebookresearch/mae, with global_pool={d.pool == 'mean'}"
        model += f" and num_classes={d.classes}"
    card = model_card(
        d,
        facts,
        content=f"{_kind(d)}, under the tensor names of the official MAE code ({path.name}).",
        how_to_load=(
            "from safetensors.torch import load_file\n\n"
            f"# {model}\n"
            f'model.load_state_dict(load_file("{path.name}"))'
        ),
    )
    write_atomically(directory / CARD_FILE, card)
    return path


def export_hugging_face(
    params: Params, directory: str | pathlib.Path, d: Description, facts: Mapping[str, Any]
) -> pathlib.Path:
    """Writes a folder for `from_pretrained` of transformers 4 and 5.

    Encoder and decoder become ViTMAEForPreTraining, an encoder alone ViTMAEModel, a classifier on
    the class token ViTForImageClassification.

    Raises:
      UserError: transformers has no model of this kind.
    """
    config = hugging_face_config(d)
    directory = pathlib.Path(directory)
    path = directory / HF_FILE
    save_safetensors(path, to_hugging_face(_official(params, d)), d.to_metadata())
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": d.image_size[0], "width": d.image_size[1]},
        "resample": _PIL_BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(d.mean),
        "image_std": list(d.std),
    }
    write_atomically(directory / "config.json", json.dumps(config, indent=2) + "\n")
    write_atomically(directory / "preprocessor_config.json", json.dumps(processor, indent=2) + "\n")
    architecture = config["architectures"][0]
    card = model_card(
        d,
        facts,
        content=f"{_kind(d)}, for Hugging Face transformers 4 and 5 as {architecture}.",
        how_to_load=(
            f"from transformers import {architecture}\n\n"
            f'model = {architecture}.from_pretrained("PATH_OF_THIS_FOLDER")'
        ),
    )
    write_atomically(directory / CARD_FILE, card)
    return path


def export_orbax(
    params: Params, directory: str | pathlib.Path, d: Description, facts: Mapping[str, Any]
) -> pathlib.Path:
    """Writes the Flax parameters as an Orbax checkpoint in `params/`, described by a JSON file."""
    directory = pathlib.Path(directory)
    path = directory / ORBAX_FOLDER
    save_params(path, params)
    description = d.to_metadata()["mae_jax"]
    write_atomically(directory / DESCRIPTION_FILE, description + "\n")
    card = model_card(
        d,
        facts,
        content=f"{_kind(d)}, as a tree of Flax parameters in an Orbax checkpoint.",
        how_to_load=(
            "import orbax.checkpoint as ocp\n\n"
            'params = ocp.StandardCheckpointer().restore("ABSOLUTE_PATH_OF_THIS_FOLDER/params")'
        ),
    )
    write_atomically(directory / CARD_FILE, card)
    return path


Exporter = Callable[[Params, pathlib.Path, Description, Mapping[str, Any]], pathlib.Path]


def timm_config(d: Description) -> dict[str, Any]:
    """`config.json` for timm's `local-dir:` and `hf-hub:` sources."""
    height, width = d.image_size
    return {
        # Any plain ViT will do: model_args overrides all of its sizes.
        "architecture": "vit_base_patch16_224",
        "num_classes": d.classes,
        "num_features": d.width,
        "model_args": {
            "img_size": [height, width],
            "patch_size": d.patch_size,
            "in_chans": d.channels,
            "embed_dim": d.width,
            "depth": d.depth,
            "num_heads": d.heads,
            "global_pool": "avg" if d.pool == "mean" else "token",
        },
        "pretrained_cfg": {
            "input_size": [d.channels, height, width],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.875 if max(height, width) <= 224 else 1.0,
            "crop_mode": "center",
            "mean": list(d.mean),
            "std": list(d.std),
            "num_classes": d.classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def hugging_face_config(d: Description) -> dict[str, Any]:
    """`config.json` of the transformers model that can hold this one.

    Raises:
      UserError: there is none, and why.
    """
    if d.pool == "mean":
        raise UserError(
            "a classifier on the mean patch token has no place in transformers: its "
            "ViTForImageClassification reads the class token after the final norm. Export it "
            "with --format=timm"
        )
    height, width = d.image_size
    if height != width and not d.classes:
        raise UserError(
            f"transformers' ViTMAE fails on images that are not square ({d.image_size}). Export "
            "with --format=timm"
        )
    config: dict[str, Any] = {
        "hidden_size": d.width,
        "num_hidden_layers": d.depth,
        "num_attention_heads": d.heads,
        "intermediate_size": MLP_RATIO * d.width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": LAYER_NORM_EPS,  # transformers' own default, 1e-12, gives other numbers
        "qkv_bias": True,
        "image_size": height if height == width else [height, width],
        "patch_size": d.patch_size,
        "num_channels": d.channels,
        "torch_dtype": "float32",
    }
    if d.classes:
        labels = {i: f"LABEL_{i}" for i in range(d.classes)}
        return {
            "architectures": ["ViTForImageClassification"],
            "model_type": "vit",
            **config,
            "id2label": labels,
            "label2id": {name: i for i, name in labels.items()},
        }
    config |= {"mask_ratio": d.mask_ratio or 0.75, "norm_pix_loss": d.target == "norm_pixel"}
    if d.decoder_depth:
        config |= {
            "decoder_hidden_size": d.decoder_width,
            "decoder_num_hidden_layers": d.decoder_depth,
            "decoder_num_attention_heads": d.decoder_heads,
            "decoder_intermediate_size": MLP_RATIO * d.decoder_width,
        }
    architecture = "ViTMAEForPreTraining" if d.decoder_depth else "ViTMAEModel"
    return {"architectures": [architecture], "model_type": "vit_mae", **config}


def _kind(d: Description) -> str:
    """What a model is, in words."""
    if d.classes:
        return "Vision Transformer image classifier"
    return "Masked autoencoder" if d.decoder_depth else "Encoder of a masked autoencoder"


def _official(
    params: Params, d: Description, *, include_decoder: bool = True
) -> dict[str, np.ndarray]:
    return to_official(
        params,
        image_size=d.image_size,
        patch_size=d.patch_size,
        channels=d.channels,
        include_decoder=include_decoder,
    )


def _without_decoder(d: Description) -> Description:
    return dataclasses.replace(d, decoder_width=0, decoder_depth=0, decoder_heads=0)
