"""Batch norm, pyramid and heads on their own; parity with others' code is in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mae_jax.distributed.mesh import BATCH_AXES, make_mesh
from mae_jax.models.upernet import (
    BatchNorm,
    Classify,
    ConvNorm,
    How,
    Pyramid,
    Up,
    UPerHead,
    bilinear_matrix,
    pooling_matrix,
)

EVALUATION = How(jnp.float32, False, (), 0.1)
TRAINING = EVALUATION._replace(training=True)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_bilinear_interpolation_by_hand():
    np.testing.assert_allclose(bilinear_matrix(2, 4) @ [0, 4], [0, 1, 3, 4])
    np.testing.assert_allclose(bilinear_matrix(4, 2) @ [0, 1, 2, 3], [0.5, 2.5])
    np.testing.assert_allclose(bilinear_matrix(6, 2) @ np.arange(6.0), [1, 4])  # no antialiasing
    np.testing.assert_allclose(bilinear_matrix(1, 3), 1)


def test_spans_of_pooling_overlap_where_they_do_not_divide_the_size():
    spans = [list(np.flatnonzero(row)) for row in pooling_matrix(16, 3)]
    assert spans == [list(range(6)), list(range(5, 11)), list(range(10, 16))]
    np.testing.assert_allclose(pooling_matrix(5, 6).sum(axis=1), 1, rtol=1e-6)


def test_batch_norm_in_training_normalises_and_tells_the_statistics():
    x = 3 + 2 * random(4, 5, 6, 3)
    norm = BatchNorm(TRAINING)
    params = {"scale": np.float32([1, 2, 3]), "bias": np.float32([0, 1, 2])}
    y, new = norm.apply({"params": params}, x, mutable=["batch"])
    y = (np.asarray(y) - params["bias"]) / params["scale"]
    np.testing.assert_allclose(y.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.var(axis=(0, 1, 2)), 1, atol=1e-4)
    np.testing.assert_allclose(new["batch"]["mean"], x.mean(axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(new["batch"]["var"], x.var(axis=(0, 1, 2), ddof=1), rtol=1e-5)


def test_batch_norm_in_evaluation_uses_the_running_statistics():
    x, mean, var = random(2, 3, 3, 4), random(4, seed=1), np.float32([1, 2, 3, 4])
    norm = BatchNorm(EVALUATION)
    variables = norm.init(jax.random.key(0), x)
    assert variables.keys() == {"params", "statistics"}
    variables["statistics"] = {"mean": mean, "var": var}
    expected = (x - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(norm.apply(variables, x), expected, rtol=1e-5, atol=1e-6)


def test_the_variance_of_far_away_values_is_not_lost():
    x = 1000 + 0.01 * random(4, 8, 8, 2)  # mean of squares less square of mean would be rounding
    params = {"scale": np.ones(2, np.float32), "bias": np.zeros(2, np.float32)}
    _, new = BatchNorm(TRAINING).apply({"params": params}, x, mutable=["batch"])
    np.testing.assert_allclose(new["batch"]["var"], x.var(axis=(0, 1, 2), ddof=1), rtol=1e-2)


def test_one_value_has_finite_statistics_and_gradients():
    """Pooling to 1 x 1 of one image."""
    conv = ConvNorm(3, 1, TRAINING)
    x = random(1, 1, 1, 4)
    params = conv.init(jax.random.key(0), x)["params"]
    run = lambda params: conv.apply({"params": params}, x, mutable=["batch"])  # noqa: E731
    _, new = run(params)
    grads = jax.grad(lambda params: run(params)[0].sum())(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((new, grads)))


@pytest.mark.parametrize("devices", [2, 8])
def test_batch_norm_is_over_the_batch_of_all_devices(devices):
    x, weights = random(8, 2, 3, 4), random(8, 2, 3, 4, seed=1)
    params = {"scale": random(4, seed=2), "bias": random(4, seed=3)}
    mesh = make_mesh(devices=jax.devices()[:devices])

    def loss(how, params, x, weights):
        y, new = BatchNorm(how).apply({"params": params}, x, mutable=["batch"])
        return (y * weights).sum(), new["batch"]

    def on_one_device(params, x, weights):
        run = lambda *a: loss(TRAINING._replace(axis_names=BATCH_AXES), *a, weights)  # noqa: E731
        (_, new), (of_params, of_x) = jax.value_and_grad(run, (0, 1), has_aux=True)(params, x)
        return jax.lax.psum(of_params, BATCH_AXES), of_x, new

    rows = P(BATCH_AXES)
    got = jax.jit(
        jax.shard_map(
            on_one_device,
            mesh=mesh,
            in_specs=(P(), rows, rows),
            out_specs=(P(), rows, P()),
            check_vma=False,
        )
    )(params, x, weights)
    run = lambda *a: loss(TRAINING, *a, weights)  # noqa: E731
    (_, new), grads = jax.value_and_grad(run, (0, 1), has_aux=True)(params, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, (*grads, new)
    )


def test_a_transposed_convolution_puts_four_pixels_in_the_place_of_one():
    x = random(1, 2, 3, 4)
    up = Up(jnp.float32)
    params = up.init(jax.random.key(0), x)["params"]
    y = up.apply({"params": params}, x)  # [1, 4, 6, 4]
    for row, column in np.ndindex(4, 6):
        expected = x[0, row // 2, column // 2] @ params["kernel"][row % 2, column % 2]
        np.testing.assert_allclose(y[0, row, column], expected + params["bias"], rtol=1e-4)


@pytest.mark.parametrize(("h", "w"), [(4, 4), (3, 3), (2, 5), (15, 20)])
def test_maps_of_any_grid(h, w):
    maps = [random(1, h, w, 4, seed=i) for i in range(4)]
    pyramid = Pyramid(EVALUATION)
    outputs = pyramid.apply(pyramid.init(jax.random.key(0), maps), maps)
    sizes = [(4 * h, 4 * w), (2 * h, 2 * w), (h, w), (h // 2, w // 2)]
    assert [x.shape for x in outputs] == [(1, *size, 4) for size in sizes]
    head = UPerHead(3, 6, EVALUATION)
    logits = head.apply(head.init(jax.random.key(0), outputs, None), outputs, None)
    assert logits.shape == (1, 4 * h, 4 * w, 3)
    assert np.isfinite(logits).all()


def test_dropout_takes_whole_channels_of_each_example_by_its_key():
    x = np.ones((2, 3, 3, 400), np.float32)
    classify = Classify(1, TRAINING._replace(dropout=0.25))
    params = {"kernel": np.ones((400, 1), np.float32), "bias": np.zeros(1, np.float32)}
    keys = jax.random.split(jax.random.key(0), 2)
    run = lambda keys: np.asarray(classify.apply({"params": params}, x, keys))  # noqa: E731
    logits = run(keys)
    np.testing.assert_allclose(logits, np.broadcast_to(logits[:, :1, :1], logits.shape))
    np.testing.assert_allclose(logits[:, 0, 0, 0], 400, rtol=0.1)  # scaled up by what is left
    assert len({*logits[:, 0, 0, 0], 400.0}) == 3
    np.testing.assert_array_equal(run(keys[::-1]), logits[::-1])
    np.testing.assert_allclose(run(None), 400, rtol=1e-6)


def test_initial_weights_are_those_of_mmsegmentation():
    maps = [random(1, *size, 32) for size in ((8, 8), (4, 4), (2, 2), (1, 1))]
    params = UPerHead(50, 64, EVALUATION).init(jax.random.key(0), maps, None)["params"]
    for name, features, size in (("fuse", 64, 3), ("lateral0", 64, 1), ("context", 64, 3)):
        deviation = np.sqrt(2 / (features * size**2))  # Kaiming's, of the outputs
        np.testing.assert_allclose(np.std(params[name]["kernel"]), deviation, rtol=0.05)
    np.testing.assert_allclose(np.std(params["classifier"]["kernel"]), 0.01, rtol=0.05)
    kernel = Up(jnp.float32).init(jax.random.key(0), maps[0])["params"]["kernel"]
    assert np.abs(kernel).max() <= 1 / np.sqrt(4 * 32)
    np.testing.assert_allclose(np.std(kernel), 1 / np.sqrt(3 * 4 * 32), rtol=0.05)
