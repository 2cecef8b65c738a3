"""Targets: the two of the paper, and what others need."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax import UserError, main
from mae_jax.interop.checkpoint import open_checkpoint
from mae_jax.interop.export import export_encoder, export_official, export_orbax
from mae_jax.models.inference import reconstruct
from mae_jax.models.masking import sample_masking
from mae_jax.models.patches import patchify, unpatchify
from mae_jax.models.spec import ModelSpec
from mae_jax.models.targets import TARGETS
from mae_jax.models.targets.base import Target
from mae_jax.models.targets.pixels import NormPixel, Pixel
from mae_jax.tasks.inputs import open_splits

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
        restored = target.to_pixels(target.values(images, None), images, None)
        np.testing.assert_allclose(restored, patches, atol=1e-4)


class Principal(Target):
    """The first three principal components of patches: a fitted basis, fewer numbers."""

    outputs = 3
    fit_examples = 12

    def init_state(self):
        values = self.patch_size**2 * self.channels
        return {"mean": jnp.zeros(values), "kernel": jnp.zeros((values, 3))}

    def fit(self, images):
        patches = patchify(images, self.patch_size).reshape(-1, self.patch_size**2 * self.channels)
        mean = patches.mean(axis=0)
        basis = jnp.linalg.svd(patches - mean, full_matrices=False)[2][:3]
        return {"mean": mean, "kernel": basis.T}

    def values(self, images, state):
        return (patchify(images, self.patch_size) - state["mean"]) @ state["kernel"]

    def to_pixels(self, predictions, images, state):
        return predictions @ state["kernel"].T + state["mean"]


class Brightness(Target):
    """Which of five bins the mean of a patch lies in: codes and cross entropy, no way back."""

    outputs = 5

    def values(self, images, state):
        return jnp.digitize(patchify(images, self.patch_size).mean(-1), jnp.arange(-1, 3.0))

    def loss(self, predictions, values):
        return optax.softmax_cross_entropy_with_integer_labels(predictions, values)


@pytest.fixture
def targets(monkeypatch):
    monkeypatch.setitem(TARGETS, "principal", Principal)
    monkeypatch.setitem(TARGETS, "brightness", Brightness)


def test_a_fitted_target_is_learned_drawn_exported_and_read_back(targets, tmp_path):
    spec = dataclasses.replace(SPEC, target="principal")
    model, keys = spec.mae(position_params=True), jax.random.split(jax.random.key(0), 2)
    images, patches = images_and_patches()
    masking = sample_masking("random", keys, spec.grid, 0.5)
    params = jax.device_get(model.init(jax.random.key(1), images, masking)["params"])
    assert params["decoder"]["pred"]["kernel"].shape == (8, 3)
    params["target_state"] = jax.device_get(model.target.fit(images))

    output, grads = jax.value_and_grad(
        lambda p: model.apply({"params": p}, images, masking).loss.mean()
    )(params)
    assert not any(x.any() for x in jax.tree.leaves(grads["target_state"]))
    output = model.apply({"params": params}, images, masking)
    flat = patches.reshape(-1, 16).astype(np.float64)
    basis = np.linalg.eigh(np.cov(flat.T))[1][:, :-4:-1]
    basis = basis * np.sign((basis * params["target_state"]["kernel"]).sum(axis=0))
    error = np.square(output.predictions - (patches - flat.mean(0)) @ basis).mean(-1)
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
    back = (predicted @ basis.T + flat.mean(0)) * 0.25 + 0.5
    back = (np.asarray(unpatchify(back, 4, (8, 8))) * 255).clip(0, 255)
    hidden = np.repeat(np.asarray(masking.mask)[:, :, None], 16, axis=2)
    hidden = np.asarray(unpatchify(hidden, 4, (8, 8))) > 0
    np.testing.assert_allclose(drawn, np.where(hidden, back, pixels), atol=1)

    encoder = open_checkpoint(export_encoder(params, tmp_path / "timm", spec, {}))
    assert encoder.params().keys() == {"encoder"}
    with pytest.raises(UserError, match=r"principal.*--format=orbax"):
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


def test_a_run_fits_its_target_once_and_keeps_it(targets, tiny_config, tmp_path):
    tiny_config.target = "principal"
    tiny_config.steps = 3
    main.run(tiny_config, str(tmp_path))
    data = open_splits(tiny_config)
    images, _, _ = data.examples(data.train, Principal.fit_examples)
    mean, std = np.asarray(tiny_config.data.mean), np.asarray(tiny_config.data.std)
    patches = patchify(((images / 255 - mean) / std).astype(np.float32), 8).reshape(-1, 192)
    state = open_checkpoint(tmp_path).params()["target_state"]
    np.testing.assert_allclose(state["mean"], patches.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(state["kernel"].T @ state["kernel"], np.eye(3), atol=1e-5)
    main.run(tiny_config, str(tmp_path))  # nothing left to do: restores and evaluates
    again = open_checkpoint(tmp_path).params()["target_state"]
    jax.tree.map(np.testing.assert_array_equal, again, state)
