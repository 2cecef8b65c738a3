"""Layer-wise decay of learning rate and weight decay is that of timm's parameter groups."""

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from parity_models import import_timm

from mae_jax.interop.names import official_name
from mae_jax.interop.weights import from_official, to_official
from mae_jax.models.spec import ModelSpec
from mae_jax.train import optimizers

torch = pytest.importorskip("torch", reason="parity is measured against PyTorch")
timm = import_timm()
timm_optim = pytest.importorskip("timm.optim")


def timm_groups(model, layer_decay, weight_decay):
    return timm_optim.param_groups_layer_decay(
        model,
        weight_decay=weight_decay,
        no_weight_decay_list=model.no_weight_decay(),
        layer_decay=layer_decay,
    )


def timm_settings(model, layer_decay):
    """Name -> (scale of the learning rate, whether decayed)."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr_scale"], group["weight_decay"] > 0)
        for group in timm_groups(model, layer_decay, 0.05)
        for p in group["params"]
    }


def our_settings(model, depth, layer_decay):
    """As `timm_settings`, of our classifier with the parameters of timm's."""
    tensors = {n: np.zeros(p.shape, np.float32) for n, p in model.named_parameters()}
    params = from_official(tensors)
    scales = flatten_dict(optimizers.layer_scales(params, depth, layer_decay), sep="/")
    decays = flatten_dict(optimizers.decays_in_fine_tuning(params), sep="/")
    return {official_name(path): (scales[path], decays[path]) for path in scales}


def narrow(name, global_pool):
    """A timm model of full depth; scales do not depend on the width, memory does."""
    return timm.create_model(
        name, global_pool=global_pool, embed_dim=16, num_heads=2, img_size=28, num_classes=10
    )


@pytest.mark.parametrize(
    ("name", "depth", "layer_decay"),
    [
        ("vit_base_patch16_224", 12, 0.65),
        ("vit_large_patch16_224", 24, 0.75),
        ("vit_huge_patch14_224", 32, 0.75),
    ],
)
def test_scale_and_decay_of_every_parameter_are_timms(name, depth, layer_decay):
    model = narrow(name, "avg")
    theirs, ours = timm_settings(model, layer_decay), our_settings(model, depth, layer_decay)
    assert len(theirs) == 8 + 12 * depth
    assert ours.keys() == theirs.keys()
    for name, (scale, decayed) in theirs.items():
        assert ours[name] == (pytest.approx(scale, rel=1e-12), decayed), name


def test_timm_counts_the_norm_before_a_class_token_head_to_the_last_block():
    # The reference, and so we, count it to the head; the mean-pooled models that are
    # fine-tuned do not have it.
    model = narrow("vit_base_patch16_224", "token")
    theirs, ours = timm_settings(model, 0.65), our_settings(model, 12, 0.65)
    different = {name for name in theirs if ours[name] != pytest.approx(theirs[name])}
    assert different == {"norm.weight", "norm.bias"}
    assert theirs["norm.weight"] == (0.65, False)
    assert ours["norm.weight"] == (1.0, False)


def test_steps_of_adamw_with_layer_decay_are_pytorchs():
    steps = 5
    model = timm.models.VisionTransformer(
        img_size=16,
        patch_size=8,
        embed_dim=16,
        depth=3,
        num_heads=2,
        num_classes=4,
        global_pool="avg",
    )
    size = {"image_size": (16, 16), "patch_size": 8, "channels": 3}
    rng = np.random.default_rng(0)

    def draw():
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}

    start, *gradients = [draw() for _ in range(1 + steps)]
    schedule = optimizers.warmup_then(
        "cosine", base_lr=0.1, batch_size=256, warmup_steps=2, total_steps=steps, min_lr=0.03
    )

    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.tensor(start[name]))
    theirs = torch.optim.AdamW(timm_groups(model, 0.65, 0.3), betas=(0.9, 0.999), eps=1e-8)
    for i, gradient in enumerate(gradients):
        for name, p in model.named_parameters():
            p.grad = torch.tensor(gradient[name])
        for group in theirs.param_groups:
            group["lr"] = float(schedule(i)) * group["lr_scale"]
        theirs.step()

    ours = optax.chain(
        optimizers.adamw(
            schedule,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=0.3,
            mask=optimizers.decays_in_fine_tuning,
        ),
        optimizers.scale_by_layer(3, 0.65),
    )

    @jax.jit
    def step(params, state, grads):
        updates, state = ours.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = from_official(start)
    state = ours.init(params)
    for gradient in gradients:
        params, state = step(params, state, from_official(gradient))

    got = to_official(params, ModelSpec(**size, width=0, depth=0, heads=1))
    for name, p in model.named_parameters():
        expected = p.detach().numpy()
        np.testing.assert_allclose(got[name], expected, rtol=2e-5, atol=2e-6, err_msg=name)
