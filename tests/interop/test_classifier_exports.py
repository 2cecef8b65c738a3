"""Classifiers out of workdirs and fine-tuned files, to every format and back: the same logits."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_models import SMALL, classifier_params

from mae_jax import UserError, export, features
from mae_jax.config import default_config
from mae_jax.config_checks import validate
from mae_jax.distributed.mesh import make_mesh
from mae_jax.interop.checkpoint import open_checkpoint
from mae_jax.interop.export import export_encoder
from mae_jax.interop.load import load_into
from mae_jax.interop.tensor_files import save_safetensors
from mae_jax.interop.weights import to_official
from mae_jax.models.inference import classify_function, features_function
from mae_jax.models.patches import normalize
from mae_jax.models.vit import sincos_position_table
from mae_jax.storage.checkpoints import Checkpoints
from mae_jax.tasks import create_task

GOLDENS = pathlib.Path(__file__).parent / "goldens"
CLASSES = 6
IMAGES = np.random.default_rng(7).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
STEPS = 40
MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.2, 0.25)

RUNS = {
    "fine-tuned, mean token": {"task": "finetune"},
    "fine-tuned, class token, moving average": {
        "task": "finetune",
        "head.pool": "cls",
        "optim.ema": 0.9,
    },
    "half a block, mean token": {"task": "finetune", "trainable_blocks": 0.5},
    "one block, class token": {"task": "finetune", "trainable_blocks": 1.0, "head.pool": "cls"},
    "from scratch": {"task": "scratch", "optim.ema": 0.9},
    "probed, class token": {"task": "linear_probe", "head.pool": "cls", "head.norm_group": 8},
    "probed, mean token": {"task": "linear_probe", "head.pool": "mean", "head.norm_group": 8},
}
POOLS = {name: "cls" if "class token" in name else "mean" for name in RUNS}
POOLS["probed, mean token"] = "normed_mean"


def config_of(fields):
    config = default_config()
    config.update_from_flattened_dict(fields)
    config.batch_size = 16
    config.compute_dtype = "float32"
    config.init_from = "" if config.task == "scratch" else "/models/mae"
    config.model.width, config.model.depth, config.model.heads = 32, 2, 4
    config.model.patch_size, config.model.image_size = 8, (32,)
    config.data.name = "demo"
    config.data.mean, config.data.std = MEAN, STD
    validate(config)
    return config


def task_of(config):
    return create_task(config, 10_000, CLASSES, make_mesh(devices=jax.devices()[:1]))


def random_state(task):
    """A training state with every number random."""
    rng = np.random.default_rng(3)

    def draw(path, leaf):
        if leaf.dtype == jnp.int32:
            return np.full(leaf.shape, STEPS, np.int32)
        x = 0.3 * rng.standard_normal(leaf.shape, np.float32)
        return 0.5 + np.abs(x) if jax.tree_util.keystr(path).endswith("['var']") else x

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(task.init))


def logits_in_training(task, state):
    """What the run's own evaluation computes; of a probe in numpy, with its batch norm."""
    if not hasattr(task, "features"):
        pixels = normalize(IMAGES, task.mean, task.std)
        return np.asarray(task.model.apply({"params": state.weights}, pixels))
    x = np.asarray(task.features(state.frozen, IMAGES), np.float64)
    statistics = state.extra["statistics"]
    x = (x - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-6)
    return x @ state.params["head"]["kernel"] + state.params["head"]["bias"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """name of a run -> its workdir, its task and its logits of `IMAGES`."""

    @functools.cache
    def make(name):
        config = config_of(RUNS[name])
        task = task_of(config)
        state = random_state(task)
        path = tmp_path_factory.mktemp("workdir")
        checkpoints = Checkpoints(path / "checkpoints", keep=1)
        record = {"config": config.to_dict(), "elapsed_seconds": 7200.0, "version": "0"}
        checkpoints.save(STEPS, state, record)
        checkpoints.close()
        (path / "metrics.jsonl").write_text('{"step": 40, "eval/top1": 0.75}\n')
        return path, task, logits_in_training(task, state)

    return make


def classifier(pool):
    return dataclasses.replace(
        SMALL,
        decoder_width=0,
        decoder_depth=0,
        decoder_heads=0,
        target="",
        mask_ratio=0.0,
        pool=pool,
        classes=CLASSES,
    )


@functools.cache
def classify(d):
    return jax.jit(classify_function(d))


def logits_of(path):
    checkpoint = open_checkpoint(path)
    d = checkpoint.spec
    assert d == dataclasses.replace(classifier(d.pool), mean=MEAN, std=STD)
    return np.asarray(classify(d)(checkpoint.params(decoder=False), IMAGES))


def served_logits(folder):
    content = bytearray((folder / "model.stablehlo").read_bytes())
    return np.asarray(jax.export.deserialize(content).call(IMAGES)["logits"])


def assert_same_logits(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_a_workdir_is_the_classifier_its_run_evaluated(name, workdir):
    path, _, expected = workdir(name)
    checkpoint = open_checkpoint(path)
    assert checkpoint.spec.classes == CLASSES
    assert checkpoint.spec.pool == POOLS[name]
    assert checkpoint.facts["last eval/top1"] == "0.7500"
    started = "random weights" if name == "from scratch" else "/models/mae"
    assert checkpoint.facts["started from"] == started
    assert not checkpoint.notes
    assert_same_logits(logits_of(path), expected)


@pytest.mark.parametrize("name", RUNS)
def test_every_format_keeps_the_logits_and_nothing_warns(name, workdir, tmp_path, caplog):
    path, _, expected = workdir(name)
    official = ["official"] if POOLS[name] != "normed_mean" else []
    for format in ("timm", "orbax", "stablehlo", *official, *["hf"] * (POOLS[name] == "cls")):
        folder = tmp_path / format
        export.main([f"--from={path}", f"--format={format}", f"--output={folder}"])
        logits = served_logits(folder) if format == "stablehlo" else logits_of(folder)
        assert_same_logits(logits, expected)
        card = (folder / "README.md").read_text()
        assert "classifier" in card.splitlines()[0]
        assert "- steps: 40\n" in card
        assert f"{CLASSES} classes from" in card
    assert not [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize("name", [name for name in RUNS if POOLS[name] != "cls"])
def test_a_mean_token_classifier_is_no_model_of_transformers_and_that_is_said(
    name, workdir, tmp_path, capsys
):
    with pytest.raises(UserError) as refusal:
        export.main([f"--from={workdir(name)[0]}", "--format=hf", f"--output={tmp_path / 'x'}"])
    error = str(refusal.value)
    assert "reads the class token after the final norm" in error
    assert "--format=timm" in error
    assert not (tmp_path / "x").exists()


def test_what_a_task_exports_at_its_end_is_what_the_command_exports(workdir, tmp_path):
    for name in ("half a block, mean token", "probed, class token"):
        _, task, expected = workdir(name)
        task.export(random_state(task), tmp_path / name, {})
        assert_same_logits(logits_of(tmp_path / name), expected)


def test_positions_that_training_hardly_moved_are_kept_to_the_bit(tmp_path):
    d = classifier("mean")
    params = classifier_params(d)
    table = sincos_position_table(32, (4, 4))[None] + np.float32(1e-6)
    params["encoder"]["pos_embed"] = table
    export_encoder(params, tmp_path / "a", d, {})
    export.main([f"--from={tmp_path / 'a'}", "--format=orbax", f"--output={tmp_path / 'b'}"])
    again = open_checkpoint(tmp_path / "b").params()["encoder"]["pos_embed"]
    np.testing.assert_array_equal(again, table)


def test_an_official_fine_tuned_pth_gives_the_logits_of_timm():
    checkpoint = open_checkpoint(GOLDENS / "finetuned.pth", heads=4)
    d = checkpoint.spec
    assert (d.pool, d.classes) == ("mean", 5)
    with np.load(GOLDENS / "finetuned.npz") as expected:
        params = {"params": checkpoint.params(decoder=False)}
        logits = d.classifier().apply(params, expected["images"])
        np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)


def test_an_official_fine_tuned_pth_goes_to_other_formats_and_into_fine_tuning(tmp_path):
    source = GOLDENS / "finetuned.pth"
    export.main([f"--from={source}", "--heads=4", "--format=timm", f"--output={tmp_path / 'timm'}"])
    tensors = open_checkpoint(source, heads=4).tensors
    again = open_checkpoint(tmp_path / "timm").tensors
    assert tensors.keys() == again.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(again[name], x)
    d = open_checkpoint(source, heads=4).spec
    model = d.classifier()
    fresh = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, np.float32),
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 24, 24, 3)))["params"],
    )
    loaded, report = load_into(fresh, source, d)
    assert not report.fresh
    assert not report.left_out
    np.testing.assert_array_equal(loaded["head"]["kernel"], tensors["head.weight"].T)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_features_of_a_classifier_lead_to_its_logits(pool):
    d = classifier(pool)
    params = classifier_params(d)
    values = features_function(d)(params, IMAGES)
    expected = classify_function(d)(params, IMAGES)
    np.testing.assert_array_equal(values["logits"], expected)
    head = params["head"]
    assert_same_logits(values[pool] @ head["kernel"] + head["bias"], expected)
    assert values["tokens"].shape == (3, 17, 32)
    if pool == "mean":  # tokens as the last block leaves them; the norm comes after the mean
        x = np.asarray(values["tokens"], np.float64)[:, 1:].mean(axis=1)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        x = x * params["fc_norm"]["scale"] + params["fc_norm"]["bias"]
        np.testing.assert_allclose(values["mean"], x, rtol=1e-4, atol=1e-4)
    inner = features_function(d, block=1)(params, IMAGES)
    assert inner.keys() == {"cls", "mean", "tokens"}


def test_the_features_command_keeps_what_the_head_reads_and_logits_on_request(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{i}.png")
    for pool in ("mean", "cls"):
        d = classifier(pool)
        export_encoder(classifier_params(d), tmp_path / pool, d, {})
        arguments = [f"--weights={tmp_path / pool}", f"--images={tmp_path / 'pictures'}"]
        features.main([*arguments, f"--output={tmp_path / pool}.npz"])
        with np.load(tmp_path / f"{pool}.npz") as result:
            assert set(result.files) == {"names", pool}
        output = tmp_path / f"{pool}_logits.npz"
        features.main([*arguments, f"--output={output}", "--kind", "logits"])
        with np.load(output) as result:
            assert result["logits"].shape == (3, CLASSES)
        with pytest.raises(UserError, match="needs a classifier, and all of its blocks"):
            features.main([*arguments, f"--output={output}", "--kind", "logits", "--block=1"])


def test_a_timm_folder_whose_pooling_is_not_that_of_its_tensors_is_refused(tmp_path):
    """timm can pool the mean token after the final norm, which looks like a class-token model."""
    d = classifier("cls")
    tensors = to_official(classifier_params(d), d)
    save_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    config = {"architecture": "vit", "model_args": {"num_heads": 4, "global_pool": "token"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(tmp_path).spec.pool == "cls"
    config["model_args"]["global_pool"] = "avg"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="pool is cls in the tensors and mean"):
        open_checkpoint(tmp_path)
