import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from mae_jax.models.classifier import Classifier
from mae_jax.models.spec import ModelSpec
from mae_jax.models.vit import VARIANTS, ViT
from mae_jax.train.optimizers import (
    adamw,
    create,
    decays,
    decays_in_fine_tuning,
    lars,
    layer_scales,
    scale_by_layer,
    warmup_cosine,
)


def reference_lr(step, peak, warmup, total, minimum):
    """Section 2.2 of the reference digest, written out."""
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
    schedule = warmup_cosine(
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
    with pytest.raises(ValueError, match="warm-up takes 10 of 10 steps"):
        warmup_cosine(base_lr=1.0, batch_size=256, warmup_steps=10, total_steps=10)


def test_adamw_equals_numpy_and_decays_matrices_only():
    rng = np.random.default_rng(0)
    params = {
        "kernel": rng.normal(size=(3, 4)),
        "bias": rng.normal(size=4),
        "cls_token": rng.normal(size=(1, 1, 4)),
    }
    grads = [{k: rng.normal(size=v.shape) for k, v in params.items()} for _ in range(5)]
    schedule = warmup_cosine(base_lr=0.1, batch_size=256, warmup_steps=2, total_steps=10)
    optimizer = adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05)
    jax_params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state = optimizer.init(jax_params)
    for g in grads:
        g32 = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)
        updates, state = optimizer.update(g32, state, jax_params)
        jax_params = optax.apply_updates(jax_params, updates)

    for name, p in params.items():
        m = v = 0
        for t, g in enumerate(grads):
            lr = reference_lr(t, 0.1, 2, 10, 0)
            m = 0.9 * m + 0.1 * g[name]
            v = 0.95 * v + 0.05 * g[name] ** 2
            if name != "bias":
                p = p * (1 - lr * 0.05)
            p = p - lr * (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.95 ** (t + 1))) + 1e-8)
        np.testing.assert_allclose(jax_params[name], p, rtol=1e-5, atol=1e-6)


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


def draw(shapes, seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


MOVING = {"base_lr": 6.0, "batch_size": 256, "warmup_steps": 3, "total_steps": 8, "min_lr": 0.1}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars_equals_numpy_while_the_learning_rate_moves(weight_decay):
    shapes = {"kernel": (6, 4), "bias": (4,), "zero": (3, 2)}
    params = draw(shapes, 0) | {"zero": np.zeros((3, 2))}
    grads = [draw(shapes, 1 + t) for t in range(8)]
    grads[2]["kernel"] = np.zeros((6, 4))
    optimizer = lars(warmup_cosine(**MOVING), momentum=0.9, trust=0.001, weight_decay=weight_decay)
    got = follow(optimizer, params, grads)

    for name, p in params.items():
        buffer = 0.0
        for t, g in enumerate(grads):
            g = g[name]
            if name != "bias":
                g = g + weight_decay * p
                norms = np.linalg.norm(p), np.linalg.norm(g)
                if all(norms):
                    g = 0.001 * norms[0] / norms[1] * g
            buffer = 0.9 * buffer + g
            p = p - reference_lr(t, 6.0, 3, 8, 0.1) * buffer
        np.testing.assert_allclose(got[name], p, rtol=2e-5, atol=1e-6)


def test_lars_takes_up_gradients_while_the_learning_rate_is_zero():
    # With the learning rate inside the momentum, the first gradient would be lost.
    optimizer = lars(lambda step: 1.0 * (step > 0), momentum=0.5, trust=0.1, weight_decay=0.0)
    params = {"bias": np.zeros(2), "kernel": np.array([[3.0, 4.0]])}
    first = {"bias": np.array([2.0, 0.0]), "kernel": np.array([[0.0, 2.0]])}
    nothing = {"bias": np.zeros(2), "kernel": np.zeros((1, 2))}
    after_one = follow(optimizer, params, [first])
    jax.tree.map(np.testing.assert_array_equal, after_one, params)
    after_two = follow(optimizer, params, [first, nothing])
    np.testing.assert_allclose(after_two["bias"], [-0.5 * 2, 0])
    # Trust ratio 0.1 * 5 / 2.
    np.testing.assert_allclose(after_two["kernel"], [[3, 4 - 0.5 * 0.25 * 2]])


def test_lars_does_not_change_with_the_scale_of_a_matrix_gradient():
    params = draw({"kernel": (5, 3), "bias": (3,)}, 0)
    grads = [draw({"kernel": (5, 3), "bias": (3,)}, 1 + t) for t in range(3)]
    optimizer = lars(optax.constant_schedule(1.0), momentum=0.9, trust=0.001, weight_decay=0.0)
    plain = follow(optimizer, params, grads)
    larger = follow(optimizer, params, [jax.tree.map(lambda g: 100 * g, g) for g in grads])
    np.testing.assert_allclose(larger["kernel"], plain["kernel"], rtol=1e-5)
    moved = {name: tree["bias"] - params["bias"] for name, tree in [("1", plain), ("100", larger)]}
    np.testing.assert_allclose(moved["100"], 100 * moved["1"], rtol=1e-4)


def classifier_shapes(variant, pool, patch_size=16):
    """Path -> shape of each parameter of a classifier on 2 x 2 patches."""
    size = 2 * patch_size
    spec = ModelSpec((size, size), patch_size, 3, *VARIANTS[variant], pool=pool, classes=10)
    return spec.abstract_params()


# mae.md 2.3: patch size, decay, and scales of embedding, first block, last block.
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


def test_layer_decay_scales_learning_rate_weight_decay_and_its_end():
    """AdamW whose learning rate differs from layer to layer, as PyTorch's groups have it."""
    encoder = ViT((4, 4), 4, 1, width=8, depth=2, heads=2, position_params=True, final_norm=False)
    model = Classifier(encoder, 3, "mean")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, 1)))["params"]
    rng = np.random.default_rng(0)
    params, *grads = [jax.tree.map(lambda p: rng.normal(size=p.shape), shapes) for _ in range(7)]
    schedule = warmup_cosine(
        base_lr=0.1, batch_size=256, warmup_steps=2, total_steps=6, min_lr=0.02
    )
    fixed = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
    optimizer = optax.chain(
        adamw(schedule, **fixed, weight_decay=0.3, mask=decays_in_fine_tuning),
        scale_by_layer(2, 0.5),
    )
    got = flatten_dict(follow(optimizer, params, grads), sep="/")

    flat_grads = [flatten_dict(g, sep="/") for g in grads]
    for path, p in flatten_dict(params, sep="/").items():
        block = re.match(r"encoder/blocks/(\d)", path)
        scale = 0.5 ** (2 - int(block[1])) if block else 0.125 if "encoder" in path else 1.0
        decay = 0.3 if path.endswith("kernel") else 0.0
        m = v = 0.0
        for t, g in enumerate(flat_grads):
            lr = scale * reference_lr(t, 0.1, 2, 6, 0.02)
            m = 0.9 * m + 0.1 * g[path]
            v = 0.999 * v + 0.001 * g[path] ** 2
            p = p * (1 - lr * decay)
            p = p - lr * (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
        np.testing.assert_allclose(got[path], p, rtol=2e-5, atol=2e-6, err_msg=path)
