"""What is written for others, and that it comes back bit for bit."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from small_models import SMALL, assert_same_tree, classifier_params, random_params

from mae_jax import UserError
from mae_jax.interop.checkpoint import open_checkpoint
from mae_jax.interop.export import (
    export_encoder,
    export_hugging_face,
    export_official,
    export_orbax,
)
from mae_jax.interop.serving import export_stablehlo
from mae_jax.interop.tensor_files import read_tensors
from mae_jax.interop.weights import from_official, to_official
from mae_jax.models.inference import features_function
from mae_jax.models.spec import ModelSpec

GOLDENS = pathlib.Path(__file__).parent / "goldens"
OTHER = ModelSpec((24, 40), 8, 5, 32, 2, 4, 16, 1, 2, "pixel", 0.6, (0.4,) * 5, (0.3,) * 5)
TOKENS = dataclasses.replace(SMALL, encoder_tokens=True, mask_kind="block", mask_unit=16)
LINEAR = dataclasses.replace(SMALL.without_decoder(), encoder_tokens=True, decoder_kind="linear")
ENCODER = dataclasses.replace(SMALL, decoder_width=0, decoder_depth=0, decoder_heads=0)
MEAN_CLASSIFIER = dataclasses.replace(ENCODER, pool="mean", classes=5)
CLS_CLASSIFIER = dataclasses.replace(ENCODER, pool="cls", classes=5)


@pytest.mark.parametrize("d", [SMALL, OTHER], ids=["square", "rectangle-5-channels"])
@pytest.mark.parametrize("export", [export_official, export_orbax])
def test_whole_models_come_back_bit_for_bit(export, d, tmp_path):
    params = random_params(d)
    export(params, tmp_path, d, {})
    checkpoint = open_checkpoint(tmp_path)
    assert_same_tree(checkpoint.params(), params)
    assert checkpoint.spec == d


@pytest.mark.parametrize("d", [TOKENS, LINEAR], ids=["decoder", "linear head"])
def test_models_with_mask_tokens_in_the_encoder_are_whole_in_our_format_alone(d, tmp_path):
    params = random_params(d)
    assert params["encoder"]["mask_token"].shape == (1, 1, 32)
    assert "mask_token" not in params["decoder"]
    export_orbax(params, tmp_path / "whole", d, {})
    checkpoint = open_checkpoint(tmp_path / "whole")
    assert_same_tree(checkpoint.params(), params)
    assert checkpoint.spec == d
    for export in (export_official, export_hugging_face):
        with pytest.raises(UserError, match="mask tokens in its encoder has no place in other"):
            export(params, tmp_path / "other", d, {})
    # Whoever has whole images needs no mask token: the encoder is like any other.
    path = export_encoder(params, tmp_path / "encoder", d, {})
    del params["encoder"]["mask_token"]
    encoder = open_checkpoint(path)
    assert_same_tree(encoder.params(), {"encoder": params["encoder"]})
    assert encoder.spec == dataclasses.replace(ENCODER, target=d.target, mask_ratio=d.mask_ratio)


def test_hugging_face_folders_come_back_bit_for_bit(tmp_path):
    params = random_params()
    export_hugging_face(params, tmp_path, SMALL, {})
    checkpoint = open_checkpoint(tmp_path)
    assert_same_tree(checkpoint.params(), params)
    assert checkpoint.spec == SMALL


@pytest.mark.parametrize("d", [SMALL, OTHER], ids=["square", "rectangle-5-channels"])
def test_timm_files_come_back_bit_for_bit(d, tmp_path):
    params = random_params(d)
    path = export_encoder(params, tmp_path, d, {})
    assert_same_tree(open_checkpoint(path).params(), {"encoder": params["encoder"]})


@pytest.mark.parametrize(
    ("d", "export"),
    [
        (MEAN_CLASSIFIER, export_encoder),
        (CLS_CLASSIFIER, export_encoder),
        (CLS_CLASSIFIER, export_hugging_face),
        (MEAN_CLASSIFIER, export_orbax),
    ],
)
def test_classifiers_come_back_bit_for_bit(d, export, tmp_path):
    params = classifier_params(d)
    export(params, tmp_path, d, {})
    checkpoint = open_checkpoint(tmp_path)
    assert_same_tree(checkpoint.params(), params)
    assert checkpoint.spec == d


def test_official_tensors_come_back_bit_for_bit_position_tables_included():
    tensors, _ = read_tensors(GOLDENS / "official.pth")
    again = to_official(from_official(tensors), dataclasses.replace(SMALL, image_size=(24, 24)))
    assert again.keys() == tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(again[name], x)


def test_the_timm_file_holds_the_encoder_alone_under_timms_names(tmp_path):
    tensors, metadata = read_tensors(export_encoder(random_params(), tmp_path, SMALL, {}))
    assert len(tensors) == 4 + 12 * 2 + 2  # cls, positions, patches; blocks; final norm
    assert not any(name.startswith(("decoder", "mask_token")) for name in tensors)
    assert tensors["pos_embed"].shape == (1, 17, 32)
    assert tensors["patch_embed.proj.weight"].shape == (32, 3, 8, 8)
    assert metadata["format"] == "pt"


def test_hugging_face_configs_say_what_transformers_defaults_get_wrong(tmp_path):
    d = dataclasses.replace(SMALL, target="pixel", mask_ratio=0.6, mean=(0.1, 0.2, 0.3))
    export_hugging_face(random_params(), tmp_path, d, {})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["layer_norm_eps"] == 1e-6
    assert config["norm_pix_loss"] is False
    assert config["mask_ratio"] == 0.6
    assert config["architectures"] == ["ViTMAEForPreTraining"]
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.1, 0.2, 0.3]
    assert processor["size"] == {"height": 32, "width": 32}
    tensors, _ = read_tensors(tmp_path / "model.safetensors")
    assert "decoder.decoder_layers.0.attention.attention.query.weight" in tensors


def test_what_transformers_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"reads the class token.*--format=timm"):
        export_hugging_face(classifier_params(MEAN_CLASSIFIER), tmp_path / "x", MEAN_CLASSIFIER, {})
    with pytest.raises(UserError, match="not square"):
        export_hugging_face(random_params(OTHER), tmp_path / "x", OTHER, {})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("d", "name", "how"),
    [
        (SMALL, "Masked autoencoder", "models_mae of facebookresearch/mae, with norm_pix_loss"),
        (ENCODER, "Encoder of a masked autoencoder", "global_pool=False and num_classes=0"),
        (MEAN_CLASSIFIER, "image classifier", "global_pool=True and num_classes=5"),
        (CLS_CLASSIFIER, "image classifier", "global_pool=False and num_classes=5"),
    ],
)
def test_the_card_of_official_weights_names_the_model_that_takes_them(d, name, how, tmp_path):
    params = classifier_params(d) if d.classes else random_params()
    if d is ENCODER:
        del params["decoder"]
    export_official(params, tmp_path, d, {})
    card = (tmp_path / "README.md").read_text()
    assert name in card.splitlines()[0]
    assert how in card


def test_cards_tell_the_training_and_the_licence(tmp_path):
    facts = {"data": "imagenet2012", "steps": 500}
    export_official(random_params(), tmp_path, SMALL, facts)
    card = (tmp_path / "README.md").read_text()
    for text in ("- data: imagenet2012", "- steps: 500", "norm_pixel", "CC-BY-NC", "0.75"):
        assert text in card
    export_official(random_params(), tmp_path, SMALL, facts | {"licence": "CC0"})
    card = (tmp_path / "README.md").read_text()
    assert card.endswith("## Licence\n\nCC0\n")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    export_official(random_params(OTHER), folder / "official", OTHER, {})
    checkpoint = open_checkpoint(folder / "official")
    export_stablehlo(checkpoint, folder / "stablehlo", {"data": "none"})
    return checkpoint, folder / "stablehlo"


BLOCK_OUR_CODE = """
import importlib.abc, runpy, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("mae_jax", "flax", "safetensors", "orbax", "optax"):
            raise ImportError(name + " must not be needed")
        if name == "flatbuffers" and not any(p.endswith("flatbuffers.zip") for p in sys.path):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("count", [1, 3])
def test_the_served_function_needs_jax_alone_takes_any_batch_and_agrees(count, served, tmp_path):
    checkpoint, folder = served
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, 24, 40, 5)).astype(np.uint8)
    np.save(tmp_path / "images.npy", images)
    script = (sys.executable, "-I", "-c", BLOCK_OUR_CODE, folder / "serve.py")
    subprocess.run(
        [*script, tmp_path / "images.npy", tmp_path / "out.npz"],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    ours = features_function(checkpoint.spec)(checkpoint.params(decoder=False), images)
    with np.load(tmp_path / "out.npz") as theirs:
        assert set(theirs.files) == {"cls", "mean", "tokens"}
        for name, x in ours.items():
            np.testing.assert_allclose(theirs[name], x, atol=1e-5)


def test_weights_too_large_for_the_format_are_refused(served, tmp_path, monkeypatch):
    monkeypatch.setattr("mae_jax.interop.serving.MAX_BYTES", 1000)
    with pytest.raises(UserError, match="at most"):
        export_stablehlo(served[0], tmp_path / "y", {})


def test_no_module_brings_in_torch_or_tensorflow():
    modules = "mae_jax.export, mae_jax.features, mae_jax.visualize, mae_jax.interop.load"
    code = f"import sys, {modules}; print([m for m in ('torch', 'tensorflow') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout.strip() == b"[]"
