"""Stochastic depth drops at timm's rates and scales as timm's layer does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_models import import_timm

from mae_jax.augment.pixels import example_keys
from mae_jax.models.vit import drop_path_scale

torch = pytest.importorskip("torch", reason="parity is measured against PyTorch")
timm = import_timm()
timm_layers = pytest.importorskip("timm.layers")


@pytest.mark.parametrize(("depth", "rate"), [(12, 0.1), (24, 0.2), (32, 0.3), (1, 0.1)])
def test_rates_and_scales_of_every_block_are_timms(depth, rate):
    count = 2000
    keys = example_keys(jax.random.key(0), 0, jnp.arange(count))
    scale = np.asarray(drop_path_scale(keys, depth, rate))  # [depth, 2, count]
    torch.manual_seed(0)
    rates = timm_layers.calculate_drop_path_rates(rate, depth)
    for block, their_rate in zip(scale, rates, strict=True):
        layer = timm_layers.DropPath(their_rate).train()
        theirs = layer(torch.ones(2 * count, 1, 1)).numpy()
        np.testing.assert_allclose(np.unique(block), np.unique(theirs), rtol=1e-6)
        # Kept branches are scaled by 1 / (1 - rate), which tells the rate exactly.
        assert 1 - 1 / block.max() == pytest.approx(their_rate, abs=1e-6)
        error = np.sqrt(their_rate * (1 - their_rate) / (2 * count))
        assert (block == 0).mean() == pytest.approx(their_rate, abs=4.5 * error)
