import jax.numpy as jnp
import numpy as np
import optax

from mae_jax.train.state import apply_gradients, create_state


def test_moving_average_follows_the_parameters():
    optimizer = optax.sgd(1.0)
    state = create_state({"w": jnp.asarray([4.0])}, optimizer, keep_ema=True)
    average = 4.0
    for step in range(3):
        state = apply_gradients(state, {"w": jnp.asarray([1.0])}, optimizer, 0.9)
        average = 0.9 * average + 0.1 * (4.0 - (step + 1))
    np.testing.assert_allclose(state.params["w"], [1.0])
    np.testing.assert_allclose(state.ema["w"], [average], rtol=1e-6)
    assert state.weights is state.ema
    assert int(state.step) == 3


def test_without_an_average_the_parameters_are_the_best():
    state = create_state({"w": jnp.zeros(1)}, optax.sgd(1.0), keep_ema=False)
    assert state.ema is None
    assert state.weights is state.params
