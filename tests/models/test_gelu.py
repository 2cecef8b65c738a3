import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.gelu import gelu

X = np.concatenate([np.linspace(-9, 9, 4001), [-40, -1e-6, 0, 1e-6, 40]])


@pytest.mark.parametrize(("dtype", "error"), [("float32", 3e-7), ("bfloat16", 2**-8)])
def test_value_and_slope_are_those_of_the_formula_up_to_rounding(dtype, error):
    x = jnp.asarray(X, dtype)
    at = np.asarray(x, np.float64)  # what rounding left of X is what the function sees
    share = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in at])
    slope = share + at * np.exp(-0.5 * at**2) / math.sqrt(2 * math.pi)
    value, back = jax.vjp(gelu, x)
    (found,) = back(jnp.ones_like(x))
    assert value.dtype == found.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(value, float), at * share, rtol=error, atol=4 * 3e-7)
    np.testing.assert_allclose(np.asarray(found, float), slope, rtol=error, atol=3e-7)


def test_nothing_but_the_slope_is_kept_for_the_gradient():
    x = jnp.asarray(X, jnp.float32)
    kept = jax.tree.leaves(jax.vjp(gelu, x)[1])
    assert [k.shape for k in kept] == [x.shape]
