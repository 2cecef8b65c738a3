"""The numbers of transformers, PyTorch and timm, where none of them is installed.

`goldens/make.py` says how they were made.
"""

import dataclasses
import pathlib

import jax
import numpy as np
import optax
import pytest

from mae_jax.interop.checkpoint import open_checkpoint
from mae_jax.interop.weights import to_official
from mae_jax.models.masking import masking_from_scores, num_kept
from mae_jax.train import optimizers
from mae_jax.train.state import merge, split

GOLDENS = pathlib.Path(__file__).parent / "goldens"


@pytest.fixture(scope="module")
def expected():
    with np.load(GOLDENS / "expected.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(GOLDENS / "official.pth", heads=4, decoder_heads=2, mask_ratio=0.6)


@pytest.mark.parametrize("target", ["pixel", "norm_pixel"])
def test_loss_predictions_mask_and_gradients_are_those_of_transformers(
    target, checkpoint, expected
):
    d = dataclasses.replace(checkpoint.spec, target=target)
    model, params = d.mae(position_params=True), checkpoint.params()
    noise = expected["noise"]
    masking = masking_from_scores(noise, num_kept(noise.shape[1], d.mask_ratio))
    np.testing.assert_array_equal(masking.mask, expected["mask"])

    def loss_fn(params):
        output = model.apply({"params": params}, expected["images"], masking)
        return output.loss.mean(), output.predictions

    (loss, predictions), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    assert float(loss) == pytest.approx(float(expected[f"loss/{target}"]), rel=1e-5)
    scale = np.abs(expected["predictions"]).max()
    np.testing.assert_allclose(predictions, expected["predictions"], atol=1e-5 * scale)
    official = to_official(grads, d)
    prefix = f"gradient/{target}/"
    names = [name.removeprefix(prefix) for name in expected if name.startswith(prefix)]
    assert set(names) == {name for name in official if not name.endswith("pos_embed")}
    for name in names:
        theirs = expected[prefix + name]
        difference = np.linalg.norm(official[name] - theirs) / np.linalg.norm(theirs)
        assert difference < 1e-4, name


def test_features_are_those_of_timm(checkpoint, expected):
    encoder = checkpoint.spec.encoder(position_params=True)
    tokens = encoder.apply({"params": checkpoint.params()["encoder"]}, expected["images"])
    np.testing.assert_allclose(tokens, expected["timm_features"], atol=1e-4)


def test_ten_adamw_steps_track_the_losses_of_pytorch(checkpoint, expected):
    d = dataclasses.replace(checkpoint.spec, target="norm_pixel")
    model, params = d.mae(position_params=True), checkpoint.params()
    noise = expected["noise"]
    masking = masking_from_scores(noise, num_kept(noise.shape[1], d.mask_ratio))
    schedule = optimizers.warmup_then(
        "cosine", base_lr=2.56, batch_size=1, warmup_steps=3, total_steps=10
    )
    optimizer = optimizers.adamw(
        schedule, optimizers.decays, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05
    )

    @jax.jit
    def step(params, state):
        def loss_fn(params):
            output = model.apply({"params": merge(params, tables)}, expected["images"], masking)
            return output.loss.mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, tables = split(params, lambda path: not path.endswith("pos_embed"))
    state, losses = optimizer.init(params), []
    for _ in range(10):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    np.testing.assert_allclose(losses, expected["adamw_losses"], rtol=1e-4)
    assert losses[-1] < losses[0] - 0.2  # something was learned
