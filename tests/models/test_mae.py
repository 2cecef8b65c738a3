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


def kept_of(model, ratio=0.75):
    return num_kept(model.encoder.grid[0] * model.encoder.grid[1], ratio)


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
    assert round(flops.mae_forward_macs(model, kept_of(model)) / 1e9, 1) == gmacs


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
        model = create(variant, patch_size)
        macs = flops.mae_forward_macs(model, kept_of(model))
        assert round(flops.train_flops(macs) / 1e9, 1) == gflop


@pytest.mark.parametrize(
    ("variant", "patch_size", "whole"), [("b", 16, 2.35), ("l", 16, 3.2), ("h", 14, 3.6)]
)
def test_mask_tokens_in_the_encoder_cost_what_the_paper_says(variant, patch_size, whole):
    """Table 1c: 4 times the encoder; 3.3 times the whole model is said of ViT-L."""
    model = create(variant, patch_size)
    full, kept = create(variant, patch_size, encoder_tokens=True), kept_of(model)
    encoders = [flops.encoder_forward_macs(model.encoder, k) for k in (None, kept)]
    np.testing.assert_allclose(encoders[0] / encoders[1], 4.0, rtol=0.01)
    ratio = flops.mae_forward_macs(full, kept) / flops.mae_forward_macs(model, kept)
    np.testing.assert_allclose(ratio, whole, rtol=0.01)


def test_work_with_a_linear_head_is_that_of_the_encoder_and_one_product():
    head = create("b", 16, encoder_tokens=True, decoder_kind="linear", decoder_depth=0)
    # ViT-B on 224 px: 17.56 G for 197 tokens without a head; 768 x 768 for each of 196 patches.
    macs = flops.mae_forward_macs(head, 49)
    assert macs - 196 * 768 * 768 == flops.encoder_forward_macs(head.encoder)
    np.testing.assert_allclose(macs / 1e9, 17.56 + 0.116, rtol=1e-3)


SMALL = {
    **{"image_size": (8, 16), "channels": 2, "mean": (0.5, 0.5), "std": (0.2, 0.2)},
    **{"width": 32, "depth": 2, "heads": 4},
    **{"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2},
}


@pytest.mark.parametrize("kind", ["blocks", "linear"])
def test_mask_tokens_pass_the_encoder_and_learn(small, kind):
    _, images, masking, _ = small
    model = create("ti", 4, **SMALL, encoder_tokens=True, decoder_kind=kind)
    params = jax.jit(model.init)(jax.random.key(1), images, masking)["params"]
    assert params["encoder"]["mask_token"].shape == (1, 1, 32)
    decoder = {"pred"} if kind == "linear" else {"embed", "blocks", "norm", "pred"}
    assert set(params["decoder"]) == decoder  # and no mask token

    gradient = jax.jit(jax.grad(lambda p: model.apply({"params": p}, images, masking).loss.mean()))
    grads = gradient(params)
    assert all(float(abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads))
    predictions = model.apply({"params": params}, images, masking).predictions
    assert predictions.shape == (3, 8, 32)
    # What stood in the removed patches does not matter, where they were removed does.
    hidden = np.asarray(masking.mask).reshape(3, 2, 4).repeat(4, axis=1).repeat(4, axis=2)
    other = jnp.where(hidden[..., None] > 0, 7.0, images)
    same = model.apply({"params": params}, other, masking).predictions
    np.testing.assert_array_equal(predictions, same)
    elsewhere = masking._replace(mask=masking.mask[::-1])
    moved = model.apply({"params": params}, other, elsewhere).predictions
    assert float(abs(moved - predictions).max()) > 1e-3


def test_a_mask_token_stands_where_its_patch_would(small):
    """The full-length encoder is the plain one, fed patches whose embedding is the token."""
    _, images, masking, _ = small
    model = create("ti", 4, **SMALL, encoder_tokens=True)
    params = jax.jit(model.init)(jax.random.key(1), images, masking)["params"]["encoder"]
    tokens = model.encoder.apply({"params": params}, images, mask=masking.mask)
    # A white-box encoder: the embedding of an all-zero image is the bias, made to be the token.
    bias = {**params["patch_embed"], "bias": params["mask_token"][0, 0]}
    zero = {**params, "patch_embed": bias}
    all_hidden = jnp.ones_like(masking.mask)
    expected = model.encoder.apply({"params": zero}, jnp.zeros_like(images))
    found = model.encoder.apply({"params": params}, images, mask=all_hidden)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not np.allclose(tokens, found)
    # Nothing hidden: the encoder as it is used on whole images.
    none = model.encoder.apply({"params": params}, images, mask=0 * all_hidden)
    np.testing.assert_array_equal(none, model.encoder.apply({"params": params}, images))


@pytest.mark.parametrize("loss", ["l2", "l1"])
def test_loss_over_chosen_patches_is_numpys(small, loss):
    _, images, masking, params = small
    model = create("ti", 4, **SMALL, loss=loss)
    counted = np.asarray([[1, 0, 0, 1, 1, 0, 0, 0], [0] * 8, [1] * 8], np.float32)
    output = model.apply(params, images, masking, jnp.asarray(counted))
    patches = np.asarray(images).reshape(3, 2, 4, 4, 4, 2).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(3, 8, 32)
    mean, var = patches.mean(-1, keepdims=True), patches.var(-1, ddof=1, keepdims=True)
    off = np.asarray(output.predictions) - (patches - mean) / np.sqrt(var + 1e-6)
    error = (abs(off) if loss == "l1" else off**2).mean(-1)
    np.testing.assert_allclose(output.loss[0], error[0, [0, 3, 4]].mean(), rtol=1e-5)
    assert output.loss[1] == 0  # of no patch
    np.testing.assert_allclose(output.loss[2], error[2].mean(), rtol=1e-5)
