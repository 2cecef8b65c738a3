import jax
import jax.numpy as jnp
import numpy as np
import pytest
from task_runs import make, run_steps

from mae_jax import UserError
from mae_jax.models.classifier import classification_sums, pool_tokens

# Without what takes long to compile and has its own tests.
PLAIN = {
    "augment__mixup": 0.0,
    "augment__cutmix": 0.0,
    "augment__erasing": 0.0,
    "model__drop_path": 0.0,
}
BLOCK = {
    f"{part}/{leaf}"
    for part, leaves in {
        "norm1": ("scale", "bias"),
        "attn/qkv": ("kernel", "bias"),
        "attn/proj": ("kernel", "bias"),
        "norm2": ("scale", "bias"),
        "mlp/fc1": ("kernel", "bias"),
        "mlp/fc2": ("kernel", "bias"),
    }.items()
    for leaf in leaves
}
LAST_MLP = {path for path in BLOCK if path.startswith(("norm2", "mlp"))}
HEAD = {"fc_norm/scale", "fc_norm/bias", "head/kernel", "head/bias"}
CLS_HEAD = {"encoder/norm/scale", "encoder/norm/bias", "head/kernel", "head/bias"}
STEM = {f"encoder/{x}" for x in ("patch_embed/kernel", "patch_embed/bias", "cls_token")}


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}


def of_block(index, parts=BLOCK):
    return {f"encoder/blocks/{index}/{part}" for part in parts}


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize(
    ("blocks", "encoder"),
    [
        (0.0, set()),
        (0.5, of_block(2, LAST_MLP)),
        (1.0, of_block(2)),
        (2.0, of_block(2) | of_block(1)),
    ],
)
def test_partial_tuning_trains_the_last_blocks_and_what_follows(
    supervised_config, blocks, encoder, pool
):
    config = supervised_config("finetune", trainable_blocks=blocks, model__depth=3, head__pool=pool)
    _, _, state = make(config)
    expected = encoder | (HEAD if pool == "mean" else CLS_HEAD)
    assert paths(state.params) == expected
    assert {p.split("/mu/")[1] for p in paths(state.opt_state) if "/mu/" in p} == expected


@pytest.mark.parametrize("blocks", [-1.0, 3.0])
def test_all_blocks_are_full_fine_tuning_with_the_stem(supervised_config, blocks):
    config = supervised_config("finetune", trainable_blocks=blocks, model__depth=3)
    _, _, state = make(config)
    assert state.frozen is None
    assert paths(state.params) >= STEM | of_block(0) | {"encoder/pos_embed"}


def test_frozen_parameters_stay_and_trained_ones_move(supervised_config):
    config = supervised_config("finetune", trainable_blocks=0.5, optim__weight_decay=0.5, **PLAIN)
    _, _, before = make(config)
    before = jax.device_get((before.params, before.frozen))
    _, after = run_steps(config, steps=3)
    jax.tree.map(np.testing.assert_array_equal, before[1], jax.device_get(after.frozen))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before[0], jax.device_get(after.params))
    assert all(jax.tree.leaves(moved)), moved


def test_frozen_blocks_cost_no_gradient_memory(supervised_config):
    """What a step keeps for its backward pass hardly grows with the number of frozen blocks."""

    def temporary_bytes(depth, trained):
        config = supervised_config(
            "finetune", model__depth=depth, trainable_blocks=trained, batch_size=64, **PLAIN
        )
        task, _, state = make(config)
        batch = {
            name: jnp.zeros((config.batch_size, *shape), kind)
            for name, (shape, kind) in task.batch_schema.items()
        }
        compiled = jax.jit(task.train_step).lower(state, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    base = temporary_bytes(2, 1.0)
    per_frozen_block = (temporary_bytes(6, 1.0) - base) / 4
    per_trained_block = (temporary_bytes(6, 5.0) - base) / 4
    assert per_frozen_block < 0.1 * per_trained_block


def test_head_reads_the_mean_patch_token_or_the_class_token():
    tokens = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    np.testing.assert_allclose(pool_tokens(tokens, "mean"), tokens[:, 1:].mean(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(pool_tokens(tokens, "cls"), tokens[:, 0])


def test_a_run_is_the_same_again_and_another_seed_is_not(supervised_config):
    config = supervised_config("finetune", **PLAIN)
    first, _ = run_steps(config, steps=2)
    again, _ = run_steps(config, steps=2)
    config.seed = 1
    other, _ = run_steps(config, steps=2)
    assert first == again
    assert first != other


def test_from_scratch_starts_where_fine_tuning_of_random_weights_starts(supervised_config):
    scratch = run_steps(supervised_config("scratch", **PLAIN), steps=2)
    tuned = run_steps(supervised_config("finetune", **PLAIN), steps=2)
    np.testing.assert_array_equal(scratch[0], tuned[0])


def test_averaged_weights_follow_the_trained_ones(supervised_config):
    decay = 0.75
    config = supervised_config("finetune", optim__ema=decay, **PLAIN)
    average = None
    for steps in range(3):
        _, state = run_steps(config, steps=steps) if steps else (None, make(config)[2])
        kernel = np.asarray(state.params["head"]["kernel"], np.float64)
        average = kernel if average is None else decay * average + (1 - decay) * kernel
    np.testing.assert_allclose(state.ema["head"]["kernel"], average, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(state.weights["head"]["kernel"], state.ema["head"]["kernel"])


def test_evaluation_sums_equal_numpy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(64, 12)).astype(np.float32)
    labels = rng.integers(0, 12, 64).astype(np.int32)
    weight = (rng.random(64) < 0.7).astype(np.float32)
    sums = classification_sums(logits, labels, weight)

    wide = logits.astype(np.float64)
    log_probability = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    losses = -log_probability[np.arange(64), labels]
    order = np.argsort(-wide, axis=1)
    top1 = order[:, 0] == labels
    top5 = (order[:, :5] == labels[:, None]).any(axis=1)
    np.testing.assert_allclose(sums["loss"], (losses * weight).sum(), rtol=1e-6)
    assert sums["top1"] == (top1 * weight).sum()
    assert sums["top5"] == (top5 * weight).sum()
    assert sums["weight"] == weight.sum()


def test_a_constant_or_broken_classifier_scores_no_better_than_it_should():
    """Ties go to the first class, and NaN is never a hit: a dead model must not look perfect."""
    labels = np.arange(10, dtype=np.int32)
    ones = np.ones(10, np.float32)
    tied = classification_sums(np.zeros((10, 10), np.float32), labels, ones)
    assert (tied["top1"], tied["top5"]) == (1, 5)
    broken = classification_sums(np.full((10, 10), np.nan, np.float32), labels, ones)
    assert (broken["top1"], broken["top5"]) == (0, 0)


def test_fewer_than_five_classes_are_all_in_the_top_five():
    sums = classification_sums(np.eye(3, dtype=np.float32), np.array([1, 2, 0]), np.ones(3))
    assert (sums["top1"], sums["top5"]) == (0, 3)


def test_class_count_of_the_config_must_be_the_data_sets(supervised_config):
    config = supervised_config("finetune", head__classes=1000)
    with pytest.raises(UserError, match=r"head\.classes = 1000, but demo has"):
        make(config)


def test_flops_of_a_partial_step_lie_between_head_and_all(supervised_config):
    def flops(blocks):
        config = supervised_config("finetune", trainable_blocks=blocks, model__depth=4)
        return make(config)[0].train_flops_per_image

    assert flops(0.0) < flops(0.5) < flops(1.0) < flops(2.0) < flops(-1.0)
