import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from mae_jax import UserError
from mae_jax.models.spec import ModelSpec
from mae_jax.models.vit import VARIANTS
from mae_jax.train.optimizers import (
    create,
    decays,
    decays_in_fine_tuning,
    lars,
    layer_scales,
    warmup_then,
)


def reference_lr(step, peak, warmup, total, minimum):
    """Linear warm-up, then half a cosine, written out."""
    if step < warmup:
        return peak * step / warmup
    return minimum + (peak - minimum) * 0.5 * (
        1 + np.cos(np.pi * (step - warmup) / (total - warmup))
    )


@pytest.mark.parametrize(
    ("base_lr", "batch_size", "warmup_steps", "total_steps", "min_lr", "peak"),
    [
        (1.5e-4, 4096, 40 * 312, 800 * 312, 0.0, 2.4e-3),  # pretraining
        (5e-4, 1024, 5 * 1251, 100 * 1251, 1e-6, 2e-3),  # fine-tuning ViT-B
        (0.1, 16384, 10 * 78, 90 * 78, 0.0, 6.4),  # linear probing
    ],
)
def test_schedule_is_the_references_at_every_step(
    base_lr, batch_size, warmup_steps, total_steps, min_lr, peak
):
    schedule = warmup_then(
        "cosine",
        base_lr=base_lr,
        batch_size=batch_size,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        min_lr=min_lr,
    )
    steps = np.arange(total_steps + 1)
    got = np.asarray(jax.vmap(schedule)(jnp.asarray(steps)))
    expected = [reference_lr(step, peak, warmup_steps, total_steps, min_lr) for step in steps]
    # Near the end the cosine is nearly -1 and rounded to float32 before 1 is added.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=peak * 2**-23)
    assert got[0] == 0
    assert got[-1] == pytest.approx(min_lr, abs=peak * 2**-23)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="warm-up takes 10 of 10 steps"):
        warmup_then("cosine", base_lr=1.0, batch_size=256, warmup_steps=10, total_steps=10)


def test_decay_exempts_one_dimensional_tensors():
    params = {
        "kernel": jnp.zeros((2, 2)),
        "scale": jnp.zeros(2),
        "mask_token": jnp.zeros((1, 1, 2)),
    }
    assert decays(params) == {"kernel": True, "scale": False, "mask_token": True}


def test_clipping_bounds_the_global_norm():
    fields = {"b1": 0.0, "b2": 0.0, "eps": 1.0, "weight_decay": 0.0, "clip_norm": 1.0}
    optimizer = create("adamw", optax.constant_schedule(1.0), fields)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    grads = {"a": jnp.asarray([6.0, 0.0]), "b": jnp.asarray([8.0])}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    # Clipped to (0.6, 0, 0.8); with b1 = b2 = 0 and eps = 1 the update is -g / (|g| + 1).
    np.testing.assert_allclose(updates["a"], [-0.6 / 1.6, 0], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [-0.8 / 1.8], rtol=1e-6)


def follow(optimizer, params, grads):
    """Parameters after an update by each of `grads`, in float32."""

    def as_float32(tree):
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)

    @jax.jit
    def step(params, state, g):
        updates, state = optimizer.update(g, state, params)
        return optax.apply_updates(params, updates), state

    params = as_float32(params)
    state = optimizer.init(params)
    for g in grads:
        params, state = step(params, state, as_float32(g))
    return params


def test_the_trust_ratio_is_one_where_a_norm_is_zero():
    params = {"zero": np.zeros((1, 2)), "kernel": np.array([[3.0, 4.0]])}
    grads = {"zero": np.array([[0.0, 2.0]]), "kernel": np.zeros((1, 2))}
    schedule = optax.constant_schedule(0.5)
    optimizer = lars(schedule, decays, momentum=0.9, trust=0.001, weight_decay=0.0)
    got = follow(optimizer, params, [grads])
    np.testing.assert_allclose(got["zero"], [[0, -1]])
    np.testing.assert_allclose(got["kernel"], params["kernel"])


def classifier_shapes(variant, pool, patch_size=16):
    """Path -> shape of each parameter of a classifier on 2 x 2 patches."""
    size = 2 * patch_size
    spec = ModelSpec((size, size), patch_size, 3, *VARIANTS[variant], pool=pool, classes=10)
    return spec.abstract_params()


# Patch size, decay, and scales of embedding, first block, last block, for the decays of the
# released fine-tuning recipes.
LAYER_DECAY = {
    "b": (16, 0.65, "3.70e-03", "5.69e-03", "6.50e-01"),
    "l": (16, 0.75, "7.53e-04", "1.00e-03", "7.50e-01"),
    "h": (14, 0.75, "7.53e-05", "1.00e-04", "7.50e-01"),
}


@pytest.mark.parametrize("variant", LAYER_DECAY)
def test_layer_scales_are_the_references_for_every_parameter(variant):
    patch_size, decay, embedding, first, last = LAYER_DECAY[variant]
    depth = VARIANTS[variant].depth
    params = classifier_shapes(variant, "mean", patch_size)
    scales = flatten_dict(layer_scales(params, depth, decay), sep="/")

    expected = {
        "encoder/cls_token": embedding,
        "encoder/pos_embed": embedding,
        "encoder/patch_embed/kernel": embedding,
        "encoder/patch_embed/bias": embedding,
        "encoder/blocks/0/attn/qkv/kernel": first,
        "encoder/blocks/0/norm1/bias": first,
        f"encoder/blocks/{depth - 1}/mlp/fc2/bias": last,
        "fc_norm/scale": "1.00e+00",
        "fc_norm/bias": "1.00e+00",
        "head/kernel": "1.00e+00",
        "head/bias": "1.00e+00",
    }
    assert {path: f"{scales[path]:.2e}" for path in expected} == expected

    # What is not in the list above belongs to a block: 12 tensors each.
    blocks = {path: scale for path, scale in scales.items() if path.startswith("encoder/blocks/")}
    assert len(blocks) == 12 * depth == len(scales) - 8
    for path, scale in blocks.items():
        assert scale == pytest.approx(decay ** (depth - int(re.findall(r"\d+", path)[0])))


def test_norm_before_a_class_token_head_is_not_scaled():
    scales = flatten_dict(layer_scales(classifier_shapes("ti", "cls"), 12, 0.5), sep="/")
    assert scales["encoder/norm/scale"] == scales["encoder/norm/bias"] == 1


def test_blocks_left_over_by_partial_fine_tuning_keep_their_scales():
    params = classifier_shapes("ti", "mean")
    part = {
        "encoder": {"blocks": {"11": params["encoder"]["blocks"]["11"]}},
        "head": params["head"],
    }
    scales = flatten_dict(layer_scales(part, 12, 0.5), sep="/")
    assert scales["encoder/blocks/11/attn/proj/kernel"] == 0.5
    assert scales["head/kernel"] == 1


def test_fine_tuning_decays_weights_of_linear_layers_alone():
    mask = flatten_dict(decays_in_fine_tuning(classifier_shapes("ti", "cls")), sep="/")
    decayed = {re.sub(r"/\d+/", "/*/", path) for path, decay in mask.items() if decay}
    assert decayed == {
        "encoder/patch_embed/kernel",
        "encoder/blocks/*/attn/qkv/kernel",
        "encoder/blocks/*/attn/proj/kernel",
        "encoder/blocks/*/mlp/fc1/kernel",
        "encoder/blocks/*/mlp/fc2/kernel",
        "head/kernel",
    }
    assert sum(mask.values()) == 2 + 4 * 12
    assert mask["encoder/pos_embed"] is mask["encoder/cls_token"] is False
