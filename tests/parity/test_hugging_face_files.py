"""Hugging Face folders: what transformers reads and writes, we write and read."""

import dataclasses

import numpy as np
import pytest
from parity_models import TINY, images_of, noise_of, random_params, theirs, transformers_mae

from mae_jax.interop.checkpoint import open_checkpoint
from mae_jax.interop.export import export_hugging_face
from mae_jax.interop.load import load_into
from mae_jax.interop.weights import to_official

torch = pytest.importorskip("torch", reason="parity is measured against PyTorch")
safetensors_torch = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers", reason="pip install transformers")


def assert_same_weights(params, others):
    for a, b in zip(flat(params), flat(others), strict=True):
        np.testing.assert_array_equal(a, b)


def flat(params):
    tensors = to_official(params, TINY)
    return [tensors[name] for name in sorted(tensors)]


@pytest.mark.parametrize("writer", ["export", "save_pretrained", "memory", "bin"])
def test_every_spelling_of_transformers_is_read_bit_for_bit(writer, tmp_path):
    params = random_params(TINY)
    model, _ = transformers_mae(TINY, params, tmp_path / "export")
    folder = tmp_path / writer
    if writer == "save_pretrained":  # transformers 5 misspells the decoder here
        model.save_pretrained(folder)
    elif writer == "memory":  # the names transformers 5 has in memory
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    elif writer == "bin":  # the hub's names, as a pickle
        model.config.save_pretrained(folder)
        tensors = safetensors_torch.load_file(tmp_path / "export" / "model.safetensors")
        torch.save(tensors, folder / "pytorch_model.bin")
    checkpoint = open_checkpoint(folder)
    assert_same_weights(params, checkpoint.params())
    d = dataclasses.replace(TINY, mean=checkpoint.spec.mean, std=checkpoint.spec.std)
    assert checkpoint.spec == d


def test_encoder_only_folder_loads_as_vit_mae_model_and_as_vit(tmp_path):
    encoder = {"encoder": random_params(TINY)["encoder"]}
    d = dataclasses.replace(TINY, decoder_width=0, decoder_depth=0, decoder_heads=0)
    export_hugging_face(encoder, tmp_path, d, {})
    _, info = transformers.ViTMAEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    vit, info = transformers.ViTModel.from_pretrained(
        tmp_path, output_loading_info=True, add_pooling_layer=False
    )
    assert not info["missing_keys"]
    images = images_of(d, 2)
    with torch.no_grad():
        tokens = vit.eval()(torch.tensor(images.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    ours = np.asarray(d.encoder(position_params=True).apply({"params": encoder["encoder"]}, images))
    np.testing.assert_allclose(ours, tokens, atol=1e-4)


def test_the_image_processor_has_our_size_and_statistics(tmp_path):
    from transformers import ViTImageProcessor

    d = dataclasses.replace(TINY, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    export_hugging_face(random_params(d), tmp_path, d, {})
    try:
        processor = ViTImageProcessor.from_pretrained(tmp_path)
    except ImportError as error:
        pytest.skip(f"transformers' image processors need torchvision here: {error}")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8)
    ready = np.asarray(processor(pixels, return_tensors="np")["pixel_values"])[0]
    expected = (pixels / 255 - np.asarray(d.mean)) / np.asarray(d.std)
    np.testing.assert_allclose(ready.transpose(1, 2, 0), expected, atol=1e-5)


def test_predictions_survive_the_way_there_and_back(tmp_path):
    params = random_params(TINY)
    model, _ = transformers_mae(TINY, params, tmp_path)
    images, noise = images_of(TINY, 2), noise_of(TINY, 2)
    before = theirs(model, images, noise)[1]
    loaded, report = load_into(random_params(TINY, seed=9), tmp_path, TINY)
    assert not report.fresh
    again, _ = transformers_mae(TINY, loaded, tmp_path / "again")
    np.testing.assert_array_equal(before, theirs(again, images, noise)[1])
