"""Shared by all tests: eight simulated devices and a model small enough for seconds."""

import atexit
import os
import shutil
import tempfile

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # not the user's; one for all that tests start
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mae_jax-compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # before jax is imported
os.environ["JAX_PLATFORMS"] = "cpu"

import bucket as fake_bucket
import pytest

from mae_jax.config import default_config
from mae_jax.config_checks import validate


@pytest.fixture(scope="session")
def bucket():
    """(path of an empty bucket, counts of what is asked of it), for this process and its own."""
    with fake_bucket.serve() as (variables, counts), pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield f"gs://{fake_bucket.NAME}", counts


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


@pytest.fixture
def supervised_config(tiny_config):
    """As `tiny_config`, a function of (task, changes) -> config of a classifier."""

    def make(task, **changes):
        config = tiny_config
        for part in ("mask", "decoder", "probe"):
            config[part] = default_config()[part]
        config.task = task
        config.init_from = "" if task == "scratch" else "random"
        config.batch_size = 24
        config.eval.batches = 0
        if task == "linear_probe":
            config.head.pool = "cls"
            config.head.init_std = 0.01
            config.head.norm_group = 12
        else:
            config.head.init_std = 0.02
            config.optim.layer_decay = 0.65
            config.model.drop_path = 0.3
            config.augment.randaugment = "rand-m9-mstd0.5-inc1"
            config.augment.erasing = 0.5
            config.augment.mixup = 0.8
            config.augment.cutmix = 1.0
            config.augment.mix_group = 4
            config.augment.smoothing = 0.1
        for name, value in changes.items():
            config.update_from_flattened_dict({name.replace("__", "."): value})
        validate(config)
        return config

    return make
