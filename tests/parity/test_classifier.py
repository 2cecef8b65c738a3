"""Our classifiers against timm's and transformers', from the files we export."""

import dataclasses

import numpy as np
import pytest
from parity_models import TINY, images_of, import_timm, of_size, random_params

from mae_jax.interop.checkpoint import open_checkpoint
from mae_jax.interop.export import CLASSIFIER_FILE, export_encoder, export_hugging_face
from mae_jax.models.inference import classify_function

torch = pytest.importorskip("torch", reason="parity is measured against PyTorch")
safetensors_torch = pytest.importorskip("safetensors.torch")

CLASSES = 11
RECTANGLE = dataclasses.replace(
    TINY, image_size=(32, 56), channels=2, mean=(0.5, 0.4), std=(0.25, 0.2)
)
BASE = of_size(768, 12, 12, 16, decoder_depth=1)
HUGE = of_size(1280, 2, 16, 14, decoder_depth=1)


def classifier(d, pool):
    """A description, and parameters as fine-tuning leaves them: trained positions, logits of ~1."""
    described = dataclasses.replace(
        d, decoder_width=0, decoder_depth=0, decoder_heads=0, pool=pool, classes=CLASSES
    )
    rng = np.random.default_rng(5)

    def draw(*shape, scale=0.2):
        return np.float32(scale) * rng.standard_normal(shape, np.float32)

    encoder = dict(random_params(d)["encoder"])
    encoder["pos_embed"] = draw(1, 1 + d.grid[0] * d.grid[1], d.width)
    head = {"kernel": draw(d.width, CLASSES, scale=d.width**-0.5), "bias": draw(CLASSES)}
    if pool == "cls":
        return described, {"encoder": encoder, "head": head}
    del encoder["norm"]
    norm = {"scale": 1 + draw(d.width), "bias": draw(d.width)}
    return described, {"encoder": encoder, "fc_norm": norm, "head": head}


def our_logits(d, params, images):
    return np.asarray(d.classifier().apply({"params": params}, images))


def torch_pixels(images):
    return torch.tensor(np.asarray(images).transpose(0, 3, 1, 2).copy())


def timm_model(d, file):
    """timm's own class with its own options, loaded strictly."""
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=d.image_size,
        patch_size=d.patch_size,
        in_chans=d.channels,
        embed_dim=d.width,
        depth=d.depth,
        num_heads=d.heads,
        num_classes=CLASSES,
        class_token=True,
        global_pool="avg" if d.pool == "mean" else "token",
        fc_norm=d.pool == "mean",
    )
    model.load_state_dict(safetensors_torch.load_file(file), strict=True)
    return model.eval()


def timm_logits(model, images):
    with torch.no_grad():
        return model(torch_pixels(images)).numpy()


@pytest.mark.parametrize(
    ("d", "pool"),
    [
        pytest.param(TINY, "mean", id="mean"),
        pytest.param(TINY, "cls", id="cls"),
        pytest.param(RECTANGLE, "mean", id="rectangle-mean"),
        pytest.param(RECTANGLE, "cls", id="rectangle-cls"),
        pytest.param(BASE, "mean", id="base-mean"),
        pytest.param(HUGE, "cls", id="huge-cls"),
    ],
)
def test_logits_are_those_of_timms_vision_transformer(d, pool, tmp_path):
    d, params = classifier(d, pool)
    export_encoder(params, tmp_path, d, {})
    images = images_of(d, 2)
    theirs = timm_logits(timm_model(d, tmp_path / CLASSIFIER_FILE), images)
    difference = np.abs(our_logits(d, params, images) - theirs).max()
    print(f"{pool}, width {d.width}: logits up to {np.abs(theirs).max():.1f}, off {difference:.1e}")
    assert np.abs(theirs).max() > 0.3
    assert difference < 1e-5


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_the_folder_says_to_timm_how_to_pool(pool, tmp_path):
    d, params = classifier(TINY, pool)
    export_encoder(params, tmp_path, d, {})
    model = import_timm().create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = images_of(d, 2)
    np.testing.assert_allclose(
        timm_logits(model, images), our_logits(d, params, images), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_pth_saved_from_timm_is_the_same_classifier_here_on_pixels(pool, tmp_path):
    d, params = classifier(TINY, pool)
    export_encoder(params, tmp_path, d, {})
    model = timm_model(d, tmp_path / CLASSIFIER_FILE)
    torch.save({"model": model.state_dict(), "epoch": 99}, tmp_path / "finetuned.pth")
    checkpoint = open_checkpoint(tmp_path / "finetuned.pth", heads=d.heads)
    assert (checkpoint.spec.pool, checkpoint.spec.classes) == (pool, CLASSES)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3)).astype(np.uint8)
    images = (pixels / 255 - np.asarray(d.mean)) / np.asarray(d.std)
    ours = classify_function(checkpoint.spec)(checkpoint.params(decoder=False), pixels)
    theirs = timm_logits(model, images.astype(np.float32))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("d", [TINY, RECTANGLE], ids=["square", "rectangle"])
def test_logits_of_the_class_token_are_those_of_transformers(d, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    d, params = classifier(d, "cls")
    export_hugging_face(params, tmp_path, d, {})
    model, info = transformers.ViTForImageClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    images = images_of(d, 2)
    with torch.no_grad():
        theirs = model.eval()(torch_pixels(images)).logits.numpy()
    np.testing.assert_allclose(our_logits(d, params, images), theirs, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    again = open_checkpoint(tmp_path / "again", mean=d.mean, std=d.std)
    assert again.spec == dataclasses.replace(d, target="", mask_ratio=0.0)
    for name, x in open_checkpoint(tmp_path).tensors.items():
        np.testing.assert_array_equal(again.tensors[name], x)
