"""The same model, weights, images and noise on both sides of a comparison."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from mae_jax.interop.export import export_hugging_face
from mae_jax.interop.names import from_hugging_face
from mae_jax.interop.weights import to_official
from mae_jax.models.masking import masking_from_scores, num_kept
from mae_jax.models.spec import ModelSpec

TINY = ModelSpec(
    image_size=(48, 48),
    patch_size=8,
    channels=3,
    width=64,
    depth=3,
    heads=4,
    decoder_width=32,
    decoder_depth=2,
    decoder_heads=2,
    target="norm_pixel",
    mask_ratio=0.75,
)


def of_size(width, depth, heads, patch_size, decoder_depth, target="norm_pixel"):
    """A model of the paper, with as many blocks as asked for."""
    return ModelSpec(
        (224, 224), patch_size, 3, width, depth, heads, 512, decoder_depth, 16, target, 0.75
    )


BASE = of_size(768, 12, 12, 16, decoder_depth=8)


def random_params(d, seed=0):
    """Every parameter random, biases and norms included, so that each of them counts."""
    rng = np.random.default_rng(seed)
    flat = flatten_dict(d.abstract_params(), sep="/")
    values = {}
    for path, leaf in flat.items():
        x = rng.standard_normal(leaf.shape, np.float32)
        if path.endswith("/kernel"):
            x *= np.sqrt(2 / sum(leaf.shape), dtype=np.float32)
        elif path.endswith("/scale"):
            x = 1 + np.float32(0.1) * x
        else:
            x *= np.float32(0.05)
        values[path] = x
    return unflatten_dict(values, sep="/")


def images_of(d, count, seed=1):
    """Smooth normalised images with some noise [B, H, W, C]."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((count, 6, 6, d.channels), np.float32)
    smooth = jax.image.resize(coarse, (count, *d.image_size, d.channels), "cubic")
    return np.asarray(smooth) + 0.1 * rng.standard_normal(smooth.shape, np.float32)


def noise_of(d, count, seed=2):
    """Masking noise [B, L]."""
    patches = d.grid[0] * d.grid[1]
    return np.random.default_rng(seed).random((count, patches), np.float32)


def masking_of(d, noise):
    return masking_from_scores(jnp.asarray(noise), num_kept(noise.shape[1], d.mask_ratio))


def ours(d, params, images, noise):
    """loss, predictions, mask and gradients under official names."""
    model = d.mae(position_params=True)
    masking = masking_of(d, noise)

    def loss_fn(params):
        output = model.apply({"params": params}, images, masking)
        return output.loss.mean(), output.predictions

    (loss, predictions), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    return (
        float(loss),
        np.asarray(predictions),
        np.asarray(masking.mask),
        official_gradients(grads, d),
    )


def official_gradients(grads, d):
    tensors = to_official(grads, d)
    return {name: x for name, x in tensors.items() if not name.endswith("pos_embed")}


def transformers_mae(d, params, folder):
    """ViTMAEForPreTraining with `params`, and transformers' report of the loading.

    Its position tables are frozen, as MAE has them: transformers 5 forgets that when it loads.
    """
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    export_hugging_face(params, folder, d, {})
    model, info = transformers.ViTMAEForPreTraining.from_pretrained(
        folder, output_loading_info=True
    )
    model.vit.embeddings.position_embeddings.requires_grad_(False)
    model.decoder.decoder_pos_embed.requires_grad_(False)
    return model, info


def theirs(model, images, noise):
    """loss, predictions, mask and gradients of a transformers model, as `ours` gives them."""
    import torch

    output = model(
        pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)), noise=torch.tensor(noise)
    )
    model.zero_grad()
    output.loss.backward()
    grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    return (
        output.loss.item(),
        output.logits.detach().numpy(),
        output.mask.numpy(),
        from_hugging_face(grads),
    )


def import_timm():
    """timm, also where there is no torchvision: models do not need it, imports of it do."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        stubs = _stub_torchvision()
        sys.modules.update(stubs)
        try:
            return pytest.importorskip("timm", reason="pip install timm")
        finally:  # transformers asks whether torchvision is there, and must hear no
            for name in stubs:
                del sys.modules[name]
    return pytest.importorskip("timm", reason="pip install timm")


def _stub_torchvision():
    class Meta(type):
        def __getattr__(cls, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return Meta(name, (), {})

    stubs = {}
    for name in (
        "torchvision",
        "torchvision.datasets",
        "torchvision.models",
        "torchvision.models.feature_extraction",
        "torchvision.ops",
        "torchvision.ops.misc",
        "torchvision.transforms",
        "torchvision.transforms.functional",
        "torchvision.utils",
    ):
        module = types.ModuleType(name)
        module.__path__ = []
        module.__getattr__ = functools.partial(getattr, Meta("stub", (), {}))
        stubs[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(stubs[parent], child, module)
    return stubs


def largest_relative_difference(a, b):
    """max |a - b| as a share of max |b|."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())
