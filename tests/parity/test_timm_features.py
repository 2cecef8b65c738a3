"""What timm computes from our exports is what we compute."""

import dataclasses

import numpy as np
import pytest
from parity_models import BASE, images_of, import_timm, of_size, random_params

from mae_jax.interop.export import ENCODER_FILE, export_encoder
from mae_jax.interop.load import load_into
from mae_jax.models.spec import ModelSpec

torch = pytest.importorskip("torch", reason="parity is measured against PyTorch")
safetensors_torch = pytest.importorskip("safetensors.torch")
timm = import_timm()

OTHER = ModelSpec(
    image_size=(40, 64),
    patch_size=8,
    channels=5,
    width=96,
    depth=3,
    heads=4,
    decoder_width=32,
    decoder_depth=1,
    decoder_heads=2,
    target="pixel",
    mask_ratio=0.6,
    mean=(0.5,) * 5,
    std=(0.25,) * 5,
)


def our_features(d, params, images):
    return np.asarray(d.encoder(position_params=True).apply({"params": params["encoder"]}, images))


def timm_features(model, images):
    with torch.no_grad():
        pixels = torch.tensor(np.asarray(images).transpose(0, 3, 1, 2).copy())
        return model.eval().forward_features(pixels).numpy()


@pytest.mark.parametrize(
    "d", [BASE, of_size(1280, 2, 16, 14, 1), OTHER], ids=["base", "huge", "other-sizes"]
)
def test_timm_builds_the_model_from_the_folder_and_its_features_agree(d, tmp_path):
    params = random_params(d)
    export_encoder(params, tmp_path, d, {})
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    model.load_state_dict(safetensors_torch.load_file(tmp_path / ENCODER_FILE), strict=True)

    images = images_of(d, 2)
    difference = np.abs(timm_features(model, images) - our_features(d, params, images)).max()
    print(f"{d.image_size} patch {d.patch_size}: features off by {difference:.1e}")
    assert difference < 1e-4
    assert model.pretrained_cfg["mean"] == pytest.approx(d.mean)
    assert model.pretrained_cfg["std"] == pytest.approx(d.std)


def test_the_file_loads_strictly_into_timms_own_mae_entry(tmp_path):
    d = of_size(768, 2, 12, 16, decoder_depth=1)
    params = random_params(d)
    path = export_encoder(params, tmp_path, d, {})
    model = timm.create_model("vit_base_patch16_224.mae", depth=2, checkpoint_path=str(path))
    images = images_of(d, 1)
    np.testing.assert_allclose(
        timm_features(model, images), our_features(d, params, images), atol=1e-4
    )


def test_timm_resamples_our_file_to_another_size_and_channel_count(tmp_path):
    d = of_size(192, 2, 3, 16, decoder_depth=1)
    path = export_encoder(random_params(d), tmp_path, d, {})
    model = timm.create_model(
        "vit_tiny_patch16_224",
        depth=2,
        num_classes=0,
        img_size=160,
        in_chans=1,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path)},
    )
    assert model.pos_embed.shape == (1, 101, 192)
    assert model.patch_embed.proj.weight.shape == (192, 1, 16, 16)


def test_patches_of_another_size_and_channel_count_adapt_as_timm_adapts_them(tmp_path):
    d = of_size(192, 2, 3, 16, decoder_depth=1)
    params = random_params(d)
    path = export_encoder(params, tmp_path, d, {})
    model = timm.create_model(
        "vit_tiny_patch16_224",
        depth=2,
        num_classes=0,
        patch_size=8,
        img_size=112,
        in_chans=1,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path)},
    )
    grey = dataclasses.replace(
        d, image_size=(112, 112), patch_size=8, channels=1, mean=(0.5,), std=(0.2,)
    )
    adapted, report = load_into({"encoder": random_params(grey)["encoder"]}, path, grey)
    assert len(report.adapted) == 2  # same 14 x 14 grid: positions stay
    images = images_of(grey, 2)
    difference = np.abs(timm_features(model, images) - our_features(grey, adapted, images)).max()
    print(f"adapted features off by {difference:.1e}\n{report}")
    assert difference < 1e-4


def test_a_checkpoint_written_by_timm_is_read(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0)
    d = of_size(192, 2, 3, 16, decoder_depth=1)
    model.load_state_dict(
        safetensors_torch.load_file(export_encoder(random_params(d), tmp_path, d, {}))
    )
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    params, report = load_into(
        {"encoder": random_params(d, seed=5)["encoder"]}, tmp_path / "timm.pth", d
    )
    assert not report.fresh
    images = images_of(d, 1)
    np.testing.assert_allclose(
        timm_features(model, images), our_features(d, params, images), atol=1e-4
    )
