"""Weights at another image size have the interpolated position table, as the official code has.

Read with torch and timm alone, from what runs leave.
"""

import copy

import numpy as np
import pytest
from parity_models import import_timm

from mae_jax import main

torch = pytest.importorskip("torch", reason="parity is measured against PyTorch")
safetensors_torch = pytest.importorskip("safetensors.torch")


def interpolated(table, old, new):
    """A table [1, 1 + L, D] bicubically on another grid, as the reference's fine-tuning does it."""
    patches = table[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        patches, size=new, mode="bicubic", align_corners=False
    )
    return torch.cat([table[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


@pytest.fixture
def pretrained(tiny_config, tmp_path):
    """A short run at 32 px, and its encoder's tensors."""
    config = copy.deepcopy(tiny_config)
    config.steps, config.optim.warmup_steps = 2, 1
    main.run(config, str(tmp_path / "pretrained"))
    exported = tmp_path / "pretrained" / "export" / "encoder.safetensors"
    return tmp_path / "pretrained", safetensors_torch.load_file(exported)


def test_a_probe_at_another_size_interpolates_and_exports_what_it_used(
    pretrained, supervised_config, tmp_path
):
    source, tensors = pretrained
    config = supervised_config(
        "linear_probe",
        init_from=str(source),
        model__image_size=(48, 64),
        steps=1,
        optim__warmup_steps=0,
        optim__warmup_epochs=0.0,
    )
    config.data.crop, config.data.flip, config.pictures.count = "centre", False, 1
    main.run(config, str(tmp_path / "probe"))
    exported = safetensors_torch.load_file(tmp_path / "probe" / "export" / "classifier.safetensors")
    expected = interpolated(tensors["pos_embed"], (4, 4), (6, 8))
    np.testing.assert_allclose(exported["pos_embed"], expected, atol=1e-5)

    # The cached features are those of timm's model from the export, on the same pixels.
    from mae_jax.tasks.inputs import open_splits

    data = open_splits(config)
    images = np.stack([data.eval_transform.image(data.eval[i]) for i in range(3)])
    x = (images / 255 - np.asarray(config.data.mean)) / np.asarray(config.data.std)
    folder = tmp_path / "probe" / "export"
    model = import_timm().create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        theirs = model.forward_features(torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32))
    (part,) = (tmp_path / "probe" / "features").glob("eval/*.npz")
    with np.load(part) as cached:
        np.testing.assert_allclose(cached["feature"][:3], theirs[:, 0], atol=1e-4)


def test_pretraining_from_weights_of_another_size_keeps_both_interpolated_tables(
    pretrained, tiny_config, tmp_path
):
    from mae_jax import export

    source, tensors = pretrained
    config = copy.deepcopy(tiny_config)
    config.init_from, config.model.image_size = str(source), (48,)
    config.steps, config.optim.warmup_steps = 2, 1
    main.run(config, str(tmp_path / "larger"))
    run = tmp_path / "larger"
    exported = safetensors_torch.load_file(run / "export" / "encoder.safetensors")
    expected = interpolated(tensors["pos_embed"], (4, 4), (6, 6))
    np.testing.assert_allclose(exported["pos_embed"], expected, atol=1e-5)
    for name, path in (("old", source), ("new", run)):
        arguments = [f"--from={path}", "--format=official", f"--output={tmp_path / name}"]
        export.main(arguments)
    old, new = (
        safetensors_torch.load_file(tmp_path / name / "mae.safetensors") for name in ("old", "new")
    )
    expected = interpolated(old["decoder_pos_embed"], (4, 4), (6, 6))
    np.testing.assert_allclose(new["decoder_pos_embed"], expected, atol=1e-5)
    assert not np.allclose(new["norm.bias"], old["norm.bias"])  # it did train
