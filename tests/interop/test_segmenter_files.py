"""Segmentation models in files: written, read, served, and as a start for others."""

import dataclasses
import importlib.util
import re

import jax
import numpy as np
import pytest
from small_models import SMALL, assert_same_tree, classifier_params, random_params

from mae_jax import UserError
from mae_jax.interop.adapt import resize_positions
from mae_jax.interop.checkpoint import open_checkpoint
from mae_jax.interop.export import (
    export_encoder,
    export_hugging_face,
    export_official,
    export_orbax,
    export_segmenter,
)
from mae_jax.interop.load import load_into
from mae_jax.interop.names import official_name, our_path
from mae_jax.interop.serving import export_stablehlo
from mae_jax.interop.tensor_files import read_tensors, save_safetensors
from mae_jax.models.inference import segment_function
from mae_jax.models.spec import ModelSpec

SEGMENTER = ModelSpec(
    image_size=(32, 48),
    patch_size=8,
    channels=3,
    width=32,
    depth=2,
    heads=4,
    classes=5,
    class_names=("sky", "road", "car", "tree", "wall"),
    segment_taps=(0, 0, 0, 1),
    segment_width=16,
    segment_stride=16,
    segment_ignore=254,
    segment_zero_is_other=True,
)


def drawn(spec=SEGMENTER, seed=0):
    """Random parameters with `statistics`, whose variances are positive."""
    params = random_params(spec, seed)
    params["statistics"] = jax.tree.map(np.abs, params["statistics"])
    return params


def written(folder, params, spec=SEGMENTER, facts=None):
    return export_segmenter(params, folder, spec, facts or {})


@pytest.fixture(scope="module")
def params():
    return drawn()


@pytest.fixture(scope="module")
def folder(params, tmp_path_factory):
    return written(tmp_path_factory.mktemp("segmenter"), params, facts={"steps": 7}).parent


def test_an_export_is_read_back_bit_for_bit(folder, params):
    checkpoint = open_checkpoint(folder)
    assert checkpoint.spec == SEGMENTER
    assert_same_tree(checkpoint.params(), params)


def test_an_orbax_export_is_read_back_bit_for_bit(params, tmp_path):
    export_orbax(params, tmp_path, SEGMENTER, {})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.spec == SEGMENTER
    assert_same_tree(checkpoint.params(), params)


def test_names_are_those_of_timm_and_pytorch_where_these_have_the_thing(folder):
    tensors, _ = read_tensors(folder / "segmenter.safetensors")
    for name, shape in {
        "blocks.1.attn.relative_position_bias_table": (7 * 11 + 3, 4),
        "blocks.1.gamma_2": (32,),
        "pyramid.up4a.weight": (32, 32, 2, 2),
        "pyramid.norm.running_mean": (32,),
        "head.fuse.weight": (16, 64, 3, 3),
        "head.fuse.norm.running_var": (16,),
        "head.classifier.weight": (5, 16),
        "auxiliary.conv.norm.weight": (256,),
    }.items():
        assert tensors[name].shape == shape, name
    assert "norm.weight" not in tensors
    for name in tensors:
        assert official_name(our_path(name)) == name


def test_the_card_tells_what_a_user_of_the_weights_needs(folder):
    card = (folder / "README.md").read_text()
    for words in (
        "UperNet of 16 channels on the outputs of blocks 0, 0, 0, 1",
        "5 classes, logits of stride 2",
        "254 does not count; nor does 0",
        "windows of 32 x 48, 16 apart",
        "sky, road, car, tree, wall",
        "steps: 7",
    ):
        assert words in card


def test_the_code_on_the_card_runs(folder, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(folder)
    exec(code, {"images": np.zeros((1, 32, 48, 3), np.uint8)})


def test_tensors_without_their_description_are_refused(folder, tmp_path):
    tensors, _ = read_tensors(folder / "segmenter.safetensors")
    save_safetensors(tmp_path / "bare.safetensors", tensors, {"format": "pt"})
    with pytest.raises(UserError, match="which blocks it reads"):
        open_checkpoint(tmp_path / "bare.safetensors", heads=4, image_size=(32, 48))


def test_what_a_serving_file_gives_is_what_the_model_gives(folder, params, tmp_path):
    export_stablehlo(open_checkpoint(folder), tmp_path, {})
    spec = importlib.util.spec_from_file_location("serve", tmp_path / "serve.py")
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3)).astype(np.uint8)
    expected = jax.jit(segment_function(SEGMENTER))(params, images)
    segment = serve.load()
    for count in (3, 1):
        got = segment(images[:count])
        np.testing.assert_allclose(got["logits"], expected["logits"][:count], atol=1e-4)
        np.testing.assert_array_equal(got["classes"], expected["classes"][:count])
    assert serve.class_names() == list(SEGMENTER.class_names)
    assert 'images)["classes"]' in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("export", [export_encoder, export_official])
def test_formats_without_segmentation_say_which_have_it(export, params, tmp_path):
    with pytest.raises(UserError, match=r"--format=hf or orbax"):
        export(params, tmp_path, SEGMENTER, {})


def test_a_file_for_transformers_is_told_from_those_that_are_read(params, tmp_path):
    square = dataclasses.replace(
        SEGMENTER, image_size=(32, 32), depth=4, segment_taps=(0, 1, 2, 3), segment_width=32
    )
    export_hugging_face(
        drawn(square), tmp_path, dataclasses.replace(square, segment_ignore=255), {}
    )
    with pytest.raises(UserError, match="'beit' is not vit_mae or vit"):
        open_checkpoint(tmp_path)


# As a start.


def test_a_segmenter_starts_from_a_pretrained_encoder(tmp_path):
    pretrained = random_params(SMALL, seed=1)
    export_official(pretrained, tmp_path, SMALL, {})
    fresh = drawn(seed=2)
    loaded, report = load_into(fresh, tmp_path, SEGMENTER)
    for name in ("qkv", "proj"):
        assert_same_tree(
            loaded["encoder"]["blocks"]["1"]["attn"][name],
            pretrained["encoder"]["blocks"]["1"]["attn"][name],
        )
    positions = pretrained["encoder"]["pos_embed"]
    np.testing.assert_array_equal(
        loaded["encoder"]["pos_embed"], resize_positions(positions, SMALL.grid, SEGMENTER.grid)
    )
    for part in ("head", "pyramid", "auxiliary", "statistics"):
        assert_same_tree(loaded[part], fresh[part])
    fresh_block, block = fresh["encoder"]["blocks"]["0"], loaded["encoder"]["blocks"]["0"]
    assert_same_tree(block["layer_scale1"], fresh_block["layer_scale1"])
    assert_same_tree(block["attn"]["relative_bias"], fresh_block["attn"]["relative_bias"])
    words = str(report)
    assert "relative position biases (2 tensors)" in words
    assert "layer scales (4 tensors)" in words
    assert "the segmentation heads (" in words
    assert re.search(r"in the file, not used: .*norm.weight", words)
    assert len(words.splitlines()) == 4


def test_a_segmenter_starts_from_a_fine_tuned_classifier(tmp_path):
    spec = dataclasses.replace(SMALL, pool="mean", classes=3).without_decoder()
    classifier = classifier_params(spec)
    export_encoder(classifier, tmp_path, spec, {})
    loaded, _ = load_into(drawn(seed=2), tmp_path, SEGMENTER)
    assert_same_tree(
        loaded["encoder"]["blocks"]["0"]["mlp"], classifier["encoder"]["blocks"]["0"]["mlp"]
    )


def test_a_segmenter_of_the_same_shape_is_taken_whole(folder, params):
    loaded, report = load_into(drawn(seed=2), folder, SEGMENTER)
    assert_same_tree(loaded, params)
    assert not report.fresh
    assert not report.left_out


@pytest.mark.parametrize(
    "change",
    [
        {"classes": 3, "class_names": ()},
        {"segment_width": 24},
        {"segment_taps": (0, 0, 1, 1)},
        {"class_names": ("road", "sky", "car", "tree", "wall")},
    ],
)
def test_heads_of_another_task_or_shape_are_not_used(change, folder, params):
    spec = dataclasses.replace(SEGMENTER, **change)
    fresh = drawn(spec, seed=2)
    loaded, report = load_into(fresh, folder, spec)
    assert_same_tree(loaded["encoder"], params["encoder"])
    for part in ("head", "pyramid", "auxiliary", "statistics"):
        assert_same_tree(loaded[part], fresh[part])
    assert "the segmentation heads" in str(report)


def test_biases_of_another_grid_are_refused(folder):
    spec = dataclasses.replace(SEGMENTER, image_size=(48, 48))
    with pytest.raises(UserError, match=r"\(4, 6\) patches, not \(6, 6\)"):
        load_into(drawn(spec), folder, spec)


@pytest.mark.parametrize("pool", ["", "mean"])
def test_models_without_biases_do_not_start_from_a_segmenter(pool, folder):
    spec = dataclasses.replace(SMALL, pool=pool, classes=3 if pool else 0).without_decoder()
    params = classifier_params(spec) if pool else {"encoder": random_params(SMALL)["encoder"]}
    with pytest.raises(UserError, match="serves segmentation alone"):
        load_into(params, folder, spec)
