import jax
import jax.numpy as jnp
import numpy as np
import optax

from mae_jax.train.state import apply_gradients, create_state, gradients


def loss_fn(params, batch):
    error = batch["x"] @ params["w"] - batch["y"]
    return jnp.square(error).mean(), {"bias": error.mean()}


def test_accumulated_gradients_and_metrics_equal_those_of_the_whole_batch():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3,)), jnp.float32)}
    batch = {
        "x": jnp.asarray(rng.normal(size=(12, 3)), jnp.float32),
        "y": jnp.asarray(rng.normal(size=(12,)), jnp.float32),
    }
    whole_grads, whole_metrics = gradients(loss_fn, params, batch, 1)
    for parts in (2, 4):
        grads, metrics = jax.jit(lambda p, b, n=parts: gradients(loss_fn, p, b, n))(params, batch)
        np.testing.assert_allclose(grads["w"], whole_grads["w"], rtol=1e-5)
        for name, value in whole_metrics.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5)


def test_micro_batches_may_carry_random_keys():
    def noisy(params, batch):
        noise = jax.vmap(jax.random.normal)(batch["key"])
        return (params["w"] * noise).mean(), {}

    batch = {"key": jax.random.split(jax.random.key(0), 8)}
    params = {"w": jnp.ones(())}
    whole, _ = gradients(noisy, params, batch, 1)
    parts, _ = gradients(noisy, params, batch, 4)
    np.testing.assert_allclose(whole["w"], parts["w"], rtol=1e-5)


def test_moving_average_follows_the_parameters():
    optimizer = optax.sgd(1.0)
    state = create_state({"w": jnp.asarray([4.0])}, optimizer, keep_ema=True)
    average = 4.0
    for step in range(3):
        state = apply_gradients(state, {"w": jnp.asarray([1.0])}, optimizer, 0.9)
        average = 0.9 * average + 0.1 * (4.0 - (step + 1))
    np.testing.assert_allclose(state.params["w"], [1.0])
    np.testing.assert_allclose(state.ema["w"], [average], rtol=1e-6)
    assert state.best_params is state.ema
    assert int(state.step) == 3


def test_without_an_average_the_parameters_are_the_best():
    state = create_state({"w": jnp.zeros(1)}, optax.sgd(1.0), keep_ema=False)
    assert state.ema is None
    assert state.best_params is state.params
