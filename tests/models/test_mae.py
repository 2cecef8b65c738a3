import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models import flops
from mae_jax.models.mae import masked_mean
from mae_jax.models.masking import num_kept, sample_masking
from mae_jax.models.spec import ModelSpec
from mae_jax.models.vit import VARIANTS

DECODER = {"decoder_width": 512, "decoder_depth": 8, "decoder_heads": 16}


def create(variant, patch_size, **changes):
    shape = VARIANTS[variant]._asdict() | {"image_size": (224, 224), "channels": 3} | DECODER
    return ModelSpec(patch_size=patch_size, target="norm_pixel", **shape | changes).mae()


def masks(model, count, seed=0, ratio=0.75):
    keys = jax.random.split(jax.random.key(seed), count)
    return sample_masking("random", keys, model.encoder.grid, ratio)


@pytest.mark.parametrize(
    ("variant", "patch_size", "trainable", "gmacs"),
    [("b", 16, 111_655_680, 9.8), ("l", 16, 329_239_296, 20.8), ("h", 14, 656_613_964, 48.6)],
)
def test_parameters_and_work_are_those_of_the_paper(variant, patch_size, trainable, gmacs):
    model = create(variant, patch_size)
    images = jnp.zeros((1, 224, 224, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images, masks(model, 1))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == trainable
    assert round(flops.mae_forward_macs(model, 0.75) / 1e9, 1) == gmacs


@pytest.mark.parametrize(
    ("variant", "patch_size", "expected"), [("b", 16, 1.799), ("l", 16, 1.799), ("h", 14, 1.927)]
)
def test_first_loss_is_the_references(variant, patch_size, expected):
    # Depth does not matter at the start: the decoder's output is normalised before the last layer.
    model = create(variant, patch_size, depth=1, decoder_depth=1)
    images = jax.random.normal(jax.random.key(1), (2, 224, 224, 3))

    @jax.jit
    def first_loss(key):
        masking = masks(model, 2)
        params = model.init(key, images, masking)
        return model.apply(params, images, masking).loss.mean()

    losses = [first_loss(jax.random.key(seed)) for seed in range(8)]
    np.testing.assert_allclose(np.mean(losses), expected, atol=0.03)


@pytest.fixture(scope="module")
def small():
    model = create(
        *("ti", 4),
        image_size=(8, 16),
        channels=2,
        mean=(0.5, 0.5),
        std=(0.2, 0.2),
        width=32,
        depth=2,
        heads=4,
        decoder_width=16,
        decoder_depth=1,
        decoder_heads=2,
    )
    images = jax.random.normal(jax.random.key(0), (3, 8, 16, 2))
    masking = masks(model, 3, ratio=0.5)
    return model, images, masking, model.init(jax.random.key(1), images, masking)


def test_loss_counts_removed_patches_only(small):
    model, images, masking, params = small
    output = model.apply(params, images, masking)
    patches = np.asarray(images).reshape(3, 2, 4, 4, 4, 2).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(3, 8, 32)
    mean, var = patches.mean(-1, keepdims=True), patches.var(-1, ddof=1, keepdims=True)
    target = (patches - mean) / np.sqrt(var + 1e-6)
    for i in range(3):
        removed = np.asarray(masking.mask[i]) == 1
        error = np.square(np.asarray(output.predictions[i]) - target[i])[removed].mean()
        np.testing.assert_allclose(output.loss[i], error, rtol=1e-5)


def test_removed_pixels_reach_the_loss_but_not_the_predictions(small):
    model, images, masking, params = small
    removed = np.repeat(np.asarray(masking.mask)[:, :, None], 32, axis=2)
    removed = removed.reshape(3, 2, 4, 4, 4, 2).transpose(0, 1, 3, 2, 4, 5).reshape(3, 8, 16, 2)
    changed = jnp.where(removed == 1, images + 3 * jnp.sin(images * 9), images)
    before, after = (model.apply(params, x, masking) for x in (images, changed))
    np.testing.assert_array_equal(before.predictions, after.predictions)
    assert not np.allclose(before.loss, after.loss)


def test_predictions_do_not_depend_on_the_order_of_visible_patches(small):
    model, images, masking, params = small
    kept = num_kept(8, 0.5)
    order = np.roll(np.arange(kept), 1)
    ids_keep = masking.ids_keep[:, order]
    rank = np.concatenate([np.argsort(order), np.arange(kept, 8)])
    reordered = masking._replace(ids_keep=ids_keep, ids_restore=rank[masking.ids_restore])
    a, b = (model.apply(params, images, m).predictions for m in (masking, reordered))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_masked_mean_of_one_image_is_over_its_removed_patches():
    np.testing.assert_array_equal(
        masked_mean(jnp.asarray([[1.0, 5]]), jnp.asarray([[1.0, 0]])), [1]
    )


def test_encode_returns_every_token_in_order(small):
    model, images, _, params = small
    tokens = model.apply(params, images, method="encode")
    assert tokens.shape == (3, 1 + 8, 32)
    everything = jnp.broadcast_to(jnp.arange(8), (3, 8))
    by_id = model.encoder.apply({"params": params["params"]["encoder"]}, images, everything)
    np.testing.assert_allclose(tokens, by_id, atol=1e-6)


def test_training_work_is_three_forward_passes_of_two_flops_a_multiply_add():
    for variant, patch_size, gflop in (("b", 16, 58.7), ("l", 16, 124.5), ("h", 14, 291.4)):
        macs = flops.mae_forward_macs(create(variant, patch_size), 0.75)
        assert round(flops.train_flops(macs) / 1e9, 1) == gflop
