"""Tokenizers trained here, and every target killed and restarted."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dvae_weights import random_dvae
from program import command, kill_at_random_moments, losses, run
from task_runs import make, run_steps

from mae_jax import UserError, main
from mae_jax.config import default_config
from mae_jax.config_checks import validate
from mae_jax.interop.checkpoint import open_checkpoint
from mae_jax.interop.tokenizer_file import read_tokenizer, write_tokenizer
from mae_jax.models.dvae import DVAE, DVAEShape
from mae_jax.tasks.inputs import open_splits
from mae_jax.train.metrics import read_metrics

pytest.importorskip("skimage", reason="the embedded data needs scikit-image")

KILLS = int(os.environ.get("MAE_JAX_KILLS", "2"))


@pytest.fixture
def tokenizer_config(tiny_config):
    config = default_config()
    for name in ("batch_size", "steps", "log_every", "compute_dtype", "data", "optim", "eval"):
        config[name] = tiny_config[name]
    config.task, config.model.image_size = "tokenizer", (16,)
    config.dvae.codes, config.dvae.width, config.dvae.blocks = 32, 8, 1
    return config


@pytest.mark.slow
def test_a_trained_tokenizer_is_exported_drawn_and_serves_pretraining(
    tokenizer_config, tiny_config, tmp_path
):
    tokenizer_config.eval.batches = 0
    main.run(tokenizer_config, str(tmp_path / "dvae"))
    shape, weights = read_tokenizer(tmp_path / "dvae")
    assert shape == DVAEShape(32, 8, 1, 1)
    assert list((tmp_path / "dvae" / "reconstructions").glob("*.png"))
    (line,) = (x for x in read_metrics(tmp_path / "dvae/metrics.jsonl") if "eval/loss" in x)

    # The same by numpy from the exported weights, of every image of the split.
    data, dvae = open_splits(tokenizer_config), DVAE(shape, 3)
    pixels = data.examples(data.eval, len(data.eval))[0] / np.float32(255)
    apply = jax.jit(dvae.apply, static_argnames="method")
    logits = apply({"params": weights}, 0.8 * pixels + 0.1, method="encode")
    codes = np.asarray(logits).argmax(-1)
    shares = np.eye(32, dtype=np.float32)[codes]
    again = np.asarray(apply({"params": weights}, shares, method="decode"))
    again = np.clip((again - 0.1) / 0.8, 0, 1)
    assert line["eval/loss"] == pytest.approx(np.square(again - pixels).mean(), rel=1e-3)
    part = np.bincount(codes.ravel(), minlength=32) / codes.size
    assert line["eval/codes_used"] == (part > 0).sum()
    entropy = -(part[part > 0] * np.log(part[part > 0])).sum()
    assert line["eval/perplexity"] == pytest.approx(np.exp(entropy), rel=1e-3)

    tiny_config.target, tiny_config.tokenizer = "token", str(tmp_path / "dvae")
    tiny_config.steps = 2
    main.run(tiny_config, str(tmp_path / "run"))
    state = open_checkpoint(tmp_path / "run").params()["target_state"]
    jax.tree.map(np.testing.assert_array_equal, state, weights)
    with pytest.raises(UserError, match="a tokenizer, no encoder"):
        open_checkpoint(tmp_path / "dvae")


@pytest.mark.slow
def test_the_loss_is_the_pictures_error_and_the_codes_divergence(tokenizer_config):
    tokenizer_config.data.flip, tokenizer_config.dvae.kl = False, 0.5
    tokenizer_config.dvae.temperature = (1e4, 1e4)  # so hot that the noise is nothing: all alike
    task, splits, state = make(tokenizer_config)
    with splits.train_batches(np.arange(16), 0, 1) as batches:
        images = next(batches)["image"]
    _, metrics = jax.jit(task.train_step)(state, {"image": jnp.asarray(images)})
    pixels = images / np.float32(255)
    weights = {"params": jax.device_get(state.weights)}
    apply = jax.jit(task.model.apply, static_argnames="method")
    logits = np.asarray(apply(weights, 0.8 * pixels + 0.1, method="encode"), np.float64)
    shares = np.full(logits.shape, 1 / 32, np.float32)
    again = (np.asarray(apply(weights, shares, method="decode")) - 0.1) / 0.8
    error = np.square(again - pixels).mean()
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    kl = (p * np.log(p * 32)).sum(-1).mean()
    assert metrics["reconstruction"] == pytest.approx(error, rel=1e-3)
    assert metrics["kl"] == pytest.approx(kl, rel=1e-3)
    assert metrics["loss"] == pytest.approx(error + 0.5 * kl, rel=1e-3)


def test_the_temperature_falls_by_equal_factors(tokenizer_config):
    task = make(tokenizer_config)[0]  # of six steps
    found = [float(task.temperature(step)) for step in (0, 3, 6)]
    np.testing.assert_allclose(found, [1, 1 / 4, 1 / 16], rtol=1e-6)


@pytest.mark.slow
def test_a_tokenizer_is_the_same_on_any_mesh(tokenizer_config):
    expected, _ = run_steps(tokenizer_config)
    tokenizer_config.optim.accumulate = 2
    found, _ = run_steps(tokenizer_config, 8, 4, 2)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.image_size", (20,), "height 20 is not divisible by the tokenizer's 8"),
        ("dvae.width", 6, "dvae.width = 6: give a multiple of 4"),
        ("dvae.temperature", (1.0,), "give two numbers"),
        ("compute_dtype", "bfloat16", "a tokenizer needs float32"),
        ("model.patch_size", 8, "task tokenizer has no use for this field"),
        ("init_from", "somewhere", "task tokenizer has no use for this field"),
    ],
)
def test_what_makes_no_tokenizer_is_refused(tokenizer_config, field, value, message):
    validate(tokenizer_config)
    tokenizer_config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        validate(tokenizer_config)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["pca", "token", "tokenizer", "pixel", "hog"])
def test_killed_and_restarted_every_target_ends_bit_identical(target, tmp_path):
    """That of normalised pixels is killed in tests/test_main.py."""
    fitted = target not in ("pixel", "hog")  # the others have no state, and are killed once
    fields = {"target": target, "checkpoint.every": 1}
    if target == "token":
        weights = random_dvae(DVAEShape(codes=64, width=8, blocks=1))
        write_tokenizer(weights, tmp_path / "tokenizer.safetensors")
        fields["tokenizer"] = tmp_path / "tokenizer.safetensors"
    elif target == "tokenizer":
        fields = {"config": "configs/tokenizer.py", "checkpoint.every": 1}
    reference, workdir = tmp_path / "reference", tmp_path / "killed"
    done = run(reference, **fields)
    assert done.returncode == 0, done.stderr
    assert kill_at_random_moments(command(workdir, **fields), workdir, KILLS if fitted else 1) > 0
    (tmp_path / "tokenizer.safetensors").unlink(missing_ok=True)  # a resume needs nothing else
    done = run(workdir, **fields)
    assert done.returncode == 0, done.stderr
    assert len(losses(reference)) == 12
    assert losses(workdir) == losses(reference)
    if target == "tokenizer":
        expected, found = read_tokenizer(reference)[1], read_tokenizer(workdir)[1]
    else:
        expected, found = (open_checkpoint(path).params() for path in (reference, workdir))
        assert ("target_state" in expected) == fitted
    jax.tree.map(np.testing.assert_array_equal, found, expected)
