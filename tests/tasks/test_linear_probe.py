import jax
import numpy as np
import pytest
from PIL import Image
from task_runs import make, run_steps

from mae_jax.data.pipeline import example_index
from mae_jax.distributed import mesh as mesh_lib
from mae_jax.evaluators import over_split
from mae_jax.evaluators.feature_cache import CachedFeatures
from mae_jax.evaluators.over_split import OverSplit
from mae_jax.models.classifier import absorb_batch_norm

CACHED = {"data__crop": "centre", "data__flip": False}


def numpy_batch_norm(x, running_mean, running_var, groups, momentum=0.1, eps=1e-6):
    """PyTorch's BatchNorm1d on every group by itself; running statistics take the groups' mean."""
    parts = np.split(x.astype(np.float64), groups)
    normalised = [(g - g.mean(0)) / np.sqrt(g.var(0) + eps) for g in parts]
    mean = np.mean([g.mean(0) for g in parts], axis=0)
    var = np.mean([g.var(0, ddof=1) for g in parts], axis=0)
    moved = [
        (1 - momentum) * a + momentum * b for a, b in ((running_mean, mean), (running_var, var))
    ]
    return np.concatenate(normalised), *moved


@pytest.mark.parametrize("group", [0, 8])
def test_batch_norm_of_a_step_equals_numpy(supervised_config, group):
    config = supervised_config("linear_probe", head__norm_group=group)
    task, _, _ = make(config)
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, (24, 5)).astype(np.float32)
    running = {
        "mean": rng.normal(size=5).astype(np.float32),
        "var": rng.uniform(1, 2, 5).astype(np.float32),
    }
    result, new = task.normalise_groups(x, running)
    groups = 24 // group if group else 1
    expected, mean, var = numpy_batch_norm(x, running["mean"], running["var"], groups)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(new["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(new["var"], var, rtol=1e-5)


def test_head_with_absorbed_batch_norm_gives_the_same_logits():
    rng = np.random.default_rng(0)
    head = {"kernel": rng.normal(size=(6, 4)), "bias": rng.normal(size=4)}
    statistics = {"mean": rng.normal(size=6), "var": rng.uniform(0.1, 3, 6)}
    x = rng.normal(size=(9, 6))
    normalised = (x - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-6)
    absorbed = absorb_batch_norm(head, statistics)
    np.testing.assert_allclose(
        x @ np.asarray(absorbed["kernel"]) + np.asarray(absorbed["bias"]),
        normalised @ head["kernel"] + head["bias"],
        rtol=1e-4,
        atol=1e-5,
    )


def test_encoder_is_frozen_and_the_head_is_all_that_is_trained(supervised_config):
    config = supervised_config("linear_probe", optim__trust=0.1)
    _, _, before = make(config)
    encoder = jax.device_get(before.frozen)
    _, after = run_steps(config, steps=3)
    jax.tree.map(np.testing.assert_array_equal, encoder, jax.device_get(after.frozen))
    assert set(after.params) == {"head"}
    assert (after.params["head"]["kernel"] != before.params["head"]["kernel"]).all()
    assert (after.extra["statistics"]["mean"] != 0).all()


def test_the_encoder_keeps_nothing_for_a_backward_pass(supervised_config):
    """With more blocks, working memory grows by less than one tensor of tokens each."""

    def temporary_bytes(depth):
        config = supervised_config("linear_probe", model__depth=depth, batch_size=48)
        task, _, state = make(config)
        batch = {
            name: np.zeros((config.batch_size, *shape), kind)
            for name, (shape, kind) in task.batch_schema.items()
        }
        compiled = jax.jit(task.train_step).lower(state, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    tokens = 48 * 17 * 32 * 4  # bytes of [B, N, D] float32
    assert temporary_bytes(6) - temporary_bytes(2) < 4 * tokens / 2


def cached(config, directory):
    task, splits, state = make(config)
    assert task.cached
    return task, splits, state, CachedFeatures(task, splits, state.frozen, directory)


def test_cached_features_are_those_of_the_evaluation_crop(supervised_config, tmp_path):
    config = supervised_config("linear_probe", **CACHED)
    task, splits, state, features = cached(config, tmp_path)
    positions = mesh_lib.local_positions(config.batch_size, task.mesh)
    compute = jax.jit(task.features)
    with features.train_batches(positions, 0, 2) as batches:
        for step, row in enumerate(batches):
            places = step * config.batch_size + positions
            indices = [example_index(config.seed, int(g), len(splits.train)) for g in places]
            chosen = [splits.train[index] for index in indices]
            images = np.stack([splits.eval_transform.image(record) for record in chosen])
            expected = compute(state.frozen, images)
            np.testing.assert_allclose(row["feature"], expected, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(row["label"], [record.label for record in chosen])


def test_every_evaluation_example_is_in_the_cached_batches_once(supervised_config, tmp_path):
    config = supervised_config("linear_probe", **CACHED)
    task, splits, state, features = cached(config, tmp_path)
    positions = mesh_lib.local_positions(40, task.mesh)  # does not divide the split
    compute = jax.jit(task.features)
    with (
        splits.eval_batches(positions, 40) as pixels,
        features.eval_batches(positions, 40) as rows,
    ):
        count = 0
        for batch, row in zip(pixels, rows, strict=True):
            real = batch["weight"] > 0
            expected = compute(state.frozen, batch["image"])
            np.testing.assert_array_equal(row["weight"], batch["weight"])
            np.testing.assert_allclose(row["feature"][real], expected[real], rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(row["label"][real], batch["label"][real])
            count += int(real.sum())
    assert count == len(splits.eval)


@pytest.fixture
def rows_read(monkeypatch):
    """A function of nothing: how many records were read for features since it was last asked."""
    counts = [0]
    over = OverSplit.over

    def counted(self, params, source, *arguments, **options):
        counts[0] += len(source)
        return over(self, params, source, *arguments, **options)

    def since() -> int:
        count, counts[0] = counts[0], 0
        return count

    monkeypatch.setattr(OverSplit, "over", counted)
    return since


def photographs(root, seed, size=40):
    """root/{train,val}/{a,b}/*.png; the same names for every seed."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", 12), ("val", 6)):
        for i in range(count):
            place = root / split / "ab"[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (size, size, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{i}.png")
    return str(root)


def test_a_cache_is_used_again_only_for_all_that_features_depend_on(
    supervised_config, tmp_path, rows_read
):
    first, second = (photographs(tmp_path / str(seed), seed) for seed in (0, 1))
    fields = {"data__name": "folder", "data__dir": first, "model__depth": 1}
    config = supervised_config("linear_probe", **CACHED, **fields)
    _, _, _, one = cached(config, tmp_path / "cache")
    assert rows_read() == 18
    _, _, _, again = cached(config, tmp_path / "cache")
    assert rows_read() == 0
    np.testing.assert_array_equal(one._train_arrays["feature"], again._train_arrays["feature"])

    config.data.dir = second  # as many pictures of the same names
    _, _, _, two = cached(config, tmp_path / "cache")
    assert rows_read() == 18
    difference = one._train_arrays["feature"] - two._train_arrays["feature"]
    assert np.abs(difference).max(axis=1).min() > 1e-3
    for name, value in {
        "seed": 1,  # another random encoder
        "data.mean": (0.1, 0.2, 0.3),
        "model.heads": 4,
    }.items():
        config.update_from_flattened_dict({name: value})
        cached(config, tmp_path / "cache")
        assert rows_read() == 18, name
    photographs(tmp_path / "1", seed=2)  # the files change where they are
    cached(config, tmp_path / "cache")
    assert rows_read() == 18


def test_a_damaged_cache_is_computed_again_where_it_is_damaged(
    supervised_config, tmp_path, rows_read, monkeypatch
):
    monkeypatch.setattr(over_split, "BATCHES_PER_PART", 1)
    directory = photographs(tmp_path / "pictures", 0)
    config = supervised_config("linear_probe", **CACHED, data__name="folder", data__dir=directory)
    config.eval.batch_size = 8
    _, _, _, first = cached(config, tmp_path / "cache")
    assert rows_read() == 18
    file = tmp_path / "cache" / "train" / "000000.npz"
    file.write_bytes(file.read_bytes()[:1000])
    for expected in (8, 0):
        _, _, _, again = cached(config, tmp_path / "cache")
        assert rows_read() == expected
        for name, values in first._train_arrays.items():
            np.testing.assert_array_equal(values, again._train_arrays[name])


def test_records_that_cannot_be_decoded_are_left_out_of_cached_batches(supervised_config, tmp_path):
    task, _, _, features = cached(supervised_config("linear_probe", **CACHED), tmp_path)
    weight = features._train_arrays["weight"].copy()
    weight[::2] = 0
    features._train_arrays["weight"] = weight
    features._train_arrays["label"] = np.where(weight > 0, 7, -1)
    positions = mesh_lib.local_positions(task.batch_size, task.mesh)
    with features.train_batches(positions, 0, 20) as rows:
        assert all((row["label"] == 7).all() for row in rows)


def test_probing_cached_features_learns(supervised_config, tmp_path):
    config = supervised_config(
        "linear_probe", **CACHED, steps=30, optim__trust=0.1, optim__base_lr=2.0, head__norm_group=0
    )
    task, _, state, features = cached(config, tmp_path)
    positions = mesh_lib.local_positions(config.batch_size, task.mesh)
    step = jax.jit(task.train_step)
    losses = []
    with features.train_batches(positions, 0, task.total_steps) as rows:
        for row in rows:
            state, metrics = step(state, row)
            losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
