"""Shared by all tests: eight simulated devices and a model small enough for seconds."""

import os

os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # before jax is imported
os.environ["JAX_PLATFORMS"] = "cpu"

import pytest

from mae_jax.config import default_config


@pytest.fixture
def tiny_config():
    """A complete config on the embedded data that trains in a second."""
    pytest.importorskip("skimage", reason="the embedded data needs scikit-image")
    config = default_config()
    config.batch_size = 16
    config.steps = 6
    config.log_every = 2
    config.compute_dtype = "float32"
    config.model.variant = "ti"
    config.model.width, config.model.depth, config.model.heads = 32, 2, 2
    config.model.patch_size = 8
    config.model.image_size = (32,)
    config.decoder.width, config.decoder.depth, config.decoder.heads = 16, 1, 2
    config.data.name = "demo"
    config.data.threads = 1
    config.optim.base_lr = 1e-2
    config.optim.warmup_steps = 2
    config.eval.batches = 1
    config.pictures.count = 2
    return config
