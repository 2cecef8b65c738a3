"""Stochastic depth: which branches are dropped, and what a block makes of it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.augment.pixels import example_keys
from mae_jax.models.classifier import Classifier
from mae_jax.models.vit import LAYER_NORM_EPS, Block, Blocks, ViT, drop_path_scale

DEPTH, RATE, COUNT = 5, 0.4, 20_000
RATES = np.linspace(0, RATE, DEPTH)  # 0, 0.1, 0.2, 0.3, 0.4


def keys(count, step=0):
    return example_keys(jax.random.key(3), step, jnp.arange(count))


@pytest.fixture(scope="module")
def scale():
    """[DEPTH, 2, COUNT]."""
    return np.asarray(drop_path_scale(keys(COUNT), DEPTH, RATE))


def within(share, expected, standard_deviation, count):
    """Whether means of `count` values are within 4.5 standard errors of what is expected."""
    return (np.abs(share - expected) <= 4.5 * standard_deviation / np.sqrt(count)).all()


def test_branches_are_dropped_or_scaled_up_by_what_is_kept(scale):
    assert scale.shape == (DEPTH, 2, COUNT)
    assert scale.dtype == np.float32
    for block, rate in zip(scale, RATES, strict=True):
        values = np.unique(block)
        expected = [0, 1 / (1 - rate)] if rate else [1]
        np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_rates_rise_evenly_from_zero_to_the_given_one(scale):
    dropped = (scale == 0).mean(2)  # [DEPTH, 2]
    rates = RATES[:, None]
    assert within(dropped, rates, np.sqrt(rates * (1 - rates)), COUNT)


def test_branches_keep_their_mean(scale):
    rates = RATES[:, None]
    assert within(scale.mean(2), 1, np.sqrt(rates / (1 - rates)), COUNT)


def test_all_branches_are_drawn_independently(scale):
    dropped = (scale[1:] == 0).reshape(-1, COUNT)  # [(DEPTH - 1) * 2, COUNT]
    correlation = np.corrcoef(dropped)
    off_diagonal = correlation[~np.eye(len(correlation), dtype=bool)]
    assert within(off_diagonal, 0, 1, COUNT)
    between_examples = np.corrcoef(dropped[:, :-1].ravel(), dropped[:, 1:].ravel())[0, 1]
    # Rows differ in their rates, so pairs within a row correlate by as much as the rates vary.
    rates = np.repeat(RATES[1:], 2)
    expected = rates.var() / (rates.mean() * (1 - rates.mean()))
    assert within(between_examples, expected, 1, dropped.size)


def test_an_example_is_dropped_as_its_key_says_whatever_the_batch(scale):
    order = np.array([4, 0, 17, 2])
    again = drop_path_scale(keys(COUNT)[order], DEPTH, RATE)
    np.testing.assert_array_equal(again, scale[:, :, order])
    other_step = drop_path_scale(keys(COUNT, step=1), DEPTH, RATE)
    assert (np.asarray(other_step) != scale).any()


@pytest.mark.parametrize(("depth", "rate"), [(4, 0.0), (1, 0.5)])
def test_nothing_is_dropped_at_rate_zero_nor_in_a_single_block(depth, rate):
    # A single block is the first one, and the first one's rate is 0.
    np.testing.assert_array_equal(drop_path_scale(keys(100), depth, rate), np.ones((depth, 2, 100)))


# A block, and stacks of blocks.

HEADS, WIDTH = 2, 8
X = np.random.default_rng(0).standard_normal((4, 5, WIDTH), np.float32)
# Per example: both branches kept, one of them, none.
PATHS = np.array([[2.0, 0.0, 1.25, 0.0], [1.25, 1.25, 0.0, 0.0]], np.float32)


def random_params(module, seed=0):
    """Every parameter random, biases and norms included, so that each of them counts."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: rng.standard_normal(p.shape, np.float32) / 2, shapes)


def layer_norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + LAYER_NORM_EPS) * p["scale"] + p["bias"]


def linear(x, p):
    return x @ p["kernel"] + p["bias"]


def attention_branch(x, p):
    b, n, d = x.shape
    qkv = linear(layer_norm(x, p["norm1"]), p["attn"]["qkv"])
    q, k, v = qkv.reshape(b, n, 3, HEADS, d // HEADS).transpose(2, 0, 3, 1, 4)  # [B, h, N, d]
    weights = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(d // HEADS))
    weights /= weights.sum(-1, keepdims=True)
    return linear((weights @ v).swapaxes(1, 2).reshape(b, n, d), p["attn"]["proj"])


def mlp_branch(x, p):
    x = linear(layer_norm(x, p["norm2"]), p["mlp"]["fc1"])
    x = x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2
    return linear(x, p["mlp"]["fc2"])


def test_a_block_multiplies_what_its_branches_add():
    block = Block(HEADS, jnp.float32)
    params = random_params(block)
    got = block.apply({"params": params}, X, PATHS)

    exact = jax.tree.map(lambda p: p.astype(np.float64), params)
    x = X + PATHS[0][:, None, None] * attention_branch(X.astype(np.float64), exact)
    x = x + PATHS[1][:, None, None] * mlp_branch(x, exact)
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got[3], X[3])  # both branches dropped


def test_without_scales_every_branch_is_kept_as_it_is():
    block = Block(HEADS, jnp.float32)
    variables = {"params": random_params(block)}
    kept = block.apply(variables, X)
    np.testing.assert_array_equal(block.apply(variables, X, np.ones_like(PATHS)), kept)
    assert np.abs(block.apply(variables, X, PATHS) - kept).max() > 0.1


def test_scales_of_bfloat16_blocks_do_not_widen_them():
    block = Block(HEADS, jnp.bfloat16)
    variables = {"params": random_params(block)}
    out = jax.eval_shape(block.apply, variables, X.astype(jnp.bfloat16), PATHS)
    assert out.dtype == jnp.bfloat16


STACK_PATHS = np.stack([PATHS, PATHS[::-1], PATHS[:, ::-1]])  # [3, 2, 4]


def value_and_gradients(run, params):
    # Compiling takes nearly all the time of this; LLVM's optimisations are not what is tested.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def compute(params):
        return jax.value_and_grad(lambda params: jnp.sin(run(params)).sum())(params)

    return compute(params)


@pytest.fixture(scope="module")
def stack():
    """Parameters of three blocks, and value and gradients of running one after the other."""
    params = random_params(Blocks(3, HEADS, jnp.float32))

    def one_by_one(params):
        x = X
        for i in range(3):
            x = Block(HEADS, jnp.float32).apply({"params": params[str(i)]}, x, STACK_PATHS[i])
        return x

    return params, *value_and_gradients(one_by_one, params)


@pytest.mark.parametrize(
    ("stacking", "remat"), [("unrolled", "none"), ("scan", "none"), ("scan", "full")]
)
def test_each_block_of_a_stack_gets_its_own_scales(stack, stacking, remat):
    params, expected, expected_grads = stack
    blocks = Blocks(3, HEADS, jnp.float32, stacking, remat)
    got, grads = value_and_gradients(
        lambda params: blocks.apply({"params": params}, X, STACK_PATHS), params
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, expected_grads
    )


@pytest.mark.parametrize("stacking", ["unrolled", "scan"])
def test_frozen_blocks_drop_nothing_and_the_others_keep_their_own_scales(stack, stacking):
    params = stack[0]
    kept, dropped = np.ones_like(PATHS), np.zeros_like(PATHS)
    partly = Blocks(3, HEADS, jnp.float32, stacking, frozen=2)
    whole = Blocks(3, HEADS, jnp.float32)
    np.testing.assert_allclose(
        partly.apply({"params": params}, X, np.stack([dropped, dropped, PATHS])),
        whole.apply({"params": params}, X, np.stack([kept, kept, PATHS])),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_classifier_without_scales_drops_nothing():
    encoder = ViT((8, 8), 4, 1, 8, 2, 2, position_params=True, final_norm=False)
    model = Classifier(encoder, 3, "mean", head_std=1.0)
    images = np.random.default_rng(0).standard_normal((4, 8, 8, 1), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda p: rng.standard_normal(p.shape, np.float32) / 2, shapes)
    logits = model.apply(variables, images)
    np.testing.assert_array_equal(model.apply(variables, images, np.ones((2, 2, 4))), logits)
    dropped = model.apply(variables, images, np.stack([np.ones_like(PATHS), PATHS]))
    # The first image of the batch keeps its branches at other weights, so none stays as it was.
    assert (np.abs(dropped - logits).max(1) > 1e-3).all()
