"""Weights into models: what is taken, what is adapted, what is refused."""

import dataclasses
import json
import pathlib

import ml_dtypes
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
from mae_jax.interop.load import load_into
from mae_jax.interop.names import to_hugging_face
from mae_jax.interop.tensor_files import read_tensors, save_safetensors
from mae_jax.interop.weights import to_official
from mae_jax.models.vit import sincos_position_table

GOLDENS = pathlib.Path(__file__).parent / "goldens"
CLASSIFIER = dataclasses.replace(
    SMALL, decoder_width=0, decoder_depth=0, decoder_heads=0, pool="mean", classes=5
)


def official_tensors(seed=0):
    return to_official(random_params(seed=seed), SMALL)


def write(folder, tensors, metadata=None):
    path = folder / "weights.safetensors"
    save_safetensors(path, tensors, metadata or {"format": "pt"})
    return path


KNOWN = {"heads": 4, "decoder_heads": 2, "target": "norm_pixel"}


def test_an_official_checkpoint_continues_pretraining():
    loaded, report = load_into(
        random_params(dataclasses.replace(SMALL, image_size=(24, 24))),
        GOLDENS / "official.pth",
        dataclasses.replace(SMALL, image_size=(24, 24)),
        **KNOWN,
    )
    tensors, _ = read_tensors(GOLDENS / "official.pth")
    np.testing.assert_array_equal(
        loaded["encoder"]["blocks"]["1"]["attn"]["qkv"]["kernel"],
        tensors["blocks.1.attn.qkv.weight"].T,
    )
    assert not report.fresh
    assert not report.left_out
    assert report.matched == len(tensors)


def test_an_encoder_leaves_the_decoder_fresh_and_says_so(tmp_path):
    export_encoder(random_params(seed=1), tmp_path, SMALL, {})
    fresh = random_params(seed=2)
    loaded, report = load_into(fresh, tmp_path, SMALL)
    assert_same_tree(loaded["decoder"], fresh["decoder"])
    assert_same_tree(loaded["encoder"], random_params(seed=1)["encoder"])
    assert "freshly initialised: the decoder (20 tensors)" in str(report)


def test_a_decoder_that_is_not_wanted_is_left_out_and_named(tmp_path):
    export_official(random_params(seed=1), tmp_path, SMALL, {})
    loaded, report = load_into({"encoder": random_params(seed=2)["encoder"]}, tmp_path, SMALL)
    assert loaded.keys() == {"encoder"}
    assert "in the file, not used: the decoder (20 tensors)" in str(report)
    fresh = random_params(seed=2)
    loaded, _ = load_into(fresh, tmp_path, SMALL, parts="encoder")
    assert_same_tree(loaded["decoder"], fresh["decoder"])


def test_another_image_size_interpolates_both_position_tables(tmp_path):
    params = random_params(seed=1)
    params["encoder"]["pos_embed"][:, 0] = 0
    export_official(params, tmp_path, SMALL, {})
    larger = dataclasses.replace(SMALL, image_size=(48, 64))
    loaded, report = load_into(random_params(larger, seed=2), tmp_path, larger)
    assert report.adapted == ["position tables: interpolated (bicubic) from 4 x 4 to 6 x 8 patches"]
    for part, width in (("encoder", 32), ("decoder", 16)):
        assert loaded[part]["pos_embed"].shape == (1, 1 + 6 * 8, width)
        table, old = loaded[part].pop("pos_embed"), params[part].pop("pos_embed")
        np.testing.assert_array_equal(table[:, 0], old[:, 0])  # the class row
        np.testing.assert_allclose(table[:, 1:].mean(), old[:, 1:].mean(), atol=0.05)
    assert_same_tree(loaded, params)


def test_another_image_size_and_a_fresh_head(tmp_path):
    params = random_params(seed=1)
    params["encoder"]["pos_embed"][:, 0] = 0
    export_encoder(params, tmp_path, SMALL, {})
    larger = dataclasses.replace(CLASSIFIER, image_size=(64, 48))
    fresh = classifier_params(larger, seed=2)
    loaded, report = load_into(fresh, tmp_path, larger)
    table = loaded["encoder"]["pos_embed"]
    assert table.shape == (1, 1 + 8 * 6, 32)
    np.testing.assert_array_equal(table[:, 0], 0)  # the class row is not interpolated
    assert np.abs(table - fresh["encoder"]["pos_embed"]).max() > 0.1
    assert "interpolated (bicubic) from 4 x 4 to 8 x 6" in str(report)
    # Pretraining's final norm is thrown away, head and fc_norm are new.
    assert report.fresh == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert report.left_out == ["norm.bias", "norm.weight"]


def test_channels_and_patch_size_are_adapted_and_named(tmp_path):
    export_encoder(random_params(seed=1), tmp_path, SMALL, {})
    other = dataclasses.replace(
        SMALL, image_size=(64, 64), patch_size=16, channels=1, mean=(0.5,), std=(0.2,)
    )
    fresh = {"encoder": random_params(other, seed=2)["encoder"]}
    loaded, report = load_into(fresh, tmp_path, other)
    assert loaded["encoder"]["patch_embed"]["kernel"].shape == (16 * 16, 32)
    assert len(report.adapted) == 2
    # A grey picture, enlarged, gets the embedding that its colour copy had.
    rng = np.random.default_rng(0)
    flat = np.full((1, 8, 8, 3), rng.standard_normal(), np.float32)
    before = flat.reshape(1, -1) @ random_params(seed=1)["encoder"]["patch_embed"]["kernel"]
    grey = np.full((1, 16 * 16), flat[0, 0, 0, 0], np.float32)
    np.testing.assert_allclose(grey @ loaded["encoder"]["patch_embed"]["kernel"], before, atol=1e-3)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_an_official_fine_tuned_file_is_known_by_its_tensors(pool, tmp_path):
    d = dataclasses.replace(CLASSIFIER, pool=pool)
    params = classifier_params(d)
    tensors = to_official(params, d)
    assert ("norm.weight" in tensors) == (pool == "cls")
    checkpoint = open_checkpoint(write(tmp_path, tensors), heads=4)
    assert checkpoint.spec == dataclasses.replace(d, target="", mask_ratio=0.0)
    assert_same_tree(checkpoint.params(), params)


def test_bfloat16_files_are_read(tmp_path):
    tensors = {n: x.astype(ml_dtypes.bfloat16) for n, x in official_tensors().items()}
    checkpoint = open_checkpoint(write(tmp_path, tensors), **KNOWN)
    for name, x in checkpoint.tensors.items():
        np.testing.assert_array_equal(x, tensors[name].astype(np.float32))


def test_a_description_of_another_version_is_explained(tmp_path):
    metadata = {"format": "pt", "mae_jax": '{"shape": "round"}'}
    with pytest.raises(UserError, match="newer version"):
        open_checkpoint(write(tmp_path, official_tensors(), metadata))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: not readable"):
        open_checkpoint(write(tmp_path, to_hugging_face(official_tensors())))


def test_a_head_is_taken_where_its_classes_are_ours_and_fresh_otherwise(tmp_path):
    params = classifier_params(CLASSIFIER, seed=1)
    export_encoder(params, tmp_path, CLASSIFIER, {})
    loaded, report = load_into(classifier_params(CLASSIFIER, seed=2), tmp_path, CLASSIFIER)
    assert_same_tree(loaded, params)
    assert not report.fresh
    seven = dataclasses.replace(CLASSIFIER, classes=7)
    fresh = classifier_params(seven, seed=2)
    loaded, report = load_into(fresh, tmp_path, seven)
    assert_same_tree(loaded["head"], fresh["head"])
    assert_same_tree(loaded["fc_norm"], fresh["fc_norm"])
    assert "head.weight" in report.fresh


def test_input_statistics_that_differ_are_mentioned(tmp_path):
    export_encoder(random_params(), tmp_path, SMALL, {})
    other = dataclasses.replace(SMALL, mean=(0.5,) * 3)
    _, report = load_into(random_params(), tmp_path, other)
    assert "input statistics" in str(report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 64}, "Set model.variant"),
        ({"depth": 3}, "3 blocks"),
        ({"heads": 2}, "2 heads"),
        ({"decoder_depth": 2}, r"decoder.depth = 1, the model's 2.*load the encoder alone"),
        ({"decoder_heads": 4}, "decoder.heads"),
        ({"target": "pixel"}, "predicts norm_pixel"),
        ({"patch_size": 16}, "decoder has patch_size"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(change, message, tmp_path):
    export_official(random_params(), tmp_path, SMALL, {})
    other = dataclasses.replace(SMALL, **change)
    with pytest.raises(UserError, match=message):
        load_into(random_params(other), tmp_path, other)


def test_positions_that_were_trained_are_taken_as_they_are(tmp_path):
    pooled = dataclasses.replace(CLASSIFIER, pool="cls")
    trained = classifier_params(pooled)
    export_encoder(trained, tmp_path, pooled, {})
    loaded, _ = load_into({"encoder": random_params()["encoder"]}, tmp_path, SMALL)
    assert_same_tree(loaded["encoder"], trained["encoder"])


def test_a_fine_tuned_file_without_final_norm_is_refused_where_one_is_needed(tmp_path):
    params = classifier_params(CLASSIFIER)
    params["encoder"]["pos_embed"] = sincos_position_table(32, (4, 4))[None]
    export_encoder(params, tmp_path, CLASSIFIER, {})
    with pytest.raises(UserError, match="no final norm"):
        load_into({"encoder": random_params()["encoder"]}, tmp_path, SMALL)


def test_nan_weights_are_refused_by_name(tmp_path):
    tensors = official_tensors()
    tensors["blocks.1.mlp.fc1.bias"][3] = np.nan
    with pytest.raises(UserError, match=r"blocks.1.mlp.fc1.bias has 1 NaN"):
        open_checkpoint(write(tmp_path, tensors), **KNOWN)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_a_truncated_safetensors_is_refused(share, tmp_path):
    path = write(tmp_path, official_tensors())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"weights.safetensors: truncated or damaged"):
        open_checkpoint(path, **KNOWN)


def test_a_missing_tensor_and_an_unexpected_one_are_named(tmp_path):
    tensors = official_tensors()
    whole = dict(tensors)
    del tensors["blocks.0.attn.proj.bias"]
    with pytest.raises(UserError, match=r"blocks.0.attn.proj.bias missing"):
        open_checkpoint(write(tmp_path, tensors), **KNOWN)
    whole["blocks.0.ls1.gamma"] = np.ones(32, np.float32)
    with pytest.raises(UserError, match=r"ls1.gamma unexpected.*another model"):
        open_checkpoint(write(tmp_path, whole), **KNOWN)


def test_weights_of_a_network_that_is_no_vit_are_refused(tmp_path):
    path = write(tmp_path, {"conv1.weight": np.ones((8, 3, 7, 7), np.float32)})
    with pytest.raises(UserError, match=r"not a ViT of MAE. It holds 1 tensors \(conv1.weight"):
        open_checkpoint(path)


def test_what_cannot_be_known_is_asked_for(tmp_path):
    path = write(tmp_path, official_tensors())
    with pytest.raises(UserError, match=r"give heads$"):
        open_checkpoint(path)
    with pytest.raises(UserError, match="give decoder_heads"):
        open_checkpoint(path, heads=4).spec.mae()
    grey = dataclasses.replace(SMALL, channels=1, mean=(0.5,), std=(0.5,))
    tensors = to_official(random_params(grey), grey)
    with pytest.raises(UserError, match="give mean and std"):
        open_checkpoint(write(tmp_path, tensors), heads=4, decoder_heads=2)
    wide = dataclasses.replace(SMALL, image_size=(16, 48))
    tensors = to_official(random_params(wide), wide)
    with pytest.raises(UserError, match="give image_size"):
        open_checkpoint(write(tmp_path, tensors), **KNOWN)
    d = open_checkpoint(write(tmp_path, tensors), **KNOWN, image_size=(16, 48)).spec
    assert d.grid == (2, 6)


def test_what_a_file_does_not_tell_is_taken_from_the_model_it_is_for(tmp_path):
    d = dataclasses.replace(
        SMALL, image_size=(16, 48), channels=1, mean=(0.3,), std=(0.2,), target="pixel"
    )
    tensors = to_official(random_params(d, seed=1), d)
    loaded, report = load_into(random_params(d, seed=2), write(tmp_path, tensors), d)
    assert_same_tree(loaded, random_params(d, seed=1))
    assert not report.adapted


def test_what_is_said_must_agree_with_the_file(tmp_path):
    path = write(tmp_path, official_tensors(), SMALL.to_metadata())
    with pytest.raises(UserError, match="heads is 4, not 8"):
        open_checkpoint(path, heads=8)


def test_half_precision_files_are_read(tmp_path):
    tensors = {name: x.astype(np.float16) for name, x in official_tensors().items()}
    checkpoint = open_checkpoint(write(tmp_path, tensors), **KNOWN)
    assert checkpoint.tensors["cls_token"].dtype == np.float32


def test_integer_tensors_are_refused(tmp_path):
    tensors = official_tensors()
    tensors["norm.bias"] = tensors["norm.bias"].astype(np.int32)
    with pytest.raises(UserError, match=r"norm\.bias holds int32"):
        open_checkpoint(write(tmp_path, tensors), **KNOWN)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "dinov2"}, "model_type 'dinov2'"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new'"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps"),
        ({"qkv_bias": False}, "qkv_bias"),
    ],
)
def test_a_hugging_face_model_that_computes_otherwise_is_refused(config, message, tmp_path):
    save_safetensors(tmp_path / "model.safetensors", to_hugging_face(official_tensors()), {})
    written = {"model_type": "vit_mae", "num_attention_heads": 4, "image_size": 32} | config
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path)


def test_the_hubs_wrong_norm_epsilon_is_noted(tmp_path):
    export_hugging_face(random_params(), tmp_path, SMALL, {})
    save_safetensors(tmp_path / "model.safetensors", to_hugging_face(official_tensors()), {})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-12}))
    checkpoint = open_checkpoint(tmp_path)
    assert "1e-12" in checkpoint.notes[0]
    assert checkpoint.spec == SMALL


def test_split_hugging_face_files_are_joined_and_stay_in_their_folder(tmp_path):
    export_hugging_face(random_params(), tmp_path, SMALL, {})
    tensors, _ = read_tensors(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[:20], names[20:])):
        file = f"model-{number}.safetensors"
        save_safetensors(tmp_path / file, {n: tensors[n] for n in part}, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    index_file = tmp_path / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": index}))
    assert_same_tree(open_checkpoint(tmp_path).params(), random_params())
    index_file.write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(UserError, match="outside the folder"):
        open_checkpoint(tmp_path)


def test_a_lost_part_of_query_key_value_is_named(tmp_path):
    tensors = to_hugging_face(official_tensors())
    del tensors["vit.encoder.layer.1.attention.attention.key.weight"]
    with pytest.raises(UserError, match=r"blocks.1.attn.qkv.weight.*k part"):
        open_checkpoint(write(tmp_path, tensors))


def test_a_folder_without_weights_and_a_wrong_suffix_are_explained(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="found none"):
        open_checkpoint(tmp_path)
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(UserError, match=r"are read from .safetensors, .pth"):
        open_checkpoint(tmp_path / "weights.h5")


def test_a_damaged_orbax_export_is_refused(tmp_path):
    export_orbax(random_params(), tmp_path, SMALL, {})
    for file in (tmp_path / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match="not a readable Orbax checkpoint"):
        open_checkpoint(tmp_path)


def test_a_decoder_of_unusual_width_is_no_obstacle_where_it_is_not_wanted(tmp_path):
    """Its heads cannot be read off the tensors; an encoder needs no answer."""
    tensors = official_tensors(seed=1)  # 16 wide, which no published decoder is
    path = write(tmp_path, tensors)
    d = dataclasses.replace(CLASSIFIER, target="", mask_ratio=0.0)
    loaded, report = load_into(classifier_params(d, seed=2), path, d)
    np.testing.assert_array_equal(
        loaded["encoder"]["blocks"]["0"]["attn"]["proj"]["bias"],
        tensors["blocks.0.attn.proj.bias"],
    )
    assert "not used: the decoder" in str(report)
    loaded, _ = load_into(random_params(seed=2), path, SMALL, parts="encoder", heads=4)
    assert_same_tree(loaded["decoder"], random_params(seed=2)["decoder"])
    checkpoint = open_checkpoint(path, heads=4, target="pixel")
    assert checkpoint.spec.decoder_heads == 0
    with pytest.raises(UserError, match="give decoder_heads"):
        checkpoint.spec.mae()


TOKENS = dataclasses.replace(SMALL, encoder_tokens=True)
LINEAR = dataclasses.replace(SMALL.without_decoder(), encoder_tokens=True, decoder_kind="linear")


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (SMALL, TOKENS, "mask.encoder_tokens = False, the model's True"),
        (TOKENS, LINEAR, "decoder.kind = blocks, the model's linear"),
    ],
)
def test_decoders_of_other_kinds_do_not_continue_each_other(theirs, ours, message, tmp_path):
    export_orbax(random_params(theirs), tmp_path, theirs, {})
    with pytest.raises(UserError, match=rf"its decoder has {message}.*init_parts = encoder"):
        load_into(random_params(ours, 1), tmp_path, ours)
    _, report = load_into(random_params(ours, 1), tmp_path, ours, parts="encoder")
    assert "encoder_mask_token" in report.fresh  # it belongs to what is pretrained


def test_an_encoder_with_mask_tokens_continues_and_is_tuned(tmp_path):
    params = random_params(LINEAR)
    export_orbax(params, tmp_path, LINEAR, {})
    loaded, report = load_into(random_params(LINEAR, 1), tmp_path, LINEAR)
    assert_same_tree(loaded, params)
    assert not report.fresh
    tuned, report = load_into(classifier_params(CLASSIFIER), tmp_path, CLASSIFIER)
    assert "encoder_mask_token" in report.left_out
    for part in ("blocks", "patch_embed"):
        assert_same_tree(tuned["encoder"][part], params["encoder"][part])
