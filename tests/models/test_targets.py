"""Targets: the two of the paper, and what others need."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dvae_weights import random_dvae
from PIL import Image

from mae_jax import UserError, main
from mae_jax.config_checks import validate
from mae_jax.distributed.sharding import in_compute_type
from mae_jax.interop.checkpoint import open_checkpoint
from mae_jax.interop.export import export_encoder, export_official, export_orbax
from mae_jax.interop.tensor_files import read_tensors
from mae_jax.interop.tokenizer_file import write_tokenizer
from mae_jax.models.dvae import DVAE, DVAEShape
from mae_jax.models.inference import reconstruct
from mae_jax.models.masking import sample_masking
from mae_jax.models.patches import patchify, unpatchify
from mae_jax.models.spec import ModelSpec
from mae_jax.models.targets import TARGETS, principal
from mae_jax.models.targets.base import Target
from mae_jax.models.targets.hog import HOG
from mae_jax.models.targets.pixels import NormPixel, Pixel
from mae_jax.models.targets.principal import PCA
from mae_jax.models.targets.token import Token
from mae_jax.tasks.inputs import open_splits
from mae_jax.train.metrics import read_metrics

SPEC = ModelSpec((8, 8), 4, 1, 16, 1, 2, 8, 1, 2, "norm_pixel", 0.5, (0.5,), (0.25,))


def images_and_patches(seed=0):
    images = np.random.default_rng(seed).normal(3, 5, size=(2, 8, 8, 1)).astype(np.float32)
    return images, np.asarray(patchify(images, 4))


def over_removed(error, mask):
    """[B]."""
    return [e[m == 1].mean() for e, m in zip(error, np.asarray(mask), strict=True)]


def test_norm_pixel_uses_the_unbiased_variance_of_the_whole_patch():
    images, patches = images_and_patches()
    deviation = np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)
    expected = (patches - patches.mean(-1, keepdims=True)) / deviation
    np.testing.assert_allclose(NormPixel(4, 1).values(images, None), expected, atol=1e-5)


def test_all_zero_prediction_scores_just_below_one():
    # Unbiased variance of p*p*3 values: (n - 1) / n.
    for p, expected in ((16, 0.9987), (14, 0.9983)):
        target = NormPixel(p, 3)
        images = np.random.default_rng(0).normal(size=(1, 8 * p, 8 * p, 3)).astype(np.float32)
        loss = target.loss(0, target.values(images, None)).mean()
        np.testing.assert_allclose(loss, expected, atol=5e-5)


def test_predictions_return_to_pixels():
    images, patches = images_and_patches()
    for target in (Pixel(4, 1), NormPixel(4, 1)):
        restored = target.to_pixels(target.values(images, None), images, None, None)
        np.testing.assert_allclose(restored, patches, atol=1e-4)


def svd_components(patches, count):
    """Mean [D] and largest components [D, count] of patches [..., D], by numpy's SVD."""
    flat = patches.reshape(-1, patches.shape[-1]).astype(np.float64)
    mean = flat.mean(axis=0)
    return mean, np.linalg.svd(flat - mean, full_matrices=False)[2][:count].T


def test_pca_is_numpys_svd_of_the_patches():
    rng = np.random.default_rng(0)
    target, mixing = PCA(6, 3), rng.normal(size=(108, 108))
    patches = 5 + rng.normal(size=(60, 16, 108)) @ mixing  # all directions vary, by design unlike
    images = np.asarray(unpatchify(patches.astype(np.float32), 6, (24, 24)))
    state = target.fit([images[:40], images[40:]])
    mean, basis = svd_components(patches, 96)
    assert target.outputs == 96
    np.testing.assert_allclose(state["mean"], mean, atol=1e-4)
    # The same space, the same order, each up to its sign.
    np.testing.assert_allclose(np.abs(basis.T @ state["basis"]), np.eye(96), atol=1e-4)
    assert (state["basis"].max(axis=0) >= -state["basis"].min(axis=0)).all()
    values = target.values(images, state)
    signs = np.sign((basis * state["basis"]).sum(axis=0))
    np.testing.assert_allclose(values, (patches - mean) @ basis * signs, atol=2e-3)
    back = target.to_pixels(values, images, None, state)
    expected = (patches - mean) @ basis @ basis.T + mean
    np.testing.assert_allclose(back, expected, atol=2e-3)


def test_pca_takes_all_components_of_a_small_patch_and_loses_nothing():
    images, patches = images_and_patches()
    target = PCA(4, 1)
    assert target.outputs == 16
    state = target.fit([images])
    back = target.to_pixels(target.values(images, state), images, None, state)
    np.testing.assert_allclose(back, patches, atol=1e-4)


def test_pca_stops_reading_when_it_has_patches_enough(monkeypatch):
    monkeypatch.setattr(principal, "FITTED_PATCHES", 16)
    seen = []

    def batches():
        for seed in range(10):
            seen.append(seed)
            yield images_and_patches(seed)[0]  # eight patches

    PCA(4, 1).fit(batches())
    assert seen == [0, 1]


def numpy_hog(image, patch):
    """MaskFeat's histograms of [H, W, C], pixel by pixel: [L, outputs]."""
    height, width, channels = image.shape
    x = np.pad(image.astype(np.float64), ((1, 1), (1, 1), (0, 0)), mode="reflect")
    sobel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    cells = np.zeros((height // 8, width // 8, channels, 9))
    for i, j, c in np.ndindex(height, width, channels):
        window = x[i : i + 3, j : j + 3, c]
        gx, gy = (window * sobel).sum(), (window * sobel.T).sum()
        direction = int(np.floor(np.arctan2(gx, gy) / np.pi * 9)) % 9
        cells[i // 8, j // 8, c, direction] += np.hypot(gx, gy)
    cells /= np.maximum(np.sqrt((cells**2).sum(-1, keepdims=True)), 1e-12)
    n = patch // 8
    return np.stack(
        [
            cells[i : i + n, j : j + n].ravel()
            for i in range(0, height // 8, n)
            for j in range(0, width // 8, n)
        ]
    )


@pytest.mark.parametrize(("patch", "outputs"), [(16, 108), (8, 27)])
def test_hog_is_maskfeats(patch, outputs):
    images = np.random.default_rng(0).normal(size=(2, 32, 48, 3)).astype(np.float32)
    target = HOG(patch, 3)
    assert target.outputs == outputs
    values = jax.jit(target.values)(images, None)
    np.testing.assert_allclose(values, [numpy_hog(x, patch) for x in images], atol=1e-4)
    # Unit length in each cell and channel: predicting nothing costs one ninth.
    np.testing.assert_allclose(target.loss(0, values), 1 / 9, rtol=1e-5)


def test_hog_of_a_flat_image_is_zero_and_of_stripes_one_direction():
    flat = np.full((1, 16, 16, 1), 0.7, np.float32)
    assert not HOG(16, 1).values(flat, None).any()
    stripes = np.sin(np.arange(16.0))[None, None, :, None] * np.ones((1, 16, 16, 1))
    values = np.asarray(HOG(16, 1).values(stripes.astype(np.float32), None)).reshape(4, 9)
    assert (values.argmax(axis=1) == 4).all()  # 90 degrees: brightness changes from left to right
    np.testing.assert_allclose(values.max(axis=1), 1, atol=1e-6)


def test_hog_needs_patches_of_whole_cells(tiny_config):
    tiny_config.target = "hog"
    validate(tiny_config)
    tiny_config.model.patch_size, tiny_config.model.image_size = 14, (28,)
    with pytest.raises(UserError, match=r"model.patch_size = 14: target hog .* give 8 or 16"):
        validate(tiny_config)


class Brightness(Target):
    """Which of five bins the mean of a patch lies in: codes and cross entropy, no way back."""

    outputs = 5

    def values(self, images, state):
        return jnp.digitize(patchify(images, self.patch_size).mean(-1), jnp.arange(-1, 3.0))

    def loss(self, predictions, values):
        return optax.softmax_cross_entropy_with_integer_labels(predictions, values)


DVAE_SHAPE = DVAEShape(codes=64, width=8, blocks=1, decoder=1)


@jax.jit
def encoded(weights, mapped):
    return DVAE(DVAE_SHAPE, 1).apply({"params": weights}, mapped, method="encode")


@jax.jit
def decoded(weights, shares):
    return DVAE(DVAE_SHAPE, 1).apply({"params": weights}, shares, method="decode")


def test_tokens_are_of_the_image_resized_to_eight_pixels_a_patch():
    pixels = np.random.default_rng(0).uniform(size=(2, 64, 48, 1)).astype(np.float32)
    target, weights = Token(16, 1, DVAE_SHAPE, (0.5,), (0.25,)), random_dvae(DVAE_SHAPE, 1)
    small = [  # Pillow's Lanczos is BEiT's
        np.asarray(Image.fromarray(x[..., 0]).resize((24, 32), Image.Resampling.LANCZOS))
        for x in pixels
    ]
    mapped = np.clip(small, 0, 1)[..., None] * 0.8 + 0.1
    expected = encoded(weights, mapped)
    images = (pixels - 0.5) / 0.25
    logits = jax.jit(target.logits)(images, weights)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    codes = np.asarray(expected).argmax(-1).reshape(2, 12)
    np.testing.assert_array_equal(jax.jit(target.values)(images, weights), codes)


def test_token_loss_is_the_cross_entropy_of_the_codes_on_hidden_patches():
    spec = dataclasses.replace(SPEC, target="token", tokenizer=tuple(DVAE_SHAPE))
    model, keys = spec.mae(), jax.random.split(jax.random.key(0), 2)
    images, _ = images_and_patches()
    masking = sample_masking("random", keys, spec.grid, 0.5)
    params = jax.jit(model.init)(jax.random.key(1), images, masking)["params"]
    params["target_state"] = random_dvae(DVAE_SHAPE, 1)

    @functools.partial(jax.grad, has_aux=True)
    def run(params):
        output = model.apply({"params": params}, images, masking)
        return output.loss.mean(), output

    grads, output = jax.jit(run)(params)
    assert not any(x.any() for x in jax.tree.leaves(grads["target_state"]))
    logits = np.asarray(output.predictions, np.float64)
    assert logits.shape == (2, 4, 64)
    codes = np.asarray(jax.jit(model.target.values)(images, params["target_state"]))
    error = [
        [np.log(np.exp(row).sum()) - row[code] for row, code in zip(rows, row_codes, strict=True)]
        for rows, row_codes in zip(logits, codes, strict=True)
    ]
    np.testing.assert_allclose(output.loss, over_removed(np.array(error), masking.mask), rtol=1e-4)
    np.testing.assert_allclose(model.target.loss(np.zeros((1, 1, 64)), codes[:1, :1]), np.log(64))


def test_codes_do_not_change_with_the_type_that_the_model_computes_in():
    spec = dataclasses.replace(SPEC, target="token", tokenizer=tuple(DVAE_SHAPE))
    state = jax.eval_shape(spec.mae().target.init_state)
    cast = in_compute_type({"target_state": state}, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(cast)} == {jnp.dtype("float32")}


def test_pictures_of_tokens_come_from_the_decoder_or_are_said_to_be_none():
    images, _ = images_and_patches()
    target, state = Token(4, 1, DVAE_SHAPE, (0.5,), (0.25,)), random_dvae(DVAE_SHAPE, 1)
    codes = np.asarray(jax.jit(target.values)(images, state))
    draw = jax.jit(target.to_pixels)
    right = np.eye(64)[codes]
    hidden, none = np.ones((2, 4)), np.zeros((2, 4))
    drawn = draw(right, images, hidden, state)
    assert drawn.shape == (2, 4, 16)
    # Where a patch is visible its true code is drawn, whatever was predicted.
    np.testing.assert_array_equal(draw(0 * right, images, none, state), drawn)
    shares = np.eye(64, dtype=np.float32)[codes].reshape(2, 2, 2, 64)
    pixels = np.clip((np.asarray(decoded(state, shares)) - 0.1) / 0.8, 0, 1)
    mean = np.asarray(drawn).mean() * 0.25 + 0.5
    np.testing.assert_allclose(mean, pixels.mean(), atol=0.01)
    without = Token(4, 1, DVAE_SHAPE._replace(decoder=0), (0.5,), (0.25,))
    assert without.to_pixels(right, images, hidden, state) is None
    assert "without a decoder" in without.note


def test_token_needs_a_tokenizer_and_no_other_target_takes_one(tiny_config):
    tiny_config.target = "token"
    with pytest.raises(UserError, match=r"target = 'token' needs .* tokenizer=FILE"):
        validate(tiny_config)
    tiny_config.tokenizer = "t.bin"
    validate(tiny_config)
    tiny_config.target = "hog"
    with pytest.raises(UserError, match=r"tokenizer = 't.bin': target hog has no use"):
        validate(tiny_config)


@pytest.mark.slow
def test_a_run_with_tokens_goes_on_when_the_tokenizers_file_is_gone(tiny_config, tmp_path):
    file, weights = tmp_path / "tokenizer.safetensors", random_dvae(DVAE_SHAPE)
    write_tokenizer(weights, file)
    tiny_config.target, tiny_config.tokenizer, tiny_config.steps = "token", str(file), 3
    main.run(tiny_config, str(tmp_path / "run"))
    (line,) = (x for x in read_metrics(tmp_path / "run/metrics.jsonl") if x["step"] == 2)
    assert line["train/loss"] == pytest.approx(np.log(64), rel=0.3)
    file.unlink()
    main.run(tiny_config, str(tmp_path / "run"))  # restores and evaluates
    checkpoint = open_checkpoint(tmp_path / "run")
    assert checkpoint.spec.tokenizer == DVAE_SHAPE
    jax.tree.map(np.testing.assert_array_equal, checkpoint.params()["target_state"], weights)
    assert ModelSpec.from_json(checkpoint.spec.to_json()) == checkpoint.spec
    (exported,) = (tmp_path / "run/export").glob("*.safetensors")
    assert not [name for name in read_tensors(exported)[0] if "target" in name]

    other = tmp_path / "other.safetensors"
    write_tokenizer(random_dvae(DVAE_SHAPE, seed=1), other)
    tiny_config.tokenizer, tiny_config.init_from = str(other), str(tmp_path / "run")
    with pytest.raises(UserError, match="codes of another tokenizer"):
        main.run(tiny_config, str(tmp_path / "second"))


@pytest.fixture
def targets(monkeypatch):
    monkeypatch.setattr(principal, "COMPONENTS", 3)
    monkeypatch.setitem(TARGETS, "brightness", Brightness)


@pytest.mark.slow
def test_a_fitted_target_is_learned_drawn_exported_and_read_back(targets, tmp_path):
    spec = dataclasses.replace(SPEC, target="pca")
    model, keys = spec.mae(position_params=True), jax.random.split(jax.random.key(0), 2)
    images, patches = images_and_patches()
    masking = sample_masking("random", keys, spec.grid, 0.5)
    params = jax.device_get(model.init(jax.random.key(1), images, masking)["params"])
    assert params["decoder"]["pred"]["kernel"].shape == (8, 3)
    params["target_state"] = model.target.fit([images])

    output, grads = jax.value_and_grad(
        lambda p: model.apply({"params": p}, images, masking).loss.mean()
    )(params)
    assert not any(x.any() for x in jax.tree.leaves(grads["target_state"]))
    output = model.apply({"params": params}, images, masking)
    mean, basis = svd_components(patches, 3)
    basis = basis * np.sign((basis * params["target_state"]["basis"]).sum(axis=0))
    error = np.square(output.predictions - (patches - mean) @ basis).mean(-1)
    np.testing.assert_allclose(output.loss, over_removed(error, masking.mask), rtol=1e-4)

    export_orbax(params, tmp_path / "orbax", spec, {})
    checkpoint = open_checkpoint(tmp_path / "orbax")
    assert checkpoint.spec == spec
    again = checkpoint.params()
    jax.tree.map(np.testing.assert_array_equal, again, params)

    pixels = (images * 5).clip(0, 255).astype(np.uint8)
    drawn = reconstruct(model, again, pixels, masking, (0.5,), (0.25,))["pixels"]
    normal = ((pixels / 255 - 0.5) / 0.25).astype(np.float32)
    predicted = np.asarray(model.apply({"params": params}, normal, masking).predictions)
    back = (predicted @ basis.T + mean) * 0.25 + 0.5
    back = (np.asarray(unpatchify(back, 4, (8, 8))) * 255).clip(0, 255)
    hidden = np.repeat(np.asarray(masking.mask)[:, :, None], 16, axis=2)
    hidden = np.asarray(unpatchify(hidden, 4, (8, 8))) > 0
    np.testing.assert_allclose(drawn, np.where(hidden, back, pixels), atol=1)

    encoder = open_checkpoint(export_encoder(params, tmp_path / "timm", spec, {}))
    assert encoder.params().keys() == {"encoder"}
    with pytest.raises(UserError, match=r"pca.*--format=orbax"):
        export_official(params, tmp_path / "official", spec, {})


def test_a_target_of_codes_has_its_own_loss_and_no_pictures(targets):
    spec = dataclasses.replace(SPEC, target="brightness")
    model, keys = spec.mae(), jax.random.split(jax.random.key(0), 2)
    images, patches = images_and_patches()
    masking = sample_masking("random", keys, spec.grid, 0.5)
    params = model.init(jax.random.key(1), images, masking)["params"]
    output = model.apply({"params": params}, images, masking)
    logits = np.asarray(output.predictions, np.float64)
    assert logits.shape == (2, 4, 5)
    codes = np.searchsorted(np.arange(-1, 3), patches.mean(-1), side="right")
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    error = -np.take_along_axis(logs, codes[:, :, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(output.loss, over_removed(error, masking.mask), rtol=1e-4)
    result = reconstruct(model, params, images.astype(np.uint8), masking, (0.5,), (0.25,))
    assert result.keys() == {"mask", "loss"}


def test_a_run_fits_its_target_once_and_keeps_it(targets, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(principal, "FITTED_PATCHES", 64 * 16)  # of 64 images
    tiny_config.target = "pca"
    tiny_config.steps = 3
    main.run(tiny_config, str(tmp_path))
    data = open_splits(tiny_config)
    # The crops of the first training examples, which the run's own batches are made of.
    with data.train_batches(np.arange(16), 0, 4) as batches:
        images = np.concatenate([batch["image"] for batch in batches])
    mean, std = np.asarray(tiny_config.data.mean), np.asarray(tiny_config.data.std)
    patches = patchify(((images / 255 - mean) / std).astype(np.float32), 8)
    mean, basis = svd_components(patches, 3)
    state = open_checkpoint(tmp_path).params()["target_state"]
    np.testing.assert_allclose(state["mean"], mean, atol=1e-4)
    np.testing.assert_allclose(np.abs(basis.T @ state["basis"]), np.eye(3), atol=1e-4)
    main.run(tiny_config, str(tmp_path))  # nothing left to do: restores and evaluates
    again = open_checkpoint(tmp_path).params()["target_state"]
    jax.tree.map(np.testing.assert_array_equal, again, state)
