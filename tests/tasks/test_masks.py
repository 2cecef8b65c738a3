"""Pretraining with other masks, decoders and losses: what a step computes, on any devices."""

import json

import jax
import numpy as np
import pytest
from task_runs import assert_close, make, run_steps

from mae_jax import UserError
from mae_jax.config_checks import validate
from mae_jax.models.spec import ModelSpec


def change(config, **fields):
    for name, value in fields.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    if config.decoder.kind == "linear":
        config.decoder.width, config.decoder.depth, config.decoder.heads = 512, 8, 16
    validate(config)
    return config


BLOCKS = {"mask__kind": "block", "model__patch_size": 4, "mask__loss": "all"}
SIMMIM = {
    **{"mask__unit": 16, "mask__ratio": 0.5, "mask__encoder_tokens": True},
    **{"decoder__kind": "linear", "loss": "l1", "target": "pixel"},
}
TOKENS = {"mask__encoder_tokens": True, "mask__kind": "grid", "mask__invalid": 0}


@pytest.mark.parametrize(
    "fields",
    [SIMMIM, *(pytest.param(x, marks=pytest.mark.slow) for x in (BLOCKS, TOKENS))],
    ids=["simmim", "blocks", "tokens"],
)
def test_a_step_is_the_same_on_any_devices(tiny_config, fields):
    config = change(tiny_config, **fields)
    expected, state = run_steps(config, steps=3)
    config.optim.accumulate = 2
    losses, other = run_steps(config, 4, 2, 2, steps=3)
    assert losses[0] != losses[-1]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert_close(jax.device_get(state.weights), jax.device_get(other.weights))


def loss_and_gradient(config, images, devices=1):
    """Loss and norm of the gradient in the first step, on `images` [B, H, W, 3] uint8."""
    task, _, state = make(config, devices)
    _, metrics = jax.jit(task.train_step)(state, {"image": images})
    return float(metrics["loss"]), float(metrics["grad_norm"])


def test_patches_and_images_without_data_count_nothing(tiny_config):
    config = change(tiny_config, mask__invalid=7, data__flip=False, target="pixel")
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3)).astype(np.uint8)
    images[:4] = 7  # four images without data
    images[4:, :, 16:] = 7  # of the others the right half
    task, _, state = make(config)

    # By hand: predictions of the model, mean over hidden patches of the left half, image by image.
    keys = task.keys(0, state.step, images)
    keys = jax.vmap(jax.random.split)(keys)[:, 1]
    masking = jax.device_get(task.masks(keys))
    x = (images / 255 - np.float32(task.mean)) / np.float32(task.std)
    x = x.astype(np.float32)
    apply = jax.jit(task.model.apply)
    predictions = apply({"params": state.weights}, x, masking).predictions
    patches = x.reshape(16, 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(16, 16, 192)
    error = np.square(np.asarray(predictions) - patches).mean(-1).reshape(16, 4, 4)[4:, :, :2]
    hidden = masking.mask.reshape(16, 4, 4)[4:, :, :2]
    means = [e[m == 1].mean() for e, m in zip(error, hidden, strict=True) if m.any()]
    assert len(means) == 12  # of 16 patches 12 are hidden, so some of these 8

    loss, gradient = loss_and_gradient(config, images)
    np.testing.assert_allclose(loss, np.mean(means), rtol=1e-5)
    batch = {"image": images, "weight": np.ones(16, np.float32)}
    evaluated = jax.jit(task.eval_step)(state, batch, 0)
    assert evaluated["weight"] == 12
    config.optim.accumulate = 2  # the first of four devices has no data at all
    spread = loss_and_gradient(config, images, devices=4)
    np.testing.assert_allclose(spread, (loss, gradient), rtol=1e-5)


def test_a_batch_without_any_data_is_no_loss(tiny_config):
    config = change(tiny_config, mask__invalid=0)
    loss, gradient = loss_and_gradient(config, np.zeros((16, 32, 32, 3), np.uint8))
    assert (loss, gradient) == (0, 0)


def test_the_loss_may_be_over_all_patches(tiny_config):
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3)).astype(np.uint8)
    config = change(tiny_config, mask__loss="all", data__flip=False, mask__ratio=0.5)
    task, _, state = make(config)
    over_all, _ = loss_and_gradient(config, images)
    keys = jax.vmap(jax.random.split)(task.keys(0, state.step, images))[:, 1]
    masking = task.masks(keys)
    x = ((images / 255 - np.float32(task.mean)) / np.float32(task.std)).astype(np.float32)
    apply = jax.jit(task.model.apply)
    parts = [
        float(apply({"params": state.weights}, x, masking, counted).loss.mean())
        for counted in (masking.mask, 1 - masking.mask)
    ]
    np.testing.assert_allclose(over_all, np.mean(parts), rtol=1e-5)


def test_masks_of_a_file_are_those_of_the_run(tiny_config, tmp_path):
    masks = np.zeros((2, 4, 4), bool)
    masks[0, :2], masks[1, :, 2:] = True, True
    np.save(tmp_path / "masks.npy", masks)
    config = change(tiny_config, mask__kind="file", mask__file=str(tmp_path / "masks.npy"))
    task, _, _ = make(config)
    found = np.asarray(task.masks(jax.random.split(jax.random.key(0), 64)).mask)
    assert {tuple(m) for m in found} == {tuple(m.ravel().astype(float)) for m in masks}
    assert task.spec.mask_ratio == 0.5
    config.mask.ratio = 0.6
    with pytest.raises(UserError, match=r"mask\.ratio = 0\.6: the masks in .* hide 0\.5"):
        make(config)


def test_the_description_of_a_model_is_that_of_its_run(tiny_config):
    spec = ModelSpec.from_config(change(tiny_config, **SIMMIM))
    assert (spec.decoder_kind, spec.decoder_depth, spec.has_decoder) == ("linear", 0, True)
    assert (spec.encoder_tokens, spec.mask_unit, spec.loss) == (True, 16, "l1")
    assert ModelSpec.from_json(spec.to_json()) == spec
    encoder = spec.without_decoder()
    assert not encoder.has_decoder
    younger = {"encoder_tokens", "decoder_kind", "mask_kind", "mask_unit", "loss"}
    assert not younger & set(json.loads(encoder.to_json()))
